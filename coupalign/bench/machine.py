"""Describe the machine that a benchmark ran on, and measure time and memory on it."""

from __future__ import annotations

import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")

Rates = tuple[float, float, float]  # per second: median, lower and upper quartile


def describe_machine(device: torch.device) -> dict[str, str]:
    """Describe what a time depends on, besides the code.

    Two results are compared only if their "device" is the same.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        cpuinfo = Path("/proc/cpuinfo")
        name = describe_processor(cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else "")

    return {
        "device": name,
        "threads": str(torch.get_num_threads()),
        "cores": str(os.cpu_count()),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def describe_processor(cpuinfo: str) -> str:
    """Name a processor by brand, family, model, instruction sets and number of cores.

    The brand is not enough: clouds call every processor of a maker by one name. "AMD EPYC" can be
    one with AVX-512 and bf16 instructions, or one of half its speed with neither.

    Args:
        cpuinfo: content of /proc/cpuinfo on Linux. Empty: not available.
    """
    first_core = cpuinfo.partition("\n\n")[0]
    fields = {}
    for line in first_core.splitlines():
        key, _, value = line.partition(":")
        fields[key.strip()] = value.strip()

    brand = fields.get("model name") or platform.processor() or platform.machine()
    details = []
    if "cpu family" in fields:
        details.append(f"family {fields['cpu family']}")
    if "model" in fields:
        details.append(f"model {fields['model']}")

    details.append(torch.backends.cpu.get_cpu_capability())
    # x86 lists its instruction sets as "flags", ARM as "Features".
    if "bf16" in fields.get("flags", "") + fields.get("Features", ""):
        details.append("bf16")
    return f"{brand} ({', '.join(details)}), {os.cpu_count()} cores"


def resident_gigabytes(process: int | str = "self") -> float:
    """Return the memory that a process holds now (its resident set), in 1e9 bytes."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e9


def time_call(function: Callable[[], T]) -> tuple[float, T]:
    """Call a function. Returns the seconds that it took, and its result."""
    began = time.perf_counter()
    result = function()
    return time.perf_counter() - began, result


def sample_rates(samples: int, seconds: Sequence[float]) -> Rates:
    """Return samples per second.

    Args:
        samples: per step.
        seconds: of each step.
    """
    if len(seconds) > 1:
        low, middle, high = statistics.quantiles(seconds, n=4)
    else:
        low = middle = high = seconds[0]
    return samples / middle, samples / high, samples / low
