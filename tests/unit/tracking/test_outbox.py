"""The outbox: where an MLflow run is sent to, and what is still to be sent."""

from __future__ import annotations

from pathlib import Path

import pytest

from coupalign.config.schema import MlflowTracking
from coupalign.tracking.journal import Journal
from coupalign.tracking.outbox import STATE, Outbox, tracking_address


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


@pytest.mark.parametrize("content", [None, "", "[]", '{"uri": "http://tracker:1"}'])
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
