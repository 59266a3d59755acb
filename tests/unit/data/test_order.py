"""The order of the samples over random shards and topologies, against a slow and plain one."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from collections import Counter

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

shards = st.lists(st.integers(0, 12), min_size=1, max_size=80).map(
    np.array
)  # in any order, some without a sample
parts = st.integers(1, 7)
windows = st.integers(1, 9)


def orders_of(
    shard_of_sample: np.ndarray, seed: int = 5, window: int = 3, parts: int = 1
) -> EpochOrders:
    return EpochOrders(ShardLayout.from_samples(shard_of_sample), seed, window, parts)


def plain_epoch(
    shard_of_sample: np.ndarray, seed: int, epoch: int, window: int, parts: int
) -> list[list[list[int]]]:
    """The definition, sample by sample: parts of windows of sample numbers."""

    def shuffled(things: list, *place: int) -> list:
        generator = np.random.Generator(
            np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(1, epoch, *place)))
        )
        return [things[i] for i in generator.permutation(len(things))]

    line = [
        (shard, number)
        for shard in shuffled(sorted(set(shard_of_sample.tolist())))
        for number in range(len(shard_of_sample))
        if shard_of_sample[number] == shard
    ]
    cuts = [part * len(line) // parts for part in range(parts + 1)]
    divided = []
    for part, (first, stop) in enumerate(zip(cuts, cuts[1:])):
        held = list(dict.fromkeys(shard for shard, _ in line[first:stop]))
        count = -(-len(held) // window)
        edges = [number * len(held) // count for number in range(count + 1)]
        divided.append(
            [
                shuffled(
                    [number for shard, number in line[first:stop] if shard in held[a:b]],
                    part,
                    place,
                )
                for place, (a, b) in enumerate(zip(edges, edges[1:]))
            ]
        )
    return divided


def plain_steps(
    shard_of_sample: np.ndarray, seed: int, window: int, parts: int, global_batch: int, epochs: int
):
    """The steps of the first epochs, one after another."""
    streams: list[list] = [[] for _ in range(parts)]
    for epoch in range(epochs):
        for stream, part in zip(streams, plain_epoch(shard_of_sample, seed, epoch, window, parts)):
            stream += [(epoch, number) for numbers in part for number in numbers]
    share = global_batch // parts
    for first in range(0, min(map(len, streams)) - share + 1, share):
        yield sum((stream[first : first + share] for stream in streams), [])


# ------------------------------------------------------------------------------------------------------- properties


@settings(max_examples=150, deadline=None)
@given(shards, st.integers(0, 2**70), windows, parts, st.integers(1, 12), st.data())
def test_steps_are_those_of_the_definition(shard_of_sample, seed, window, parts, share, data):
    """Forward, and each step and each slice of it alone, with nothing known of the steps before."""
    assume(len(shard_of_sample) >= parts)
    size = share * parts
    expected = list(plain_steps(shard_of_sample, seed, window, parts, size, 4))
    orders = orders_of(shard_of_sample, seed, window, parts)
    assert [orders.step(step, size) for step in range(len(expected))] == expected
    for step in (
        data.draw(st.lists(st.integers(0, len(expected) - 1), max_size=5)) if expected else ()
    ):
        assert (
            orders_of(shard_of_sample, seed, window, parts).step(step, size) == expected[step]
        )  # no history in it
        first = data.draw(st.integers(0, size - 1))
        taken = slice(first, data.draw(st.integers(first + 1, size)))
        assert orders.step(step, size, taken) == expected[step][taken]  # backward, too


@settings(max_examples=100, deadline=None)
@given(
    shards,
    windows,
    parts,
    st.integers(1, 3),
    st.lists(st.integers(1, 6), min_size=1, max_size=4),
    st.integers(1, 9),
)
def test_every_sample_once_an_epoch_while_the_world_changes(
    shard_of_sample, window, parts, share, worlds, hold
):
    """Every `hold` steps the run goes on with another number of ranks, which know the step only."""
    assume(len(shard_of_sample) >= parts)
    size = int(np.lcm.reduce([parts, *worlds])) * share
    samples, seen = len(shard_of_sample), Counter()
    whole = orders_of(shard_of_sample, 5, window, parts)
    for step in range(2 * -(-samples // size) + 2):
        if step % hold == 0:
            ranks = worlds[step // hold % len(worlds)]
            orders = orders_of(shard_of_sample, 5, window, parts)
        own = [
            orders.step(step, size, rank_slice(size, world_of(rank, ranks)))
            for rank in range(ranks)
        ]
        assert {len(keys) for keys in own} == {size // ranks}
        assert sum(own, []) == whole.step(step, size)
        seen.update(key for keys in own for key in keys)
    assert max(seen.values()) == 1
    assert sorted(key for key in seen if key[0] < 2) == [
        (epoch, number) for epoch in range(2) for number in range(samples)
    ]


@settings(deadline=None)
@given(shards, windows, parts, st.integers(0, 5))
def test_parts_are_equal_and_share_a_shard_only_at_a_cut(shard_of_sample, window, parts, epoch):
    assume(len(shard_of_sample) >= parts)
    orders, samples = orders_of(shard_of_sample, 5, window, parts), len(shard_of_sample)
    lengths = [
        (part + 1) * samples // parts - part * samples // parts for part in range(parts)
    ]  # of every epoch
    assert max(lengths) - min(lengths) <= 1
    read = []
    for part, length in enumerate(lengths):
        pieces = list(orders.read(part, epoch * length, (epoch + 1) * length))
        assert {found for found, _ in pieces} == {epoch}
        read.append(np.concatenate([numbers for _, numbers in pieces]))
    assert (
        sorted(np.concatenate(read)) == list(range(samples))
        and [len(numbers) for numbers in read] == lengths
    )
    held = [set(shard_of_sample[numbers]) for numbers in read]
    assert sum(map(len, held)) <= len(set(shard_of_sample)) + parts - 1


@settings(deadline=None)
@given(shards, windows, parts)
def test_samples_move_inside_a_window_of_shards_only(shard_of_sample, window, parts):
    assume(len(shard_of_sample) >= parts)
    orders = orders_of(shard_of_sample, 5, window, parts)
    for part in range(parts):
        places = orders.window_bounds(0, part)
        held = []
        for first, stop in zip(places, places[1:]):
            ((epoch, numbers),) = orders.read(part, int(first), int(stop))
            held.append(set(shard_of_sample[numbers]))
        sizes = [len(window_shards) for window_shards in held]
        assert max(sizes) <= window and max(sizes) - min(sizes) <= 1
        assert sum(sizes) == len(set().union(*held)) and len(sizes) == -(-sum(sizes) // window)


@given(
    st.integers(1, 6), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 5)
)
def test_a_node_reads_its_own_parts(nodes, parts_each, ranks_each, factor, share):
    """For any numbers of nodes and ranks that divide: parts of different nodes are disjoint, those of one are neighbors."""
    parts, ranks = nodes * parts_each, nodes * ranks_each
    size = int(np.lcm(parts, ranks)) * share
    read = [set() for _ in range(nodes)]
    for rank in range(ranks):
        read[rank // ranks_each] |= {
            part for part, _ in part_slices(size, parts, rank_slice(size, world_of(rank, ranks)))
        }
    assert read == [set(range(node * parts_each, (node + 1) * parts_each)) for node in range(nodes)]


@given(st.integers(1, 20), st.integers(1, 9), st.data())
def test_slices_of_parts_are_the_slice_of_the_step(share, parts, data):
    size = share * parts
    first = data.draw(st.integers(0, size - 1))
    taken = slice(first, data.draw(st.integers(first + 1, size)))
    found = [
        part * share + place
        for part, own in part_slices(size, parts, taken)
        for place in range(own.start, own.stop)
    ]
    assert found == list(range(size))[taken]


# ------------------------------------------------------------------------------------------------- random numbers


def test_seed_epoch_and_part_all_change_the_order():
    """Two parts of equal shards, seeds of more than 32 bits among them: all orders differ, also as seen from the part."""
    seeds = [0, 1, 2, 3, 2**32, 2**32 + 1, 2**33, 2**64]
    found = set()
    for seed in seeds:
        orders = orders_of(np.arange(200) // 10, seed, 10, 2)
        for epoch in range(5):
            for part in range(2):
                ((_, numbers),) = orders.read(part, epoch * 100, epoch * 100 + 100)
                found.add(tuple(np.argsort(np.argsort(numbers))))
    assert len(found) == len(seeds) * 5 * 2


def test_the_order_of_the_shards_and_of_a_window_are_not_the_same_numbers():
    """One sample a shard, one window: were the generators one, the order would be that permutation applied twice."""
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence(3, spawn_key=(1, 0))))
    once = generator.permutation(50)
    assert [number for _, number in orders_of(np.arange(50), 3, 50).step(0, 50)] != once[
        once
    ].tolist()


@pytest.mark.parametrize("first_of", [0, 3])
def test_a_full_window_is_a_fair_shuffle(first_of):
    """Each of 6 samples comes at a place equally often: chi-square of 6000 epochs below the 99.99 % point of 5 degrees (25.7)."""
    orders = orders_of(np.array([0, 0, 0, 1, 1, 2]), 3, 3)
    counts = np.bincount([orders.step(epoch, 6)[first_of][1] for epoch in range(6000)], minlength=6)
    assert ((counts - 1000) ** 2 / 1000).sum() < 25.7


def test_over_the_epochs_a_sample_comes_to_every_part():
    """As above: the part that reads sample 0, of 4 parts of 8 shards."""
    orders = orders_of(np.arange(32) // 4, 3, 3, 4)
    counts = np.zeros(4)
    for epoch in range(4000):
        counts[[number for _, number in orders.step(epoch, 32)].index(0) // 8] += 1
    assert ((counts - 1000) ** 2 / 1000).sum() < 21.1  # 3 degrees


# ---------------------------------------------------------------------------------------------------------- at scale


def test_a_rank_builds_its_own_windows_only():
    """A billion samples: neither time nor memory depends on them, only on shards and one window."""
    tracemalloc.start()
    orders = EpochOrders(ShardLayout.from_counts(np.full(10_000, 100_000)), 5, 2, 8)
    keys = orders.step(1_000_000, 64, rank_slice(64, world_of(3, 16)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (
        len(set(keys)) == 4
        and all(epoch == 0 for epoch, _ in keys)
        and list(orders._current) == [1]
    )
    assert peak < 10 * 8 * (10_000 + 2 * 100_000)


def test_an_order_of_sorted_samples_keeps_no_table():
    counts = np.array([3, 0, 1, 2])
    layouts = [
        ShardLayout.from_counts(counts),
        ShardLayout.from_samples(np.repeat(np.arange(4), counts)),
    ]
    for layout in layouts:
        assert (
            layout.numbers is None and layout.starts.tolist() == [0, 3, 4, 6] and len(layout) == 6
        )
    mixed = ShardLayout.from_samples(np.array([7, 2, 7, 2, 4]))
    assert mixed.starts.tolist() == [0, 2, 3, 5] and mixed.numbers.tolist() == [1, 3, 4, 0, 2]


def test_a_batch_may_straddle_epochs():
    orders = orders_of(np.zeros(5, int))
    assert [epoch for epoch, _ in orders.step(1, 4)] == [0, 1, 1, 1]
    assert [epoch for epoch, _ in orders.step(0, 12)] == [0] * 5 + [1] * 5 + [2] * 2
    assert [epoch for epoch, _ in orders_of(np.zeros(5, int), parts=2).step(2, 2)] == [
        1,
        0,
    ]  # parts of 2 and 3 samples


# ---------------------------------------------------------------------------------------------------------- sharing


@given(st.integers(1, 200), st.one_of(st.none(), st.integers(1, 64)), st.integers(1, 9))
def test_accumulation_is_the_fewest_equal_parts_that_fit(share, limit, ranks):
    parts, samples = micro_batches(share * ranks, limit, ranks)
    assert parts * samples == share and (limit is None or samples <= limit)
    assert not any(
        share % fewer == 0 and (limit is None or share // fewer <= limit)
        for fewer in range(1, parts)
    )


def test_ranks_that_cannot_share_a_batch_are_told_what_works():
    with pytest.raises(
        InputError, match=r"global_batch=32 cannot be shared evenly by 3 processes: use 30 or 33"
    ):
        rank_slice(32, world_of(0, 3))
    with pytest.raises(InputError, match=r"by 8 processes: use 8,"):
        rank_slice(2, world_of(0, 8))


def test_parts_that_cannot_share_a_batch_are_told_what_works():
    with pytest.raises(
        InputError,
        match=r"train.global_batch=32 cannot .* data.canonical_nodes=12 parts: use 24 or 36, or another data",
    ):
        part_share(32, 12)
    with pytest.raises(InputError, match="use 24 or 48,"):
        part_share(32, 12, ranks=8)
    with pytest.raises(InputError, match="data.canonical_nodes=12 parts: use 24 or 36"):
        orders_of(np.arange(40), parts=12).step(0, 32)
    with pytest.raises(
        InputError, match="data.canonical_nodes=4 exceeds the number of training samples \(3\)"
    ):
        orders_of(np.arange(3), parts=4)


def test_the_order_needs_no_torch():
    code = "import sys, coupalign.data.order; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
