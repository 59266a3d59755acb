"""The order of the training samples: a pure function of (shards, seed, epoch).

An epoch permutes the shards, lays their samples end to end on a line, and cuts the line into equal
parts, one per canonical node. Inside a part, windows of a few shards are shuffled one by one:

    shards, permuted    |--7--|---2---|--9--|-4-|--0--|--5--|---1---|--8--|-3-|--6--|
    parts               |<-------- 0 -------->|<------- 1 ------->|<------- 2 ----->|
    windows             |<-- 0 -->|<--- 1 --->|<-- 0 -->|<-- 1 -->|<-- 0 -->|<- 1 ->|

A shard that a cut divides belongs to both parts.

Each part is an endless stream: one epoch after another, with the same number of samples per epoch.
With C parts and a global batch of B, step s takes the positions s·B/C … (s+1)·B/C − 1 of every
stream and concatenates them. A batch may straddle two epochs. Nothing is dropped or padded.

The topology is an argument. A rank takes a contiguous slice of the step, and a micro-batch takes a
contiguous slice of that. It follows that:

- The samples of a step do not depend on ranks, accumulation or workers.
- The step number is the whole state of the order.
- A node reads its own parts only, if the number of nodes divides C and its ranks are consecutive.
- Finding a position shuffles its own window only. Time and memory grow with the number of shards
  and the size of a window, not with the number of samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import lcm
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from coupalign.errors import InputError

if TYPE_CHECKING:  # the order itself needs no torch
    from coupalign.distributed.world import World

# Keeps these random numbers apart from the samples' own, which are seeded [seed, epoch, sample].
ORDER_SPAWN_KEY = 1


@dataclass(frozen=True)
class ShardLayout:
    """The samples grouped by shard. Shards without a sample are left out.

    Attributes:
        starts: int64 [shards + 1], where the group of each shard begins.
        numbers: int64 [n], the sample numbers in that grouping. None: 0 … n−1, as with a single
            source that is read in the order of its shards. Memory then grows with the shards only.
    """

    starts: np.ndarray
    numbers: np.ndarray | None = None

    @classmethod
    def from_counts(cls, counts: np.ndarray) -> ShardLayout:
        """Number the samples shard after shard.

        Args:
            counts: int [shards], the samples in each shard.
        """
        filled = counts[counts > 0]
        return cls(np.concatenate([[0], np.cumsum(filled, dtype=np.int64)]))

    @classmethod
    def from_samples(cls, shard_of_sample: np.ndarray) -> ShardLayout:
        """Group numbered samples by shard.

        Args:
            shard_of_sample: int [n], the shard of each sample, in any order.
        """
        layout = cls.from_counts(np.bincount(shard_of_sample))

        already_grouped = (shard_of_sample[1:] >= shard_of_sample[:-1]).all()
        if already_grouped:
            return layout

        return cls(layout.starts, np.argsort(shard_of_sample, kind="stable"))

    def __len__(self) -> int:
        return int(self.starts[-1])


class _Window(NamedTuple):
    """A shuffled window: its epoch, its first position in the part, its sample numbers (int64)."""

    epoch: int
    first: int
    numbers: np.ndarray

    def holds(self, epoch: int, position: int) -> bool:
        stop = self.first + len(self.numbers)
        return epoch == self.epoch and self.first <= position < stop


class EpochOrders:
    """The endless streams of samples, one for each of `parts` canonical nodes.

    Keeps in memory the lines of two epochs, and one window of each part that was read.

    Raises:
        InputError: there are more parts than samples.
    """

    def __init__(self, layout: ShardLayout, seed: int, window: int, parts: int = 1) -> None:
        self.samples = len(layout)
        self.parts = parts
        if self.samples < parts:
            raise InputError(
                f"data.canonical_nodes={parts} exceeds the number of training samples "
                f"({self.samples}): lower it"
            )

        self._layout = layout
        self._seed = seed
        self._window_shards = window
        # Where each part begins on the line, the same in every epoch.
        self._cuts = [part * self.samples // parts for part in range(parts + 1)]

        self._line = lru_cache(maxsize=2)(self._lay_line)
        self._current: dict[int, _Window] = {}

    def step(
        self, step: int, global_batch: int, positions: slice | None = None
    ) -> list[tuple[int, int]]:
        """Return the (epoch, sample) pairs of one optimizer step.

        Args:
            step: counted over the whole run, not per epoch.
            positions: which of the step's `global_batch` positions. Default: all of them, that is,
                those of all ranks.
        """
        if positions is None:
            positions = slice(0, global_batch)
        share = part_share(global_batch, self.parts)

        keys: list[tuple[int, int]] = []
        for part, own in part_slices(global_batch, self.parts, positions):
            # Each earlier step took `share` samples from the stream of this part.
            first = step * share + own.start
            stop = step * share + own.stop
            for epoch, numbers in self.read(part, first, stop):
                keys.extend((epoch, number) for number in numbers.tolist())
        return keys

    def read(self, part: int, first: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
        """Read the positions first … stop − 1 of the endless stream of a part.

        Yields:
            (epoch, sample numbers), piece by piece; the numbers are int64 and read-only.
        """
        length = self.length(part)
        while first < stop:
            epoch, position = divmod(first, length)

            # Shuffle the window of this position, unless it is the one that was read last.
            window = self._current.get(part)
            if window is None or not window.holds(epoch, position):
                window = self._shuffle_window(part, epoch, position)
                self._current[part] = window

            # Take what the window has from this position on.
            offset = position - window.first
            numbers = window.numbers[offset : offset + stop - first]
            yield epoch, numbers
            first += len(numbers)

    def length(self, part: int) -> int:
        """Return the number of samples of a part, the same in every epoch."""
        return self._cuts[part + 1] - self._cuts[part]

    def window_bounds(self, epoch: int, part: int) -> np.ndarray:
        """Return where the windows of a part begin and end: int64 [windows + 1] positions in it."""
        _, line = self._line(epoch)
        first, stop = self._cuts[part], self._cuts[part + 1]

        # Windows are made of whole shards. A cut may divide the first and the last shard of a part.
        edges = window_edges(line, slice(first, stop), self._window_shards)
        return np.clip(line[edges], first, stop) - first

    def _lay_line(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Permute the shards of an epoch and lay them on a line.

        Returns:
            the permuted shards, int64 [shards]; where each of them begins, int64 [shards + 1].
        """
        starts = self._layout.starts
        shards = _generator(self._seed, epoch).permutation(len(starts) - 1)
        sizes = np.diff(starts)[shards]
        return shards, np.concatenate([[0], np.cumsum(sizes)])

    def _shuffle_window(self, part: int, epoch: int, position: int) -> _Window:
        """Shuffle the window that holds this position of a part."""
        shards, line = self._line(epoch)

        # Find the window, and where it begins and ends on the line.
        bounds = self.window_bounds(epoch, part)
        window = int(np.searchsorted(bounds, position, side="right")) - 1
        first = self._cuts[part] + int(bounds[window])
        stop = self._cuts[part] + int(bounds[window + 1])

        # The line holds whole shards, so within a shard, positions on the line and in the layout
        # differ by a constant. Spread this constant over the positions of each shard.
        inside = slice(*_shards_between(line, first, stop))
        difference = self._layout.starts[shards[inside]] - line[inside]
        difference = np.repeat(difference, np.diff(line)[inside])

        # A cut may divide the first and the last shard: keep the positions inside the window.
        skipped = first - int(line[inside.start])
        difference = difference[skipped : skipped + stop - first]
        grouped = np.arange(first, stop) + difference

        # Shuffle, then look up the sample numbers.
        grouped = _generator(self._seed, epoch, part, window).permutation(grouped)
        numbers = grouped if self._layout.numbers is None else self._layout.numbers[grouped]
        numbers.flags.writeable = False
        return _Window(epoch, int(bounds[window]), numbers)


