"""Pickles that run code when they are loaded without restrictions, in every form torch has had."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import torch

FORMS = ("zip", "legacy", "tar", "raw")


class RunsCode:
    """A pickle of it creates the file `marker` when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def write_pickle(file: Path, value: Any, form: str = "zip") -> None:
    """Write as torch does today ("zip"), before 1.6 ("legacy"), before 0.2 ("tar"), or not at all.

    The last form, "raw", is a plain pickle.
    """
    if form == "raw":
        file.write_bytes(pickle.dumps(value))
    elif form == "tar":
        _write_tar(file, {"storages": 0, "tensors": 0, "pickle": value})
    else:
        torch.save(value, file, _use_new_zipfile_serialization=form == "zip")


def _write_tar(file: Path, members: dict[str, Any]) -> None:
    with tarfile.open(file, "w:") as tar:
        for name, value in members.items():
            data = pickle.dumps(value, 2)
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
