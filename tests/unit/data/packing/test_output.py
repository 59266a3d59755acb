"""The output directory: finished sets, files of others, and one process at a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coupalign.data.packing import output
from coupalign.errors import InputError
from tests.unit.data.packing.small_set import contents, pack_quietly, recipe_of


def test_finished_set_is_left_as_it_is(refer_root: Path, packed: Path) -> None:
    before = {file.name: file.stat().st_mtime_ns for file in packed.iterdir()}

    report = pack_quietly(recipe_of(refer_root), packed)

    assert report.state == "already packed"
    assert "already packed" in report.table()
    assert report.shards == 3
    assert {file.name: file.stat().st_mtime_ns for file in packed.iterdir()} == before


def test_another_set_needs_overwrite_which_removes_old_shards(
    refer_root: Path, packed: Path, tmp_path: Path
) -> None:
    other = recipe_of(refer_root, max_images=8, vocabulary_size=None)
    before = contents(packed)

    with pytest.raises(InputError, match="holds the finished set 'small'.*overwrite"):
        pack_quietly(other, packed)
    assert contents(packed) == before

    foreign = {"shard-000099.tar": b"somebody else's"}
    (packed / "shard-000099.tar").write_bytes(foreign["shard-000099.tar"])
    report = pack_quietly(other, packed, overwrite=True)
    pack_quietly(other, tmp_path / "clean")

    assert report.state == "packed"
    assert contents(packed) == contents(tmp_path / "clean") | foreign


def test_damaged_finished_set_is_refused_unless_overwritten(refer_root: Path, packed: Path) -> None:
    expected = contents(packed)
    (packed / "shard-000001.tar").write_bytes(b"short")

    with pytest.raises(
        InputError, match="shard-000001.tar is missing or truncated; pack again with --overwrite"
    ):
        pack_quietly(recipe_of(refer_root), packed)
    pack_quietly(recipe_of(refer_root), packed, overwrite=True)

    assert contents(packed) == expected


@pytest.mark.parametrize("name", ["shard-000001.tar", "vocab.txt", "index.json"])
def test_files_of_others_are_never_touched(refer_root: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("[]")

    for overwrite in (False, True):
        with pytest.raises(InputError, match=f"{name}.*(did not write|not an index)"):
            pack_quietly(recipe_of(refer_root), out, overwrite=overwrite)
        assert contents(out) == {name: b"[]"}


def test_index_of_another_version_needs_overwrite(refer_root: Path, packed: Path) -> None:
    expected = contents(packed)
    tree = json.loads((packed / "index.json").read_text())
    (packed / "index.json").write_text(json.dumps({**tree, "format_version": 0}))

    with pytest.raises(InputError, match="format_version 0, this tool reads 1"):
        pack_quietly(recipe_of(refer_root), packed)
    pack_quietly(recipe_of(refer_root), packed, overwrite=True)

    assert contents(packed) == expected


def test_only_one_process_packs_into_a_directory(refer_root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with output.locked(tmp_path / "out"):
        with pytest.raises(InputError, match="another process is packing"):
            pack_quietly(recipe_of(refer_root), tmp_path / "out")
    with pytest.raises(InputError, match="is a file"):
        pack_quietly(recipe_of(refer_root), tmp_path / "file")