def window_edges(line: np.ndarray, part: slice, window: int) -> np.ndarray:
    """Divide the shards of a part into windows of at most `window` shards.

    Makes as few windows as possible, all of about the same size: a small last window would be a
    stretch of poorly mixed samples.

    Args:
        line: int64 [shards + 1], where each shard begins on the line.
        part: the positions of the part on the line.

    Returns:
        int64 [windows + 1], the first shard of each window, and the end of the last window.
    """
    first, stop = _shards_between(line, part.start, part.stop)
    windows = -(-(stop - first) // window)  # rounded up
    return first + np.arange(windows + 1) * (stop - first) // windows


def _shards_between(line: np.ndarray, first: int, stop: int) -> tuple[int, int]:
    """Find the shards that hold the positions first … stop − 1 of the line: first, last + 1."""
    first_shard = int(np.searchsorted(line, first, side="right")) - 1
    stop_shard = int(np.searchsorted(line, stop, side="left"))
    return first_shard, stop_shard


def _generator(seed: int, *stream: int) -> np.random.Generator:
    """Open an independent random stream for each (epoch) and each (epoch, part, window)."""
    # As a spawn key, which numpy mixes in after it filled up `seed` with zeros. In a list
    # [seed, epoch], a seed above 32 bits would run into the epoch, and [seed, epoch] would equal
    # [seed, epoch, 0, 0].
    sequence = np.random.SeedSequence(seed, spawn_key=(ORDER_SPAWN_KEY, *stream))
    return np.random.Generator(np.random.PCG64(sequence))


# ---------------------------------------------------------------------------- sharing a step


def rank_slice(global_batch: int, world: World) -> slice:
    """Return the contiguous positions of a step that this rank takes.

    Raises:
        InputError: the ranks cannot share the batch evenly. The message names sizes that work.
    """
    assert 0 <= world.rank < world.size
    share = _rank_share(global_batch, world.size)
    return slice(world.rank * share, (world.rank + 1) * share)


def part_share(global_batch: int, parts: int, ranks: int = 1) -> int:
    """Return how many samples of a step come from each canonical node's part.

    Args:
        ranks: used by the error message, which names sizes that this many ranks can share, too.

    Raises:
        InputError: the parts cannot share the batch evenly. The message names sizes that work.
    """
    if global_batch % parts:
        raise InputError(
            f"train.global_batch={global_batch} cannot be taken evenly from "
            f"data.canonical_nodes={parts} parts: "
            f"use {_nearest_multiples(global_batch, lcm(parts, ranks))}, "
            "or another data.canonical_nodes"
        )
    return global_batch // parts


def part_slices(global_batch: int, parts: int, positions: slice) -> list[tuple[int, slice]]:
    """Divide positions of a step by part.

    Returns:
        (part, positions in that part's share of the step) for each part that they touch.
    """
    share = part_share(global_batch, parts)
    first_part = positions.start // share
    stop_part = -(-positions.stop // share)  # rounded up

    slices = []
    for part in range(first_part, stop_part):
        begin = part * share
        own = slice(max(positions.start - begin, 0), min(positions.stop - begin, share))
        slices.append((part, own))
    return slices


def micro_batches(global_batch: int, max_micro_batch: int | None, ranks: int) -> tuple[int, int]:
    """Cut each rank's share of a step into the fewest micro-batches of equal size.

    Args:
        max_micro_batch: the most samples per micro-batch. None: no limit.

    Returns:
        the number of micro-batches per rank, and the samples in each.

    Raises:
        InputError: the ranks cannot share the batch evenly.
    """
    share = _rank_share(global_batch, ranks)
    limit = max_micro_batch or share

    accumulation = 1
    while share % accumulation or share // accumulation > limit:
        accumulation += 1
    return accumulation, share // accumulation


def _rank_share(global_batch: int, ranks: int) -> int:
    if global_batch % ranks:
        raise InputError(
            f"train.global_batch={global_batch} cannot be shared evenly by {ranks} processes: "
            f"use {_nearest_multiples(global_batch, ranks)}, or another number of processes"
        )
    return global_batch // ranks


def _nearest_multiples(batch: int, divisor: int) -> str:
    below = batch // divisor * divisor
    above = below + divisor
    return f"{below} or {above}" if below else f"{above}"
