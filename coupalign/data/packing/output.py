"""The output directory of `pack`: who may write to it, which files are ours, what is left over.

While a set is being packed, the directory contains:

    .pack.json                the journal: names of the files that are ours
    shard-000000.tar          a finished shard
    .shard-000000.tar.json    its receipt: digests that prove that the shard is finished
    vocab.txt
    index.json                written last; then the dot files are removed
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from coupalign.data.index import FORMAT, INDEX_NAME, read_index
from coupalign.data.packing.layout import TOOL, PackingLayout
from coupalign.errors import InputError
from coupalign.files import write_json

VOCABULARY = "vocab.txt"
JOURNAL = ".pack.json"

_OUTPUT = re.compile(r"shard-\d{6}\.tar|vocab\.txt|index\.json")
_RECEIPT = r"\.shard-\d{6}\.tar\.json"
_WRITTEN = rf"{_OUTPUT.pattern}|{_RECEIPT}|\.pack\.json"
_LEFTOVER = re.compile(rf"{_RECEIPT}|\.({_WRITTEN})\.\d+(-[\w.-]+)?\.partial")


def receipt_path(out: Path, url: str) -> Path:
    """Return the path of the receipt of a shard."""
    return out / f".{url}.json"


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Create `out` and lock it, since two processes would remove each other's files.

    Raises:
        InputError: `out` is a file, or another process is packing into it.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"{out}: is a file; choose a directory for the shards") from None

    # The lock goes away with the process, however it ends.
    handle = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise InputError(
            f"{out}: another process is packing into this directory; wait until it has finished"
        ) from None
    except OSError:
        pass  # a file system without locks

    try:
        yield
    finally:
        os.close(handle)


def has_finished_set(out: Path, layout: PackingLayout) -> bool:
    """Return whether `out` contains the finished set of `layout`, judged by the file sizes.

    Raises:
        InputError: `out` contains another finished set, or a shard of this one is damaged.
    """
    if not (out / INDEX_NAME).exists():
        return False

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
        owned |= set(journal.get("owned", ()))
    index = _read_if_ours(out / INDEX_NAME)
    if index is not None:
        owned |= {INDEX_NAME, VOCABULARY, *(shard["url"] for shard in index.get("shardlist", ()))}
    return {name for name in owned if _OUTPUT.fullmatch(name)}


def _read_if_ours(file: Path) -> dict | None:
    """Read a JSON file of this tool; None if there is none, or it is another tool's."""
    try:
        tree = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return None
    return tree if isinstance(tree, dict) and tree.get("format") == FORMAT else None


def _leftovers(out: Path) -> list[Path]:
    return [file for file in sorted(out.iterdir()) if _LEFTOVER.fullmatch(file.name)]
