"""Scores are sent to an address that the user gave, and never where a run's own files say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from coupalign.config.load import dump
from coupalign.config.schema import Config, MlflowTracking
from coupalign.scoring import publish
from coupalign.tracking.outbox import STATE, Outbox


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(name, folder) of each artifact that a tracker gets."""
    artifacts: list[tuple[str, str]] = []

    class Tracker:
        def artifact(self, path: Path, folder: str = "") -> None:
            artifacts.append((path.name, folder))

    @contextmanager
    def open_tracker(config: MlflowTracking, *_: object, **__: object) -> Iterator[Tracker]:
        if config.uri:
            artifacts.append((config.uri, "address"))
        yield Tracker()

    monkeypatch.setattr(publish, "open_tracker", open_tracker)
    return artifacts


def test_tracked_run_is_published(tmp_path: Path, sent: list[tuple[str, str]]) -> None:
    for name in ("tracking.json", "score.json", "report.html"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "scores").mkdir()

    publish.publish_scores(Config(run_dir=tmp_path))

    assert sent == [("score.json", ""), ("report.html", ""), ("scores", "scores")]


def test_untracked_run_is_not_published(tmp_path: Path, sent: list[tuple[str, str]]) -> None:
    (tmp_path / "score.json").write_text("{}")

    publish.publish_scores(Config(run_dir=tmp_path))

    assert sent == []


def write_foreign_run(run: Path, uri: str) -> Outbox:
    """A scored run of somebody else, whose files name an address."""
    (run / "score.json").write_text("{}")
    config = Config(run_dir=run, tracking=MlflowTracking(uri=uri))
    (run / "config.yaml").write_text(dump(config))
    outbox = Outbox(path=run / STATE, uri=uri, experiment="x", run_name="x")
    outbox.change()
    return outbox


def test_address_of_the_runs_own_files_gets_nothing(
    tmp_path: Path, sent: list[tuple[str, str]], caplog: pytest.LogCaptureFixture
) -> None:
    write_foreign_run(tmp_path, "http://evil:1")

    publish.publish_scores_of(tmp_path)
    publish.publish_scores_of(tmp_path, ["tracking.experiment=y", "data.workers=0"])

    assert sent == []
    command = f"coupalign track {tmp_path} --tracking-uri http://evil:1"
    assert "nothing was sent to 'http://evil:1'" in caplog.text and command in caplog.text
    assert Outbox.read(tmp_path).waiting() == (0, 1)


def test_address_of_the_user_gets_the_scores(
    tmp_path: Path, sent: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_foreign_run(tmp_path, "http://mine:1")

    publish.publish_scores_of(tmp_path, ["tracking.uri=http://mine:1"])
    assert sent == [("http://mine:1", "address"), ("score.json", "")]

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mine:1")
    publish.publish_scores_of(tmp_path)
    assert sent[2:] == [("score.json", "")]

    publish.publish_scores_of(tmp_path, ["tracking.kind=none"])
    assert len(sent) == 3


def test_database_next_to_the_run_gets_the_scores(
    tmp_path: Path, sent: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = tmp_path / "run"
    run.mkdir()
    write_foreign_run(run, f"sqlite:///{tmp_path}/mlflow.db")

    publish.publish_scores_of(run)

    assert sent == [("score.json", "")]


def test_new_page_is_noted_and_waits_for_track(tmp_path: Path, sent: list[tuple[str, str]]) -> None:
    write_foreign_run(tmp_path, "http://mine:1")

    publish.note_results(tmp_path)
    publish.note_results(tmp_path / "nothing here")

    assert sent == []
    assert Outbox.read(tmp_path).waiting() == (0, 1)
