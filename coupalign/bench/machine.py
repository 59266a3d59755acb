"""Which machine a figure belongs to, how fast its matrix products are, and how two results of it compare."""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from coupalign.errors import InputError

Rates = tuple[float, float, float]  # median, lower and upper quartile; a second


class Result(ABC):
    """What a bench found, a dataclass of plain values: JSON and back, and the figures that two of them are compared by."""

    bench: ClassVar[str]
    machine: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        return {"bench": self.bench, **asdict(self)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """What `to_json` gave; fields that have come since then have their defaults."""
        return cls(
            **{field.name: value[field.name] for field in fields(cls) if field.name in value}
        )

    @abstractmethod
    def figures(self) -> dict[str, float]:
        """By name."""


def describe_machine(device: torch.device) -> dict[str, str]:
    """What a time depends on, besides the code. Two results are compared if their "device" is the same."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        cpuinfo = Path("/proc/cpuinfo")
        name = processor(cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else "")
    return {
        "device": name,
        "threads": str(torch.get_num_threads()),
        "cores": str(os.cpu_count()),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def resident_gigabytes(process: int | str = "self") -> float:
    """Memory of a process that is held now, 1e9 bytes."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e9


def rates(samples: int, seconds: Sequence[float]) -> Rates:
    """Samples a second of steps that took so long."""
    low, middle, high = (
        statistics.quantiles(seconds, n=4) if len(seconds) > 1 else (seconds[0],) * 3
    )
    return samples / middle, samples / high, samples / low


def ratios(now: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
    """now / before of every figure that both have."""
    return {name: value / before[name] for name, value in now.items() if before.get(name)}


def read_result(file: Path, machine: Mapping[str, str], what: str) -> dict[str, Any]:
    """An earlier result to compare with.

    Raises:
        InputError: it is not there, no result of this bench, or of another machine.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        theirs = value["machine"]["device"]
        known = value["bench"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"--against {file}: not a result of a bench ({type(error).__name__}: {error}); --out writes one"
        ) from None
    if known != what:
        raise InputError(f"--against {file}: a result of bench {known}, not of bench {what}")
    if theirs != machine["device"]:
        raise InputError(
            f"--against {file}: measured on {theirs}, this is {machine['device']}: ratios of times would mean nothing"
        )
    return value


def processor(cpuinfo: str) -> str:
    """Brand, what tells generations of one brand apart, and cores.

    Clouds call every processor of a maker by one name: "AMD EPYC" was one with AVX-512 and bf16 instructions one day, and one of half its
    speed with neither the next.

    Args:
        cpuinfo: what Linux has in /proc/cpuinfo.
    """
    first = cpuinfo.partition("\n\n")[0].splitlines()
    known = {
        name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first)
    }
    name = known.get("model name") or platform.processor() or platform.machine()
    details = [
        f"{key.removeprefix('cpu ')} {known[key]}"
        for key in ("cpu family", "model")
        if key in known
    ]
    details.append(torch.backends.cpu.get_cpu_capability())
    if "bf16" in known.get("flags", "") + known.get(
        "Features", ""
    ):  # x86's name for the list, and ARM's
        details.append("bf16")
    return f"{name} ({', '.join(details)}), {os.cpu_count()} cores"
