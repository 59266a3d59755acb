"""Boundary refinement: decide the least certain pixels of the mask again, at full size.

The supplement leaves a boundary enhancement module as future work. This one is ours, after
PointRend (Kirillov et al., CVPR 2020), with three changes:

- The points are the K least certain pixels in training too, so there is no random draw.
- A point sees the colors around it. Features at stride 4 cannot tell where an edge between two of
  their pixels is.
- Mask and features are read without a gradient. Otherwise those few pixels would outweigh all
  others, which cost the mask 14 points of oIoU on RefShapes.

Shape legend: B batch, S input side, d feature width, K points.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coupalign.config.schema import RefineConfig

_NEIGHBORS = 9


class PointRefinement(nn.Module):
    """Add a learned correction to the logits of the K pixels nearest to zero.

    The last layer starts at zero, so the correction does too.
    """

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
            logits [B, S, S], and the indices of the points in the flattened mask, int64 [B, K].
        """
        batch, side, _ = logits.shape
        logits, features = logits.detach().flatten(1), features.detach()

        # Choose the pixels whose logits are nearest to zero.
        count = min(self.points, side * side)
        points = logits.abs().topk(count, dim=1, largest=False).indices  # [B, K]
        y, x = points // side, points % side

        # Read the features at the points, in grid_sample's coordinates: -1 .. 1 from edge to edge.
        centers = (torch.stack([x, y], dim=2).float() * 2 + 1) / side - 1  # [B, K, 2]
        read = F.grid_sample(
            features.float(),
            centers[:, :, None],
            mode="bilinear",
            padding_mode="border",
            align_corners=False,
        )  # [B, d, K, 1]
        read = read[..., 0].transpose(1, 2)  # [B, K, d]

        # Correct the logits from the features, the colors around the point and the logit itself.
        coarse = logits.gather(1, points)  # [B, K]
        evidence = torch.cat([read, _surrounding_colors(colors, y, x), coarse[..., None]], dim=2)
        refined = coarse + self.decide(evidence)[..., 0].float()

        return logits.scatter(1, points, refined).view(batch, side, side), points


def point_loss(logits: Tensor, points: Tensor, target: Tensor) -> Tensor:
    """Compute the cross-entropy of the refined points only.

    Args:
        logits: [B, S, S].
        points: indices in the flattened mask, int64 [B, K].
        target: bool [B, S, S].
    """
    chosen = logits.flatten(1).gather(1, points)
    truth = target.flatten(1).gather(1, points)
    return F.binary_cross_entropy_with_logits(chosen.float(), truth.float())


def _surrounding_colors(colors: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Read the 3x3 colors around each point, with the image's edge repeated.

    [B, S, S, 3], [B, K], [B, K] -> [B, K, 27].
    """
    side = colors.shape[1]
    shift = torch.tensor([-1, 0, 1], device=y.device)
    rows = (y[..., None] + shift).clamp(0, side - 1)  # [B, K, 3]
    columns = (x[..., None] + shift).clamp(0, side - 1)  # [B, K, 3]

    indices = rows[..., :, None] * side + columns[..., None, :]  # [B, K, 3, 3]
    indices = indices.flatten(1)[..., None].expand(-1, -1, 3)  # [B, K * 9, 3]
    read = colors.flatten(1, 2).gather(1, indices)  # [B, K * 9, 3]
    return read.unflatten(1, (-1, _NEIGHBORS)).flatten(2)
