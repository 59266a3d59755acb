"""The outbox: where an MLflow run is sent to, and what is still to be sent."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from coupalign.config.schema import MlflowTracking
from coupalign.tracking.journal import Journal
from coupalign.tracking.outbox import (
    STATE,
    Outbox,
    find_way_out,
    sole_sender,
    track_command,
    tracking_address,
)


def test_tracking_address_is_configured_or_from_the_environment_or_next_to_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "runs" / "a"
    relative_run_dir = Path("runs/a")
    database_next_to_run = f"sqlite:///{tmp_path}/runs/mlflow.db"
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    # Nothing configured: a database next to the run. Relative files become absolute.
    assert tracking_address(MlflowTracking(), run_dir) == database_next_to_run
    monkeypatch.chdir(tmp_path)
    assert tracking_address(MlflowTracking(), relative_run_dir) == database_next_to_run
    own_file = MlflowTracking(uri="sqlite:///x.db")
    assert tracking_address(own_file, relative_run_dir) == f"sqlite:///{tmp_path}/x.db"

    # The configuration wins over the environment.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracker:5000")
    assert tracking_address(MlflowTracking(), tmp_path / "a") == "http://tracker:5000"
    own_server = MlflowTracking(uri="http://other:1")
    assert tracking_address(own_server, tmp_path / "a") == "http://other:1"


def new_outbox(run_dir: Path) -> Outbox:
    return Outbox(path=run_dir / STATE, uri="http://tracker:1", experiment="a", run_name="b")


def test_outbox_survives_a_restart(tmp_path: Path) -> None:
    outbox = new_outbox(tmp_path)

    outbox.change(run_id="7", sent=3, params={"seed": "0"})

    assert Outbox.read(tmp_path) == outbox


@pytest.mark.parametrize(
    "content",
    [
        None,
        "",
        "[]",
        '{"uri": "http://tracker:1"}',
        '{"uri": "http://tracker:1", "experiment": "a", "run_name": "b", "sent": -1}',
        '{"uri": "http://tracker:1", "experiment": "a", "run_name": "b", "artifacts": [7]}',
        '{"uri": "http://tracker:1", "experiment": "a", "run_name": "b", "run_id": "../1"}',
        "[" * 100_000,
        '{"uri": "http://tracker:1/\\u001b[31m", "experiment": "a", "run_name": "b"}',
    ],
    ids=lambda content: str(content)[-20:],
)
def test_missing_or_damaged_outbox_is_none(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / STATE).write_text(content)

    assert Outbox.read(tmp_path) is None


def test_artifact_that_was_sent_waits_again_when_it_is_added_again(tmp_path: Path) -> None:
    outbox = new_outbox(tmp_path)

    outbox.add_artifact(tmp_path / "score.json", "scores")
    assert outbox.waiting() == (0, 1)

    outbox.artifacts[0]["sent"] = 1
    assert outbox.waiting() == (0, 0)

    outbox.add_artifact(tmp_path / "score.json", "scores")
    assert outbox.waiting() == (0, 1)
    assert len(outbox.artifacts) == 1


def test_start_over_marks_everything_as_unsent(tmp_path: Path) -> None:
    # A run whose one row and one artifact were sent.
    journal = Journal(tmp_path)
    journal.log(1, {"loss": 1.0})
    journal.close()
    outbox = new_outbox(tmp_path)
    outbox.add_artifact(tmp_path / "score.json", "")
    outbox.artifacts[0]["sent"] = 1
    outbox.change(run_id="7", sent=journal.path.stat().st_size)
    assert outbox.waiting() == (0, 0)

    outbox.start_over(uri="http://other:1")

    assert outbox.waiting() == (1, 1)
    assert outbox.run_id is None
    assert Outbox.read(tmp_path).uri == "http://other:1"


def settled_outbox(run_dir: Path) -> Outbox:
    """The outbox of a run that was sent: one artifact, and 7 bytes of the journal."""
    run_dir.mkdir(parents=True)
    outbox = new_outbox(run_dir)
    outbox.add_artifact(run_dir / "score.json")
    outbox.artifacts[0]["sent"] = 1
    assert outbox.settle() is None
    outbox.change(run_id="7", sent=7)
    return outbox


def test_copy_of_a_run_directory_gets_an_mlflow_run_of_its_own(tmp_path: Path) -> None:
    original = settled_outbox(tmp_path / "a")

    shutil.copytree(tmp_path / "a", tmp_path / "b")
    copy = Outbox.read(tmp_path / "b")
    found = copy.settle()

    assert f"a copy of '{tmp_path}/a'" in found
    assert copy.key != original.key
    assert (copy.run_id, copy.sent, copy.artifacts[0]["sent"]) == (None, 0, 0)
    assert copy.settle() is None
    assert Outbox.read(tmp_path / "b") == copy
    assert Outbox.read(tmp_path / "a").settle() is None
    assert Outbox.read(tmp_path / "a") == original


def test_moved_run_directory_goes_on_in_its_mlflow_run(tmp_path: Path) -> None:
    original = settled_outbox(tmp_path / "a")

    (tmp_path / "a").rename(tmp_path / "b")
    moved = Outbox.read(tmp_path / "b")
    found = moved.settle()

    assert "continues in the same MLflow run" in found
    assert (moved.key, moved.run_id, moved.sent) == (original.key, "7", 7)
    assert moved.settle() is None


def test_copy_whose_original_was_moved_is_still_a_copy(tmp_path: Path) -> None:
    settled_outbox(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "a").rename(tmp_path / "c")

    copy, moved = Outbox.read(tmp_path / "b"), Outbox.read(tmp_path / "c")

    assert "a copy of" in copy.settle()
    assert "same MLflow run" in moved.settle()
    assert (copy.run_id, moved.run_id) == (None, "7")


def test_directory_under_two_paths_is_no_copy(tmp_path: Path) -> None:
    original = settled_outbox(tmp_path / "a")
    (tmp_path / "link").symlink_to(tmp_path / "a")

    again = Outbox.read(tmp_path / "link")

    assert again.settle() is None
    assert again.key == original.key


def test_what_leaves_the_run_directory_is_found(tmp_path: Path) -> None:
    run, keys = tmp_path / "run", tmp_path / "keys"
    (run / "pictures" / "deep").mkdir(parents=True)
    keys.write_text("secret")
    (run / "pictures" / "a.png").write_text("a")
    (run / "pictures" / "deep" / "same.png").symlink_to("../a.png")

    assert find_way_out(run, run / "pictures", "pictures") is None
    assert find_way_out(run, run / "pictures" / "a.png") is None

    assert "leads out" in find_way_out(run, run / "../keys")
    assert "leads out" in find_way_out(run, run / str(keys))
    assert "leads out" in find_way_out(run, run / "pictures", "../other-run")
    assert "leads out" in find_way_out(run, run / "pictures", "/etc")
    (run / "pictures" / "deep" / "b.png").symlink_to(keys)
    assert "leads out" in find_way_out(run, run / "pictures")
    (run / "pictures" / "deep" / "b.png").unlink()
    os.mkfifo(run / "pictures" / "pipe")
    assert "no ordinary file" in find_way_out(run, run / "pictures")


def test_lock_of_the_sender_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("precious")
    (tmp_path / "tracking.lock").symlink_to(tmp_path / "keys")

    with pytest.raises(OSError), sole_sender(tmp_path):
        pass

    assert (tmp_path / "keys").read_text() == "precious"


def test_password_of_the_environment_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:hunter2@host/db")

    assert tracking_address(MlflowTracking(), tmp_path) == "postgresql://me:hunter2@host/db"
    assert (
        track_command(tmp_path, "postgresql://me:hunter2@host/db") == f"coupalign track {tmp_path}"
    )
    other = track_command(tmp_path, "postgresql://me:hunter2@other/db")
    assert other == f"coupalign track {tmp_path} --tracking-uri 'postgresql://***@other/db'"
    assert "'http://h; rm -r ~'" in track_command(tmp_path, "http://h; rm -r ~")


def test_stored_state_is_plain_json(tmp_path: Path) -> None:
    settled_outbox(tmp_path / "a")

    state = json.loads((tmp_path / "a" / STATE).read_text())

    assert state["place"] == str(tmp_path / "a")
    assert state["inode"] == [os.stat(tmp_path / "a").st_dev, os.stat(tmp_path / "a").st_ino]


def test_name_that_is_not_utf8_and_an_old_file_with_a_password_are_read(tmp_path: Path) -> None:
    run_dir = tmp_path / os.fsdecode(b"run-\xff")
    run_dir.mkdir()
    outbox = new_outbox(run_dir)
    outbox.uri = "postgresql://me:hunter2@host/db"
    outbox.change()

    again = Outbox.read(run_dir)

    assert again.uri == "postgresql://***@host/db"
    assert again.settle() is None
    assert Outbox.read(run_dir).settle() is None
    assert "hunter2" not in (run_dir / STATE).read_text()
