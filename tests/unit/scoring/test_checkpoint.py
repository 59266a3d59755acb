"""Which sources `coupalign eval` scores, and where their scores go; see also tests/e2e."""

from __future__ import annotations

from pathlib import Path

import pytest

from coupalign.config.schema import Config, Source
from coupalign.errors import InputError
from coupalign.scoring.checkpoint import _choose_sources, run_directory

TRAIN = Source(index="ours", split="train")
VAL = Source(index="ours", split="val")


def config(*evaluated: Source) -> Config:
    data = Config().data.model_copy(update={"train": (TRAIN,), "evaluate": evaluated})
    return Config().model_copy(update={"data": data})


def test_default_is_what_the_run_evaluated() -> None:
    assert _choose_sources(config(VAL), [], None) == [VAL]

    with pytest.raises(InputError, match="name an --index and a --split"):
        _choose_sources(config(), [], None)


def test_split_that_the_run_did_not_evaluate_comes_from_its_shards() -> None:
    test = Source(index="ours", split="test")

    assert _choose_sources(config(VAL), ["test", "val"], None) == [VAL, test]
    assert _choose_sources(config(), ["test"], None) == [test]


def test_another_index_needs_a_split() -> None:
    assert _choose_sources(config(VAL), ["val"], "theirs") == [Source(index="theirs", split="val")]

    with pytest.raises(InputError, match="--index needs a --split"):
        _choose_sources(config(VAL), [], "theirs")


def test_scores_belong_to_the_run_of_a_checkpoint(tmp_path: Path) -> None:
    assert run_directory(tmp_path / "run" / "checkpoints" / "step-00000100") == tmp_path / "run"
    assert run_directory(tmp_path / "exported") == tmp_path / "exported"
