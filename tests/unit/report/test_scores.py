"""Scores of a run: which ones are shown, how they are named, and damage that is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coupalign.errors import InputError
from coupalign.files import write_json
from coupalign.report import report_run
from coupalign.report.scores import name_scores, read_scores
from tests.unit.report.examples import score_of, write_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "demo")


def test_later_scoring_replaces_that_of_training(run: Path):
    scores = read_scores(run)

    assert list(scores) == [("val", "ris-v1", "each"), ("val", "lavt", "first")]
    assert scores["val", "ris-v1", "each"].language_blind is not None


def test_names_tell_scores_apart(run: Path):
    assert list(name_scores(read_scores(run)).values()) == ["val", "val (lavt, first)"]


def test_old_score_of_training_is_ignored_once_scored_again(run: Path):
    old = json.loads((run / "scores" / "val.json").read_text())
    del old["bIoU"]
    write_json(run / "scores" / "val.json", old)

    assert len(read_scores(run)) == 2

    (run / "scores" / "val-ris-v1.json").unlink()
    (run / "scores" / "val-lavt-first.json").unlink()
    with pytest.raises(InputError, match=r"val\.json.*bIoU.*coupalign eval"):
        read_scores(run)


def test_score_json_is_read_if_there_is_no_other(tmp_path: Path):
    write_json(tmp_path / "score.json", {"split": "testA", **score_of().to_json()})

    assert list(read_scores(tmp_path)) == [("testA", "ris-v1", "each")]


@pytest.mark.parametrize("text", ["{", "[]", '{"protocol": "ris-v1"}'])
def test_damaged_score_is_named(tmp_path: Path, text: str):
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores" / "val.json").write_text(text)

    with pytest.raises(InputError, match=r"val\.json"):
        report_run(tmp_path)


def test_run_without_scores_says_how_to_get_them(tmp_path: Path):
    with pytest.raises(InputError, match="coupalign eval"):
        report_run(tmp_path)

    assert not (tmp_path / "report.html").exists()
