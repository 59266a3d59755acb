"""The order of the training samples: a pure function of (shards, seed, epoch); the topology is an argument.

An epoch permutes the shards, lays their samples end to end on a line, and cuts the line into equal parts, one for each
canonical node. Inside a part, windows of a few shards are shuffled one after another:

    shards, permuted    |--7--|---2---|--9--|-4-|--0--|--5--|---1---|--8--|-3-|--6--|
    parts               |<-------- 0 -------->|<------- 1 ------->|<------- 2 ----->|       a shard on a cut belongs to two
    windows             |<-- 0 -->|<--- 1 --->|<-- 0 -->|<-- 1 -->|<-- 0 -->|<- 1 ->|

A part's places are an endless stream through the epochs, always of the same length an epoch. Step s takes from each of C
streams the places s·B/C … (s+1)·B/C − 1, B being the global batch size, and lays them side by side; a batch may straddle
two epochs, nothing is dropped or padded. A rank takes a contiguous slice of the step, a micro-batch a contiguous slice
of that. So the samples of a step do not depend on ranks, accumulation or workers; the step number is the whole state; and
where the number of nodes divides C and a node's ranks follow each other, a node reads its own parts and no others. Any
place is found by shuffling its own window alone: time and memory go with shards and windows, not with samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import lcm
from typing import NamedTuple

import numpy as np

from coupalign.errors import InputError

_ORDER = 1  # a spawn key: keeps these random numbers apart from the samples' own, which are seeded [seed, epoch, number]


@dataclass(frozen=True)
class ShardLayout:
    """The samples grouped by shard; shards without a sample are left out.

    Attributes:
        starts: int64 [shards + 1], where each shard's group begins.
        numbers: int64 [n], the sample numbers so grouped; None where they are just 0 … n−1, as with one source that is read
            in the order of its shards: memory then goes with the shards only.
    """

    starts: np.ndarray
    numbers: np.ndarray | None = None

    @classmethod
    def of_counts(cls, counts: np.ndarray) -> ShardLayout:
        """Samples numbered shard after shard; counts: int [shards], samples of each."""
        return cls(np.concatenate([[0], np.cumsum(counts[counts > 0], dtype=np.int64)]))

    @classmethod
    def of_samples(cls, shard_of_sample: np.ndarray) -> ShardLayout:
        """shard_of_sample: int [n], the shard each sample lies in, in any order."""
        layout = cls.of_counts(np.bincount(shard_of_sample))
        if (shard_of_sample[1:] >= shard_of_sample[:-1]).all():
            return layout
        return cls(layout.starts, np.argsort(shard_of_sample, kind="stable"))

    def __len__(self) -> int:
        return int(self.starts[-1])


class _Window(NamedTuple):
    """A shuffled window: its epoch, the place in the part where it begins, its sample numbers (int64)."""

    epoch: int
    first: int
    numbers: np.ndarray

    def holds(self, epoch: int, place: int) -> bool:
        return epoch == self.epoch and self.first <= place < self.first + len(self.numbers)


class EpochOrders:
    """The endless streams of samples, one for each of `parts` canonical nodes; keeps two lines and a window of each part read.

    Raises:
        InputError: there are more parts than samples.
    """

    def __init__(self, layout: ShardLayout, seed: int, window: int, parts: int = 1) -> None:
        self.samples, self.parts = len(layout), parts
        if self.samples < parts:
            raise InputError(
                f"data.canonical_nodes={parts} is more than there are training samples, {self.samples}: lower it"
            )
        self._layout, self._seed, self._window_shards = layout, seed, window
        self._cuts = [
            part * self.samples // parts for part in range(parts + 1)
        ]  # the same in every epoch
        self._line = lru_cache(maxsize=2)(self._lay_line)
        self._current: dict[int, _Window] = {}

    def step(
        self, step: int, global_batch: int, taken: slice | None = None
    ) -> list[tuple[int, int]]:
        """The (epoch, sample) pairs of one optimizer step, over all ranks, or of the places `taken` of it."""
        first = step * part_share(global_batch, self.parts)
        return [
            (epoch, number)
            for part, own in part_slices(global_batch, self.parts, taken or slice(0, global_batch))
            for epoch, numbers in self.read(part, first + own.start, first + own.stop)
            for number in numbers.tolist()
        ]

    def read(self, part: int, first: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
        """The places first … stop − 1 of a part's endless stream, in pieces: the epoch, and sample numbers (int64, read only)."""
        length = self.length(part)
        while first < stop:
            epoch, place = divmod(first, length)
            window = self._current.get(part)
            if window is None or not window.holds(epoch, place):
                window = self._current[part] = self._shuffle(part, epoch, place)
            numbers = window.numbers[place - window.first :][: stop - first]
            yield epoch, numbers
            first += len(numbers)

    def length(self, part: int) -> int:
        """How many samples of a part there are in every epoch."""
        return self._cuts[part + 1] - self._cuts[part]

    def window_places(self, epoch: int, part: int) -> np.ndarray:
        """Where the windows of a part begin and end: int64 [windows + 1] places in the part."""
        cuts, line = slice(self._cuts[part], self._cuts[part + 1]), self._line(epoch)[1]
        return (
            np.clip(line[window_edges(line, cuts, self._window_shards)], cuts.start, cuts.stop)
            - cuts.start
        )

    def _lay_line(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The permuted shards, int64 [shards], and where on the line each of them begins, int64 [shards + 1]."""
        shards = _generator(self._seed, epoch).permutation(len(self._layout.starts) - 1)
        return shards, np.concatenate([[0], np.cumsum(np.diff(self._layout.starts)[shards])])

    def _shuffle(self, part: int, epoch: int, place: int) -> _Window:
        """The window that holds this place of a part."""
        shards, line = self._line(epoch)
        places = self.window_places(epoch, part)
        window = int(np.searchsorted(places, place, side="right")) - 1
        first, stop = (self._cuts[part] + int(edge) for edge in places[window : window + 2])
        inside = slice(*_shards_between(line, first, stop))
        grouped = np.repeat(
            self._layout.starts[shards[inside]] - line[inside], np.diff(line)[inside]
        )  # of whole shards
        begin = first - int(line[inside.start])
        grouped = grouped[begin : begin + stop - first] + np.arange(first, stop)
        grouped = _generator(self._seed, epoch, part, window).permutation(grouped)
        numbers = grouped if self._layout.numbers is None else self._layout.numbers[grouped]
        numbers.flags.writeable = False
        return _Window(epoch, int(places[window]), numbers)


def window_edges(line: np.ndarray, part: slice, window: int) -> np.ndarray:
    """Where on the line each window of a part begins, and the last one ends, counted in shards.

    As few windows as there can be of at most `window` shards, all of about the same size: a small last one would be a
    stretch of poorly mixed samples.

    Args:
        line: int64 [shards + 1], where each shard begins on the line.
        part: the part's places on the line.
    """
    first, stop = _shards_between(line, part.start, part.stop)
    count = -(-(stop - first) // window)
    return first + np.arange(count + 1) * (stop - first) // count


def _shards_between(line: np.ndarray, first: int, stop: int) -> tuple[int, int]:
    """The shards on the line, first and last + 1, that hold the places first … stop − 1."""
    return int(np.searchsorted(line, first, side="right")) - 1, int(
        np.searchsorted(line, stop, side="left")
    )


def _generator(seed: int, *place: int) -> np.random.Generator:
    """Independent random numbers for each (epoch) and each (epoch, part, window)."""
    # as a spawn key, which is mixed in after `seed` was filled up with zeros: in a list [seed, epoch], a seed above 32 bits would
    # run into the epoch, and [seed, epoch] would be the same as [seed, epoch, 0, 0]
    return np.random.Generator(
        np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(_ORDER, *place)))
    )


# ---------------------------------------------------------------------------------------------------------- sharing


def rank_slice(global_batch: int, rank: int, ranks: int) -> slice:
    """The contiguous part of a step that one rank takes.

    Raises:
        InputError: the ranks cannot share the batch evenly; the message names the nearest sizes that work.
    """
    assert 0 <= rank < ranks
    if global_batch % ranks:
        raise InputError(
            f"train.global_batch={global_batch} cannot be shared evenly by {ranks} processes: "
            f"use {_nearest(global_batch, ranks)}, or another number of processes"
        )
    share = global_batch // ranks
    return slice(rank * share, (rank + 1) * share)


def part_share(global_batch: int, parts: int, ranks: int = 1) -> int:
    """How many samples of a step each of the canonical nodes' parts gives.

    Raises:
        InputError: not the same number from each; the message names the nearest sizes that work, for `ranks` processes, too.
    """
    if global_batch % parts:
        raise InputError(
            f"train.global_batch={global_batch} cannot be taken evenly from data.canonical_nodes={parts} parts: "
            f"use {_nearest(global_batch, lcm(parts, ranks))}, or another data.canonical_nodes"
        )
    return global_batch // parts


def part_slices(global_batch: int, parts: int, taken: slice) -> list[tuple[int, slice]]:
    """The places `taken` of a step as (part, places in that part's share of the step)."""
    share = part_share(global_batch, parts)
    touched = range(taken.start // share, -(-taken.stop // share))
    return [
        (part, slice(max(taken.start - part * share, 0), min(taken.stop - part * share, share)))
        for part in touched
    ]


def micro_batches(global_batch: int, max_micro_batch: int | None, ranks: int) -> tuple[int, int]:
    """How many micro-batches each rank's share of a step is cut into, and the samples of each: the fewest of equal size.

    Raises:
        InputError: see `rank_slice`.
    """
    share = rank_slice(global_batch, 0, ranks).stop
    most = max_micro_batch or share
    return next(
        (count, share // count)
        for count in range(1, share + 1)
        if share % count == 0 and share // count <= most
    )


def _nearest(batch: int, divisor: int) -> str:
    below, above = batch // divisor * divisor, -(-batch // divisor) * divisor
    return f"{below} or {above}" if below else f"{above}"
