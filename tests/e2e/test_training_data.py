"""Which samples and sentences a training reads."""

from __future__ import annotations

import shutil
from itertools import islice
from pathlib import Path

import pytest

from coupalign.config.schema import Source
from coupalign.data.index import read_index
from coupalign.errors import InputError
from tests.e2e.scored_run import config_of, train_loader_of


def test_mixture_reads_every_sample_and_no_held_out_image_unasked(
    scored_run: Path, shards: Path
) -> None:
    """DETRIS gives its mixture one key too many, and leaves the images of its test splits in."""
    splits = ("train", "val", "testA")
    mixture = tuple(Source(index=str(shards), split=split) for split in splits)
    counts, config = read_index(shards).counts["refshapes/unc"], config_of(scored_run)

    with pytest.raises(InputError, match="photographs that are to be scored"):
        train_loader_of(config, train=mixture, leaks="refuse")

    without_leaks = train_loader_of(config, train=mixture, leaks="exclude")
    assert without_leaks.samples == counts["train"]["refs"]

    loader = train_loader_of(config, train=mixture, leaks="allow")
    assert loader.samples == sum(counts[split]["refs"] for split in splits)
    steps = islice(loader.steps_from(0), -(-loader.samples // 8))
    numbers = [info.number for _, batches in steps for batch in batches for info in batch.info]
    assert sorted(numbers[: loader.samples]) == list(range(loader.samples))


def test_unreadable_sample_ends_the_training(
    scored_run: Path, shards: Path, tmp_path: Path
) -> None:
    """LISA catches whatever its data raise."""
    damaged = shutil.copytree(shards, tmp_path / "damaged")
    for tar in damaged.glob("*.tar"):
        tar.write_bytes(bytes(tar.stat().st_size))
    source = Source(index=str(damaged), split="train")
    loader = train_loader_of(config_of(scored_run), train=(source,))

    with pytest.raises(InputError, match="unreadable sample"):
        next(loader.steps_from(0))


def test_sentence_of_a_ref_is_drawn_in_each_epoch(scored_run: Path) -> None:
    """mmdet draws its random sentence once."""
    loader = train_loader_of(config_of(scored_run))
    three_epochs = islice(loader.steps_from(0), 3 * loader.samples // 8)

    names_of_ref: dict[str, set[str]] = {}
    for _, batches in three_epochs:
        for info in (info for batch in batches for info in batch.info):
            names_of_ref.setdefault(info.name.rpartition("/")[0], set()).add(info.name)

    # Each ref has two or three sentences.
    several = [names for names in names_of_ref.values() if len(names) > 1]
    assert len(several) > len(names_of_ref) / 2


def test_number_of_trained_samples_is_that_of_the_shards(scored_run: Path, shards: Path) -> None:
    """CRIS and its children carry tables of the sizes of the data sets in their code."""
    counts = read_index(shards).counts["refshapes/unc"]

    assert train_loader_of(config_of(scored_run)).samples == counts["train"]["refs"]
