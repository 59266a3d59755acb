"""The order of the training samples: a pure function of (shards, seed, epoch); the topology is an argument.

Epochs form one endless sequence of samples. Step s of a run takes the places s·B … s·B + B − 1 of it, B being the global
batch size; a batch may straddle two epochs, nothing is dropped or padded. A rank takes a contiguous part of the step,
a micro-batch a contiguous part of that, so the samples of a step do not depend on ranks, accumulation or workers, and
the step number is the whole state.
"""
from __future__ import annotations

from functools import lru_cache

import numpy as np

from coupalign.errors import InputError

_ORDER = 1      # a spawn key: keeps these random numbers apart from the samples' own, which are seeded [seed, epoch, number]


def epoch_order(shard_of_sample: np.ndarray, seed: int, epoch: int, window: int) -> np.ndarray:
    """The order in which an epoch visits its samples.

    Shards are permuted and grouped in windows of `window`; samples are shuffled inside a window, so that a reader needs
    no more than one window of shards at a time. A window of all the shards is a full shuffle.

    Args:
        shard_of_sample: int [n], the shard each sample lies in.

    Returns:
        int64 [n], a permutation of 0 … n−1.
    """
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch], spawn_key=(_ORDER,))))
    shards, shard = np.unique(shard_of_sample, return_inverse=True)
    window_of_shard = generator.permutation(len(shards)) // window
    return np.lexsort((generator.permutation(len(shard)), window_of_shard[shard]))


class EpochOrders:
    """The endless sequence of samples; keeps the two epochs in use."""

    def __init__(self, shard_of_sample: np.ndarray, seed: int, window: int) -> None:
        self.samples = len(shard_of_sample)
        self._order = lru_cache(maxsize=2)(lambda epoch: epoch_order(shard_of_sample, seed, epoch, window))

    def step(self, step: int, global_batch: int) -> list[tuple[int, int]]:
        """The (epoch, sample) pairs of one optimizer step, over all ranks."""
        return [(epoch, int(self._order(epoch)[place])) for epoch, place in step_places(self.samples, global_batch, step)]


def step_places(samples: int, global_batch: int, step: int) -> list[tuple[int, int]]:
    """(epoch, place in the epoch's order) of each sample of a step, counted from step 0."""
    first = step * global_batch
    return [divmod(place, samples) for place in range(first, first + global_batch)]


def rank_slice(global_batch: int, rank: int, ranks: int) -> slice:
    """The contiguous part of a step that one rank takes.

    Raises:
        InputError: the ranks cannot share the batch evenly; the message names the nearest sizes that work.
    """
    assert 0 <= rank < ranks
    if global_batch % ranks:
        below, above = global_batch // ranks * ranks, -(-global_batch // ranks) * ranks
        sizes = f"{below} or {above}" if below else f"{above}"
        raise InputError(f"train.global_batch={global_batch} cannot be shared evenly by {ranks} processes: "
                         f"use {sizes}, or another number of processes")
    share = global_batch // ranks
    return slice(rank * share, (rank + 1) * share)


def micro_batches(share: int, max_micro_batch: int | None) -> int:
    """How many micro-batches a rank's `share` of a step is cut into: the fewest of equal size, none above `max_micro_batch`."""
    if max_micro_batch is None:
        return 1
    return next(count for count in range(1, share + 1) if share % count == 0 and share // count <= max_micro_batch)
