"""The order of the samples over random shards and topologies, compared with a slow, plain one."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from coupalign.data.order import (
    EpochOrders,
    ShardLayout,
    micro_batches,
    part_share,
    part_slices,
    rank_slice,
)
from coupalign.errors import InputError
from tests.unit.data.batches import world_of

# The shard of each sample, in any order. Some shards have no sample.
shards = st.lists(st.integers(0, 12), min_size=1, max_size=80).map(np.array)
parts = st.integers(1, 7)
windows = st.integers(1, 9)


def orders_of(
    shard_of_sample: np.ndarray, seed: int = 5, window: int = 3, parts: int = 1
) -> EpochOrders:
    return EpochOrders(ShardLayout.from_samples(shard_of_sample), seed, window, parts)


def plain_epoch(
    shard_of_sample: np.ndarray, seed: int, epoch: int, window: int, parts: int
) -> list[list[int]]:
    """The definition, sample by sample: the sample numbers of each part."""

    def shuffled(things: list, *stream: int) -> list:
        sequence = np.random.SeedSequence(seed, spawn_key=(1, epoch, *stream))
        generator = np.random.Generator(np.random.PCG64(sequence))
        return [things[i] for i in generator.permutation(len(things))]

    # Lay the permuted shards on a line.
    line = []
    for shard in shuffled(sorted(set(shard_of_sample.tolist()))):
        line += [(shard, int(number)) for number in np.flatnonzero(shard_of_sample == shard)]

    cuts = [part * len(line) // parts for part in range(parts + 1)]
    divided = []
    for part, (first, stop) in enumerate(zip(cuts, cuts[1:])):
        own = line[first:stop]

        # Divide the shards of the part into windows.
        held = list(dict.fromkeys(shard for shard, _ in own))
        count = -(-len(held) // window)
        edges = [number * len(held) // count for number in range(count + 1)]

        # Shuffle the samples of each window.
        numbers = []
        for window_number, (a, b) in enumerate(zip(edges, edges[1:])):
            inside = [number for shard, number in own if shard in held[a:b]]
            numbers += shuffled(inside, part, window_number)
        divided.append(numbers)
    return divided


def plain_steps(
    shard_of_sample: np.ndarray, seed: int, window: int, parts: int, global_batch: int, epochs: int
) -> Iterator[list[tuple[int, int]]]:
    """The steps of the first epochs, one after another."""
    streams: list[list[tuple[int, int]]] = [[] for _ in range(parts)]
    for epoch in range(epochs):
        divided = plain_epoch(shard_of_sample, seed, epoch, window, parts)
        for stream, numbers in zip(streams, divided):
            stream += [(epoch, number) for number in numbers]

    share = global_batch // parts
    for first in range(0, min(map(len, streams)) - share + 1, share):
        yield sum((stream[first : first + share] for stream in streams), [])


# ---------------------------------------------------------------------------------- properties


@settings(max_examples=150, deadline=None)
@given(shards, st.integers(0, 2**70), windows, parts, st.integers(1, 12), st.data())
def test_steps_equal_the_plain_definition(shard_of_sample, seed, window, parts, share, data):
    """All steps in order; and each step, and each slice of it, with no step before it."""
    assume(len(shard_of_sample) >= parts)
    size = share * parts
    expected = list(plain_steps(shard_of_sample, seed, window, parts, size, 4))

    orders = orders_of(shard_of_sample, seed, window, parts)
    assert [orders.step(step, size) for step in range(len(expected))] == expected

    chosen = st.lists(st.integers(0, len(expected) - 1), max_size=5)
    for step in data.draw(chosen) if expected else ():
        # A fresh order, which has read nothing.
        fresh = orders_of(shard_of_sample, seed, window, parts)
        assert fresh.step(step, size) == expected[step]

        # The same order, backward too.
        first = data.draw(st.integers(0, size - 1))
        positions = slice(first, data.draw(st.integers(first + 1, size)))
        assert orders.step(step, size, positions) == expected[step][positions]


@settings(max_examples=100, deadline=None)
@given(
    shards,
    windows,
    parts,
    st.integers(1, 3),
    st.lists(st.integers(1, 6), min_size=1, max_size=4),
    st.integers(1, 9),
)
def test_every_sample_is_read_once_per_epoch_while_the_world_changes(
    shard_of_sample, window, parts, share, worlds, hold
):
    """Every `hold` steps the run resumes on another number of ranks, which know the step only."""
    assume(len(shard_of_sample) >= parts)
    size = int(np.lcm.reduce([parts, *worlds])) * share
    samples, seen = len(shard_of_sample), Counter()
    whole = orders_of(shard_of_sample, 5, window, parts)

    for step in range(2 * -(-samples // size) + 2):
        if step % hold == 0:
            ranks = worlds[step // hold % len(worlds)]
            orders = orders_of(shard_of_sample, 5, window, parts)

        slices = [rank_slice(size, world_of(rank, ranks)) for rank in range(ranks)]
        own = [orders.step(step, size, positions) for positions in slices]

        assert {len(keys) for keys in own} == {size // ranks}
        assert sum(own, []) == whole.step(step, size)
        seen.update(sum(own, []))

    assert max(seen.values()) == 1
    assert sorted(key for key in seen if key[0] < 2) == [
        (epoch, number) for epoch in range(2) for number in range(samples)
    ]


@settings(deadline=None)
@given(shards, windows, parts, st.integers(0, 5))
def test_parts_are_equal_and_share_a_shard_only_at_a_cut(shard_of_sample, window, parts, epoch):
    assume(len(shard_of_sample) >= parts)
    orders, samples = orders_of(shard_of_sample, 5, window, parts), len(shard_of_sample)

    # The lengths are those of every epoch.
    lengths = [(part + 1) * samples // parts - part * samples // parts for part in range(parts)]
    assert max(lengths) - min(lengths) <= 1

    read = []
    for part, length in enumerate(lengths):
        pieces = list(orders.read(part, epoch * length, (epoch + 1) * length))
        assert {found for found, _ in pieces} == {epoch}
        read.append(np.concatenate([numbers for _, numbers in pieces]))

    assert sorted(np.concatenate(read)) == list(range(samples))
    assert [len(numbers) for numbers in read] == lengths
    held = [set(shard_of_sample[numbers]) for numbers in read]
    assert sum(map(len, held)) <= len(set(shard_of_sample)) + parts - 1


@settings(deadline=None)
@given(shards, windows, parts)
def test_samples_move_only_inside_a_window_of_shards(shard_of_sample, window, parts):
    assume(len(shard_of_sample) >= parts)
    orders = orders_of(shard_of_sample, 5, window, parts)

    for part in range(parts):
        bounds = orders.window_bounds(0, part)
        held = []
        for first, stop in zip(bounds, bounds[1:]):
            ((_, numbers),) = orders.read(part, int(first), int(stop))
            held.append(set(shard_of_sample[numbers]))

        sizes = [len(window_shards) for window_shards in held]
        assert max(sizes) <= window and max(sizes) - min(sizes) <= 1
        assert sum(sizes) == len(set().union(*held)) and len(sizes) == -(-sum(sizes) // window)


@given(
    st.integers(1, 6), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 5)
)
def test_node_reads_only_its_own_parts(nodes, parts_each, ranks_each, factor, share):
    """For numbers of nodes and ranks that divide: nodes share no part, parts of a node adjoin."""
    parts, ranks = nodes * parts_each, nodes * ranks_each
    size = int(np.lcm(parts, ranks)) * share

    read = [set() for _ in range(nodes)]
    for rank in range(ranks):
        positions = rank_slice(size, world_of(rank, ranks))
        read[rank // ranks_each] |= {part for part, _ in part_slices(size, parts, positions)}

    assert read == [set(range(node * parts_each, (node + 1) * parts_each)) for node in range(nodes)]


@given(st.integers(1, 20), st.integers(1, 9), st.data())
def test_slices_of_parts_make_up_the_slice_of_the_step(share, parts, data):
    size = share * parts
    first = data.draw(st.integers(0, size - 1))
    positions = slice(first, data.draw(st.integers(first + 1, size)))

    found = []
    for part, own in part_slices(size, parts, positions):
        found += range(part * share + own.start, part * share + own.stop)

    assert found == list(range(size))[positions]


# ------------------------------------------------------------------------------ random numbers


def test_seed_epoch_and_part_all_change_the_order():
    """Two parts of equal shards, some seeds above 32 bits: all orders differ inside the part."""
    seeds = [0, 1, 2, 3, 2**32, 2**32 + 1, 2**33, 2**64]
    found = set()
    for seed in seeds:
        orders = orders_of(np.arange(200) // 10, seed, 10, 2)
        for epoch in range(5):
            for part in range(2):
                ((_, numbers),) = orders.read(part, epoch * 100, epoch * 100 + 100)
                found.add(tuple(np.argsort(np.argsort(numbers))))

    assert len(found) == len(seeds) * 5 * 2


def test_shards_and_windows_are_shuffled_with_different_random_numbers():
    """One sample per shard, one window: with one generator, one permutation would apply twice."""
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence(3, spawn_key=(1, 0))))
    once = generator.permutation(50)

    found = [number for _, number in orders_of(np.arange(50), 3, 50).step(0, 50)]

    assert found != once[once].tolist()


@pytest.mark.parametrize("position", [0, 3])
def test_full_window_is_a_fair_shuffle(position):
    """Each of 6 samples comes at a position equally often.

    The chi-square of 6000 epochs is below the 99.99 % point of 5 degrees of freedom, 25.7.
    """
    orders = orders_of(np.array([0, 0, 0, 1, 1, 2]), 3, 3)

    found = [orders.step(epoch, 6)[position][1] for epoch in range(6000)]

    counts = np.bincount(found, minlength=6)
    assert ((counts - 1000) ** 2 / 1000).sum() < 25.7


def test_sample_comes_to_every_part_over_the_epochs():
    """As above, with 3 degrees of freedom: the part that reads sample 0, of 4 parts of 8 shards."""
    orders = orders_of(np.arange(32) // 4, 3, 3, 4)

    counts = np.zeros(4)
    for epoch in range(4000):
        numbers = [number for _, number in orders.step(epoch, 32)]
        counts[numbers.index(0) // 8] += 1

    assert ((counts - 1000) ** 2 / 1000).sum() < 21.1


# ------------------------------------------------------------------------------------ at scale


def test_rank_shuffles_only_its_own_windows():
    """A billion samples: time and memory depend on shards and one window, not on samples."""
    tracemalloc.start()
    orders = EpochOrders(ShardLayout.from_counts(np.full(10_000, 100_000)), 5, 2, 8)
    keys = orders.step(1_000_000, 64, rank_slice(64, world_of(3, 16)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert len(set(keys)) == 4
    assert all(epoch == 0 for epoch, _ in keys)
    assert list(orders._current) == [1]
    assert peak < 10 * 8 * (10_000 + 2 * 100_000)


def test_layout_of_sorted_samples_keeps_no_table():
    counts = np.array([3, 0, 1, 2])

    layouts = [
        ShardLayout.from_counts(counts),
        ShardLayout.from_samples(np.repeat(np.arange(4), counts)),
    ]
    mixed = ShardLayout.from_samples(np.array([7, 2, 7, 2, 4]))

    for layout in layouts:
        assert layout.numbers is None
        assert layout.starts.tolist() == [0, 3, 4, 6]
        assert len(layout) == 6
    assert mixed.starts.tolist() == [0, 2, 3, 5]
    assert mixed.numbers.tolist() == [1, 3, 4, 0, 2]


def test_batch_may_straddle_epochs():
    def epochs_of(orders: EpochOrders, step: int, size: int) -> list[int]:
        return [epoch for epoch, _ in orders.step(step, size)]

    orders = orders_of(np.zeros(5, int))
    assert epochs_of(orders, 1, 4) == [0, 1, 1, 1]
    assert epochs_of(orders, 0, 12) == [0] * 5 + [1] * 5 + [2] * 2

    # Parts of 2 and 3 samples.
    assert epochs_of(orders_of(np.zeros(5, int), parts=2), 2, 2) == [1, 0]


# ------------------------------------------------------------------------------ sharing a step


@given(st.integers(1, 200), st.one_of(st.none(), st.integers(1, 64)), st.integers(1, 9))
def test_micro_batches_are_the_fewest_of_equal_size_that_fit(share, limit, ranks):
    accumulation, samples = micro_batches(share * ranks, limit, ranks)

    def fits(count: int) -> bool:
        return share % count == 0 and (limit is None or share // count <= limit)

    assert accumulation * samples == share
    assert fits(accumulation)
    assert not any(fits(fewer) for fewer in range(1, accumulation))


def test_batch_that_ranks_cannot_share_names_sizes_that_work():
    with pytest.raises(
        InputError, match=r"global_batch=32 cannot be shared evenly by 3 processes: use 30 or 33"
    ):
        rank_slice(32, world_of(0, 3))

    with pytest.raises(InputError, match=r"by 8 processes: use 8,"):
        rank_slice(2, world_of(0, 8))


def test_batch_that_parts_cannot_share_names_sizes_that_work():
    with pytest.raises(
        InputError,
        match=r"train.global_batch=32 cannot .* data.canonical_nodes=12 parts: use 24 or 36, "
        r"or another data",
    ):
        part_share(32, 12)

    with pytest.raises(InputError, match="use 24 or 48,"):
        part_share(32, 12, ranks=8)

    with pytest.raises(InputError, match="data.canonical_nodes=12 parts: use 24 or 36"):
        orders_of(np.arange(40), parts=12).step(0, 32)


def test_more_parts_than_samples_are_refused():
    with pytest.raises(
        InputError, match=r"data.canonical_nodes=4 exceeds the number of training samples \(3\)"
    ):
        orders_of(np.arange(3), parts=4)


def test_order_imports_no_torch():
    code = "import sys, coupalign.data.order; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
