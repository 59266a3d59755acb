"""What a quick start takes."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collection() -> Iterator[None]:
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
def absent(package: str) -> Iterator[None]:
    """Let what is imported meanwhile believe that a package is not installed, unless it is imported already."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # documented: an import of it raises ModuleNotFoundError
    try:
        yield
    finally:
        del sys.modules[package]
