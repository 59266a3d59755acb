"""Copies between host and device that do not wait, so that a GPU never runs out of work."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")


class PendingCopy:
    """A copy of a tensor that is on its way to the host.

    Reading it waits for this copy alone, not for work that the device was given later.
    """

    def __init__(self, tensor: Tensor) -> None:
        # From a GPU, the copy goes to page-locked memory.
        self._tensor = tensor.to("cpu", non_blocking=True, copy=True)
        self._arrived: torch.cuda.Event | None = None
        if tensor.is_cuda:
            # A blocking event: the waiting thread leaves its core to others.
            self._arrived = torch.cuda.Event(blocking=True)
            self._arrived.record(torch.cuda.current_stream(tensor.device))

    def numpy(self) -> np.ndarray:
        """Wait for the copy and return it."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._tensor.numpy()


def start_copy(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy an array to the device without blocking, by way of page-locked memory for a GPU."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def lag_by_one(items: Iterable[T]) -> Iterator[T]:
    """Yield the same items, each one only after the next has been made."""
    iterator = iter(items)
    for previous in iterator:
        for item in iterator:
            yield previous
            previous = item
        yield previous
