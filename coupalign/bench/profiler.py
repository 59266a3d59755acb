"""Count calls in a profile of torch: operators, kernel launches, waits, numbers read back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
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


def profiler_activities(device: torch.device) -> list[ProfilerActivity]:
    """Return what a profile must record for `count_calls`."""
    if device.type == "cuda":
        return [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    return [ProfilerActivity.CPU]


def count_calls(
    events: Iterable[Any], repeats: int, device: torch.device, own_waits: int = 0
) -> dict[str, float]:
    """Count calls per step or per sample, by name.

    Args:
        events: of a profile.
        repeats: number of steps or samples that the profile covers.
        own_waits: waits that the measurement itself added; they are not counted.
    """
    counts = Counter(event.name for event in events)

    operators = sum(count for name, count in counts.items() if name.startswith("aten::"))
    calls = {
        "operators": operators / repeats,
        "numbers read back": counts["aten::_local_scalar_dense"] / repeats,
    }
    if device.type == "cuda":
        launches = sum(counts[name] for name in _LAUNCHES)
        waits = sum(counts[name] for name in _WAITS)
        calls["kernels launched"] = launches / repeats
        calls["waits"] = (waits - own_waits) / repeats
    return calls
