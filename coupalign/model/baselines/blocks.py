"""What VLT and LTS have in common: how the sentence is multiplied into three stages, and how a stride-16 map becomes a mask.

Shape legend: B batch, T words, C stage channels, D text width, d width of the method, h w sides at stride 16, S input side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coupalign.model.base import STAGES, ReferringModel
from coupalign.model.decoder import MaskHead, SmoothingConv

STRIDE = 16  # of the map on which both methods work


class SentenceFusion(nn.Module):
    """The stages at strides 8, 16 and 32 meet the sentence by multiplication, and each other at stride 16.

    F_i = act(LN(W_i V_i)) * act(LN(U_i s))        F = conv3x3(W [pool(F_8), F_16, up(F_32)])
    """

    def __init__(
        self, channels: Sequence[int], word_width: int, width: int, act: Callable[[Tensor], Tensor]
    ):
        super().__init__()
        self.act = act
        self.pixels = nn.ModuleList(
            nn.Sequential(nn.Linear(c, width), nn.LayerNorm(width)) for c in channels
        )
        self.sentences = nn.ModuleList(
            nn.Sequential(nn.Linear(word_width, width), nn.LayerNorm(width)) for _ in channels
        )
        self.mix = nn.Conv2d(len(channels) * width, width, 1)
        self.smooth = SmoothingConv(width, width)

    def forward(self, stages: Sequence[Tensor], sentence: Tensor) -> Tensor:
        """Three maps [B, H, W, C], finest first, and s [B, D] -> rectified [B, d, h, w]."""
        met = [
            (self.act(see(stage)) * self.act(say(sentence))[:, None, None]).permute(0, 3, 1, 2)
            for see, say, stage in zip(self.pixels, self.sentences, stages)
        ]
        side = met[1].shape[2:]
        level = [
            F.avg_pool2d(met[0], 2),
            met[1],
            F.interpolate(met[2], size=side, mode="bilinear", align_corners=False),
        ]
        return torch.relu(self.smooth(self.mix(torch.cat(level, dim=1))))


class MaskDecoder(nn.Sequential):
    """Three 3x3 convolutions with GroupNorm, twice as fine after the first and the second, and a 1x1 to one logit:
    [B, inputs, S/16, S/16] -> [B, 1, S/4, S/4]."""

    def __init__(self, inputs: int, width: int):
        finer = [nn.ReLU(), nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)]
        super().__init__(
            SmoothingConv(inputs, width),
            *finer,
            SmoothingConv(width, width),
            *finer,
            MaskHead(width),
        )


def coarser_stages(model: ReferringModel, image: Tensor) -> list[Tensor]:
    """uint8 [B, 3, S, S] -> the image encoder's maps [B, H, W, C] at strides 8, 16 and 32."""
    pixels, maps = model.normalized(image), []
    for stage in range(STAGES):
        pixels = model.image(stage, pixels)
        maps.append(pixels)
    return maps[1:]


def mean_of_words(words: Tensor, word_mask: Tensor) -> Tensor:
    """The sentence as the mean of its words: [B, T, D], zero where padded, and bool [B, T] -> [B, D]."""
    return words.sum(1) / word_mask.sum(1, keepdim=True).clamp(min=1)


def enlarged(logits: Tensor, side: int) -> Tensor:
    """[B, 1, S/4, S/4] -> float32 [B, S, S], bilinearly."""
    return F.interpolate(logits.float(), size=(side, side), mode="bilinear", align_corners=False)[
        :, 0
    ]
