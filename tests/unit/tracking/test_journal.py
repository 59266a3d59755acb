"""The journal: every number once, through kills, resumes and full disks."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from coupalign.config.schema import MlflowTracking, NoTracking
from coupalign.errors import InputError
from coupalign.tracking import JOURNAL, git_revision, open_tracker, read_journal
from coupalign.tracking.journal import Journal
from coupalign.tracking.outbox import tracking_address


def points(run_dir: Path) -> list[tuple[int, str, float]]:
    return [
        (row.step, name, value)
        for row, _ in read_journal(run_dir / JOURNAL)
        for name, value in row.metrics.items()
    ]


def test_a_row_is_on_disk_when_log_returns(tmp_path):
    journal = Journal(tmp_path)
    journal.log(3, {"loss": 0.5})
    value = json.loads((tmp_path / JOURNAL).read_text())
    assert (
        value["step"] == 3
        and value["metrics"] == {"loss": 0.5}
        and isinstance(value["time"], float)
    )
    journal.close()


def test_numbers_that_json_does_not_have_survive_as_strict_json(tmp_path):
    journal = Journal(tmp_path)
    journal.log(0, {"a": math.nan, "b": math.inf, "c": -math.inf})
    journal.close()

    def refuse(word):
        raise AssertionError(word)

    json.loads((tmp_path / JOURNAL).read_text(), parse_constant=refuse)
    (_, _, a), (_, _, b), (_, _, c) = points(tmp_path)
    assert math.isnan(a) and b == math.inf and c == -math.inf


@pytest.mark.parametrize("cut", [1, 7, 30, 45])
def test_a_resume_after_a_kill_counts_no_step_twice_and_misses_none(tmp_path, cut):
    journal = Journal(tmp_path)
    for step in range(1, 8):
        journal.log(step, {"loss": float(step)})
    whole = (tmp_path / JOURNAL).read_bytes()
    (tmp_path / JOURNAL).write_bytes(whole[:-cut])
    again = Journal(tmp_path)
    for step in range(5, 12):
        again.log(step, {"loss": float(step)})
        again.log(step, {"loss": -1.0, "score": float(step)})
    again.close()
    found = points(tmp_path)
    assert sorted(p for p in found if p[1] == "loss") == [
        (step, "loss", float(step)) for step in range(1, 12)
    ]
    assert [p for p in found if p[1] == "score"] == [
        (step, "score", float(step)) for step in range(5, 12)
    ]
    assert (tmp_path / JOURNAL).read_bytes().endswith(b"\n")


def test_a_damaged_line_in_the_middle_is_left_out_and_offsets_stay_right(tmp_path):
    journal = Journal(tmp_path)
    journal.log(1, {"loss": 1.0})
    journal.close()
    with open(tmp_path / JOURNAL, "ab") as file:
        file.write(b'\x00\x00\x00\n{"step": 2}\n[]\n')
    journal = Journal(tmp_path)
    journal.log(3, {"loss": 3.0})
    journal.close()
    rows = list(read_journal(tmp_path / JOURNAL))
    assert [row.step for row, _ in rows] == [1, 3]
    assert rows[-1][1] == (tmp_path / JOURNAL).stat().st_size
    assert [row.step for row, _ in read_journal(tmp_path / JOURNAL, rows[0][1])] == [3]


class FullDisk:
    """A raw file that takes `room` bytes and then has no space until more is given."""

    def __init__(self, file, room):
        self.file, self.room, self.closed = file, room, False

    def write(self, data):
        if self.room == 0:
            raise OSError(28, "No space left on device")
        taken = self.file.write(data[: self.room])
        self.room -= taken
        return taken


def test_a_full_disk_is_said_once_and_loses_no_row(tmp_path, caplog):
    journal = Journal(tmp_path)
    journal._file = disk = FullDisk(journal._file, room=100)
    for step in range(5):
        journal.log(step, {"loss": float(step)})
    assert [step for step, _, _ in points(tmp_path)] == [0]
    assert len(caplog.records) == 1 and "No space left" in caplog.text
    disk.room = 10**6
    journal.log(5, {"loss": 5.0})
    journal._file = disk.file
    journal.close()
    assert [step for step, _, _ in points(tmp_path)] == [0, 1, 2, 3, 4, 5]
    assert len(caplog.records) == 2 and "written again" in caplog.text


def test_other_ranks_write_nothing(tmp_path):
    with open_tracker(NoTracking(), tmp_path / "run", "a", rank=1) as tracker:
        tracker.log(0, {"loss": 1.0})
        tracker.artifact(tmp_path / "nothing")
        tracker.tag({"a": "b"})
    assert not (tmp_path / "run").exists()


def test_without_mlflow_the_journal_is_written_and_mlflow_is_not_imported(tmp_path):
    code = f"""
