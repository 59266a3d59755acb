"""Building loaders: settings that are refused, fingerprints, and a cache that is too small."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from coupalign.config.schema import DataConfig, Source
from coupalign.data import build, workers
from coupalign.data.build import build_eval_loader, open_tokenizer
from coupalign.data.index import read_index
from coupalign.errors import InputError
from tests.unit.data.batches import config_of, evaluate, train, world_of


def test_batch_that_cannot_be_shared_is_refused(packed: Path):
    with pytest.raises(InputError, match="cannot be shared evenly by 4 processes: use 4 or 8"):
        train(config_of(packed), global_batch=6, world=world_of(0, 4))

    with pytest.raises(
        InputError, match="train.global_batch=6 .* data.canonical_nodes=4 parts: use 12,"
    ):
        train(config_of(packed, canonical_nodes=4), global_batch=6, world=world_of(0, 6))

    with pytest.raises(
        InputError, match=r"data.canonical_nodes=17 exceeds the number of training samples \(16\)"
    ):
        train(config_of(packed, canonical_nodes=17), global_batch=17)


def test_missing_sources_are_refused(packed: Path):
    config = config_of(packed, train=(), tokenizer=str(packed / "vocab.txt"))

    with pytest.raises(InputError, match="data.train is empty"):
        train(config)

    with pytest.raises(InputError, match="data.evaluate"):
        build_eval_loader(config, (), batch=2, world=world_of(), tokenizer=open_tokenizer(config))


def test_missing_vocabulary_is_refused():
    with pytest.raises(InputError, match="no vocabulary"):
        open_tokenizer(DataConfig())


def test_fingerprint_depends_on_the_sources_only(packed: Path):
    other = Source(index=str(packed), dataset="refcocog", split="train")

    fingerprint = train(config_of(packed)).fingerprint

    assert train(config_of(packed, image_size=64)).fingerprint == fingerprint
    assert train(config_of(packed, train=(other,))).fingerprint != fingerprint
    assert train(config_of(packed, unit="sentence")).fingerprint != fingerprint


@pytest.mark.parametrize("parts, shards", [(1, 1), (2, 2)])
def test_small_cache_is_warned_of(
    packed: Path,
    parts: int,
    shards: int,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    """One rank reads all the parts, each in a window of its own."""
    index = replace(read_index(packed), location="https://example.org/set")
    monkeypatch.setattr(build, "open_index", lambda location: index)
    needed = sum(sorted(shard.bytes for shard in index.shards)[-shards:])

    for spare, warned in ((-1, True), (1, False)):
        caplog.clear()
        config = config_of(
            packed,
            cache_gb=(needed + spare) / 1e9,
            cache_dir=packed / "cache",
            shuffle_window=1,
            canonical_nodes=parts,
            tokenizer=str(packed / "vocab.txt"),
        )
        train(config, global_batch=2)

        assert ("is less than the" in caplog.text) == warned


@pytest.mark.parametrize("open_loader", [train, evaluate])
def test_batches_that_do_not_fit_into_shared_memory_are_refused(
    packed: Path, monkeypatch: pytest.MonkeyPatch, open_loader: Callable
) -> None:
    monkeypatch.setattr(workers, "free_shared_memory", lambda: 20_000)

    open_loader(config_of(packed))
    with pytest.raises(InputError, match="data.workers=2: 2 x 2 batches .* --shm-size"):
        open_loader(config_of(packed, workers=2))
