"""The simulation of the order, small: against counting by hand, and with faults put in."""

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


def test_all_holds_and_canonical_nodes_make_the_difference(bench: OrderBench) -> None:
    assert (
        bench.faults == []
        and bench.count.once == bench.count.drawn == 60_000
        and bench.count.never == 0
    )
    with_parts, after, without = bench.fetched
    assert (
        max(with_parts.worst, after.worst) < 1.01
        and 3.9 < without.mean <= 4
        and (without.canonical_nodes, without.nodes) == (1, 4)
    )
    assert (
        30 < bench.window_shards <= 40
        and bench.rank.steps == 625
        and 0 < bench.rank.peak_bytes < 60_000 * 8
    )


def test_what_is_shown_and_what_is_for_machines(bench: OrderBench) -> None:
    shown = table(bench)
    assert (
        "read 60,000, once 60,000, never 0; 24 of 24" in shown
        and "Choose for data.canonical_nodes" in shown
        and "FAULT" not in shown
    )
    assert max(map(len, shown.splitlines())) < 140
    found = json.loads(json.dumps(bench.to_json()))
    assert found["faults"] == [] and found["scale"]["before"] == {
        "nodes": 4,
        "ranks": 16,
        "workers": 2,
    }


@pytest.mark.parametrize("parts, nodes", [(12, 4), (12, 3), (1, 4), (4, 12), (6, 4)])
def test_what_is_fetched_is_what_the_ranks_read(parts: int, nodes: int) -> None:
    """Step by step, by the slices of the nodes; also where a node reads a fraction of a part."""
    scale = replace(SMALL, samples=6000, shards=300)
    layout = scale.layout()
    orders = scale.orders(layout, parts)
    shard_of = np.repeat(np.arange(300), np.diff(layout.starts))
    touched: list[set] = [set() for _ in range(nodes)]
    length = 6000 // parts  # whole, so that every part begins its epoch at the same place of a step
    for step in range(length * parts // 96, -(-2 * length * parts // 96)):
        for node, seen in enumerate(touched):
            taken = rank_slice(96, simulated_rank(node, nodes))
            for place, (epoch, number) in enumerate(orders.step(step, 96, taken), taken.start):
                if epoch == 1:
                    seen.add((place // (96 // parts), shard_of[number]))
    expected = [sum(np.diff(layout.starts)[shard] for _, shard in seen) for seen in touched]
    assert fetched_samples(scale.orders(layout, parts), layout, nodes, 96).tolist() == expected


@pytest.mark.parametrize(
    "rank, found, words",
    [
        (3, slice(12, 18), r" \d,\d{3} never; 60,000 reads in all"),  # it reads what rank 2 reads
        (3, slice(18, 25), r" 60,000 samples 5\d,\d{3} were read once, 0 never; 6\d,\d{3} reads"),
    ],
)
def test_a_wrong_sharing_is_found(
    rank: int, found: slice, words: str, monkeypatch: pytest.MonkeyPatch, bench: OrderBench
) -> None:
    monkeypatch.setattr(
        order,
        "rank_slice",
        lambda size, world: (
            found if (world.rank, world.size) == (rank, 16) else rank_slice(size, world)
        ),
    )
    (fault,) = replace(bench, count=count_reads(SMALL, SMALL.layout())).faults
    assert re.search(words, fault)


def test_an_order_that_depends_on_its_past_is_found(
    monkeypatch: pytest.MonkeyPatch, bench: OrderBench
) -> None:
    step = order.EpochOrders.step
    monkeypatch.setattr(
        order.EpochOrders, "step", lambda orders, number, *rest: step(orders, number + 1, *rest)
    )
    (fault,) = replace(bench, count=count_reads(SMALL, SMALL.layout())).faults
    assert "of 24 steps are not the same" in fault


def test_the_verb_says_no_where_a_property_fails(
    bench: OrderBench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(order, "bench_order", lambda: bench)
    assert main(["bench", "order", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["count"]["once"] == 60_000
    far = replace(bench, fetched=(Fetched(12, 4, 1.0, 1.06),))
    monkeypatch.setattr(order, "bench_order", lambda: far)
    assert main(["bench", "order"]) == 1
    assert (
        "FAULT: one of 4 nodes fetches 1.060 times its share, more than 1.05"
        in capsys.readouterr().out
    )
