"""Mask generator: N learned queries read the aligned pixels and become mask embeddings Q_o.

Shape legend: B batch, N mask embeddings, P pixels of the stages that are read, C stage channels,
d mask width.
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

        # With several stages, tell the queries which stage a pixel belongs to.
        self.level_embedding = None
        if len(channels) > 1:
            self.level_embedding = nn.Parameter(torch.randn(len(channels), width))

        self.layers = nn.ModuleList(
            QueryLayer(width, config.heads, config.ffn, dropout=config.dropout)
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
        """Turn the aligned maps [B, H, W, C] of the chosen stages into Q_o [B, N, d]."""
        # Project every stage to the same width, and concatenate the pixels of all stages.
        memory, positions = [], []
        for i, pixels in enumerate(stages):
            _, height, width, _ = pixels.shape
            where = sine_positions(
                height, width, channels=self.queries.shape[1], device=pixels.device
            )  # [H*W, d]
            if self.level_embedding is not None:
                where = where + self.level_embedding[i]
            positions.append(where)
            memory.append(self.project[i](pixels.flatten(1, 2)))  # [B, H*W, d]
        pixels = torch.cat(memory, dim=1)  # [B, P, d]
        where = torch.cat(positions, dim=0)  # [P, d]

        # The queries read each other and the pixels, layer by layer.
        state = self.queries.expand(len(pixels), -1, -1)  # [B, N, d]
        for layer in self.layers:
            state = layer(state, self.queries, pixels, where)
        return self.embed(state)


class QueryLayer(nn.Module):
    """A transformer decoder layer (post-norm): self-attention, cross-attention, feed-forward."""

    def __init__(self, width: int, heads: int, ffn: int, dropout: float):
        super().__init__()
        self.among_queries = MultiHeadAttention(width, heads)
        self.queries_from_pixels = MultiHeadAttention(width, heads)
        self.ffn = feed_forward(width, ffn, dropout)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(self, state: Tensor, queries: Tensor, pixels: Tensor, where: Tensor) -> Tensor:
        """Update the state of the queries.

        Args:
            state: [B, N, d].
            queries: learned positions of the queries, [N, d] or [B, N, d].
            pixels: [B, P, d].
            where: positions of the pixels, [P, d].

        Returns:
            state [B, N, d].
        """
        # Queries read each other.
        placed = state + queries
        read = self.among_queries(placed, placed, state)
        state = self.norms[0](state + self.dropout(read))

        # Queries read pixels.
        read = self.queries_from_pixels(state + queries, pixels + where, pixels)
        state = self.norms[1](state + self.dropout(read))

        return self.norms[2](state + self.dropout(self.ffn(state)))


class MultiHeadAttention(nn.Module):
    """Multi-head attention with plain Linear projections."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [B, N, d], key and value [B, P, d] -> [B, N, d]."""
        # Project, and move the heads next to the batch.
        q = self._split_heads(self.query(query))  # [B, heads, N, d / heads]
        k = self._split_heads(self.key(key))  # [B, heads, P, d / heads]
        v = self._split_heads(self.value(value))  # [B, heads, P, d / heads]

        read = F.scaled_dot_product_attention(q, k, v)  # [B, heads, N, d / heads]
        return self.out(read.transpose(1, 2).flatten(2))

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


def feed_forward(width: int, hidden: int, dropout: float) -> nn.Sequential:
    """Build the feed-forward network of a transformer layer: [..., width] -> [..., width]."""
    return nn.Sequential(
        nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, width)
    )


def sine_positions(height: int, width: int, channels: int, device: torch.device) -> Tensor:
    """Compute fixed 2-D positions [height*width, channels], as in DETR.

    Half of the channels are for y and half for x; of each half, half are sines and half cosines.
    Positions are scaled to 0 .. 2 pi, wavelengths grow to 10,000. `channels` is a multiple of 4.
    """
    quarter = channels // 4
    decay = -math.log(10_000.0) / quarter
    frequency = torch.exp(torch.arange(quarter, device=device) * decay)

    y = _encode_axis(height, frequency)  # [height, channels / 2]
    x = _encode_axis(width, frequency)  # [width, channels / 2]

    # Give each pixel the code of its row and the code of its column.
    rows = y[:, None].expand(-1, width, -1)
    columns = x[None].expand(height, -1, -1)
    return torch.cat([rows, columns], dim=2).flatten(0, 1)


def _encode_axis(size: int, frequency: Tensor) -> Tensor:
    """Encode the pixel centers of one axis by sines and cosines: [size, 2 * frequencies]."""
    centers = (torch.arange(size, device=frequency.device) + 0.5) / size * (2 * math.pi)
    angles = centers[:, None] * frequency
    return torch.cat([angles.sin(), angles.cos()], dim=1)
