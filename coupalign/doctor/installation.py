"""Report what this machine and this installation can do."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

import coupalign
from coupalign.engine.optimizer import installed_apex
from coupalign.kernels import describe_choice

PACKAGES = (
    "torch",
    "torchvision",
    "triton",
    "timm",
    "transformers",
    "deepspeed",
    "webdataset",
    "mlflow",
    "pydantic",
    "s3fs",
)


def examine() -> dict[str, str]:
    """Look at versions, processors and GPUs. Returns what was looked at and what was found."""
    report = {
        "coupalign": coupalign.__version__,
        "python": platform.python_version(),
        "processor cores": str(os.cpu_count()),
    }
    report |= {name: _version(name) for name in PACKAGES}
    report["gpu"] = _gpus()
    report["bf16"] = _bf16()
    report["apex"] = installed_apex()
    report["alignment attention"] = f"auto takes {describe_choice('auto')}"
    return report


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none: training runs on the CPU over gloo"

    gpus = []
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        gpus.append(f"{properties.name}, {properties.total_memory / 1e9:.0f} GB")
    return "; ".join(gpus)


def _bf16() -> str:
    if torch.cuda.is_available() and torch.cuda.is_bf16_supported():
        return "yes"

    flags = set(Path("/proc/cpuinfo").read_text().split())
    instructions = sorted(flags & {"avx512_bf16", "amx_bf16"})
    if instructions:
        return f"yes, {', '.join(instructions)}"
    return "no instructions for it: precision=fp32 is faster here"
