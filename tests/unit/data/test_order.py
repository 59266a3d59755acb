"""The order of the samples over random topologies."""
from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coupalign.data.order import EpochOrders, epoch_order, micro_batches, rank_slice, step_places
from coupalign.errors import InputError

shards = st.lists(st.integers(0, 6), min_size=1, max_size=60).map(np.array)


@given(shards, st.integers(0, 2**40), st.integers(0, 50), st.integers(1, 9))
def test_an_epoch_visits_every_sample_once(shard_of_sample, seed, epoch, window):
    order = epoch_order(shard_of_sample, seed, epoch, window)
    assert order.dtype == np.int64 and sorted(order) == list(range(len(shard_of_sample)))
    assert np.array_equal(order, epoch_order(shard_of_sample, seed, epoch, window))


@given(shards, st.integers(0, 9), st.integers(1, 7))
def test_samples_move_inside_a_window_of_shards_only(shard_of_sample, seed, window):
    visited = shard_of_sample[epoch_order(shard_of_sample, seed, 0, window)]
    closed: set[int] = set()
    current: set[int] = set()
    for shard in visited:
        if shard not in current and len(current) == window:
            closed, current = closed | current, set()
        current.add(shard)
        assert shard not in closed


def test_seed_and_epoch_both_change_the_order():
    shard_of_sample = np.arange(200) // 10
    orders = {tuple(epoch_order(shard_of_sample, seed, epoch, 4)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_a_full_window_is_a_fair_shuffle():
    """Each of 6 samples is first equally often: chi-square of 6000 epochs below the 99.99 % point of 5 degrees (25.7)."""
    firsts = np.bincount([epoch_order(np.array([0, 0, 0, 1, 1, 2]), 3, epoch, 3)[0] for epoch in range(6000)], minlength=6)
    assert ((firsts - 1000) ** 2 / 1000).sum() < 25.7


@settings(max_examples=60)
@given(shards, st.integers(1, 40), st.integers(1, 6), st.data())
def test_steps_cover_epochs_without_gap_and_ranks_share_a_step(shard_of_sample, share, ranks, data):
    samples, global_batch = len(shard_of_sample), share * ranks
    orders = EpochOrders(shard_of_sample, 5, 3)
    steps = 2 * samples // global_batch + 2
    every = [orders.step(step, global_batch) for step in range(steps)]
    flat = [key for keys in every for key in keys]
    for epoch in range(2):
        assert sorted(flat[epoch * samples:(epoch + 1) * samples]) == [(epoch, number) for number in range(samples)]
    step = data.draw(st.integers(0, steps - 1))
    parts = [every[step][rank_slice(global_batch, rank, ranks)] for rank in range(ranks)]
    assert {len(part) for part in parts} == {share}
    assert sum(parts, []) == every[step]
    assert EpochOrders(shard_of_sample, 5, 3).step(step, global_batch) == every[step]      # no history in it


def test_a_batch_may_straddle_two_epochs():
    assert step_places(5, 4, 1) == [(0, 4), (1, 0), (1, 1), (1, 2)]
    assert step_places(3, 8, 0) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1)]


@given(st.integers(1, 200), st.one_of(st.none(), st.integers(1, 64)))
def test_accumulation_is_the_fewest_equal_parts_that_fit(share, limit):
    parts = micro_batches(share, limit)
    assert share % parts == 0 and (limit is None or share // parts <= limit)
    assert not any(share % fewer == 0 and (limit is None or share // fewer <= limit) for fewer in range(1, parts))


def test_ranks_that_cannot_share_a_batch_are_told_what_works():
    with pytest.raises(InputError, match=r"global_batch=32 cannot be shared evenly by 3 processes: use 30 or 33"):
        rank_slice(32, 0, 3)
    with pytest.raises(InputError, match=r"by 8 processes: use 8,"):
        rank_slice(2, 0, 8)


def test_the_order_needs_no_torch():
    code = "import sys, coupalign.data.order; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
