"""Tensors between host and device without waiting: what a GPU works on while the host is busy with something else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")


class PendingCopy:
    """A copy on its way to the host. Whoever wants it waits for it alone, and not for what the device was given since."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor.to(
            "cpu", non_blocking=True, copy=True
        )  # from a GPU into page-locked memory
        self._there: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._there = torch.cuda.Event(
                blocking=True
            )  # the waiting thread leaves its core to others
            self._there.record(torch.cuda.current_stream(tensor.device))

    def numpy(self) -> np.ndarray:
        """Its numbers."""
        if self._there is not None:
            self._there.synchronize()
        return self._tensor.numpy()


def start_copy(array: np.ndarray, device: torch.device) -> Tensor:
    """The array on the device, by way of page-locked memory, from which the copy does not block."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def lag_by_one(items: Iterable[T]) -> Iterator[T]:
    """The same items, each once the next one has been made."""
    rest = iter(items)
    for before in rest:
        for item in rest:
            yield before
            before = item
        yield before
