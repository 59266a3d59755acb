"""The order of the data at the scale of a cluster, by simulation: what it costs, that nothing is read twice, who fetches what.

No sample is read, but every sample is counted: the ranks' own slices of the real order, over an epoch in the middle of
which the run goes on with another number of nodes.
"""

from __future__ import annotations

import time
import tracemalloc
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from coupalign.data.order import EpochOrders, ShardLayout, part_share, part_slices, rank_slice
from coupalign.distributed.world import World

EPOCH = 1  # the one that is counted: it begins and ends in the middle of steps
MOST_FETCHED = 1.05
Readers = dict[
    int, list[tuple[slice, slice]]
]  # part -> (a rank's slice of the step, of the part's share), for all its ranks


@dataclass(frozen=True)
class Cluster:
    """Ranks follow each other on a node; each of them has `workers` processes that take its micro-batches in turn."""

    nodes: int
    ranks: int
    workers: int = 8


@dataclass(frozen=True)
class Scale:
    """What is simulated; the run begins on the cluster `before` and goes on, in the middle of an epoch, on `after`."""

    samples: int = 100_000_000
    shards: int = 100_000
    before: Cluster = Cluster(nodes=128, ranks=1024)
    after: Cluster = Cluster(nodes=96, ranks=768)
    global_batch: int = 6144
    canonical_nodes: int = 384
    shuffle_window: int = 256
    seed: int = 0

    def layout(self) -> ShardLayout:
        """Shards of the mean size, give or take a fifth."""
        mean = self.samples // self.shards
        sizes = np.random.default_rng(self.seed).integers(
            mean - mean // 5, mean + mean // 5 + 1, self.shards
        )
        excess, rest = divmod(int(sizes.sum()) - self.samples, self.shards)
        return ShardLayout.from_counts(sizes - excess - (np.arange(self.shards) < rest))

    def orders(self, layout: ShardLayout, canonical_nodes: int) -> EpochOrders:
        """A fresh order of `layout`, as a rank opens it."""
        return EpochOrders(layout, self.seed, self.shuffle_window, canonical_nodes)


@dataclass(frozen=True)
class RankCost:
    """What the order costs a rank: seconds, and the most memory that was allocated at any time (tracemalloc), bytes."""

    open_s: float
    first_s: float
    resume_s: float
    epoch_s: float
    steps: int
    peak_bytes: int


@dataclass(frozen=True)
class Count:
    """Samples of an epoch by how often all ranks together read them; `differing`: spot checks in which a rank read something else."""

    drawn: int
    once: int
    never: int
    checks: int
    differing: int


@dataclass(frozen=True)
class Fetched:
    """Samples in the shards that a node touches in an epoch, as a multiple of samples / nodes: the mean and the worst node."""

    canonical_nodes: int
    nodes: int
    mean: float
    worst: float


@dataclass(frozen=True)
class OrderBench:
    """All of it; `window_shards`: how many shards are mixed with each other at a time, the mean."""

    scale: Scale
    rank: RankCost
    count: Count
    fetched: tuple[Fetched, ...]
    window_shards: float

    @property
    def faults(self) -> list[str]:
        """What does not hold; empty where all is well."""
        samples, count = self.scale.samples, self.count
        found = [
            f"one of {row.nodes} nodes fetches {row.worst:.3f} times its share, more than {MOST_FETCHED}"
            for row in self.fetched
            if row.canonical_nodes == self.scale.canonical_nodes and row.worst > MOST_FETCHED
        ]
        if not count.drawn == count.once == samples:
            found.append(
                f"of {samples:,} samples {count.once:,} were read once, {count.never:,} never; {count.drawn:,} reads in all"
            )
        if count.differing:
            found.append(
                f"{count.differing} of {count.checks} steps are not the same for a rank that begins there"
            )
        return found

    def to_json(self) -> dict[str, Any]:
        """The same, for machines."""
        return {**asdict(self), "faults": self.faults}


def bench_order(scale: Scale | None = None) -> OrderBench:
    """Measure and count everything; at the full scale half a minute of one core, and 2 GB."""
    scale = scale or Scale()
    layout = scale.layout()
    orders = scale.orders(layout, scale.canonical_nodes)
    windows = sum(
        len(orders.window_bounds(EPOCH, part)) - 1 for part in range(scale.canonical_nodes)
    )
    rank = rank_cost(scale)
    count = count_reads(scale, layout)
    fetched = tuple(
        _fetched(scale, layout, parts, nodes)
        for parts, nodes in (
            (scale.canonical_nodes, scale.before.nodes),
            (scale.canonical_nodes, scale.after.nodes),
            (1, scale.before.nodes),
        )
    )
    return OrderBench(scale, rank, count, fetched, scale.shards / windows)


