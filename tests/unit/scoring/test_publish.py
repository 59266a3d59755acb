"""Scores of a tracked run are sent to its tracker; those of another run are not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from coupalign.config.schema import Config
from coupalign.scoring import publish


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(name, folder) of each artifact that a tracker gets."""
    artifacts: list[tuple[str, str]] = []

    class Tracker:
        def artifact(self, path: Path, folder: str = "") -> None:
            artifacts.append((path.name, folder))

    @contextmanager
    def open_tracker(*_: object, **__: object) -> Iterator[Tracker]:
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
