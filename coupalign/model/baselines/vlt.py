"""VLT: Vision-Language Transformer and Query Generation (Ding et al., ICCV 2021), our re-implementation for this harness.

The words are weighted anew by N_q views of the image, which makes N_q queries. They go through a transformer over the pixels;
each response gets a confidence, and the responses, matched with the pixels, become the mask. Written from the paper's
description; its code was not used. What differs on purpose: the sentence is read by the harness's text encoder (the paper: a
bi-GRU over GloVe), and GroupNorm and LayerNorm stand for BatchNorm, so that no batch split changes a number.

What we are not sure of: whether the sentence is multiplied into all three stages or the coarsest alone (here: all); what s is
(here: the mean of the words); the activations of the query generation (tanh) and the scale of its scores (1/sqrt(d)); dropout
(none), and the transformer's feed-forward width; how the balanced responses become a map (here: their products with the
encoder's pixels, decoded beside these); the number of channels and the stride of the decoder's output (here 4).

Shape legend: B batch, P pixels at stride 16 (h*w), T words, D text width, d transformer width, N queries, S input side.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from coupalign.config.schema import VltConfig
from coupalign.errors import InputError
from coupalign.model.base import ReferringModel
from coupalign.model.baselines.blocks import (
    STRIDE,
    MaskDecoder,
    SentenceFusion,
    coarser_stages,
    enlarged,
    mean_of_words,
)
from coupalign.model.decoder import SmoothingConv
from coupalign.model.losses import mask_losses
from coupalign.model.proposals import Attention, QueryLayer, sine_positions

_MASKED = -1e4  # exp() of it is 0 in every type, and it stays finite in half precision


class Vlt(ReferringModel):
    """Queries made of the sentence for this very image ask a transformer over its pixels."""

    def __init__(self, config: VltConfig, vocabulary: int, image_size: int):
        super().__init__(config, vocabulary, image_size)
        sizes, width = config.transformer, config.transformer.width
        if width % sizes.heads or width % 4:
            raise InputError(
                f"model.transformer.width = {width} must be a multiple of 4 and of model.transformer.heads = {sizes.heads}"
            )
        self.fusion = SentenceFusion(self.image.channels[1:], self.text.width, width, torch.tanh)
        self.generation = QueryGeneration(
            self.text.width, width, sizes.count, (image_size // STRIDE) ** 2
        )
        self.encoder = nn.ModuleList(
            PixelLayer(width, sizes.heads, sizes.ffn, sizes.dropout)
            for _ in range(sizes.encoder_layers)
        )
        self.decoder = nn.ModuleList(
            QueryLayer(width, sizes.heads, sizes.ffn, sizes.dropout)
            for _ in range(sizes.decoder_layers)
        )
        self.balance = QueryBalance(width)
        self.mask = MaskDecoder(width + sizes.count, width)

    def forward(
        self, image: Tensor, words: Tensor, word_mask: Tensor, target: Tensor | None = None
    ) -> Tensor | dict[str, Tensor]:
        """As every `ReferringModel`."""
        words = self.read(words, word_mask)  # [B, T, D]
        fused = self.fusion(
            coarser_stages(self, image), mean_of_words(words, word_mask)
        )  # [B, d, h, w]
        queries = self.generation(fused, words, word_mask)  # [B, N, d]
        where = sine_positions(*fused.shape[2:], fused.shape[1], fused.device)  # [P, d]
        memory = fused.flatten(2).transpose(1, 2)  # [B, P, d]
        for layer in self.encoder:
            memory = layer(memory, where)
        responses = queries
        for layer in self.decoder:
            responses = layer(responses, queries, memory, where)
        balanced = self.balance(queries, responses)  # [B, N, d]
        matched = (
            memory @ balanced.to(memory.dtype).transpose(1, 2) / fused.shape[1] ** 0.5
        )  # [B, P, N]
        seen = torch.cat([memory, matched], dim=2).transpose(1, 2).unflatten(2, fused.shape[2:])
        logits = enlarged(self.mask(seen), self.image_size)
        return logits if target is None else mask_losses(logits, target, self.config.losses)


class QueryGeneration(nn.Module):
    """Query n is the words, weighted as view n of the image asks for.

        g = conv(F), N maps        a_n = softmax_words(d^-1/2 tanh(g_n Wg) tanh(L Wa)^T)        q_n = a_n tanh(L Wq)

    As in the paper, Wg reads a map pixel by pixel, so its size depends on the input's.
    """

    def __init__(self, word_width: int, width: int, count: int, pixels: int):
        super().__init__()
        self.views = nn.Sequential(
            SmoothingConv(width, width),
            nn.ReLU(),
            SmoothingConv(width, width),
            nn.ReLU(),
            nn.Conv2d(width, count, 1),
        )
        self.ask = nn.Linear(pixels, width)
        self.answer, self.carry = nn.Linear(word_width, width), nn.Linear(word_width, width)

    def forward(self, fused: Tensor, words: Tensor, word_mask: Tensor) -> Tensor:
        """F [B, d, h, w], L [B, T, D], mask [B, T] -> queries [B, N, d]."""
        asked = torch.tanh(self.ask(self.views(fused).flatten(2)))  # [B, N, d]
        scores = asked @ torch.tanh(self.answer(words)).transpose(1, 2) / fused.shape[1] ** 0.5
        weights = scores.masked_fill(~word_mask[:, None], _MASKED).softmax(2)  # [B, N, T]
        carried = torch.tanh(self.carry(words))
        return weights.to(carried.dtype) @ carried


class PixelLayer(nn.Module):
    """A transformer encoder's layer (post-norm): pixels read each other, then themselves."""

    def __init__(self, width: int, heads: int, ffn: int, dropout: float):
        super().__init__()
        self.among_pixels = Attention(width, heads)
        self.ffn = nn.Sequential(
            nn.Linear(width, ffn), nn.ReLU(), nn.Dropout(dropout), nn.Linear(ffn, width)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.dropout = nn.Dropout(dropout)

    def forward(self, pixels: Tensor, where: Tensor) -> Tensor:
        """pixels [B, P, d], their positions [P, d] -> [B, P, d]."""
        placed = pixels + where
        pixels = self.norms[0](pixels + self.dropout(self.among_pixels(placed, placed, pixels)))
        return self.norms[1](pixels + self.dropout(self.ffn(pixels)))


class QueryBalance(nn.Module):
    """r_n <- c_n r_n, with a confidence c_n = sigmoid(MLP([q_n, r_n])) in a query and its response."""

    def __init__(self, width: int):
        super().__init__()
        self.confidence = nn.Sequential(
            nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, 1), nn.Sigmoid()
        )

    def forward(self, queries: Tensor, responses: Tensor) -> Tensor:
        """Two of [B, N, d] -> [B, N, d]."""
        return self.confidence(torch.cat([queries, responses], dim=2)) * responses