# ------------------------------------------------------------------------------------------------ the cost for a rank


def rank_cost(scale: Scale) -> RankCost:
    """Rank 0 opens the order, takes its first step, takes one in the middle of a later epoch, and walks through an epoch."""
    taken, steps = (
        rank_slice(scale.global_batch, simulated_rank(0, scale.before.ranks)),
        -(-scale.samples // scale.global_batch),
    )
    opened: list[EpochOrders] = []
    seconds = [
        _seconds(act)
        for act in (
            lambda: opened.append(scale.orders(scale.layout(), scale.canonical_nodes)),
            lambda: opened[0].step(0, scale.global_batch, taken),
            lambda: opened[0].step(7 * steps + steps // 2, scale.global_batch, taken),
            lambda: _walk(opened[0], steps, scale.global_batch, taken),
        )
    ]
    tracemalloc.start()  # after the clock: it slows everything down
    _walk(scale.orders(scale.layout(), scale.canonical_nodes), steps + 1, scale.global_batch, taken)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return RankCost(*seconds, steps, peak)


def _walk(orders: EpochOrders, steps: int, global_batch: int, taken: slice) -> None:
    for step in range(steps):
        orders.step(step, global_batch, taken)


def _seconds(act: Callable[[], Any]) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


# ---------------------------------------------------------------------------------------------------- every sample once


def count_reads(scale: Scale, layout: ShardLayout) -> Count:
    """Count the samples of an epoch that each worker of each rank reads, the cluster changing at two fifths of it."""
    orders, fresh = (
        scale.orders(layout, scale.canonical_nodes),
        scale.orders(layout, scale.canonical_nodes),
    )
    share = part_share(scale.global_batch, scale.canonical_nodes)
    lengths = [orders.length(part) for part in range(scale.canonical_nodes)]
    first, stop = EPOCH * min(lengths) // share, -(-(EPOCH + 1) * max(lengths) // share)
    change = (stop - first) * 2 // 5
    phases = [(slice(0, change), scale.before), (slice(change, stop - first), scale.after)]
    readers = [part_readers(scale, cluster.ranks) for _, cluster in phases]
    counts, drawn, differing = np.zeros(scale.samples, np.uint8), 0, 0
    for part in tqdm(range(scale.canonical_nodes), desc="counting", unit="part", leave=False):
        steps = _steps_of(orders, part, first * share, stop * share).reshape(-1, share)
        for (rows, cluster), reading in zip(phases, readers):
            for numbers in _worker_reads(
                steps[rows], [own for _, own in reading[part]], cluster.workers
            ):
                counts[numbers] += (
                    1  # a number twice in `numbers` counts once, but then `drawn` is too large for all to be 1
                )
                drawn += len(numbers)
            row = rows.start + part * 7919 % (
                rows.stop - rows.start
            )  # any one of the phase, and any one of its ranks
            taken, own = reading[part][part % len(reading[part])]
            keys = fresh.step(first + row, scale.global_batch, taken)[
                part * share + own.start - taken.start :
            ]
            again = [
                number if epoch == EPOCH else -1 for epoch, number in keys[: own.stop - own.start]
            ]
            differing += again != steps[row, own].tolist()
    return Count(
        drawn,
        int((counts == 1).sum()),
        int((counts == 0).sum()),
        2 * scale.canonical_nodes,
        differing,
    )


def simulated_rank(rank: int, ranks: int) -> World:
    """Return the World of one rank of a cluster that is only simulated."""
    return World(rank=rank, size=ranks, local_rank=0, local_size=1, device=torch.device("cpu"))


def part_readers(scale: Scale, ranks: int) -> Readers:
    """Which ranks read a part, and which places of its share of each step."""
    readers: Readers = defaultdict(list)
    for rank in range(ranks):
        taken = rank_slice(scale.global_batch, simulated_rank(rank, ranks))
        for part, own in part_slices(scale.global_batch, scale.canonical_nodes, taken):
            readers[part].append((taken, own))
    return readers


def _steps_of(orders: EpochOrders, part: int, first: int, stop: int) -> np.ndarray:
    """Sample numbers, int64 [stop − first]; −1 in other epochs than the one that is counted."""
    return np.concatenate(
        [
            numbers if epoch == EPOCH else np.full(len(numbers), -1)
            for epoch, numbers in orders.read(part, first, stop)
        ]
    )


def _worker_reads(steps: np.ndarray, slices: list[slice], workers: int) -> Iterator[np.ndarray]:
    for own in slices:
        for worker in range(workers):
            numbers = steps[worker::workers, own].ravel()
            yield numbers[numbers >= 0]


# ------------------------------------------------------------------------------------------------ what a node fetches


def _fetched(scale: Scale, layout: ShardLayout, parts: int, nodes: int) -> Fetched:
    orders = scale.orders(layout, parts)
    ratio = fetched_samples(orders, layout, nodes, scale.global_batch) * nodes / scale.samples
    return Fetched(parts, nodes, float(ratio.mean()), float(ratio.max()))


def fetched_samples(
    orders: EpochOrders, layout: ShardLayout, nodes: int, global_batch: int
) -> np.ndarray:
    """Samples in all the shards that each node touches in an epoch, int64 [nodes]; a shard on a cut counts in both parts."""
    share, node_share = part_share(global_batch, orders.parts), global_batch // nodes
    sizes = np.diff(layout.starts)
    shard_of = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    total = np.zeros(nodes, np.int64)
    with tqdm(
        total=orders.samples,
        desc=f"fetching, {orders.parts} parts",
        unit="sample",
        unit_scale=True,
        leave=False,
    ) as bar:
        for part in range(orders.parts):
            first, stop = (
                part * share // node_share,
                -(-(part + 1) * share // node_share),
            )  # the nodes that read this part
            touched = np.zeros((stop - first, len(sizes)), bool)
            place, length = EPOCH * orders.length(part), orders.length(part)
            for _, numbers in orders.read(part, place, place + length):
                node = (part * share + np.arange(place, place + len(numbers)) % share) // node_share
                touched[node - first, shard_of[numbers]] = True
                place += len(numbers)
                bar.update(len(numbers))
            total[first:stop] += touched @ sizes
    return total


# ------------------------------------------------------------------------------------------------------- for people


def table(bench: OrderBench) -> str:
    """What was found, and what a user should conclude."""
    scale, rank, count = bench.scale, bench.rank, bench.count
    before, after = scale.before, scale.after
    lines = [
        f"{scale.samples:,} samples in {scale.shards:,} shards, global batch {scale.global_batch:,}, canonical_nodes "
        f"{scale.canonical_nodes}, shuffle_window {scale.shuffle_window}",
        f"{before.ranks:,} ranks x {before.workers} workers on {before.nodes} nodes, then {after.ranks:,} ranks on {after.nodes}",
        "",
        "the order, for one rank (its workers are handed sample numbers, and hold none of it)",
        f"  opened (sizes of the shards drawn, summed)    {rank.open_s * 1e3:10,.1f} ms",
        f"  first step                                    {rank.first_s * 1e3:10,.1f} ms",
        f"  a step in the middle of epoch 7 (resume)      {rank.resume_s * 1e3:10,.1f} ms",
        f"  an epoch of {rank.steps:>7,} steps                    {rank.epoch_s:10,.2f} s   "
        f"{rank.epoch_s / rank.steps * 1e6:.1f} us a step",
        f"  peak memory through the epoch (tracemalloc)   {rank.peak_bytes / 1e6:10,.1f} MB",
        "",
        f"an epoch, counted over {before.ranks:,} ranks and from two fifths of it over {after.ranks:,}, x {before.workers} workers",
        f"  read {count.drawn:,}, once {count.once:,}, never {count.never:,}; "
        f"{count.checks - count.differing} of {count.checks} steps begun afresh were the same",
        "",
        "whole shards fetched by a node in an epoch, as a multiple of samples / nodes",
        f"  {'canonical_nodes':>15}{'nodes':>8}{'mean':>10}{'worst':>10}",
        *(
            f"  {row.canonical_nodes:>15,}{row.nodes:>8,}{row.mean:>10.3f}{row.worst:>10.3f}"
            for row in bench.fetched
        ),
        "",
        *_conclusion(bench),
        *(f"FAULT: {fault}" for fault in bench.faults),
    ]
    return "\n".join(lines)


def _conclusion(bench: OrderBench) -> list[str]:
    scale = bench.scale
    return [
        f"Choose for data.canonical_nodes a common multiple of the numbers of nodes you may use ({scale.before.nodes} and "
        f"{scale.after.nodes}: {scale.canonical_nodes}) that divides",
        "train.global_batch, before the run begins: changing it changes the order. Its price: a window mixes shards of one part",
        f"only, at most shuffle_window, here {bench.window_shards:.0f}; yet a step takes from all the parts, "
        f"from {scale.canonical_nodes * bench.window_shards:,.0f} shards at a time,",
        "and the parts are drawn anew each epoch. A node's cache should hold a window of each of its parts, here "
        f"{scale.canonical_nodes // scale.before.nodes} x {bench.window_shards:.0f} shards.",
    ]
