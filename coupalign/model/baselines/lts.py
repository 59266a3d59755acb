"""LTS: Locate then Segment (Jing et al., CVPR 2021), our re-implementation for this harness.

The sentence is multiplied into the image's features; what is relevant to it gives a heat map of where the object is, which is
held to the truth at stride 16; features and heat map together are segmented. Written from the paper's description; its code was
not published to our knowledge and was not used. What differs on purpose: the sentence is read by the harness's text encoder (the
paper: a bi-GRU over GloVe), and GroupNorm and LayerNorm stand for BatchNorm, so that no batch split changes a number.

What we are not sure of: whether the sentence is multiplied into all three stages or the coarsest alone (here: all); what s is
(here: the mean of the words); the form of the eight coordinate channels (here: sine and cosine of y and x in two wavelengths);
the relevance filter, which the paper also gives as a transformer; how the truth is brought to stride 16 (here: the share of the
object's pixels in a cell); the weight of that loss, the widths, the dilations, and the stride of the output (here 4).

Shape legend: B batch, T words, D text width, d width, h w sides at stride 16, S input side.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coupalign.config.schema import LtsConfig
from coupalign.model.backbone import group_norm
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
from coupalign.model.proposals import sine_positions

_COORDINATES = 8  # channels that say where a pixel is


class Lts(ReferringModel):
    """First where, then what: a heat map of the object, and a small segmentation network that is shown it."""

    def __init__(self, config: LtsConfig, vocabulary: int, image_size: int):
        super().__init__(config, vocabulary, image_size)
        width = config.segment.width
        self.fusion = SentenceFusion(self.image.channels[1:], self.text.width, width, torch.relu)
        self.locate = Localization(self.text.width, width)
        self.segment = Segmentation(width + _COORDINATES + 1, width, config.segment.dilations)

    def forward(
        self, image: Tensor, words: Tensor, word_mask: Tensor, target: Tensor | None = None
    ) -> Tensor | dict[str, Tensor]:
        """As every `ReferringModel`; the losses also have "locate", that of the heat map."""
        words = self.read(words, word_mask)  # [B, T, D]
        sentence = mean_of_words(words, word_mask)  # [B, D]
        fused = placed(self.fusion(coarser_stages(self, image), sentence))  # [B, d + 8, h, w]
        heat = self.locate(fused, sentence)  # [B, 1, h, w]
        logits = enlarged(self.segment(fused, heat), self.image_size)
        return logits if target is None else self._losses(logits, heat, target)

    def _losses(self, logits: Tensor, heat: Tensor, target: Tensor) -> dict[str, Tensor]:
        losses, locate = (
            mask_losses(logits, target, self.config.losses),
            location_loss(heat, target),
        )
        return {
            **losses,
            "loss": losses["loss"] + self.config.losses.locate * locate,
            "locate": locate.detach(),
        }


class Localization(nn.Module):
    """The sentence is a filter over the fused map: k = tanh(W s), r = sigmoid(d^-1/2 k . conv(F)), heat = conv(r F)."""

    def __init__(self, word_width: int, width: int):
        super().__init__()
        self.kernel = nn.Linear(word_width, width)
        self.key = SmoothingConv(width + _COORDINATES, width)
        self.filtered = SmoothingConv(width + _COORDINATES, width)
        self.heat = nn.Conv2d(width, 1, 1)

    def forward(self, fused: Tensor, sentence: Tensor) -> Tensor:
        """F [B, d + 8, h, w], s [B, D] -> logits of the heat map [B, 1, h, w]."""
        kernel = torch.tanh(self.kernel(sentence))  # [B, d]
        relevance = (self.key(fused) * kernel[..., None, None]).sum(1, keepdim=True) / kernel.shape[
            1
        ] ** 0.5
        return self.heat(torch.relu(self.filtered(fused * relevance.sigmoid())))


class Segmentation(nn.Module):
    """Fused map and heat map through 3x3 convolutions of several dilations side by side, then to a mask."""

    def __init__(self, inputs: int, width: int, dilations: tuple[int, ...]):
        super().__init__()
        self.views = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(inputs, width, 3, padding=d, dilation=d, bias=False),
                group_norm(width),
                nn.ReLU(),
            )
            for d in dilations
        )
        self.mask = MaskDecoder(len(dilations) * width, width)

    def forward(self, fused: Tensor, heat: Tensor) -> Tensor:
        """F [B, d + 8, h, w], heat map [B, 1, h, w] -> logits [B, 1, S/4, S/4]."""
        seen = torch.cat([fused, heat.sigmoid()], dim=1)
        return self.mask(torch.cat([view(seen) for view in self.views], dim=1))


def placed(pixels: Tensor) -> Tensor:
    """[B, d, h, w] -> [B, d + 8, h, w]: with where each pixel is."""
    batch, _, height, width = pixels.shape
    where = sine_positions(height, width, _COORDINATES, pixels.device).T.unflatten(
        1, (height, width)
    )
    return torch.cat([pixels, where.to(pixels.dtype).expand(batch, -1, -1, -1)], dim=1)


def location_loss(heat: Tensor, target: Tensor) -> Tensor:
    """Binary cross-entropy of the heat map's logits [B, 1, h, w] with the share of the object (bool [B, S, S]) in each cell."""
    with torch.autocast(heat.device.type, enabled=False):
        share = F.avg_pool2d(target.float()[:, None], STRIDE)
        return F.binary_cross_entropy_with_logits(heat.float(), share)
