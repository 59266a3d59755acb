"""Opening a tracker: which one each rank gets, and which addresses are refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from coupalign.config.schema import MlflowTracking, NoTracking
from coupalign.errors import InputError
from coupalign.tracking import JOURNAL, open_tracker, read_journal


def test_ranks_other_than_0_write_nothing(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"

    with open_tracker(NoTracking(), run_dir, "a", rank=1) as tracker:
        tracker.log(0, {"loss": 1.0})
        tracker.artifact(tmp_path / "nothing")
        tracker.tag({"a": "b"})

    assert not run_dir.exists()


def test_no_tracking_writes_the_journal_without_importing_mlflow(tmp_path: Path) -> None:
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

    [(measurement, _)] = read_journal(tmp_path / JOURNAL)
    assert (measurement.step, measurement.metrics) == (1, {"loss": 2.0})
    assert not (tmp_path / "tracking.json").exists()


def test_exception_of_the_session_passes_through(tmp_path: Path) -> None:
    with pytest.raises(KeyError), open_tracker(NoTracking(), tmp_path, "a", rank=0) as tracker:
        tracker.log(1, {"loss": 2})
        raise KeyError("training")


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "uri, remedy",
    [
        ("mlruns", "sqlite:///"),
        ("file:///tmp/mlruns", "sqlite:///"),
    ],
)
def test_address_that_cannot_work_is_refused_on_every_rank(
    tmp_path: Path, uri: str, remedy: str, rank: int
) -> None:
    with pytest.raises(InputError, match=remedy):
        with open_tracker(MlflowTracking(uri=uri), tmp_path / "a", "a", rank=rank):
            pass


def test_address_with_a_password_is_refused_without_repeating_it() -> None:
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_PASSWORD") as refusal:
        MlflowTracking(uri="http://me:hunter2@host:5000")

    assert "hunter2" not in str(refusal.value)


def test_link_in_the_place_of_the_journal_is_refused(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("no line end")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / JOURNAL).symlink_to(tmp_path / "keys")

    with pytest.raises(InputError, match="is a link"):
        with open_tracker(NoTracking(), tmp_path / "run", "a", rank=0):
            pass

    assert (tmp_path / "keys").read_text() == "no line end"
