"""Mask generator: N learned queries read the aligned pixels and become mask embeddings Q_o.

Shape legend: B batch, N mask embeddings, P pixels of the stages that are read, C stage channels, d mask width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coupalign.config.schema import ProposalsConfig
from coupalign.errors import InputError


class MaskProposals(nn.Module):
    """A DETR decoder (post-norm, as in MaskFormer) over the aligned features of the chosen stages.

    Args:
        channels: C of the stages that are read, in the order of `forward`.
        width: d.
        config: count, layers, heads, ffn, dropout.

    Raises:
        InputError: `width` is not a multiple of the heads, or not of 4 (sine positions).
    """

    def __init__(self, channels: Sequence[int], width: int, config: ProposalsConfig):
        super().__init__()
        if width % config.heads or width % 4:
            raise InputError(
                f"model.decoder.width = {width} must be a multiple of 4 "
                f"and of model.proposals.heads = {config.heads}"
            )
        self.queries = nn.Parameter(torch.randn(config.count, width))
        self.project = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(c), nn.Linear(c, width)) for c in channels
        )
        self.level_embedding = (
            nn.Parameter(torch.randn(len(channels), width)) if len(channels) > 1 else None
        )
        self.layers = nn.ModuleList(
            QueryLayer(width, config.heads, config.ffn, config.dropout)
            for _ in range(config.layers)
        )
        self.embed = nn.Sequential(
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, width),
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, stages: Sequence[Tensor]) -> Tensor:
        """Aligned maps [B, H, W, C] of the chosen stages -> Q_o [B, N, d]."""
        memory, positions = [], []
        for i, pixels in enumerate(stages):
            where = sine_positions(
                pixels.shape[1], pixels.shape[2], self.queries.shape[1], pixels.device
            )  # [P, d]
            positions.append(
                where if self.level_embedding is None else where + self.level_embedding[i]
            )
            memory.append(self.project[i](pixels.flatten(1, 2)))
        pixels, where = torch.cat(memory, dim=1), torch.cat(positions, dim=0)  # [B, P, d], [P, d]
        state = self.queries.expand(len(pixels), -1, -1)  # [B, N, d]
        for layer in self.layers:
            state = layer(state, self.queries, pixels, where)
        return self.embed(state)


class QueryLayer(nn.Module):
    """Queries read each other, then the pixels, then themselves; a norm after each."""

    def __init__(self, width: int, heads: int, ffn: int, dropout: float):
        super().__init__()
        self.among_queries = Attention(width, heads)
        self.queries_from_pixels = Attention(width, heads)
        self.ffn = nn.Sequential(
            nn.Linear(width, ffn), nn.ReLU(), nn.Dropout(dropout), nn.Linear(ffn, width)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(self, state: Tensor, queries: Tensor, pixels: Tensor, where: Tensor) -> Tensor:
        """state [B, N, d], query positions [N, d], pixels [B, P, d], pixel positions [P, d] -> state [B, N, d]."""
        placed = state + queries
        state = self.norms[0](state + self.dropout(self.among_queries(placed, placed, state)))
        state = self.norms[1](
            state + self.dropout(self.queries_from_pixels(state + queries, pixels + where, pixels))
        )
        return self.norms[2](state + self.dropout(self.ffn(state)))


class Attention(nn.Module):
    """Multi-head attention with plain Linear projections."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [B, N, d], key and value [B, P, d] -> [B, N, d]."""
        q, k, v = (
            projected.unflatten(2, (self.heads, -1)).transpose(1, 2)  # [B, heads, ., d / heads]
            for projected in (self.query(query), self.key(key), self.value(value))
        )
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def sine_positions(height: int, width: int, channels: int, device: torch.device) -> Tensor:
    """Fixed 2-D positions [height*width, channels]: half of the channels for y, half for x, sine beside cosine.

    As in DETR: positions are scaled to 0 .. 2 pi, wavelengths grow to 10,000. `channels` is a multiple of 4.
    """
    quarter = channels // 4
    frequency = torch.exp(torch.arange(quarter, device=device) * (-math.log(10_000.0) / quarter))
    y = (torch.arange(height, device=device) + 0.5) / height * (2 * math.pi)
    x = (torch.arange(width, device=device) + 0.5) / width * (2 * math.pi)
    y, x = y[:, None] * frequency, x[:, None] * frequency
    y, x = (
        torch.cat([y.sin(), y.cos()], 1),
        torch.cat([x.sin(), x.cos()], 1),
    )  # [height, d/2], [width, d/2]
    grid = torch.cat([y[:, None].expand(-1, width, -1), x[None].expand(height, -1, -1)], dim=2)
    return grid.flatten(0, 1)
