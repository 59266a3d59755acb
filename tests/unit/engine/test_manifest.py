"""The manifest finds every difference between a checkpoint and what was written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coupalign.distributed.world import World
from coupalign.engine.manifest import (
    MANIFEST,
    BadManifest,
    find_damage,
    find_damage_of,
    read_manifest,
    write_manifest,
)
from coupalign.errors import RunError

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
GOOD = {"bytes": 4, "sha256": "0" * 64}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a").write_bytes(b"1234")
    (tmp_path / "b").write_bytes(b"5678")
    write_manifest(tmp_path, ALONE)
    return tmp_path


def uses_all(name: str) -> bool:
    return True


def damage_of(folder: Path) -> list[str]:
    """All damage, which one process alone finds as well."""
    damage = find_damage(folder, ALONE, uses_all)
    assert find_damage_of(folder, uses_all) == damage
    return damage


def test_whole_checkpoint_has_no_damage(checkpoint: Path) -> None:
    assert damage_of(checkpoint) == []


def test_damage_is_named_file_by_file(checkpoint: Path) -> None:
    (checkpoint / "folder" / "a").write_bytes(b"12345")
    (checkpoint / "b").write_bytes(b"5679")

    assert damage_of(checkpoint) == [
        "b has another sha256 than when it was written",
        "folder/a has 5 bytes instead of 4",
    ]


def test_missing_file_is_damage(checkpoint: Path) -> None:
    (checkpoint / "b").unlink()

    assert damage_of(checkpoint) == ["b is missing or unreadable"]


def test_missing_or_torn_manifest_is_damage(checkpoint: Path) -> None:
    whole = (checkpoint / MANIFEST).read_bytes()

    for length in range(len(whole) - 2):
        (checkpoint / MANIFEST).write_bytes(whole[:length])
        assert damage_of(checkpoint) == [f"{MANIFEST} is unreadable or damaged"]

    (checkpoint / MANIFEST).unlink()
    assert damage_of(checkpoint) == [f"{MANIFEST} is missing"]


def test_every_wrong_bit_of_a_manifest_is_damage(checkpoint: Path) -> None:
    """White space between the values is the only part that may change without damage."""
    whole = (checkpoint / MANIFEST).read_bytes()
    content = json.loads(whole)

    for place in range(len(whole)):
        for bit in range(8):
            wrong = bytearray(whole)
            wrong[place] ^= 1 << bit
            (checkpoint / MANIFEST).write_bytes(wrong)
            damage = damage_of(checkpoint)
            assert damage or json.loads(wrong) == content, (place, bit)


@pytest.mark.parametrize(
    "content",
    [
        {},
        [],
        None,
        {"format": 1, "files": {}},
        {"format": 1, "files": []},
        {"format": 2, "files": {"b": GOOD}},
        {"format": True, "files": {"b": GOOD}},
        {"format": 1, "files": {"b": GOOD}, "more": 1},
        {"format": 1, "files": {"b": None}},
        {"format": 1, "files": {"b": {"bytes": 4}}},
        {"format": 1, "files": {"b": {**GOOD, "bytes": -1}}},
        {"format": 1, "files": {"b": {**GOOD, "bytes": 4.0}}},
        {"format": 1, "files": {"b": {**GOOD, "bytes": True}}},
        {"format": 1, "files": {"b": {**GOOD, "sha256": "A" * 64}}},
        {"format": 1, "files": {"b": {**GOOD, "sha256": "0" * 63}}},
        {"format": 1, "files": {"b": {**GOOD, "sha256": None}}},
        *(
            {"format": 1, "files": {name: GOOD}}
            for name in ("", ".", "/dev/zero", "..", "../b", "a/../b", "a//b", "a/", "./b")
        ),
        {"format": 1, "files": {"a\nb": GOOD}},
        {"format": 1, "files": {"a\x00": GOOD}},
        {"format": 1, "files": {MANIFEST: GOOD}},
    ],
)
def test_manifest_of_another_form_is_refused(tmp_path: Path, content: Any) -> None:
    (tmp_path / MANIFEST).write_text(json.dumps(content))

    with pytest.raises(BadManifest, match="unreadable or damaged"):
        read_manifest(tmp_path)


def test_name_that_is_listed_twice_is_refused(tmp_path: Path) -> None:
    """One bit can make two names equal, and Python keeps the last."""
    record = json.dumps(GOOD)
    (tmp_path / MANIFEST).write_text(f'{{"format": 1, "files": {{"b": {record}, "b": {record}}}}}')

    with pytest.raises(BadManifest):
        read_manifest(tmp_path)


def test_deep_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text("[" * 100_000)

    with pytest.raises(BadManifest):
        read_manifest(tmp_path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_manifest_of_any_json_is_read_or_refused(tmp_path: Path, content: Any) -> None:
    (tmp_path / MANIFEST).write_text(json.dumps({"format": 1, "files": content}))

    assert damage_of(tmp_path) != []


def test_file_that_would_be_used_must_be_listed(checkpoint: Path) -> None:
    (checkpoint / "ema.safetensors").write_bytes(b"somebody else's")
    (checkpoint / ".DS_Store").touch()

    def uses(name: str) -> bool:
        return not name.startswith(".")

    assert find_damage(checkpoint, ALONE, uses) == [f"ema.safetensors is not in {MANIFEST}"]


def test_file_that_is_not_used_is_not_read(checkpoint: Path) -> None:
    (checkpoint / "b").write_bytes(b"5679")

    assert find_damage_of(checkpoint, lambda name: name == "folder/a") == []


def test_links_and_devices_are_damage_and_never_read(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "b").rename(checkpoint / "same bytes")
    (checkpoint / "b").symlink_to("same bytes")
    (checkpoint / "folder").rename(checkpoint / "elsewhere")
    (checkpoint / "folder").symlink_to("elsewhere")

    def uses(name: str) -> bool:
        return name in ("b", "folder/a")

    found = find_damage(checkpoint, ALONE, uses)
    assert found == [
        "b is a link or no plain file",
        "folder/a is a link or no plain file",
    ]

    # A pipe that nobody writes would block its reader.
    (checkpoint / "b").unlink()
    os.mkfifo(checkpoint / "b")
    assert "b is a link or no plain file" in find_damage(checkpoint, ALONE, uses)


def test_manifest_is_not_written_for_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "gone").symlink_to("nowhere")

    with pytest.raises(RunError, match="gone is a link or no plain file"):
        write_manifest(tmp_path, ALONE)

    assert not (tmp_path / MANIFEST).exists()
