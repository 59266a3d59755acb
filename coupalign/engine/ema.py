"""Exponential moving average of the weights, wherever an engine keeps them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class Ema:
    """Average of tensors that are updated in place: whole parameters under DDP and ZeRO 0 to 2, a rank's share under ZeRO 3.

    Args:
        live: the tensors that training changes, by name.
        decay: per step; the first steps use (1 + step) / (10 + step), so that the random start is forgotten soon.
    """

    def __init__(self, live: Mapping[str, Tensor], decay: float):
        self.live = dict(live)
        self.kept = {name: tensor.detach().clone() for name, tensor in self.live.items()}
        self.decay = decay

    @torch.no_grad()
    def update(self, step: Tensor, taken: Tensor) -> None:
        """Move towards the live tensors after optimizer step `step`, counted from 1, if it was `taken`; both 0-dim, on their device."""
        decay = ((1 + step) / (10 + step)).clamp(max=self.decay)
        weight = (1 - decay) * taken
        torch._foreach_lerp_(
            list(self.kept.values()),
            [tensor.detach() for tensor in self.live.values()],
            [weight] * len(self.kept),
        )

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Inside, the live tensors hold their averages."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def restore(self, averages: Mapping[str, Tensor]) -> None:
        """Take the averages from tensors of the same names and shapes."""
        for name, kept in self.kept.items():
            kept.copy_(averages[name])

    @torch.no_grad()
    def _swap(self) -> None:
        for name, live in self.live.items():
            held = live.detach().clone()
            live.detach().copy_(self.kept[name])
            self.kept[name].copy_(held)
