"""Batches: how they leave a worker process, and how they move."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from coupalign.data.batch import random_batch
from tests.unit.data.batches import config_of, train


@pytest.mark.parametrize("workers", [0, 1])
def test_batch_is_handed_over_as_it_was_written(packed: Path, workers: int):
    """Channels last; from a worker, in memory that both processes share. The words are copied."""
    loader = train(config_of(packed, workers=workers))

    _, [batch] = next(loader.steps_from(0))

    assert batch.image.is_contiguous(memory_format=torch.channels_last)
    assert batch.target.is_contiguous()
    assert batch.image.is_shared() == batch.target.is_shared() == bool(workers)
    assert not batch.words.is_shared() and not batch.word_mask.is_shared()

    # They can be written to.
    batch.words[:], batch.word_mask[:] = 0, False
    loader.close()


def test_batch_has_the_documented_shapes(packed: Path):
    _, [batch] = next(train(config_of(packed)).steps_from(0))

    assert len(batch) == 6
    assert batch.image.shape == (6, 3, 32, 32) and batch.image.dtype == torch.uint8
    assert batch.words.shape == batch.word_mask.shape == (6, 8)
    assert batch.target.dtype == torch.bool and batch.target.is_contiguous()


def test_batch_moves_as_a_whole(packed: Path):
    _, [batch] = next(train(config_of(packed)).steps_from(0))

    moved = batch.to("meta")

    assert moved.image.device.type == moved.target.device.type == "meta"
    assert moved.image.stride() == batch.image.stride()
    assert moved.info is batch.info


def test_random_batch_has_the_layout_of_a_loaded_one(packed: Path):
    _, [loaded] = next(train(config_of(packed)).steps_from(0))

    noise = random_batch(samples=6, size=32, tokens=8, vocabulary=50)

    for name in ("image", "words", "word_mask", "target"):
        one, other = getattr(noise, name), getattr(loaded, name)
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())
