"""The output directory of `pack`: who may write to it, which files are ours, what is left over.

While a set is being packed, the directory contains:

    .pack.lock                who is packing
    .pack.json                the journal: names of the files that are ours
    shard-000000.tar          a finished shard
    .shard-000000.tar.json    its receipt: digests that prove that the shard is finished
    vocab.txt
    index.json                written last; then the dot files are removed
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from coupalign.data.index import FORMAT, INDEX_NAME, read_index
from coupalign.data.packing.layout import TOOL, PackingLayout
from coupalign.errors import InputError, RunError, quoted
from coupalign.files import locked, parse_strict_json, require_writable, write_json

VOCABULARY = "vocab.txt"
JOURNAL = ".pack.json"
LOCK = ".pack.lock"
FEW_INODES = 16

_OUTPUT = re.compile(r"shard-\d{6}\.tar|vocab\.txt|index\.json")
_RECEIPT = r"\.shard-\d{6}\.tar\.json"
_WRITTEN = rf"{_OUTPUT.pattern}|{_RECEIPT}|\.pack\.json"
_LEFTOVER = re.compile(rf"{_RECEIPT}|\.({_WRITTEN})\.\d+(-[\w.-]+)?\.partial")


def receipt_path(out: Path, url: str) -> Path:
    """Return the path of the receipt of a shard."""
    return out / f".{url}.json"


@contextmanager
def writable(out: Path) -> Iterator[None]:
    """Create `out` and lock it, since two processes would remove each other's files.

    Raises:
        InputError: `out` is a file, cannot be written, or another process is packing into it.
        RunError: the disk failed in the block: it is full, or was lost.
    """
    try:
        is_file = out.exists() and not out.is_dir()
    except OSError as error:  # such as a name that is too long
        raise InputError(f"{quoted(str(out))}: {error.strerror}; choose another --out") from None
    if is_file:
        raise InputError(f"{out}: is a file; choose a directory for the shards")
    remedy = "choose another directory with --out"
    require_writable(out, "the shards", remedy[0].upper() + remedy[1:])

    try:
        with locked(out / LOCK, "is being packed", f"Wait until it has finished, or {remedy}"):
            yield
    except BrokenPipeError:  # of the progress bar
        raise
    except OSError as error:
        raise RunError(_describe_failure(out, error)) from error


def _describe_failure(out: Path, error: OSError) -> str:
    """Say which disk failed, what is kept, and what to do."""
    cause = error.strerror or str(error)
    if error.errno == errno.ENOSPC and _has_no_inodes(out):
        cause = "no inodes are left: too many files are on this file system"
    place = f" ({error.filename})" if error.filename else ""

    finished = sum(1 for file in _leftovers(out) if re.fullmatch(_RECEIPT, file.name))
    return (
        f"{out}: packing stopped: {cause}{place}; {finished} finished shards are kept. Free "
        "space or repair the disk, then start the same command again: it writes only what is "
        "missing"
    )


def _has_no_inodes(folder: Path) -> bool:
    try:
        status = os.statvfs(folder)
    except OSError:
        return False
    # The half-written files are removed by now, and gave theirs back.
    return status.f_files > 0 and status.f_favail < FEW_INODES


def has_finished_set(out: Path, layout: PackingLayout) -> bool:
    """Return whether `out` contains the finished set of `layout`, judged by the file sizes.

    Raises:
        InputError: `out` contains another finished set, or a shard of this one is damaged.
    """
    try:
        (out / INDEX_NAME).lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise InputError(f"{out}: cannot be read ({error}); choose another directory") from None

    # Another set is somebody's work: replace it only when asked.
    index = read_index(out)
    if index.source_fingerprint != layout.fingerprint:
        raise InputError(
            f"{out}: holds the finished set {index.name!r}, packed from other sources, with "
            f"another recipe or by another version ({index.tool}); choose another directory, or "
            "replace it with --overwrite"
        )
    for shard in index.shards:
        file = out / shard.url
        if not file.is_file() or file.stat().st_size != shard.bytes:
            raise InputError(
                f"{out}: is packed, but {shard.url} is missing or truncated; "
                "pack again with --overwrite"
            )
    return True


def prepare(out: Path, layout: PackingLayout, with_vocabulary: bool) -> None:
    """Record the files to be written as ours and remove those of an older set.

    Receipts of `layout` stay, so the shards of an interrupted run can be reused.

    Raises:
        InputError: a file to be written exists already and is not ours.
    """
    planned = {INDEX_NAME, *(shard.url for shard in layout.shards)}
    if with_vocabulary:
        planned.add(VOCABULARY)

    # Refuse before anything is changed.
    owned = _owned_names(out)
    foreign = sorted(name for name in planned - owned if (out / name).exists())
    if foreign:
        raise InputError(
            f"{out}: contains {foreign[0]} ({len(foreign)} such files), which this tool did not "
            "write; choose an empty directory"
        )

    # The index goes first: a directory that has one is a finished set.
    write_json(out / JOURNAL, {"format": FORMAT, "tool": TOOL, "owned": sorted(owned | planned)})
    (out / INDEX_NAME).unlink(missing_ok=True)
    for name in owned - planned:
        (out / name).unlink(missing_ok=True)

    receipts = {receipt_path(out, shard.url) for shard in layout.shards}
    for file in _leftovers(out):
        if file not in receipts:
            file.unlink()


def has_leftovers(out: Path) -> bool:
    """Return whether a process that packs, or was killed, has files of its work in `out`."""
    return bool(_leftovers(out)) or any((out / name).exists() for name in (JOURNAL, LOCK))


def remove_leftovers(out: Path) -> None:
    """Remove what only an unfinished run needs."""
    for file in _leftovers(out):
        file.unlink()
    (out / JOURNAL).unlink(missing_ok=True)  # last: it says that the other files are ours


def _owned_names(out: Path) -> set[str]:
    """Return the names of files that this tool wrote: those in the journal and in the index."""
    owned: set[str] = set()
    journal = _read_if_ours(out / JOURNAL)
    if journal is not None:
        owned |= _names(journal.get("owned"))
    index = _read_if_ours(out / INDEX_NAME)
    if index is not None:
        shards = index.get("shardlist")
        shards = shards if isinstance(shards, list) else []
        urls = [shard.get("url") for shard in shards if isinstance(shard, dict)]
        # A set without a vocabulary has not written the vocab.txt that may lie next to it.
        owned |= {INDEX_NAME, *_names([index.get("vocabulary")]), *_names(urls)}
    return {name for name in owned if _OUTPUT.fullmatch(name)}


def _names(value: Any) -> set[str]:
    """Return the texts in a list; a damaged file may hold anything."""
    return {name for name in value if isinstance(name, str)} if isinstance(value, list) else set()


def _read_if_ours(file: Path) -> dict | None:
    """Read a JSON file of this tool; None if there is none, or it is another tool's."""
    try:
        tree = parse_strict_json(file.read_bytes())
    except (OSError, ValueError):
        return None
    return tree if isinstance(tree, dict) and tree.get("format") == FORMAT else None


def _leftovers(out: Path) -> list[Path]:
    try:
        files = sorted(out.iterdir())
    except OSError:
        return []
    return [file for file in files if _LEFTOVER.fullmatch(file.name)]
