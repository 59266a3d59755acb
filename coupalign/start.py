"""What a quick start takes."""
from __future__ import annotations

import gc
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
