"""The sha256 of every file of a checkpoint: written last, checked first.

A folder without a manifest was never finished.
"""

from __future__ import annotations

import json
from pathlib import Path

from coupalign.distributed.world import World, gather_objects, on_main
from coupalign.files import sha256_of, write_json

MANIFEST = "manifest.json"

Measured = tuple[str, int | None, str | None]
"""A file's (name, bytes, sha256); None and None if it cannot be read."""


def write_manifest(folder: Path, world: World) -> None:
    """Describe all files below `folder`, each rank reading its part of them; collective."""
    names = on_main(lambda: _list_files(folder), world)
    files = {
        name: {"bytes": size, "sha256": sha256}
        for name, size, sha256 in _measure_files(folder, names, world)
    }
    on_main(lambda: write_json(folder / MANIFEST, {"format": 1, "files": files}), world)


def find_damage(folder: Path, world: World) -> list[str]:
    """Compare all files with the manifest; collective.

    Returns:
        one line per difference, the same on every rank; empty if there is none.
    """
    expected = on_main(lambda: _read_manifest(folder), world)
    if expected is None:
        return [f"{MANIFEST} is missing or unreadable"]

    problems = []
    for name, size, sha256 in _measure_files(folder, sorted(expected), world):
        if size is None:
            problems.append(f"{name} is missing or unreadable")
        elif size != expected[name]["bytes"]:
            problems.append(f"{name} has {size:,} bytes instead of {expected[name]['bytes']:,}")
        elif sha256 != expected[name]["sha256"]:
            problems.append(f"{name} has another sha256 than when it was written")
    return problems


def find_file_damage(folder: Path, name: str) -> str | None:
    """Compare one file with the manifest. None: no difference, or the manifest lacks the file."""
    expected = (_read_manifest(folder) or {}).get(name)
    if expected is None or sha256_of(folder / name) == expected["sha256"]:
        return None
    return f"{folder / name} has another sha256 than when it was written"


def _read_manifest(folder: Path) -> dict[str, dict] | None:
    try:
        return json.loads((folder / MANIFEST).read_text("utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _list_files(folder: Path) -> list[str]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return sorted(str(path.relative_to(folder)) for path in paths)


def _measure_files(folder: Path, names: list[str], world: World) -> list[Measured]:
    """Measure each file on one of the ranks; returns all of them in the order of their names."""
    own = [_measure(folder, name) for name in names[world.rank :: world.size]]
    measured = [file for files in gather_objects(own, world) for file in files]
    return sorted(measured, key=lambda file: file[0])


def _measure(folder: Path, name: str) -> Measured:
    try:
        return name, (folder / name).stat().st_size, sha256_of(folder / name)
    except OSError:
        return name, None, None
