"""What a profile of torch counts: operators, kernels launched, waits for the device, numbers read back from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity

_LAUNCHES = (
    "cudaLaunchKernel",
    "cudaLaunchKernelExC",
    "cuLaunchKernel",
    "cuLaunchKernelEx",
    "cudaGraphLaunch",
)
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def activities(device: torch.device) -> list[ProfilerActivity]:
    """What a profile must watch for `count_calls`."""
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]


def count_calls(
    events: Iterable[Any], times: int, device: torch.device, own_waits: int = 0
) -> dict[str, float]:
    """Calls by name, for each of so many steps or samples.

    Args:
        events: of a profile.
        own_waits: waits of whoever looked, which are left out.
    """
    names = [event.name for event in events]

    def count(wanted: Callable[[str], bool]) -> float:
        return sum(map(wanted, names)) / times

    calls = {
        "operators": count(lambda name: name.startswith("aten::")),
        "numbers read back": count(lambda name: name == "aten::_local_scalar_dense"),
    }
    if device.type == "cuda":
        calls |= {
            "kernels launched": count(lambda name: name in _LAUNCHES),
            "waits": count(lambda name: name in _WAITS) - own_waits / times,
        }
    return calls
