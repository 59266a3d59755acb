"""VLT: Vision-Language Transformer and Query Generation (Ding et al., ICCV 2021).

This is our re-implementation for this framework. N_q views of the image weight the words, which
makes N_q queries. The queries go through a transformer over the pixels; each response gets a
confidence, and the responses, matched with the pixels, become the mask. We wrote this from the
paper's description; its code was not used.

What differs on purpose:

- The framework's text encoder reads the sentence (the paper: a bi-GRU over GloVe).
- GroupNorm and LayerNorm replace BatchNorm, so that no split of a batch changes a number.

What we are not sure of:

- whether the sentence is multiplied into all three stages or the coarsest alone (here: all);
- what s is (here: the mean of the words);
- the activations of the query generation (tanh) and the scale of its scores (1/sqrt(d));
- dropout (none), and the transformer's feed-forward width;
- how the balanced responses become a map (here: their products with the encoder's pixels, decoded
  together with these pixels);
- the number of channels and the stride of the decoder's output (here: 4).

Shape legend: B batch, P pixels at stride 16 (h*w), T words, D text width, d transformer width,
N queries, S input side.
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
    average_words,
    enlarge_logits,
)
from coupalign.model.decoder import SmoothingConv
from coupalign.model.losses import mask_losses
from coupalign.model.proposals import (
    MultiHeadAttention,
    QueryLayer,
    feed_forward,
    sine_positions,
)
from coupalign.model.text import MASKED_SCORE


class Vlt(ReferringModel):
    """Queries made from the sentence for this very image read its pixels in a transformer."""

    def __init__(self, config: VltConfig, vocabulary: int, image_size: int):
        super().__init__(config, vocabulary, image_size)
        sizes, width = config.transformer, config.transformer.width
        if width % sizes.heads or width % 4:
            raise InputError(
                f"model.transformer.width = {width} must be a multiple of 4 "
                f"and of model.transformer.heads = {sizes.heads}"
            )

        pixels = (image_size // STRIDE) ** 2
        self.fusion = SentenceFusion(
            self.image.channels[1:], self.text.width, width, act=torch.tanh
        )
        self.generation = QueryGeneration(self.text.width, width, sizes.count, pixels=pixels)
        self.encoder = nn.ModuleList(
            PixelLayer(width, sizes.heads, sizes.ffn, dropout=sizes.dropout)
            for _ in range(sizes.encoder_layers)
        )
        self.decoder = nn.ModuleList(
            QueryLayer(width, sizes.heads, sizes.ffn, dropout=sizes.dropout)
            for _ in range(sizes.decoder_layers)
        )
        self.balance = QueryBalance(width)
        self.mask = MaskDecoder(width + sizes.count, width)

    def forward(
        self, image: Tensor, words: Tensor, word_mask: Tensor, target: Tensor | None = None
    ) -> Tensor | dict[str, Tensor]:
        """Segment what each sentence refers to, see `ReferringModel`."""
        # Multiply the sentence into the stages at strides 8 to 32.
        words = self.encode_text(words, word_mask)  # L [B, T, D]
        stages = self.encode_image(image)[1:]  # 3 x [B, H, W, C]
        fused = self.fusion(stages, average_words(words, word_mask))  # F [B, d, h, w]
        _, width, *sides = fused.shape

        # Generate the queries, and run the transformer.
        queries = self.generation(fused, words, word_mask)  # [B, N, d]
        where = sine_positions(*sides, channels=width, device=fused.device)  # [P, d]
        memory = fused.flatten(2).transpose(1, 2)  # [B, P, d]
        for layer in self.encoder:
            memory = layer(memory, where)  # [B, P, d]
        responses = queries
        for layer in self.decoder:
            responses = layer(responses, queries, memory, where)  # [B, N, d]

        # Match the balanced responses with the pixels.
        balanced = self.balance(queries, responses).to(memory.dtype)  # [B, N, d]
        matched = memory @ balanced.transpose(1, 2) / width**0.5  # [B, P, N]

        # Decode pixels and matches to a mask.
        features = torch.cat([memory, matched], dim=2)  # [B, P, d + N]
        features = features.transpose(1, 2).unflatten(2, sides)  # [B, d + N, h, w]
        logits = enlarge_logits(self.mask(features), self.image_size)  # [B, S, S]

        if target is None:
            return logits
        return mask_losses(logits, target, self.config.losses)


class QueryGeneration(nn.Module):
    """Query n is the words, weighted as view n of the image asks for.

        g = conv(F), N maps
        a_n = softmax_words(d^-1/2 tanh(g_n Wg) tanh(L Wa)^T)
        q_n = a_n tanh(L Wq)

    As in the paper, Wg reads a map pixel by pixel, so its size depends on the input's.

    Args:
        word_width: D.
        width: d.
        count: N.
        pixels: P.
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
        self.ask = nn.Linear(pixels, width)  # Wg
        self.answer = nn.Linear(word_width, width)  # Wa
        self.carry = nn.Linear(word_width, width)  # Wq

    def forward(self, fused: Tensor, words: Tensor, word_mask: Tensor) -> Tensor:
        """F [B, d, h, w], L [B, T, D], mask [B, T] -> queries [B, N, d]."""
        width = fused.shape[1]

        # Each view of the image scores the words.
        views = self.views(fused).flatten(2)  # g [B, N, P]
        asked = torch.tanh(self.ask(views))  # [B, N, d]
        answers = torch.tanh(self.answer(words))  # [B, T, d]
        scores = asked @ answers.transpose(1, 2) / width**0.5  # [B, N, T]
        scores = scores.masked_fill(~word_mask[:, None], MASKED_SCORE)
        weights = scores.softmax(2)  # a [B, N, T]

        # Each query is a weighted mean of the words.
        carried = torch.tanh(self.carry(words))  # [B, T, d]
        return weights.to(carried.dtype) @ carried


class PixelLayer(nn.Module):
    """A transformer encoder layer: self-attention of the pixels, feed-forward, each post-norm."""

    def __init__(self, width: int, heads: int, ffn: int, dropout: float):
        super().__init__()
        self.among_pixels = MultiHeadAttention(width, heads)
        self.ffn = feed_forward(width, ffn, dropout)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.dropout = nn.Dropout(dropout)

    def forward(self, pixels: Tensor, where: Tensor) -> Tensor:
        """pixels [B, P, d], their positions [P, d] -> [B, P, d]."""
        placed = pixels + where
        read = self.among_pixels(placed, placed, pixels)
        pixels = self.norms[0](pixels + self.dropout(read))
        return self.norms[1](pixels + self.dropout(self.ffn(pixels)))


class QueryBalance(nn.Module):
    """Weight each response by a confidence: r_n <- c_n r_n, with c_n = sigmoid(MLP([q_n, r_n]))."""

    def __init__(self, width: int):
        super().__init__()
        self.confidence = nn.Sequential(
            nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, 1), nn.Sigmoid()
        )

    def forward(self, queries: Tensor, responses: Tensor) -> Tensor:
        """Queries and responses [B, N, d] -> balanced responses [B, N, d]."""
        return self.confidence(torch.cat([queries, responses], dim=2)) * responses
