"""The outbox: where an MLflow run is sent to."""

from __future__ import annotations

from pathlib import Path

import pytest

from coupalign.config.schema import MlflowTracking
from coupalign.tracking.outbox import tracking_address


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
