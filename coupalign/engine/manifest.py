"""The sha256 of every file of a checkpoint: written last, checked first.

A folder without a manifest was never finished. A manifest is checked strictly, so that a wrong bit
in it is found like a wrong bit in any other file:

    {
      "format": 1,
      "files": {"tokenizer/vocab.txt": {"bytes": 1234, "sha256": "64 hex digits"}, …}
    }
"""

from __future__ import annotations

import re
import stat
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from coupalign.distributed.world import World, gather_objects, on_main
from coupalign.errors import RunError
from coupalign.files import parse_strict_json, sha256_of, write_json

MANIFEST = "manifest.json"

_FORMAT = 1
_SHA256 = re.compile(r"[0-9a-f]{64}")
# A line takes about 150 bytes, and DeepSpeed's converter makes three files per parameter.
_MOST_BYTES = 64 * 2**20


class FileRecord(NamedTuple):
    """What a manifest says about a file."""

    bytes: int
    sha256: str


class BadManifest(ValueError):
    """A manifest is missing or damaged; the message says how, without the folder."""


class Measured(NamedTuple):
    """What a file is now, or why it cannot be read."""

    name: str
    bytes: int = 0
    sha256: str = ""
    problem: str = ""


def write_manifest(folder: Path, world: World) -> None:
    """Describe all files below `folder`, each rank reading its part of them; collective.

    Raises:
        RunError: a rank cannot read a file.
    """
    names = on_main(lambda: _list_files(folder), world)
    measured = _measure_files(folder, dict.fromkeys(names), world)

    unreadable = [f"{file.name} {file.problem}" for file in measured if file.problem]
    if unreadable:
        raise RunError(
            f"{folder}: {unreadable[0]} on one of the ranks, just after it was written. All nodes "
            "must share the file system of run_dir, and nobody else may remove files from it"
        )

    files = {file.name: {"bytes": file.bytes, "sha256": file.sha256} for file in measured}
    on_main(lambda: write_json(folder / MANIFEST, {"format": _FORMAT, "files": files}), world)


def read_manifest(folder: Path) -> dict[str, FileRecord]:
    """Read the manifest of a folder: records by file name.

    Raises:
        BadManifest: it is missing, or anything in it is not as `write_manifest` writes it.
    """
    path = folder / MANIFEST
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MOST_BYTES:
            raise ValueError("not a file that we wrote")
        # A bit can turn one name into another: two equal names are refused.
        tree = parse_strict_json(path.read_text("utf-8"))
        return _check_tree(tree)
    except FileNotFoundError as error:
        raise BadManifest(f"{MANIFEST} is missing") from error
    except (OSError, ValueError, TypeError) as error:
        raise BadManifest(f"{MANIFEST} is unreadable or damaged") from error


def find_damage(folder: Path, world: World, uses: Callable[[str], bool]) -> list[str]:
    """Compare all files with the manifest; collective.

    Args:
        uses: whether a file of this name, if it is there, is read by anything. Such a file must be
            in the manifest; others may be there, as those of the file system or of users.

    Returns:
        one line per difference, the same on every rank; empty if there is none.
    """

    def expect() -> tuple[dict[str, FileRecord], list[str]]:
        try:
            expected = read_manifest(folder)
        except BadManifest as error:
            return {}, [str(error)]
        return expected, _find_unlisted(folder, expected, uses)

    expected, problems = on_main(expect, world)
    measured = _measure_files(folder, expected, world)
    return [*problems, *_describe_differences(expected, measured)]


def find_damage_of(folder: Path, uses: Callable[[str], bool]) -> list[str]:
    """Compare the files that are used with the manifest, in this process alone; see `find_damage`.

    Files that are not used are not read.
    """
    try:
        expected = read_manifest(folder)
    except BadManifest as error:
        return [str(error)]

    used = {name: record for name, record in expected.items() if uses(name)}
    measured = [_measure(folder, name, record) for name, record in used.items()]
    problems = _find_unlisted(folder, expected, uses)
    return [*problems, *_describe_differences(used, measured)]


def _describe_differences(
    expected: dict[str, FileRecord], measured: Iterable[Measured]
) -> list[str]:
    problems = []
    for file in measured:
        record = expected[file.name]
        if file.problem:
            problems.append(f"{file.name} {file.problem}")
        elif file.bytes != record.bytes:
            problems.append(f"{file.name} has {file.bytes:,} bytes instead of {record.bytes:,}")
        elif file.sha256 != record.sha256:
            problems.append(f"{file.name} has another sha256 than when it was written")
    return problems


def _check_tree(tree: Any) -> dict[str, FileRecord]:
    """Check what the file holds; raises ValueError or TypeError."""
    if not _has_keys(tree, {"format", "files"}) or type(tree["format"]) is not int:
        raise ValueError("keys")
    if tree["format"] != _FORMAT or not isinstance(tree["files"], dict) or not tree["files"]:
        raise ValueError("files")
    return {_check_name(name): _check_record(record) for name, record in tree["files"].items()}


def _check_name(name: str) -> str:
    """Check that a name is a plain path inside the folder, as `_list_files` makes them."""
    path = PurePosixPath(name)
    is_plain = str(path) == name and not path.is_absolute() and ".." not in path.parts
    if not is_plain or not path.parts or not name.isprintable() or name == MANIFEST:
        raise ValueError(name)
    return name


def _check_record(record: Any) -> FileRecord:
    if not _has_keys(record, {"bytes", "sha256"}):
        raise ValueError("keys")
    if type(record["bytes"]) is not int or record["bytes"] < 0:
        raise ValueError("bytes")
    if not _SHA256.fullmatch(record["sha256"]):
        raise ValueError("sha256")
    return FileRecord(**record)


def _has_keys(value: Any, keys: set[str]) -> bool:
    return isinstance(value, dict) and value.keys() == keys


def _find_unlisted(
    folder: Path, expected: dict[str, FileRecord], uses: Callable[[str], bool]
) -> list[str]:
    """Name the files that would be read although the manifest does not vouch for them."""
    unlisted = [name for name in _list_files(folder) if name not in expected and uses(name)]
    return [f"{name} is not in {MANIFEST}" for name in unlisted]


def _list_files(folder: Path) -> list[str]:
    """List all files below `folder`, as "tokenizer/vocab.txt", except the manifest."""
    paths = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    names = {path.relative_to(folder).as_posix() for path in paths}
    return sorted(names - {MANIFEST})


def _measure_files(
    folder: Path, expected: dict[str, FileRecord] | dict[str, None], world: World
) -> list[Measured]:
    """Measure each file on one of the ranks; returns all of them in the order of their names."""
    names = sorted(expected)
    own = [_measure(folder, name, expected[name]) for name in names[world.rank :: world.size]]
    measured = [file for files in gather_objects(own, world) for file in files]
    return sorted(measured)


def _measure(folder: Path, name: str, expected: FileRecord | None) -> Measured:
    """Measure a file; one whose size is not the expected one is not read."""
    path = folder / name
    links = [part for part in (path, *path.parents) if folder in part.parents and part.is_symlink()]
    try:
        status = path.lstat()
        if links or not stat.S_ISREG(status.st_mode):
            return Measured(name, problem="is a link or no plain file")
        if expected is not None and status.st_size != expected.bytes:
            return Measured(name, status.st_size)
        return Measured(name, status.st_size, sha256_of(path))
    except (OSError, ValueError):
        return Measured(name, problem="is missing or unreadable")
