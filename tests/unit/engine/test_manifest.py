"""The manifest finds every difference between a checkpoint and what was written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from coupalign.distributed.world import World
from coupalign.engine.manifest import MANIFEST, find_damage, find_file_damage, write_manifest

ALONE = World(0, 1, 0, 1, torch.device("cpu"))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a").write_bytes(b"1234")
    (tmp_path / "b").write_bytes(b"5678")
    write_manifest(tmp_path, ALONE)
    return tmp_path


def test_whole_checkpoint_has_no_damage(checkpoint: Path) -> None:
    assert find_damage(checkpoint, ALONE) == []
    assert find_file_damage(checkpoint, "b") is None


def test_damage_is_named_file_by_file(checkpoint: Path) -> None:
    (checkpoint / "folder" / "a").write_bytes(b"12345")
    (checkpoint / "b").write_bytes(b"5679")

    assert find_damage(checkpoint, ALONE) == [
        "b has another sha256 than when it was written",
        "folder/a has 5 bytes instead of 4",
    ]
    assert "b has another sha256" in find_file_damage(checkpoint, "b")


def test_missing_file_and_missing_manifest_are_damage(checkpoint: Path) -> None:
    (checkpoint / "b").unlink()
    assert find_damage(checkpoint, ALONE) == ["b is missing or unreadable"]

    (checkpoint / MANIFEST).write_text("{")
    assert find_damage(checkpoint, ALONE) == [f"{MANIFEST} is missing or unreadable"]
