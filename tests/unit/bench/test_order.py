"""`coupalign bench order` at a small scale: compared with counting by hand, and with faults."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from coupalign.bench import order
from coupalign.bench.order import (
    Cluster,
    Fetched,
    OrderBench,
    Scale,
    bench_order,
    count_reads,
    fetched_samples,
    simulated_rank,
    table,
)
from coupalign.cli.parser import main
from coupalign.data.order import rank_slice
from coupalign.distributed.world import World

SMALL = Scale(
    samples=60_000,
    shards=3000,
    before=Cluster(4, 16, 2),
    after=Cluster(3, 12, 2),
    global_batch=96,
    canonical_nodes=12,
    shuffle_window=40,
    seed=3,
)


@pytest.fixture(scope="module")
def bench() -> OrderBench:
    return bench_order(SMALL)


def test_every_sample_is_read_once(bench: OrderBench) -> None:
    assert bench.faults == []
    assert bench.count.once == bench.count.drawn == 60_000
    assert bench.count.never == 0


def test_canonical_nodes_reduce_what_a_node_fetches(bench: OrderBench) -> None:
    before, after, without = bench.fetched

    assert max(before.worst, after.worst) < 1.01
    assert (without.canonical_nodes, without.nodes) == (1, 4)
    assert 3.9 < without.mean <= 4


def test_cost_of_a_rank_is_measured(bench: OrderBench) -> None:
    assert 30 < bench.window_shards <= 40
    assert bench.rank.steps == 625
    assert 0 < bench.rank.peak_bytes < 60_000 * 8


def test_table_and_json_show_the_counts(bench: OrderBench) -> None:
    shown = table(bench)
    assert "read 60,000, once 60,000, never 0; 24 of 24" in shown
    assert "Choose data.canonical_nodes" in shown
    assert "FAULT" not in shown
    assert max(map(len, shown.splitlines())) < 140

    value = json.loads(json.dumps(bench.to_json()))
    assert value["faults"] == []
    assert value["scale"]["before"] == {"nodes": 4, "ranks": 16, "workers": 2}


@pytest.mark.parametrize("parts, nodes", [(12, 4), (12, 3), (1, 4), (4, 12), (6, 4)])
def test_fetched_samples_are_those_of_the_shards_that_nodes_read(parts: int, nodes: int) -> None:
    """Counts step by step from the slices of the nodes, also if a node reads part of a part."""
    scale = replace(SMALL, samples=6000, shards=300)
    layout = scale.layout()
    orders = scale.orders(layout, parts)
    sizes = np.diff(layout.starts)
    shard_of = np.repeat(np.arange(300), sizes)

    # The parts have equal lengths, so each begins its epoch at the same position of a step.
    length = 6000 // parts
    steps = range(length * parts // 96, -(-2 * length * parts // 96))
    touched: list[set[tuple[int, int]]] = [set() for _ in range(nodes)]
    for step in steps:
        for node, shards_of_node in enumerate(touched):
            positions = rank_slice(96, simulated_rank(node, nodes))
            keys = orders.step(step, 96, positions)
            for position, (epoch, number) in enumerate(keys, positions.start):
                if epoch == 1:
                    part = position // (96 // parts)
                    shards_of_node.add((part, shard_of[number]))

    expected = [sum(sizes[shard] for _, shard in shards) for shards in touched]
    fresh_orders = scale.orders(layout, parts)
    assert fetched_samples(fresh_orders, layout, nodes, 96).tolist() == expected


@pytest.mark.parametrize(
    "wrong_slice, message",
    [
        # Rank 3 reads what rank 2 reads.
        (slice(12, 18), r" \d,\d{3} never; 60,000 reads in all"),
        # Rank 3 reads one sample of rank 4, too.
        (slice(18, 25), r" 60,000 samples 5\d,\d{3} were read once, 0 never; 6\d,\d{3} reads"),
    ],
)
def test_wrong_slice_of_a_rank_is_a_fault(
    wrong_slice: slice, message: str, monkeypatch: pytest.MonkeyPatch, bench: OrderBench
) -> None:
    def wrong_rank_slice(global_batch: int, world: World) -> slice:
        if (world.rank, world.size) == (3, 16):
            return wrong_slice
        return rank_slice(global_batch, world)

    monkeypatch.setattr(order, "rank_slice", wrong_rank_slice)

    (fault,) = replace(bench, count=count_reads(SMALL, SMALL.layout())).faults
    assert re.search(message, fault)


def test_order_that_depends_on_earlier_steps_is_a_fault(
    monkeypatch: pytest.MonkeyPatch, bench: OrderBench
) -> None:
    step = order.EpochOrders.step
    monkeypatch.setattr(
        order.EpochOrders, "step", lambda orders, number, *rest: step(orders, number + 1, *rest)
    )

    (fault,) = replace(bench, count=count_reads(SMALL, SMALL.layout())).faults
    assert "of 24 steps are not the same" in fault


def test_status_is_1_if_a_property_does_not_hold(
    bench: OrderBench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # All properties hold.
    monkeypatch.setattr(order, "bench_order", lambda: bench)
    assert main(["bench", "order", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["count"]["once"] == 60_000

    # One node fetches too much.
    faulty = replace(bench, fetched=(Fetched(12, 4, 1.0, 1.06),))
    monkeypatch.setattr(order, "bench_order", lambda: faulty)
    assert main(["bench", "order"]) == 1
    fault = "FAULT: one of 4 nodes fetches 1.060 times its share, more than 1.05"
    assert fault in capsys.readouterr().out
