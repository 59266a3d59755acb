"""A run resumes with another number of ranks, another engine or another ZeRO stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.jobs import adopt_each, engine_configs, train_and_save_each, train_each
from tests.distributed.ranks import run_ranks
from tests.distributed.test_engine import (
    LOSS_TOLERANCE,
    WEIGHT_TOLERANCE,
    largest_difference,
)

SOURCES = ("ddp", "zero1", "zero2", "zero3", "zero2 offload")
# From two ranks to more and to fewer. Each form of the optimizer state (whole, fragments of flat
# groups at stages 1 and 2, shares at stage 3) becomes each other one.
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
SAVED_AT, STEPS = 4, 6


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, Any]:
    """A single process that trains `STEPS` steps; its weights are those at the end."""
    return run_ranks(train_each, 1, engine_configs("ddp"), STEPS - 2)[0][0]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, float]]]:
    """Checkpoints of every source on two ranks, and their counters."""
    folder = tmp_path_factory.mktemp("saved")
    configs = engine_configs(*SOURCES)
    return folder, run_ranks(train_and_save_each, 2, configs, folder, SAVED_AT)[0]


@pytest.mark.parametrize("ranks", MOVES)
def test_engine_adopts_a_checkpoint_of_another_engine_on_other_ranks(
    ranks: int, saved: tuple[Path, list[dict[str, float]]], uninterrupted: dict[str, Any]
) -> None:
    folder, counters = saved
    moves = [(SOURCES.index(source), engine_configs(target)[0]) for source, target in MOVES[ranks]]

    results = run_ranks(adopt_each, ranks, moves, folder, counters, range(SAVED_AT, STEPS))[0]

    expected = torch.tensor(uninterrupted["numbers"][SAVED_AT:STEPS], dtype=torch.float64)
    for (source, target), result in zip(MOVES[ranks], results):
        name = f"{source} on 2 -> {target} on {ranks}"
        numbers = torch.tensor(result["numbers"], dtype=torch.float64)  # [steps, loss | norm]
        loss, norm = ((numbers - expected).abs() / expected).amax(0).tolist()
        weights = largest_difference(uninterrupted, result, "weights")
        average = largest_difference(uninterrupted, result, "ema")
        print(
            f"{name:<40} loss {loss:.1e}  norm {norm:.1e}  weights {weights:.1e}  "
            f"average {average:.1e}"
        )

        assert loss < LOSS_TOLERANCE and norm < 100 * LOSS_TOLERANCE, name
        assert max(weights, average) < WEIGHT_TOLERANCE, name
