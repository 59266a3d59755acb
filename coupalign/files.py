"""Files that appear whole or not at all."""

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
    """A folder of ours in the user's cache folder: $XDG_CACHE_HOME, else ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "coupalign" / name


@contextmanager
def whole_file(path: Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a neighbor of `path` for writing; rename it to `path` when the block ends well, remove it otherwise."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(beside, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """Yield an empty neighbor of `path`; rename it to `path` (which is replaced) when the block ends well, remove it otherwise."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        yield beside
        publish_directory(beside, path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def publish_directory(finished: Path, path: Path) -> None:
    """Flush everything below `finished` to disk, then rename it to `path`; an older `path` goes away only after that."""
    files = [finished, *finished.rglob("*")]
    if len(files) > 100:
        os.sync()  # once for all: an fsync each takes milliseconds
    else:
        for file in files:
            _sync(file)
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        os.replace(path, old)
    os.replace(finished, path)
    _sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove_debris(folder: Path, older_than_s: float = 5.0) -> None:
    """Remove what killed processes left half-written below `folder`; what is younger may belong to a living one."""
    for left in list(folder.rglob(".*.partial")):
        with suppress(FileNotFoundError):
            if time.time() - left.stat().st_mtime > older_than_s:
                shutil.rmtree(left) if left.is_dir() else left.unlink()


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON with a final newline, atomically."""
    with whole_file(path, "w") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")


def read_json(path: Path | str, what: str) -> Any:
    """Read a JSON file, where `what` names its purpose for the error message.

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
    """SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
