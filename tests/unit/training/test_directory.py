"""A run directory has one trainer, and is a folder of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from coupalign.config.load import dump, read_config
from coupalign.config.schema import Config
from coupalign.errors import InputError
from coupalign.training import directory as room
from coupalign.training.directory import LOCK, claim_directory, only_trainer
from tests.unit.training.examples import ALONE

HOLD = """
import sys
from pathlib import Path
from coupalign.training.directory import only_trainer
from tests.unit.training.examples import ALONE
with only_trainer(Path(sys.argv[1]), ALONE):
    print("training", flush=True)
    sys.stdin.read()
"""


class FakeTrainedOn:
    def write(self, folder: Path) -> None:
        (folder / "trained_on.json").write_text("{}")


@contextmanager
def trainer(directory: Path) -> Iterator[subprocess.Popen]:
    """Another process that trains in a directory."""
    command = [sys.executable, "-c", HOLD, str(directory)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"training\n"
        yield process
        process.kill()


def claim(directory: Path, checkpoint_bytes: int = 0) -> None:
    claim_directory(Config(run_dir=directory), FakeTrainedOn(), checkpoint_bytes)


def refusal(directory: Path) -> str:
    with pytest.raises(InputError) as error, only_trainer(directory, ALONE):
        pass
    return str(error.value)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_second_trainer_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with trainer(run) as first:
        (run / ".half.partial").write_text("half")

        message = refusal(run)

        assert f"{run}: is being trained by process {first.pid} on host" in message
        assert message.endswith("Wait until that has ended, or choose another name or run_dir")
        assert names_in(run) == [".half.partial", LOCK]


def test_killed_trainer_does_not_keep_the_directory(tmp_path: Path) -> None:
    with trainer(tmp_path / "run"):
        pass

    with only_trainer(tmp_path / "run", ALONE):
        claim(tmp_path / "run")

    assert names_in(tmp_path / "run") == ["config.yaml", "trained_on.json"]


def test_run_that_is_refused_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError), only_trainer(tmp_path / "run", ALONE):
        raise InputError("no such data set")

    assert names_in(tmp_path) == []


def test_trainer_whose_folder_disappears_can_end(tmp_path: Path) -> None:
    with only_trainer(tmp_path / "run", ALONE):
        (tmp_path / "run" / LOCK).unlink()
        (tmp_path / "run").rmdir()


def test_place_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    message = refusal(tmp_path / "file" / "run")

    assert "run: the run directory cannot be written" in message
    assert "choose another run_dir" in message


@pytest.mark.parametrize("content", ["mine", "port: 80\n", "[", "\x00"])
def test_config_of_another_program_is_not_replaced(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.yaml").write_text(content)

    message = refusal(tmp_path)

    assert message.startswith(f"{tmp_path}/config.yaml: is not the configuration of a run")
    assert names_in(tmp_path) == ["config.yaml"]
    assert (tmp_path / "config.yaml").read_text() == content


@pytest.mark.parametrize("place", [".", "..", "~", "/"])
def test_place_with_other_files_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    # Given: a working directory and a home folder that hold files.
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "notes.txt").write_text("mine")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path))

    message = refusal(Path(place).expanduser())

    assert "holds other files than those of a run" in message
    assert names_in(tmp_path / "here") == ["notes.txt"]


def test_run_may_be_trained_from_inside_its_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        with only_trainer(Path("."), ALONE):
            claim(Path("."))

    assert dump(read_config(tmp_path / "config.yaml")) == dump(Config(run_dir=Path(".")))


def test_claim_removes_what_killed_sessions_left_and_nothing_else(tmp_path: Path) -> None:
    # Given: half a checkpoint, and partial folders of other programs.
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / ".step-00000004.partial" / "shares").mkdir(parents=True)
    (checkpoints / ".step-old.partial").mkdir()
    (tmp_path / "sub" / ".photos.partial").mkdir(parents=True)
    for folder in (*checkpoints.iterdir(), tmp_path / "sub" / ".photos.partial"):
        os.utime(folder, (1, 1))

    claim(tmp_path)

    assert names_in(checkpoints) == [".step-old.partial"]
    assert names_in(tmp_path / "sub") == [".photos.partial"]


def test_disk_without_room_for_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a checkpoint takes at least 1000000\.000 GB, and"):
        claim(tmp_path, checkpoint_bytes=10**15)

    assert names_in(tmp_path) == []


def test_file_system_without_inodes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room.os, "statvfs", lambda _: SimpleNamespace(f_files=1000, f_favail=3))
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**12))

    with pytest.raises(InputError, match="room for 3 more files"):
        claim(tmp_path)