import sys
from pathlib import Path
from coupalign.config.schema import NoTracking
from coupalign.tracking import open_tracker
with open_tracker(NoTracking(), Path({str(tmp_path)!r}), "a", rank=0) as tracker:
    tracker.log(1, {{"loss": 2}})
assert "mlflow" not in sys.modules and "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert points(tmp_path) == [(1, "loss", 2.0)]
    assert not (tmp_path / "tracking.json").exists()


def test_the_exception_of_training_passes_through(tmp_path):
    with pytest.raises(KeyError), open_tracker(NoTracking(), tmp_path, "a", rank=0) as tracker:
        tracker.log(1, {"loss": 2})
        raise KeyError("training")


def test_git_revision_tells_clean_dirty_and_untracked_folders(tmp_path):
    def git(*words):
        me = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *me, *words], check=True, capture_output=True)

    assert git_revision(tmp_path) == "unknown"
    git("init")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "a.py").write_text("1\n")
    (tmp_path / "installed").mkdir()
    (tmp_path / "installed" / "b.py").write_text("1\n")
    git("add", "package")
    git("commit", "-m", "a")
    clean = git_revision(tmp_path / "package")
    assert len(clean) >= 7 and all(c in "0123456789abcdef" for c in clean)
    assert git_revision(tmp_path / "installed") == "unknown"
    (tmp_path / "package" / "a.py").write_text("2\n")
    assert git_revision(tmp_path / "package") == f"{clean}+dirty"
    assert git_revision(tmp_path / "missing") == "unknown"


def test_the_address_is_configured_or_from_the_environment_or_beside_the_run(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert (
        tracking_address(MlflowTracking(), tmp_path / "runs" / "a")
        == f"sqlite:///{tmp_path}/runs/mlflow.db"
    )
    monkeypatch.chdir(tmp_path)
    assert (
        tracking_address(MlflowTracking(), Path("runs/a")) == f"sqlite:///{tmp_path}/runs/mlflow.db"
    )
    assert (
        tracking_address(MlflowTracking(uri="sqlite:///x.db"), Path("runs/a"))
        == f"sqlite:///{tmp_path}/x.db"
    )
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracker:5000")
    assert tracking_address(MlflowTracking(), tmp_path / "a") == "http://tracker:5000"
    assert (
        tracking_address(MlflowTracking(uri="http://other:1"), tmp_path / "a") == "http://other:1"
    )


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "uri, remedy",
    [
        ("mlruns", "sqlite:///"),
        ("file:///tmp/mlruns", "sqlite:///"),
        ("http://me:secret@host:5000", "MLFLOW_TRACKING_PASSWORD"),
    ],
)
def test_an_address_that_cannot_work_is_refused_on_every_rank(tmp_path, uri, remedy, rank):
    with pytest.raises(InputError, match=remedy) as refusal:
        with open_tracker(MlflowTracking(uri=uri), tmp_path / "a", "a", rank=rank):
            pass
    assert "secret" not in str(refusal.value)
