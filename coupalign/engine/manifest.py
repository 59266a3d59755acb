"""The sha256 of every file of a checkpoint: written last, read first. A folder without one was never finished."""

from __future__ import annotations

import json
from pathlib import Path

from coupalign.distributed.world import World, gather_objects, on_main
from coupalign.files import sha256_of, write_json

MANIFEST = "manifest.json"


def write_manifest(folder: Path, world: World) -> None:
    """Describe all files below `folder`, each rank reading its part of them; collective."""
    found = _read(folder, _names(folder, world), world)
    files = {name: {"bytes": size, "sha256": digest} for name, size, digest in found}
    on_main(lambda: write_json(folder / MANIFEST, {"format": 1, "files": files}), world)


def find_damage(folder: Path, world: World) -> list[str]:
    """What is not as the manifest says, a line a file, the same on every rank; empty where all is well; collective."""

    def listed() -> dict[str, dict] | None:
        try:
            return json.loads((folder / MANIFEST).read_text("utf-8"))["files"]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    wanted = on_main(listed, world)
    if wanted is None:
        return [f"{MANIFEST} is missing or unreadable"]
    problems = []
    for name, size, digest in _read(folder, sorted(wanted), world):
        if size is None:
            problems.append(f"{name} is missing or unreadable")
        elif size != wanted[name]["bytes"]:
            problems.append(f"{name} has {size:,} bytes instead of {wanted[name]['bytes']:,}")
        elif digest != wanted[name]["sha256"]:
            problems.append(f"{name} has another sha256 than when it was written")
    return problems


def damaged_alone(folder: Path, name: str) -> str | None:
    """What is wrong with one file, where the folder has a manifest that lists it."""
    try:
        wanted = json.loads((folder / MANIFEST).read_text("utf-8"))["files"][name]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return (
        None
        if sha256_of(folder / name) == wanted["sha256"]
        else f"{folder / name} has another sha256 than when it was written"
    )


def _names(folder: Path, world: World) -> list[str]:
    return on_main(
        lambda: sorted(
            str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()
        ),
        world,
    )


def _read(folder: Path, names: list[str], world: World) -> list[tuple[str, int | None, str | None]]:
    """(name, bytes, sha256) of each file, in the order of `names`; none and none where it cannot be read."""
    mine = [_look(folder, name) for name in names[world.rank :: world.size]]
    return sorted(
        (entry for part in gather_objects(mine, world) for entry in part),
        key=lambda entry: entry[0],
    )


def _look(folder: Path, name: str) -> tuple[str, int | None, str | None]:
    try:
        return name, (folder / name).stat().st_size, sha256_of(folder / name)
    except OSError:
        return name, None, None
