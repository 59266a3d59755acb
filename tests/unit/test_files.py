"""Files and directories appear whole or not at all."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from coupalign.errors import InputError
from coupalign.files import (
    publish_directory,
    read_json,
    remove_debris,
    sha256_of,
    user_cache,
    whole_directory,
    whole_file,
    write_json,
)


def names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_failed_write_leaves_the_old_file_and_no_debris(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "file.txt"
    with whole_file(file, "w") as out:
        out.write("old")

    with pytest.raises(RuntimeError), whole_file(file, "w") as out:
        out.write("new")
        raise RuntimeError

    assert file.read_text() == "old"
    assert names_in(file.parent) == ["file.txt"]


@pytest.mark.parametrize("files", [1, 150])
def test_directory_is_replaced_as_a_whole(tmp_path: Path, files: int) -> None:
    target = tmp_path / "target"

    for text in ("old", "new"):
        with whole_directory(target) as folder:
            for number in range(files):
                (folder / str(number)).write_text(text)
    with pytest.raises(RuntimeError), whole_directory(target) as folder:
        (folder / "0").write_text("half")
        raise RuntimeError

    assert {file.read_text() for file in target.iterdir()} == {"new"}
    assert names_in(tmp_path) == ["target"]


def test_publish_directory_replaces_an_older_one(tmp_path: Path) -> None:
    finished, target = tmp_path / ".partial", tmp_path / "target"
    for folder, text in ((finished, "new"), (target, "old")):
        folder.mkdir()
        (folder / "file").write_text(text)

    publish_directory(finished, target)

    assert (target / "file").read_text() == "new"
    assert names_in(tmp_path) == ["target"]


def test_write_json_ends_with_a_newline_and_keeps_accents(tmp_path: Path) -> None:
    file = tmp_path / "a.json"

    write_json(file, {"é": 1})

    assert file.read_text(encoding="utf-8") == '{\n  "é": 1\n}\n'
    assert read_json(file, "an example") == {"é": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "a.json: no such file; expected the scores of a run"),
        (b"{", "a.json: cannot be read as the scores of a run"),
        (b"\xff", "a.json: cannot be read as the scores of a run"),
    ],
)
def test_read_json_says_what_the_file_should_be(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    file = tmp_path / "a.json"
    if content is not None:
        file.write_bytes(content)

    with pytest.raises(InputError, match=message):
        read_json(file, "the scores of a run")


def test_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"some bytes")

    assert sha256_of(file) == hashlib.sha256(b"some bytes").hexdigest()


def test_remove_debris_spares_files_that_are_being_written(tmp_path: Path) -> None:
    # Given: a file and a folder that killed processes left, and a file that was just begun.
    (tmp_path / "scores").mkdir()
    old_file = tmp_path / "scores" / ".val.csv.12.partial"
    old_folder = tmp_path / ".step-1.partial"
    young_file = tmp_path / ".a.json.13.partial"
    old_folder.mkdir()
    for file in (old_file, young_file, old_folder / "weights"):
        file.write_text("half")
    for path in (old_file, old_folder):
        os.utime(path, (1, 1))

    remove_debris(tmp_path)

    assert sorted(path.name for path in tmp_path.rglob("*")) == [".a.json.13.partial", "scores"]


def test_user_cache_follows_xdg_cache_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert user_cache("shards") == Path("/cache/coupalign/shards")

    monkeypatch.delenv("XDG_CACHE_HOME")
    assert user_cache("shards") == Path.home() / ".cache" / "coupalign" / "shards"
