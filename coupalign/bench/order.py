"""`coupalign bench order`: simulate the data order of a cluster.

It measures what the order costs a rank, checks that no sample is read twice, and shows how much
each node fetches. No sample is read from disk, but every sample is counted: each rank takes its own
slice of the real order over one epoch. In the middle of it, the run continues with another number
of nodes.
"""

from __future__ import annotations

import tracemalloc
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from textwrap import indent
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from coupalign.bench.machine import time_call
from coupalign.bench.result import format_rows
from coupalign.data.order import EpochOrders, ShardLayout, part_share, part_slices, rank_slice
from coupalign.distributed.world import World

# The epoch that is counted. It begins and ends in the middle of steps.
EPOCH = 1

# A node must not fetch more than this multiple of samples / nodes.
MAX_FETCHED = 1.05

# part -> for each of its ranks, (the rank's slice of a step, its slice of the part's share).
Readers = dict[int, list[tuple[slice, slice]]]


@dataclass(frozen=True)
class Cluster:
    """The size of a cluster.

    The ranks of a node are consecutive. Each rank has `workers` processes, which take its
    micro-batches in turn.
    """

    nodes: int
    ranks: int
    workers: int = 8


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What is simulated. In the middle of an epoch, the run moves from `before` to `after`."""

    samples: int = 100_000_000
    shards: int = 100_000
    before: Cluster = Cluster(nodes=128, ranks=1024)
    after: Cluster = Cluster(nodes=96, ranks=768)
    global_batch: int = 6144
    canonical_nodes: int = 384
    shuffle_window: int = 256
    seed: int = 0

    def layout(self) -> ShardLayout:
        """Draw the sizes of the shards: the mean, plus or minus up to a fifth."""
        mean = self.samples // self.shards
        smallest, largest = mean - mean // 5, mean + mean // 5
        rng = np.random.default_rng(self.seed)
        sizes = rng.integers(smallest, largest + 1, self.shards)

        # Correct all sizes so that they add up to the number of samples.
        excess, rest = divmod(int(sizes.sum()) - self.samples, self.shards)
        return ShardLayout.from_counts(sizes - excess - (np.arange(self.shards) < rest))

    def orders(self, layout: ShardLayout, canonical_nodes: int) -> EpochOrders:
        """Return a new order of `layout`, as a rank opens it."""
        return EpochOrders(layout, self.seed, self.shuffle_window, canonical_nodes)


@dataclass(frozen=True, kw_only=True)
class RankCost:
    """What the order costs a rank: seconds, and the peak of allocated memory (tracemalloc).

    Attributes:
        open_s: opening the order.
        first_s: the first step.
        resume_s: a step in the middle of a later epoch.
        epoch_s: all steps of an epoch.
        steps: per epoch.
        peak_bytes: during an epoch.
    """

    open_s: float
    first_s: float
    resume_s: float
    epoch_s: float
    steps: int
    peak_bytes: int


@dataclass(frozen=True, kw_only=True)
class ReadCounts:
    """How often the samples of an epoch are read by all ranks together.

    Attributes:
        drawn: reads in total.
        once: samples that are read exactly once.
        never: samples that are not read.
        checks: steps that were read again by a rank that begins there.
        differing: checks in which that rank read something else.
    """

    drawn: int
    once: int
    never: int
    checks: int
    differing: int


@dataclass(frozen=True)
class Fetched:
    """Samples in the shards that a node touches in an epoch, as a multiple of samples / nodes."""

    canonical_nodes: int
    nodes: int
    mean: float  # over the nodes
    worst: float  # of the nodes


@dataclass(frozen=True, kw_only=True)
class OrderBench:
    """The result of the simulation.

    Attributes:
        window_shards: mean number of shards per shuffle window.
    """

    scale: Scale
    rank: RankCost
    count: ReadCounts
    fetched: tuple[Fetched, ...]
    window_shards: float

    @property
    def faults(self) -> list[str]:
        """Properties of the order that do not hold. Empty if all is well."""
        samples, count = self.scale.samples, self.count
        faults = []
        for row in self.fetched:
            if row.canonical_nodes == self.scale.canonical_nodes and row.worst > MAX_FETCHED:
                faults.append(
                    f"one of {row.nodes} nodes fetches {row.worst:.3f} times its share, "
                    f"more than {MAX_FETCHED}"
                )
        if not count.drawn == count.once == samples:
            faults.append(
                f"of {samples:,} samples {count.once:,} were read once, {count.never:,} never; "
                f"{count.drawn:,} reads in all"
            )
        if count.differing:
            faults.append(
                f"{count.differing} of {count.checks} steps are not the same "
                "for a rank that begins there"
            )
        return faults

    def to_json(self) -> dict[str, Any]:
        """Return the fields and the faults as plain values."""
        return {**asdict(self), "faults": self.faults}


def bench_order(scale: Scale | None = None) -> OrderBench:
    """Run the simulation. The full scale takes half a minute on one core, and 2 GB."""
    scale = scale or Scale()
    layout = scale.layout()
    parts = scale.canonical_nodes

    orders = scale.orders(layout, parts)
    windows = sum(len(orders.window_bounds(EPOCH, part)) - 1 for part in range(parts))
    return OrderBench(
        scale=scale,
        rank=measure_rank(scale),
        count=count_reads(scale, layout),
        fetched=(
            _compare_fetched(scale, layout, parts, scale.before.nodes),
            _compare_fetched(scale, layout, parts, scale.after.nodes),
            _compare_fetched(scale, layout, 1, scale.before.nodes),
        ),
        window_shards=scale.shards / windows,
    )


def simulated_rank(rank: int, ranks: int) -> World:
    """Return the World of one rank of a cluster that is only simulated."""
    return World(rank=rank, size=ranks, local_rank=0, local_size=1, device=torch.device("cpu"))


def _ceil_div(number: int, divisor: int) -> int:
    return -(-number // divisor)


# ---------------------------------------------------------------------------- what a rank pays


def measure_rank(scale: Scale) -> RankCost:
    """Measure the order on rank 0: open it, take single steps, and walk through an epoch."""
    positions = rank_slice(scale.global_batch, simulated_rank(0, scale.before.ranks))
    steps = _ceil_div(scale.samples, scale.global_batch)
    middle_of_epoch_7 = 7 * steps + steps // 2

    def open_orders() -> EpochOrders:
        return scale.orders(scale.layout(), scale.canonical_nodes)

    open_s, orders = time_call(open_orders)
    first_s, _ = time_call(lambda: orders.step(0, scale.global_batch, positions))
    resume_s, _ = time_call(lambda: orders.step(middle_of_epoch_7, scale.global_batch, positions))
    epoch_s, _ = time_call(lambda: _walk(orders, steps, scale.global_batch, positions))

    # Tracing slows everything down, so it begins after the clock.
    tracemalloc.start()
    _walk(open_orders(), steps + 1, scale.global_batch, positions)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return RankCost(
        open_s=open_s,
        first_s=first_s,
        resume_s=resume_s,
        epoch_s=epoch_s,
        steps=steps,
        peak_bytes=peak_bytes,
    )


def _walk(orders: EpochOrders, steps: int, global_batch: int, positions: slice) -> None:
    for step in range(steps):
        orders.step(step, global_batch, positions)


# ---------------------------------------------------------------------------- every sample once


def count_reads(scale: Scale, layout: ShardLayout) -> ReadCounts:
    """Count the samples of an epoch that each worker of each rank reads.

    The cluster changes after two fifths of the epoch.
    """
    parts = scale.canonical_nodes
    orders, fresh_orders = scale.orders(layout, parts), scale.orders(layout, parts)

    # The steps that touch the epoch: from the shortest part's beginning to the longest part's end.
    share = part_share(scale.global_batch, parts)
    lengths = [orders.length(part) for part in range(parts)]
    first = EPOCH * min(lengths) // share
    stop = _ceil_div((EPOCH + 1) * max(lengths), share)

    # The rows of these steps that each cluster trains.
    change = (stop - first) * 2 // 5
    phases = [
        (slice(0, change), scale.before.workers, part_readers(scale, scale.before.ranks)),
        (slice(change, stop - first), scale.after.workers, part_readers(scale, scale.after.ranks)),
    ]

    reads_of_sample, drawn, differing = np.zeros(scale.samples, np.uint8), 0, 0
    for part in tqdm(range(parts), desc="counting", unit="part", leave=False):
        steps = _read_part(orders, part, first * share, stop * share).reshape(-1, share)
        for rows, workers, readers in phases:
            for numbers in _worker_reads(steps[rows], readers[part], workers):
                # A number twice in `numbers` counts once here. But then `drawn` is larger than the
                # number of samples that are read once.
                reads_of_sample[numbers] += 1
                drawn += len(numbers)

            # Check an arbitrary step of the phase, on an arbitrary rank that has seen no other.
            row = rows.start + part * 7919 % (rows.stop - rows.start)
            positions, own = readers[part][part % len(readers[part])]
            keys = fresh_orders.step(first + row, scale.global_batch, positions)
            begin = part * share + own.start - positions.start
            own_keys = keys[begin : begin + own.stop - own.start]
            numbers = [number if epoch == EPOCH else -1 for epoch, number in own_keys]
            differing += numbers != steps[row, own].tolist()

    return ReadCounts(
        drawn=drawn,
        once=int((reads_of_sample == 1).sum()),
        never=int((reads_of_sample == 0).sum()),
        checks=len(phases) * parts,
        differing=differing,
    )


def part_readers(scale: Scale, ranks: int) -> Readers:
    """Find which ranks read each part, and which positions of its share of each step."""
    readers: Readers = defaultdict(list)
    for rank in range(ranks):
        positions = rank_slice(scale.global_batch, simulated_rank(rank, ranks))
        for part, own in part_slices(scale.global_batch, scale.canonical_nodes, positions):
            readers[part].append((positions, own))
    return readers


def _read_part(orders: EpochOrders, part: int, first: int, stop: int) -> np.ndarray:
    """Return sample numbers, int64 [stop − first]; −1 in other epochs than the counted one."""
    pieces = []
    for epoch, numbers in orders.read(part, first, stop):
        pieces.append(numbers if epoch == EPOCH else np.full(len(numbers), -1))
    return np.concatenate(pieces)


def _worker_reads(
    steps: np.ndarray, readers: Sequence[tuple[slice, slice]], workers: int
) -> Iterator[np.ndarray]:
    """Yield the sample numbers that each worker of each rank reads."""
    for _, own in readers:
        for worker in range(workers):
            numbers = steps[worker::workers, own].ravel()
            yield numbers[numbers >= 0]


# ---------------------------------------------------------------------------- what a node fetches


def _compare_fetched(scale: Scale, layout: ShardLayout, parts: int, nodes: int) -> Fetched:
    orders = scale.orders(layout, parts)
    ratio = fetched_samples(orders, layout, nodes, scale.global_batch) * nodes / scale.samples
    return Fetched(parts, nodes, float(ratio.mean()), float(ratio.max()))


def fetched_samples(
    orders: EpochOrders, layout: ShardLayout, nodes: int, global_batch: int
) -> np.ndarray:
    """Count the samples in all shards that each node touches in an epoch.

    A shard that a cut divides counts in both parts.

    Returns:
        int64 [nodes].
    """
    share, node_share = part_share(global_batch, orders.parts), global_batch // nodes
    sizes = np.diff(layout.starts)
    shard_of = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)

    total = np.zeros(nodes, np.int64)
    bar = tqdm(
        total=orders.samples,
        desc=f"fetching, {orders.parts} parts",
        unit="sample",
        unit_scale=True,
        leave=False,
    )
    with bar:
        for part in range(orders.parts):
            # The nodes that read this part.
            first = part * share // node_share
            stop = _ceil_div((part + 1) * share, node_share)
            touched = np.zeros((stop - first, len(sizes)), bool)

            length = orders.length(part)
            position = EPOCH * length
            for _, numbers in orders.read(part, position, position + length):
                positions = np.arange(position, position + len(numbers))
                node = (part * share + positions % share) // node_share
                touched[node - first, shard_of[numbers]] = True
                position += len(numbers)
                bar.update(len(numbers))
            total[first:stop] += touched @ sizes
    return total


# ---------------------------------------------------------------------------- for people


def table(bench: OrderBench) -> str:
    """Format the result, and what a user should conclude."""
    scale, rank, count = bench.scale, bench.rank, bench.count
    before, after = scale.before, scale.after

    costs = [
        ("open it (draw and add up the shard sizes)", f"{rank.open_s * 1e3:,.1f} ms"),
        ("first step", f"{rank.first_s * 1e3:,.1f} ms"),
        ("a step in the middle of epoch 7 (resume)", f"{rank.resume_s * 1e3:,.1f} ms"),
        (f"an epoch of {rank.steps:,} steps", f"{rank.epoch_s:,.2f} s"),
        ("each of these steps", f"{rank.epoch_s / rank.steps * 1e6:,.1f} us"),
        ("peak memory during the epoch (tracemalloc)", f"{rank.peak_bytes / 1e6:,.1f} MB"),
    ]
    headers = ("canonical_nodes", "nodes", "mean", "worst")
    fetched = []
    for row in bench.fetched:
        cells = (f"{row.canonical_nodes:,}", f"{row.nodes:,}")
        fetched.append((*cells, f"{row.mean:.3f}", f"{row.worst:.3f}"))

    lines = [
        f"{scale.samples:,} samples in {scale.shards:,} shards, global batch "
        f"{scale.global_batch:,}, canonical_nodes {scale.canonical_nodes}, "
        f"shuffle_window {scale.shuffle_window}",
        f"{before.ranks:,} ranks x {before.workers} workers on {before.nodes} nodes, "
        f"then {after.ranks:,} ranks on {after.nodes}",
        "",
        "the order, for one rank (its workers only receive sample numbers)",
        indent(format_rows(costs), "  "),
        "",
        f"an epoch, counted over {before.ranks:,} ranks, and after two fifths of it over "
        f"{after.ranks:,}, x {before.workers} workers",
        f"  read {count.drawn:,}, once {count.once:,}, never {count.never:,}; "
        f"{count.checks - count.differing} of {count.checks} steps were the same "
        "for a rank that begins there",
        "",
        "whole shards fetched per node and epoch, as a multiple of samples / nodes",
        indent(format_rows(fetched, headers), "  "),
        "",
        *_conclusion(bench),
        *(f"FAULT: {fault}" for fault in bench.faults),
    ]
    return "\n".join(lines)


def _conclusion(bench: OrderBench) -> list[str]:
    scale, window = bench.scale, bench.window_shards
    parts_per_node = scale.canonical_nodes // scale.before.nodes
    return [
        "Choose data.canonical_nodes before the run begins: changing it changes the order. It must",
        "divide train.global_batch, and be a common multiple of the numbers of nodes you may use",
        f"(here {scale.before.nodes} and {scale.after.nodes}: {scale.canonical_nodes}).",
        "",
        f"A window mixes shards of one part only, here {window:.0f}, at most shuffle_window. But a "
        "step takes",
        f"samples from all parts, so from {scale.canonical_nodes * window:,.0f} shards at a time, "
        "and each epoch draws new parts.",
        "A node's cache should hold one window of each of its parts, here "
        f"{parts_per_node} x {window:.0f} shards.",
    ]
