"""Pixel decoder: a top-down pyramid over the four aligned stages, and the head that predicts masks.

Shape legend: B batch, C stage channels, d decoder width, H W stage sides, S input side.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coupalign.model.backbone import group_norm


class PixelDecoder(nn.Module):
    """Feature pyramid: project each stage to d, add the coarser level, smooth with convolutions.

    One convolution per level (`depth=1`) keeps it at about a tenth of a Swin-B at d = 256.

    Args:
        channels: C of the four stages, finest first.
        width: d.
        depth: 3x3 convolutions per level.
    """

    def __init__(self, channels: Sequence[int], width: int, depth: int = 1):
        super().__init__()
        self.laterals = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(c), nn.Linear(c, width)) for c in channels
        )
        self.smooth = nn.ModuleList(_smoothing(width, depth) for _ in channels)

    def forward(self, stages: Sequence[Tensor]) -> Tensor:
        """Merge four maps into one pixel embedding.

        Args:
            stages: [B, H, W, C] each, finest first.

        Returns:
            Y [B, d, S/4, S/4], with both signs (no final ReLU).
        """
        level: Tensor | None = None
        for i in reversed(range(len(stages))):
            lateral = self.laterals[i](stages[i]).permute(0, 3, 1, 2)  # [B, d, H, W]
            if level is not None:
                coarser = torch.relu(level)
                lateral = lateral + F.interpolate(coarser, scale_factor=2.0, mode="nearest")
            level = self.smooth[i](lateral)

        assert level is not None
        return level


class MaskHead(nn.Module):
    """A small convolutional head that predicts one logit per stride-4 pixel."""

    def __init__(self, width: int):
        super().__init__()
        inner = max(width // 4, 16)
        self.smooth = SmoothingConv(width, inner)
        self.classify = nn.Conv2d(inner, 1, 1)
        nn.init.trunc_normal_(self.classify.weight, std=0.02)
        # Objects cover about a tenth of an image, so start near sigmoid(-2) = 0.12.
        nn.init.constant_(self.classify.bias, -2.0)

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, d, S/4, S/4] -> logits [B, 1, S/4, S/4]."""
        return self.classify(torch.relu(self.smooth(pixels)))


class SmoothingConv(nn.Module):
    """3x3 convolution and GroupNorm."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm = group_norm(outputs)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] -> [B, outputs, H, W]."""
        return self.norm(self.conv(x))


def _smoothing(width: int, depth: int) -> nn.Sequential:
    """Chain `depth` convolutions, with ReLU between them."""
    layers: list[nn.Module] = []
    for _ in range(depth - 1):
        layers += [SmoothingConv(width, width), nn.ReLU()]
    return nn.Sequential(*layers, SmoothingConv(width, width))
