"""Collectives give the same answer on every rank, and the loss of a rank is a failed run."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
import pytest
import torch

from coupalign.distributed.world import (
    AgreedFlag,
    World,
    from_main,
    gather_objects,
    gather_rows,
    gather_vector,
    max_over_ranks,
    on_main,
    rank_session,
    sum_over_ranks,
    wait_for_all,
)
from coupalign.engine.base import average_norm_statistics
from coupalign.errors import InputError
from tests.distributed.ranks import run_ranks


def call_collectives(world: World) -> dict[str, Any]:
    # 0, 1 and 2 rows.
    rows = np.arange(world.rank * 3, dtype=np.int64).reshape(-1, 3) + 100 * world.rank
    summed = torch.tensor([world.rank, 1.0])
    sum_over_ranks(summed, world)
    wait_for_all(world)
    return {
        "rows": gather_rows(rows, world),
        "any": AgreedFlag(lambda: world.rank == 1, world)(),
        "none": AgreedFlag(lambda: False, world)(),
        "vector": gather_vector(torch.tensor([world.rank, 0.5]), world),
        "main": from_main(world.rank * 2 + 7, world),
        "max": max_over_ranks([world.rank, -world.rank], world),
        "objects": gather_objects(f"rank {world.rank}", world),
        "sum": summed.tolist(),
    }


def test_collectives_agree_on_three_ranks() -> None:
    for result in run_ranks(call_collectives, 3):
        assert result["rows"].tolist() == [[100, 101, 102], [200, 201, 202], [203, 204, 205]]
        assert (result["any"], result["none"], result["main"]) == (True, False, 7)
        assert result["vector"].tolist() == [[0, 0.5], [1, 0.5], [2, 0.5]]
        assert result["max"] == [2, 0] and result["sum"] == [3, 3]
        assert result["objects"] == ["rank 0", "rank 1", "rank 2"]


def ask_in_a_loop(world: World) -> list[bool]:
    """Iterate in 20 ms (40 ms on rank 0); rank 1's flag is true from the tenth iteration on."""
    answers: list[bool] = []
    flag = AgreedFlag(lambda: world.rank == 1 and len(answers) >= 10, world, every_s=0.2)
    while len(answers) < 40 and not any(answers):
        time.sleep(0.04 if world.rank == 0 else 0.02)
        answers.append(flag())
    return answers


def ask_alone(world: World) -> int:
    """Return how often five calls ask the flag."""
    asked: list[int] = []
    flag = AgreedFlag(lambda: bool(asked.append(1)), world)
    assert [flag() for _ in range(5)] == [False] * 5
    return len(asked)


def test_agreed_flag_is_true_at_the_same_call_on_every_rank() -> None:
    first, second = run_ranks(ask_in_a_loop, 2)

    assert first == second and first[-1] and not any(first[:-1])
    assert len(first) > 10


def test_agreed_flag_of_a_single_rank_asks_each_time() -> None:
    [asked] = run_ranks(ask_alone, 1)

    assert asked == 5


def test_rank_session_needs_no_launcher() -> None:
    with rank_session() as world:
        assert (world.rank, world.size, world.is_main) == (0, 1, True)
        assert gather_rows(np.ones((2, 3), np.int64), world).tolist() == [[1, 1, 1]] * 2


def fail_on_one(world: World) -> None:
    if world.rank == 1:
        raise RuntimeError("deliberate")


def test_run_ranks_reports_a_failing_rank() -> None:
    with pytest.raises(AssertionError, match="(?s)rank 1.*deliberate"):
        run_ranks(fail_on_one, 2)


def vanish_on_one(world: World) -> None:
    if world.rank == 1:
        os._exit(9)
    wait_for_all(world)


def test_lost_rank_is_a_failed_run() -> None:
    with pytest.raises(AssertionError, match="RunError: rank 0 lost contact with another rank"):
        run_ranks(vanish_on_one, 2)


def call_on_main(world: World) -> tuple[int, str]:
    """Return a result of on_main, and the message of the error that it raised."""

    def refuse() -> None:
        raise InputError("deliberate")

    value = on_main(lambda: world.rank + 40, world)
    try:
        on_main(refuse, world)
    except InputError as error:
        return value, str(error)
    return value, "nothing"


def test_on_main_gives_result_and_error_to_every_rank() -> None:
    assert run_ranks(call_on_main, 2) == [(40, "deliberate")] * 2


def average_statistics(world: World) -> tuple[list[float], list[float]]:
    trained, frozen = torch.nn.BatchNorm2d(2), torch.nn.BatchNorm2d(2).requires_grad_(False)
    for norm in (trained, frozen):
        norm.running_mean.fill_(world.rank + 1.0)
        norm.running_var.fill_(4.0**world.rank)

    average_norm_statistics(torch.nn.Sequential(trained, frozen), world)

    learned = [*trained.running_mean.tolist(), *trained.running_var.tolist()]
    return learned, frozen.running_mean.tolist()


def test_statistics_of_trained_norms_become_their_mean() -> None:
    first, second = run_ranks(average_statistics, 2)

    assert first[0] == second[0] == [1.5, 1.5, 2.5, 2.5]
    assert (first[1], second[1]) == ([1.0, 1.0], [2.0, 2.0]), "frozen ones stay as they were loaded"
