"""Files and directories appear whole or not at all."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from coupalign.files import remove_debris, sha256_of, whole_directory, whole_file, write_json


def test_a_failure_leaves_the_old_file_and_no_debris(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "file.txt"
    with whole_file(file, "w") as out:
        out.write("old")
    with pytest.raises(RuntimeError), whole_file(file, "w") as out:
        out.write("new")
        raise RuntimeError
    assert file.read_text() == "old"
    assert [path.name for path in file.parent.iterdir()] == ["file.txt"]


@pytest.mark.parametrize("count", [1, 150])
def test_a_directory_is_replaced_as_a_whole(tmp_path: Path, count: int) -> None:
    place = tmp_path / "place"
    for text in ("old", "new"):
        with whole_directory(place) as folder:
            for number in range(count):
                (folder / str(number)).write_text(text)
    with pytest.raises(RuntimeError), whole_directory(place) as folder:
        (folder / "0").write_text("half")
        raise RuntimeError
    assert {file.read_text() for file in place.iterdir()} == {"new"}
    assert [path.name for path in tmp_path.iterdir()] == ["place"]


def test_json_and_hash(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"é": 1})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "é": 1\n}\n'
    assert (
        sha256_of(tmp_path / "a.json")
        == hashlib.sha256((tmp_path / "a.json").read_bytes()).hexdigest()
    )


def test_what_killed_processes_left_is_removed_and_what_is_being_written_is_not(
    tmp_path: Path,
) -> None:
    (tmp_path / "scores").mkdir()
    old, young, folder = (
        tmp_path / "scores" / ".val.csv.12.partial",
        tmp_path / ".a.json.13.partial",
        tmp_path / ".step-1.partial",
    )
    folder.mkdir()
    for file in (old, young, folder / "weights"):
        file.write_text("half")
    for left in (old, folder):
        os.utime(left, (1, 1))
    remove_debris(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == [".a.json.13.partial", "scores"]
