"""Write files and directories that appear whole or not at all; read JSON.

Everything is written under a hidden name with the ending .partial first, and then renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from coupalign.errors import InputError


def user_cache(name: str) -> Path:
    """The folder `name` of this package in $XDG_CACHE_HOME, or in ~/.cache if that is not set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "coupalign" / name


@contextmanager
def whole_file(path: Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Write a file that appears only when the block ends without an error.

    The block writes to a temporary file in the same folder. It then replaces `path`, or is removed
    after an error.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    encoding = None if "b" in mode else "utf-8"

    try:
        with open(partial, mode, encoding=encoding) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """Write a directory that appears only when the block ends without an error.

    The block fills the empty directory that is yielded. It then replaces `path`, or is removed
    after an error.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()

    try:
        yield partial
        publish_directory(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def publish_directory(finished: Path, path: Path) -> None:
    """Flush a directory to disk, then rename it to `path`, and only then remove an older `path`."""
    # One sync of everything is faster than many of one file each, which take milliseconds.
    files = [finished, *finished.rglob("*")]
    if len(files) > 100:
        os.sync()
    else:
        for file in files:
            _sync(file)

    # A crash between the two renames leaves the old directory under its hidden name.
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        os.replace(path, old)
    os.replace(finished, path)
    _sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove_debris(folder: Path, older_than_s: float = 5.0) -> None:
    """Remove half-written files and directories that killed processes left below `folder`.

    Younger ones stay: a living process may be writing them.
    """
    for partial in list(folder.rglob(".*.partial")):
        # Another process may remove it at the same time.
        with suppress(FileNotFoundError):
            if time.time() - partial.stat().st_mtime <= older_than_s:
                continue
            if partial.is_dir():
                shutil.rmtree(partial)
            else:
                partial.unlink()


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON with a final newline, see `whole_file`."""
    with whole_file(path, "w") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")


def read_json(path: Path | str, what: str) -> Any:
    """Read a JSON file.

    Args:
        what: what the file should be, for the error message: "the scores of a run".

    Raises:
        InputError: the file cannot be read or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; expected {what}") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as {what} ({error})") from error


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
