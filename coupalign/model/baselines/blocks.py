"""Blocks that VLT and LTS share: fusion by multiplication, and a decoder from stride 16.

Shape legend: B batch, T words, C stage channels, D text width, d width of the method, h w sides at
stride 16, S input side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coupalign.model.decoder import MaskHead, SmoothingConv

STRIDE = 16  # of the map on which both methods work


class SentenceFusion(nn.Module):
    """Multiply the sentence into the stages at strides 8, 16 and 32, and merge them at stride 16.

    F_i = act(LN(W_i V_i)) * act(LN(U_i s))        F = conv3x3(W [pool(F_8), F_16, up(F_32)])

    Args:
        channels: C of the three stages, finest first.
        word_width: D.
        width: d.
        act: the activation.
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
        """Fuse a sentence with three maps.

        Args:
            stages: [B, H, W, C] each, finest first.
            sentence: s [B, D].

        Returns:
            F [B, d, h, w], after a ReLU.
        """
        # Multiply the sentence into every pixel of each stage.
        products = []
        for project_pixels, project_sentence, stage in zip(self.pixels, self.sentences, stages):
            pixels = self.act(project_pixels(stage))  # [B, H, W, d]
            filters = self.act(project_sentence(sentence))  # [B, d]
            products.append((pixels * filters[:, None, None]).permute(0, 3, 1, 2))

        # Bring all stages to stride 16 and merge them.
        fine, middle, coarse = products
        levels = [
            F.avg_pool2d(fine, 2),
            middle,
            F.interpolate(coarse, size=middle.shape[2:], mode="bilinear", align_corners=False),
        ]
        return torch.relu(self.smooth(self.mix(torch.cat(levels, dim=1))))


class MaskDecoder(nn.Sequential):
    """Decode a stride-16 map to one logit per stride-4 pixel.

    Three 3x3 convolutions with GroupNorm, upsampled by two after the first and the second, then a
    1x1 convolution. [B, inputs, S/16, S/16] -> [B, 1, S/4, S/4].
    """

    def __init__(self, inputs: int, width: int):
        upsample = [nn.ReLU(), nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)]
        super().__init__(
            SmoothingConv(inputs, width),
            *upsample,
            SmoothingConv(width, width),
            *upsample,
            MaskHead(width),
        )


def average_words(words: Tensor, word_mask: Tensor) -> Tensor:
    """Represent the sentence by the mean of its words.

    [B, T, D], zero where padded, and bool [B, T] -> [B, D].
    """
    return words.sum(1) / word_mask.sum(1, keepdim=True).clamp(min=1)


def enlarge_logits(logits: Tensor, side: int) -> Tensor:
    """Enlarge bilinearly: [B, 1, S/4, S/4] -> float32 [B, S, S]."""
    logits = F.interpolate(logits.float(), size=(side, side), mode="bilinear", align_corners=False)
    return logits[:, 0]
