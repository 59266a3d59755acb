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


@pytest.mark.parametrize("text", ["{", "[]", '{"protocol": "ris-v1"}', "\udcff", "9" * 5000])
def test_damaged_score_is_named(tmp_path: Path, text: str):
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores" / "val.json").write_bytes(text.encode("utf-8", "surrogateescape"))

    with pytest.raises(InputError, match=r"val\.json.*`coupalign eval` again, or remove"):
        report_run(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "null"])
def test_damaged_score_of_training_is_ignored_once_scored_again(run: Path, text: str):
    before = read_scores(run)
    (run / "scores" / "val.json").write_text(text)

    assert read_scores(run) == before


FOREIGN_VALUES = [
    ("oIoU", "<b>"),
    ("oIoU", 73.7),
    ("mIoU", float("nan")),
    ("P@0.5", True),
    ("samples", "many"),
    ("images", None),
    ("intervals", {"oIoU": [0.1, "<b>"]}),
    ("intervals", {"oIoU": 3}),
    ("intervals", {"<b>": [0.1, 0.2]}),
    ("intervals", []),
    ("conditions", {"truth": ["a"]}),
    ("conditions", "a"),
    ("leak", 7),
    ("data_fingerprint", {}),
    ("language_blind", {"oIoU": 1}),
    ("language_blind", "a"),
    ("protocol", "../../../etc/passwd"),
    ("protocol", 3),
    ("sentences", "x" * 10_000),
]


@pytest.mark.parametrize("name, value", FOREIGN_VALUES)
def test_value_of_a_foreign_score_is_refused_in_one_line(tmp_path: Path, name: str, value: object):
    (tmp_path / "scores").mkdir()
    write_json(tmp_path / "scores" / "val.json", {**score_of().to_json(), name: value})

    with pytest.raises(InputError, match=r"val\.json: not a score of this version") as error:
        report_run(tmp_path)

    assert len(str(error.value)) < 400 + len(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["../../other", "", 7, "a\nb"])
def test_set_name_of_a_foreign_score_json_is_no_path(tmp_path: Path, name: object):
    write_json(tmp_path / "score.json", {"name": name, **score_of().to_json()})

    assert list(read_scores(tmp_path)) == [("score", "ris-v1", "each")]


def test_run_without_scores_says_how_to_get_them(tmp_path: Path):
    with pytest.raises(InputError, match="coupalign eval"):
        report_run(tmp_path)

    assert not (tmp_path / "report.html").exists()
