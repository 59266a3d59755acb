"""What this machine and this installation can do, in words."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

import coupalign
from coupalign.engine.optimizer import which_apex
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
    """Names of what was looked at -> what was found."""
    found = {
        "coupalign": coupalign.__version__,
        "python": platform.python_version(),
        "processor cores": str(os.cpu_count()),
    }
    found |= {name: _version(name) for name in PACKAGES}
    found["gpu"] = _gpus()
    found["bf16"] = (
        "yes" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else _cpu_bf16()
    )
    found["apex"] = which_apex()
    found["alignment attention"] = f"auto takes {describe_choice('auto')}"
    return found


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none: training runs on the CPU over gloo"
    return "; ".join(
        f"{torch.cuda.get_device_name(place)}, {torch.cuda.get_device_properties(place).total_memory / 1e9:.0f} GB"
        for place in range(torch.cuda.device_count())
    )


def _cpu_bf16() -> str:
    flags = set(Path("/proc/cpuinfo").read_text().split())
    found = sorted(flags & {"avx512_bf16", "amx_bf16"})
    return (
        f"yes, {', '.join(found)}"
        if found
        else "no instructions for it: precision=fp32 is faster here"
    )
