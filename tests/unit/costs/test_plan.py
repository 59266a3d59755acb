"""The planner: properties of its formulas, and its answers at the bounds; tests/cluster/test_memory.py measures."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest

from coupalign.cli.parser import build_parser, main
from coupalign.costs.footprint import Footprint, Line
from coupalign.costs.plan import (
    GPUS,
    STRATEGIES,
    CommVolume,
    Memory,
    Sizes,
    break_even,
    comm_volume_of,
    largest_micro_batch,
    memory_of,
    plan,
)
from coupalign.errors import InputError
from tests.distributed.jobs import TINY, tiny

SIZES = Sizes(
    trainable=200_000_000, frozen=10_000_000, largest=24_000_000, largest_group=110_000_000
)
OPTIONS = {"ema": True, "bucket_mb": 25, "accumulates": True}
STRATEGY = {way.name: way for way in STRATEGIES}


def test_ddp_is_sixteen_bytes_a_parameter_and_four_for_the_average() -> None:
    memory = memory_of(STRATEGY["ddp"], SIZES, 8, ema=True, bucket_mb=25, accumulates=False)
    assert memory.total == 20 * SIZES.trainable + 4 * SIZES.frozen + 4 * SIZES.largest
    accumulating = memory_of(STRATEGY["ddp"], SIZES, 8, **OPTIONS)
    assert accumulating.total - memory.total == 4 * SIZES.trainable, "sums beside the buckets"
    assert (
        memory_of(STRATEGY["ddp"], SIZES, 1, **OPTIONS).total
        == 20 * SIZES.trainable + 4 * SIZES.frozen
    ), "one rank has no buckets"


@pytest.mark.parametrize("stage, kept", [(1, 0.25), (2, 0.25), (3, 0.25)])
def test_states_are_shared_out(stage: int, kept: float) -> None:
    """Master copy and moments: 12 bytes a parameter, divided by the ranks."""
    memory = memory_of(STRATEGY[f"zero{stage}"], SIZES, 4, **OPTIONS)
    assert memory.master + memory.moments == 12 * SIZES.trainable * kept
    assert memory.ema == 4 * SIZES.trainable * (kept if stage == 3 else 1)
    offloaded = memory_of(STRATEGY[f"zero{stage}+offload"], SIZES, 4, **OPTIONS)
    assert offloaded.total < memory.total and offloaded.host >= 20 * SIZES.trainable * kept


@pytest.mark.parametrize("way", STRATEGIES, ids=lambda way: way.name)
def test_more_ranks_never_need_more_memory(way) -> None:
    totals = [memory_of(way, SIZES, ranks, **OPTIONS).total for ranks in (2, 4, 8, 64, 1024)]
    assert all(more >= fewer for more, fewer in itertools.pairwise(totals))


@pytest.mark.parametrize("way", STRATEGIES, ids=lambda way: way.name)
def test_one_rank_sends_nothing(way) -> None:
    assert comm_volume_of(way, SIZES, 1) == CommVolume(0, 0)


def test_what_is_sent() -> None:
    """Of P numbers, for many ranks: 8 P bytes for an all-reduce, 4 P for an all-gather or a reduce-scatter."""
    of = {
        name: comm_volume_of(way, Sizes(10**9 // 4, 0, 1, 1), 10**9)
        for name, way in STRATEGY.items()
    }
    found = {
        name: (round(wire.per_step(1) / 1e9, 3), round(wire.per_step(3) / 1e9, 3))
        for name, wire in of.items()
        if "+" not in name
    }
    assert found == {
        "ddp": (2, 2),
        "zero0": (2, 2),
        "zero1": (3, 3),
        "zero2": (3, 7),
        "zero3": (2, 6),
    }
    huge = comm_volume_of(STRATEGY["zero3"], Sizes(2 * 10**9, 0, 1, 1), 10**9)
    assert huge.each / 8e9 == pytest.approx(3), (
        "too many to keep from forward to backward: gathered twice"
    )


@pytest.mark.parametrize(
    "once, each, compute",
    [(5.0, 0.0, 1.0), (5.0, 0.4, 1.0), (0.0, 0.9, 1.0), (0.3, 0.1, 1.0), (7.0, 0.99, 1.0)],
)
def test_break_even_is_the_first_number_that_pays(once: float, each: float, compute: float) -> None:
    first = break_even(CommVolume(once, each), 1.0, compute)
    assert first is not None
    pays = [count for count in range(1, 1000) if once + count * each <= count * compute + 1e-9]
    assert first == pays[0]


def test_break_even_may_never_come() -> None:
    assert break_even(CommVolume(1.0, 2.0), 1.0, 1.0) is None
    assert break_even(CommVolume(0.0, 0.0), 1.0, 1.0) == 1


def test_the_largest_micro_batch_fits_and_one_more_does_not() -> None:
    cost = Footprint(Line(7.0, 3.0), Line(9.0, 5.0), Line(1.0, 0.0))
    for update in (10.0, 400.0):
        state = Memory(weights=100, gradients=50, moments=200, buckets=10, update=update)

        images = largest_micro_batch(state, cost, 800.0)

        fits = replace(state, activations=cost.peak.at(images))
        too_large = replace(state, activations=cost.peak.at(images + 1))
        assert fits.total <= 800 < too_large.total
    assert largest_micro_batch(state, cost, 300.0) == 0


def test_a_plan_says_what_it_is() -> None:
    config = tiny("engine.kind=deepspeed", "engine.stage=2")
    found = plan(config, "rtx3090", nodes=2, ranks_per_node=2)
    assert (found.ranks, found.micro_batch, found.accumulation, found.engine) == (4, 2, 1, "zero2")
    assert [row.strategy for row in found.rows] == list(STRATEGY)
    assert all(row.fits for row in found.rows)
    shown = found.table()
    assert "zero2 *" in shown and "estimate" in shown and "counted" in shown
    assert (
        json.loads(json.dumps(found.to_json()))["rows"][0]["memory"]["total"]
        == found.rows[0].memory.total
    )
    assert found.bandwidth == 32e9, "PCIe is slower than the network"


@pytest.mark.parametrize(
    "changes, options, message",
    [
        (["precision=bf16"], {"gpu": "v100-32"}, "precision=fp16"),
        ([], {"gpu": "h100", "nodes": 0}, "at least 1"),
        ([], {"gpu": "h100", "ranks_per_node": 3}, "train.global_batch=8"),
        ([], {"gpu": "h100", "network": 0.0}, "more than 0"),
    ],
)
def test_refused(changes: list[str], options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan(tiny(*changes), **options)


@pytest.mark.parametrize("gpu", GPUS)
def test_the_command_line_knows_every_gpu(gpu: str) -> None:
    assert build_parser().parse_args(["plan", "configs/demo.yaml", "--gpu", gpu]).gpu == gpu


def test_the_verb_prints_a_table_and_an_object(capsys: pytest.CaptureFixture[str]) -> None:
    demo = Path(__file__).parents[3] / "configs" / "demo.yaml"
    assert (
        main(
            [
                "plan",
                str(demo),
                *TINY,
                "--gpu",
                "v100-32",
                "--nodes",
                "2",
                "--ranks-per-node",
                "1",
                "--json",
            ]
        )
        == 0
    )
    *table, found = capsys.readouterr().out.splitlines()
    assert "2 ranks on 2 nodes of v100-32" in table[0] and json.loads(found)["ranks"] == 2
