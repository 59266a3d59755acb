"""Boundary refinement: the pixels about which the mask is least certain are decided again, one by one, at full size.

The supplement leaves a boundary enhancement module as future work; this is ours, after PointRend (Kirillov et al., CVPR 2020) with
three changes: points are the K least certain pixels, in training too, so there is no random draw; a point sees the colors
around it, since features at stride 4 cannot tell where between two of their pixels an edge lies; and mask and features are read without
a gradient, since those few pixels would outweigh all others (on RefShapes that cost the mask 14 points of oIoU).

Shape legend: B batch, S input side, d feature width, K points.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coupalign.config.schema import RefineConfig

_NEIGHBORS = 9


class PointRefinement(nn.Module):
    """Adds a learned correction to the logits of the K pixels nearest to zero; it starts at nothing."""

    def __init__(self, width: int, config: RefineConfig):
        super().__init__()
        self.points = config.points
        self.decide = nn.Sequential(
            nn.Linear(width + 3 * _NEIGHBORS + 1, config.width),
            nn.ReLU(),
            nn.Linear(config.width, config.width),
            nn.ReLU(),
            nn.Linear(config.width, 1),
        )
        nn.init.zeros_(self.decide[-1].weight)
        nn.init.zeros_(self.decide[-1].bias)

    def forward(self, logits: Tensor, features: Tensor, colors: Tensor) -> tuple[Tensor, Tensor]:
        """Decide the least certain pixels again.

        Args:
            logits: float32 [B, S, S].
            features: [B, d, S/4, S/4].
            colors: the normalized image [B, S, S, 3].

        Returns:
            logits [B, S, S] and the places of the points in the flattened mask, int64 [B, K].
        """
        batch, side, _ = logits.shape
        flat, features = logits.detach().flatten(1), features.detach()
        places = (
            flat.abs().topk(min(self.points, side * side), dim=1, largest=False).indices
        )  # [B, K]
        y, x = places // side, places % side
        centers = (torch.stack([x, y], dim=2).float() * 2 + 1) / side - 1  # [B, K, 2]
        read = F.grid_sample(
            features.float(),
            centers[:, :, None],
            mode="bilinear",
            padding_mode="border",
            align_corners=False,
        )
        coarse = flat.gather(1, places)  # [B, K]
        seen = torch.cat(
            [read[..., 0].transpose(1, 2), _around(colors, y, x), coarse[..., None]], dim=2
        )
        refined = coarse + self.decide(seen)[..., 0].float()
        return flat.scatter(1, places, refined).view(batch, side, side), places


def point_loss(logits: Tensor, places: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of the refined points alone: logits [B, S, S], places int64 [B, K], target bool [B, S, S] -> scalar."""
    chosen, truth = logits.flatten(1).gather(1, places), target.flatten(1).gather(1, places)
    return F.binary_cross_entropy_with_logits(chosen.float(), truth.float())


def _around(colors: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """The 3x3 colors around each point, the edge repeated: [B, S, S, 3], [B, K], [B, K] -> [B, K, 27]."""
    side = colors.shape[1]
    shift = torch.tensor([-1, 0, 1], device=y.device)
    rows = (y[..., None] + shift).clamp(0, side - 1)  # [B, K, 3]
    columns = (x[..., None] + shift).clamp(0, side - 1)
    places = (rows[..., :, None] * side + columns[..., None, :]).flatten(1)  # [B, K * 9]
    return (
        colors.flatten(1, 2)
        .gather(1, places[..., None].expand(-1, -1, 3))
        .unflatten(1, (-1, _NEIGHBORS))
        .flatten(2)
    )
