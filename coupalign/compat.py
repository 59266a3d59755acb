"""Makes torchvision importable beside a CPU build of torch.

The torchvision wheel on PyPI is linked against CUDA. Beside a CPU-only torch its compiled operators do not load, and
`import torchvision`, and with it timm and transformers, fails because two operator schemas are unknown. Declaring the
schemas is enough for everything this project uses; nothing is declared where torch has CUDA.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library: torch.library.Library | None = None


def prepare_torchvision() -> None:
    """Call before the first import of torchvision, timm or transformers; does nothing the second time."""
    global _library
    if _library is not None or torch.version.cuda is not None:
        return
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        _library.define(schema)


@contextmanager
def garbage_collection_paused() -> Iterator[None]:
    """Hold the garbage collector back while what is made stays: modules, indexes, a model.

    Importing a training makes some hundred thousand objects, hardly any of them garbage; looking through them takes a seventh of the time.
    """
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


@contextmanager
def package_hidden(package: str) -> Iterator[None]:
    """Let what is imported meanwhile believe that a package is not installed, unless it is imported already."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # documented: an import of it raises ModuleNotFoundError
    try:
        yield
    finally:
        del sys.modules[package]
