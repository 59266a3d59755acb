"""A run goes on with another number of ranks, another engine or another ZeRO stage than it began with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.jobs import adopted, begin_all, curves, engines
from tests.distributed.ranks import run_ranks
from tests.distributed.test_engine import LOSS_TOLERANCE, WEIGHT_TOLERANCE

SOURCES = ("ddp", "zero1", "zero2", "zero3", "zero2 offload")
# Whole state, fragments of flat groups (1, 2) and shares (3): each of these forms into each other one, and growing and shrinking.
MOVES = {
    4: (
        ("ddp", "ddp"),
        ("ddp", "zero2"),
        ("ddp", "zero3"),
        ("zero1", "zero3"),
        ("zero2", "zero2"),
        ("zero3", "zero3"),
        ("zero3", "zero1"),
        ("zero3", "ddp"),
        ("zero2 offload", "zero3 offload"),
    ),
    1: (
        ("ddp", "zero1"),
        ("zero1", "zero2"),
        ("zero2", "zero0"),
        ("zero3", "zero3"),
        ("zero2 offload", "zero2"),
    ),
}
BEFORE, AFTER = 4, 6


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    """A single process that nobody interrupts; its weights are those after `AFTER` steps."""
    return run_ranks(curves, 1, engines("ddp"), AFTER - 2)[0][0]


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, float]]]:
    """Checkpoints of every source on two ranks, and their counters."""
    folder = tmp_path_factory.mktemp("begun")
    return folder, run_ranks(begin_all, 2, engines(*SOURCES), folder, BEFORE)[0]


@pytest.mark.parametrize("ranks", MOVES)
def test_an_engine_takes_over_from_another_on_other_ranks(
    ranks: int, begun: tuple[Path, list[dict[str, float]]], whole: dict[str, Any]
) -> None:
    folder, counters = begun
    moves = [(SOURCES.index(source), engines(target)[0]) for source, target in MOVES[ranks]]
    results = run_ranks(adopted, ranks, moves, folder, counters, range(BEFORE, AFTER))[0]
    for (source, target), found in zip(MOVES[ranks], results):
        name = f"{source} on 2 -> {target} on {ranks}"
        numbers = torch.tensor(
            [found["numbers"], whole["numbers"][BEFORE:AFTER]], dtype=torch.float64
        )  # [2, steps, loss | norm]
        apart = ((numbers[0] - numbers[1]).abs() / numbers[1]).amax(0)
        furthest = {
            what: max(
                (found[what][key] - value).abs().max().item() for key, value in whole[what].items()
            )
            for what in ("weights", "ema")
        }
        print(
            f"{name:<40} loss {apart[0]:.1e}  norm {apart[1]:.1e}  weights {furthest['weights']:.1e}  average {furthest['ema']:.1e}"
        )
        assert apart[0] < LOSS_TOLERANCE and apart[1] < 100 * LOSS_TOLERANCE, name
        assert max(furthest.values()) < WEIGHT_TOLERANCE, name
