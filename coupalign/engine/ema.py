"""Exponential moving average of the weights, wherever an engine keeps them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class Ema:
    """Average tensors that training updates in place.

    These are whole parameters under DDP and ZeRO 0 to 2, and a rank's share under ZeRO 3.

    Args:
        live: the tensors that training changes, by name.
        decay: per step. The first steps use (1 + step) / (10 + step), which forgets the random
            start soon.

    Attributes:
        averages: by name, of the same shapes as `live`.
    """

    def __init__(self, live: Mapping[str, Tensor], decay: float):
        self.live = dict(live)
        self.averages = {name: tensor.detach().clone() for name, tensor in self.live.items()}
        self.decay = decay

    @torch.no_grad()
    def update(self, step: Tensor, applied: Tensor) -> None:
        """Move the averages towards the live tensors, if the step was applied.

        Args:
            step: optimizer steps including this one; 0-dim, on the tensors' device.
            applied: whether the step changed the weights; 0-dim, on the tensors' device.
        """
        decay = ((1 + step) / (10 + step)).clamp(max=self.decay)
        weight = (1 - decay) * applied
        torch._foreach_lerp_(
            list(self.averages.values()),
            [tensor.detach() for tensor in self.live.values()],
            [weight] * len(self.averages),
        )

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Enter a context in which the live tensors hold their averages."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def restore(self, averages: Mapping[str, Tensor]) -> None:
        """Copy the averages from tensors of the same names and shapes."""
        for name, average in self.averages.items():
            average.copy_(averages[name])

    @torch.no_grad()
    def _swap(self) -> None:
        for name, live in self.live.items():
            before = live.detach().clone()
            live.detach().copy_(self.averages[name])
            self.averages[name].copy_(before)
