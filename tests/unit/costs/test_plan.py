"""The planner: properties of its formulas, and its answers at the bounds.

tests/cluster/test_memory.py compares it with measurements.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coupalign.cli.parser import build_parser, main
from coupalign.costs.footprint import Footprint, Line
from coupalign.costs.plan import (
    GPUS,
    STRATEGIES,
    CommVolume,
    Memory,
    Sizes,
    Strategy,
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
STRATEGY = {strategy.name: strategy for strategy in STRATEGIES}

DEMO = Path(__file__).parents[3] / "configs" / "demo.yaml"


def ddp_bytes(ranks: int, accumulates: bool) -> float:
    memory = memory_of(
        STRATEGY["ddp"], SIZES, ranks, ema=True, bucket_mb=25, accumulates=accumulates
    )
    return memory.total


def test_ddp_takes_16_bytes_per_parameter_and_4_for_the_average() -> None:
    state = 20 * SIZES.trainable + 4 * SIZES.frozen
    assert ddp_bytes(ranks=8, accumulates=False) == state + 4 * SIZES.largest


def test_ddp_buckets_take_memory_if_several_ranks_accumulate() -> None:
    # Under no_sync, gradients accumulate separately from the buckets.
    difference = ddp_bytes(ranks=8, accumulates=True) - ddp_bytes(ranks=8, accumulates=False)
    assert difference == 4 * SIZES.trainable

    # One rank has no buckets.
    assert ddp_bytes(ranks=1, accumulates=True) == 20 * SIZES.trainable + 4 * SIZES.frozen


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_divides_optimizer_state_by_ranks(stage: int) -> None:
    """Master copy and moments take 12 bytes per parameter."""
    memory = memory_of(STRATEGY[f"zero{stage}"], SIZES, 4, **OPTIONS)

    assert memory.master + memory.moments == 12 * SIZES.trainable / 4
    assert memory.ema == 4 * SIZES.trainable * (0.25 if stage == 3 else 1)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offload_moves_optimizer_state_to_the_host(stage: int) -> None:
    memory = memory_of(STRATEGY[f"zero{stage}"], SIZES, 4, **OPTIONS)
    offloaded = memory_of(STRATEGY[f"zero{stage}+offload"], SIZES, 4, **OPTIONS)

    assert offloaded.total < memory.total
    assert offloaded.host >= 20 * SIZES.trainable / 4


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: strategy.name)
def test_more_ranks_never_need_more_memory(strategy: Strategy) -> None:
    totals = [memory_of(strategy, SIZES, ranks, **OPTIONS).total for ranks in (2, 4, 8, 64, 1024)]

    assert all(more >= fewer for more, fewer in itertools.pairwise(totals))


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: strategy.name)
def test_one_rank_sends_nothing(strategy: Strategy) -> None:
    assert comm_volume_of(strategy, SIZES, 1) == CommVolume(0, 0)


@pytest.mark.parametrize(
    "name, one_micro_batch, three_micro_batches",
    [("ddp", 2, 2), ("zero0", 2, 2), ("zero1", 3, 3), ("zero2", 3, 7), ("zero3", 2, 6)],
)
def test_sent_bytes_per_step(name: str, one_micro_batch: int, three_micro_batches: int) -> None:
    """In units of 4 P bytes, for P parameters on many ranks.

    An all-reduce sends 2 units, an all-gather or a reduce-scatter 1.
    """
    sizes = Sizes(trainable=10**9 // 4, frozen=0, largest=1, largest_group=1)
    volume = comm_volume_of(STRATEGY[name], sizes, 10**9)

    assert round(volume.per_step(1) / 1e9, 3) == one_micro_batch
    assert round(volume.per_step(3) / 1e9, 3) == three_micro_batches


def test_zero3_gathers_a_huge_model_twice() -> None:
    """It has too many weights to keep them from forward to backward."""
    sizes = Sizes(trainable=2 * 10**9, frozen=0, largest=1, largest_group=1)
    volume = comm_volume_of(STRATEGY["zero3"], sizes, 10**9)

    assert volume.each / 8e9 == pytest.approx(3)


@pytest.mark.parametrize(
    "once, each, compute",
    [(5.0, 0.0, 1.0), (5.0, 0.4, 1.0), (0.0, 0.9, 1.0), (0.3, 0.1, 1.0), (7.0, 0.99, 1.0)],
)
def test_break_even_is_the_first_number_that_pays(once: float, each: float, compute: float) -> None:
    first = break_even(CommVolume(once, each), 1.0, compute)

    pays = [count for count in range(1, 1000) if once + count * each <= count * compute + 1e-9]
    assert first == pays[0]


def test_break_even_may_never_come() -> None:
    assert break_even(CommVolume(1.0, 2.0), 1.0, 1.0) is None
    assert break_even(CommVolume(0.0, 0.0), 1.0, 1.0) == 1


@pytest.mark.parametrize("update", [10.0, 400.0])
def test_largest_micro_batch_fits_and_one_more_does_not(update: float) -> None:
    cost = Footprint(Line(7.0, 3.0), Line(9.0, 5.0), Line(1.0, 0.0))
    state = Memory(weights=100, gradients=50, moments=200, buckets=10, update=update)

    images = largest_micro_batch(state, cost, 800.0)

    fits = replace(state, activations=cost.peak.at(images))
    too_large = replace(state, activations=cost.peak.at(images + 1))
    assert fits.total <= 800 < too_large.total
    assert largest_micro_batch(state, cost, 300.0) == 0


def test_plan_names_its_strategies_and_how_numbers_were_found() -> None:
    config = tiny("engine.kind=deepspeed", "engine.stage=2")

    result = plan(config, "rtx3090", nodes=2, ranks_per_node=2)

    assert result.ranks == 4
    assert (result.micro_batch, result.accumulation) == (2, 1)
    assert result.engine == "zero2"
    assert [row.strategy for row in result.rows] == list(STRATEGY)
    assert all(row.fits for row in result.rows)
    assert result.bandwidth == 32e9, "PCIe is slower than the network"

    table = result.table()
    assert "zero2 *" in table
    assert "estimate" in table
    assert "counted" in table

    first_row = json.loads(json.dumps(result.to_json()))["rows"][0]
    assert first_row["memory"]["total"] == result.rows[0].memory.total


@pytest.mark.parametrize(
    "changes, options, message",
    [
        (["precision=bf16"], {"gpu": "v100-32"}, "precision=fp16"),
        ([], {"gpu": "h100", "nodes": 0}, "at least 1"),
        ([], {"gpu": "h100", "ranks_per_node": 3}, "train.global_batch=8"),
        ([], {"gpu": "h100", "network": 0.0}, "more than 0"),
    ],
)
def test_impossible_plan_is_refused(
    changes: list[str], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        plan(tiny(*changes), **options)


@pytest.mark.parametrize("gpu", GPUS)
def test_command_line_accepts_every_gpu(gpu: str) -> None:
    assert build_parser().parse_args(["plan", "configs/demo.yaml", "--gpu", gpu]).gpu == gpu


def test_verb_prints_a_table_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    cluster = ["--gpu", "v100-32", "--nodes", "2", "--ranks-per-node", "1"]

    assert main(["plan", str(DEMO), *TINY, *cluster, "--json"]) == 0

    *table, line = capsys.readouterr().out.splitlines()
    assert "2 ranks on 2 nodes of v100-32" in table[0]
    assert json.loads(line)["ranks"] == 2
