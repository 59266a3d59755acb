"""Workarounds for the libraries below us: torchvision without CUDA, slow starts, unwanted imports.

Importing this module imports no torch.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Operators whose schemas torch and torchvision expect when torchvision is imported.
_OPERATOR_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library: torch.library.Library | None = None


def prepare_torchvision() -> None:
    """Make torchvision importable with a CPU build of torch. A second call does nothing.

    Call it before the first import of torchvision, timm or transformers. PyPI's torchvision is
    linked against CUDA, so its compiled operators do not load with a CPU build of torch. The import
    then fails, because two operator schemas are unknown. Declaring them is all this project needs.
    Nothing is declared if torch has CUDA.
    """
    import torch

    global _library
    if _library is not None or torch.version.cuda is not None:
        return

    _library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _OPERATOR_SCHEMAS:
        _library.define(schema)


@contextmanager
def garbage_collection_paused() -> Iterator[None]:
    """Pause the garbage collector while long-lived objects are made: modules, indexes, a model.

    Importing everything for a training makes some hundred thousand objects, hardly any of them
    garbage. Searching them would take a seventh of the time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def package_hidden(package: str) -> Iterator[None]:
    """Pretend that a package is not installed, unless it is already imported."""
    if package in sys.modules:
        yield
        return

    # As Python documents it: importing the package now raises ModuleNotFoundError.
    sys.modules[package] = None
    try:
        yield
    finally:
        del sys.modules[package]
