"""The output directory: finished sets, files of others, and one process at a time."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from coupalign.data.packing import output
from coupalign.errors import InputError, RunError
from tests.unit.data.conftest import change_index
from tests.unit.data.packing.small_set import contents, pack_quietly, recipe_of


def test_finished_set_is_left_as_it_is(refer_root: Path, packed: Path) -> None:
    before = {file.name: file.stat().st_mtime_ns for file in packed.iterdir()}

    report = pack_quietly(recipe_of(refer_root), packed)

    assert report.state == "already packed"
    assert "already packed" in report.table()
    assert report.shards == 3
    assert {file.name: file.stat().st_mtime_ns for file in packed.iterdir()} == before


def test_set_of_an_early_version_gets_hashes_with_overwrite(refer_root: Path, packed: Path) -> None:
    """Packing again alone changes nothing: a run may be resumed over this index."""
    now = contents(packed)

    def forget(tree: dict) -> None:
        for image in tree["images"]:
            del image["photo"]

    change_index(packed, forget)
    old = contents(packed)

    report = pack_quietly(recipe_of(refer_root), packed)

    assert contents(packed) == old
    (warning,) = [line for line in report.warnings if "no hashes" in line]
    assert "12 photographs" in warning and "--overwrite" in warning

    report = pack_quietly(recipe_of(refer_root), packed, overwrite=True)

    assert contents(packed) == now
    assert not [line for line in report.warnings if "no hashes" in line]


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


def test_vocabulary_of_others_next_to_a_set_without_one_is_kept(
    refer_root: Path, tmp_path: Path
) -> None:
    out = tmp_path / "shards"
    bare = recipe_of(refer_root, vocabulary_size=None)
    pack_quietly(bare, out)
    (out / "vocab.txt").write_text("precious")

    pack_quietly(bare, out, overwrite=True)
    with pytest.raises(InputError, match="contains vocab.txt .* did not write"):
        pack_quietly(recipe_of(refer_root), out, overwrite=True)

    assert (out / "vocab.txt").read_text() == "precious"
    assert (out / "index.json").is_file()


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

    with output.writable(tmp_path / "out"):
        with pytest.raises(
            InputError, match="out: is being packed by .*Wait until it has finished"
        ):
            pack_quietly(recipe_of(refer_root), tmp_path / "out")
    with pytest.raises(InputError, match="is a file"):
        pack_quietly(recipe_of(refer_root), tmp_path / "file")


# -------------------------------------------------------------------------------------- Bad disks


def fail_from_call(number: int, code: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let flushing and renaming files fail from the n-th call on; returns the calls so far."""
    calls = [0]

    def failing(function):
        def call(*args, **kwargs):
            calls[0] += 1
            if calls[0] > number:
                raise OSError(code, os.strerror(code))
            return function(*args, **kwargs)

        return call

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, failing(getattr(os, name)))
    return calls


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS])
def test_failing_disk_is_one_line_and_the_same_command_goes_on(
    refer_root: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    recipe, number = recipe_of(refer_root), 0
    while True:
        out = tmp_path / f"out{number}"
        with monkeypatch.context() as patch:
            calls = fail_from_call(number, code, patch)
            try:
                pack_quietly(recipe, out)
            except RunError as error:
                assert "\n" not in str(error)
                assert f"{out}: packing stopped: {os.strerror(code)}" in str(error)
                assert "start the same command again" in str(error)
        if calls[0] <= number:
            break

        assert not (out / "index.json").exists()
        pack_quietly(recipe, out)
        assert contents(out) == contents(packed)
        number += 3
    assert number > 10


def test_place_without_inodes_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Status:
        f_files, f_favail = 1000, 1

    monkeypatch.setattr(os, "statvfs", lambda path: Status)

    with pytest.raises(RunError, match="no inodes are left"):
        with output.writable(tmp_path / "out"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_place_that_cannot_be_written_is_refused_before_the_work(
    refer_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "out")

    monkeypatch.setattr("coupalign.files.TemporaryFile", refuse)

    with pytest.raises(InputError, match="out: the shards cannot be written there.*--out"):
        pack_quietly(recipe_of(refer_root), tmp_path / "out")


@pytest.mark.parametrize("overwrite", [False, True])
def test_name_that_is_too_long_is_refused_in_one_line(
    refer_root: Path, tmp_path: Path, overwrite: bool
) -> None:
    with pytest.raises(InputError, match="name too long"):
        pack_quietly(recipe_of(refer_root), tmp_path / ("left" * 2000), overwrite=overwrite)


def test_finished_set_needs_no_writing(
    refer_root: Path, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "out")

    monkeypatch.setattr("coupalign.files.TemporaryFile", refuse)
    monkeypatch.setattr(os, "unlink", refuse)

    assert pack_quietly(recipe_of(refer_root), packed).state == "already packed"


@pytest.mark.parametrize("journal", ["[1]", '{"format": "coupalign-shards", "owned": 5}', "{"])
def test_damaged_journal_owns_nothing(refer_root: Path, tmp_path: Path, journal: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / ".pack.json").write_text(journal)
    (out / "vocab.txt").write_text("mine")

    with pytest.raises(InputError, match="vocab.txt.*did not write"):
        pack_quietly(recipe_of(refer_root), out)
