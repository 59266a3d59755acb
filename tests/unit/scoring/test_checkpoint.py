"""Which sources `coupalign eval` scores, and where their scores go; see also tests/e2e."""

from __future__ import annotations

from pathlib import Path

import pytest

from coupalign.config.schema import Config, Source
from coupalign.errors import InputError
from coupalign.scoring.checkpoint import _choose_sources, run_directory, score_checkpoint
from tests.unit.predict.conftest import tiny_config, write_checkpoint

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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.decoder.width=64", "model: is that of the checkpoint"),
        ("data.image_size=32", "data.image_size: is that of the checkpoint"),
        ("data.tokenizer=other", "data.tokenizer: is that of the checkpoint"),
        ("run_dir=elsewhere", "run_dir: .* with --out"),
    ],
)
def test_override_that_has_no_effect_is_refused(tmp_path: Path, change: str, message: str) -> None:
    write_checkpoint(tmp_path / "run", tiny_config())

    with pytest.raises(InputError, match=message):
        score_checkpoint(tmp_path / "run", [change])


@pytest.mark.parametrize("name", ["scores", "pictures"])
def test_scores_are_not_written_through_a_link(tmp_path: Path, name: str) -> None:
    """Somebody else's run directory may link to a folder of the user's."""
    write_checkpoint(tmp_path / "run", tiny_config())
    (tmp_path / "run" / name).symlink_to(tmp_path)
    before = sorted(tmp_path.iterdir())

    with pytest.raises(InputError, match=f"{name}: is a link that leads out of the run directory"):
        score_checkpoint(tmp_path / "run")

    assert sorted(tmp_path.iterdir()) == before
