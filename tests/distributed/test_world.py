"""Who a process is, and collectives that must give the same answer on every rank."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch

from coupalign.distributed.world import (
    AgreedFlag,
    World,
    from_main,
    gather_rows,
    gather_vector,
    on_main,
    rank_session,
    wait_for_all,
)
from coupalign.engine.base import average_norm_statistics
from coupalign.errors import InputError
from tests.distributed.ranks import run_ranks


def collect(world: World) -> dict[str, Any]:
    rows = (
        np.arange(world.rank * 3, dtype=np.int64).reshape(-1, 3) + 100 * world.rank
    )  # 0, 1 and 2 rows
    wait_for_all(world)
    return {
        "rows": gather_rows(rows, world),
        "any": AgreedFlag(lambda: world.rank == 1, world)(),
        "none": AgreedFlag(lambda: False, world)(),
        "vector": gather_vector(torch.tensor([world.rank, 0.5]), world),
        "main": from_main(world.rank * 2 + 7, world),
    }


def test_collectives_agree_on_three_ranks() -> None:
    results = run_ranks(collect, 3)
    for result in results:
        assert result["rows"].tolist() == [[100, 101, 102], [200, 201, 202], [203, 204, 205]]
        assert (result["any"], result["none"], result["main"]) == (True, False, 7)
        assert result["vector"].tolist() == [[0, 0.5], [1, 0.5], [2, 0.5]]


def ask_in_a_loop(world: World) -> list[bool]:
    """Rounds of 20 ms, 40 ms on rank 0; rank 1 means yes from round 10 on."""
    rounds: list[bool] = []
    asking = AgreedFlag(lambda: world.rank == 1 and len(rounds) >= 10, world, every_s=0.2)
    while len(rounds) < 40 and not any(rounds):
        time.sleep(0.04 if world.rank == 0 else 0.02)
        rounds.append(asking())
    return rounds


def test_ranks_agree_in_the_same_round_and_not_in_every_one() -> None:
    first, second = run_ranks(ask_in_a_loop, 2)
    assert first == second and first[-1] and not any(first[:-1]) and len(first) > 10
    [asked] = run_ranks(count_questions, 1)
    assert asked == 5, "alone, the flag itself is the answer"


def count_questions(world: World) -> int:
    asked: list[int] = []
    asking = AgreedFlag(lambda: bool(asked.append(1)), world)
    assert [asking() for _ in range(5)] == [False] * 5
    return len(asked)


def test_alone_needs_no_launcher() -> None:
    with rank_session() as world:
        assert (world.rank, world.size, world.is_main) == (0, 1, True)
        assert gather_rows(np.ones((2, 3), np.int64), world).tolist() == [[1, 1, 1]] * 2


def fail_on_one(world: World) -> None:
    if world.rank == 1:
        raise RuntimeError("deliberate")


def test_the_harness_reports_a_failing_rank() -> None:
    with pytest.raises(AssertionError, match="(?s)rank 1.*deliberate"):
        run_ranks(fail_on_one, 2)


def found_on_main(world: World) -> tuple[int, str]:
    """What on_main gave, and the mistake it raised."""

    def refuse() -> None:
        raise InputError("deliberate")

    value = on_main(lambda: world.rank + 40, world)
    try:
        on_main(refuse, world)
    except InputError as error:
        return value, str(error)
    return value, "nothing"


def test_what_rank_0_finds_out_all_ranks_know() -> None:
    assert run_ranks(found_on_main, 2) == [(40, "deliberate")] * 2


def statistics(world: World) -> tuple[list[float], list[float]]:
    learned, kept = torch.nn.BatchNorm2d(2), torch.nn.BatchNorm2d(2).requires_grad_(False)
    for norm in (learned, kept):
        norm.running_mean.fill_(world.rank + 1.0)
        norm.running_var.fill_(4.0**world.rank)
    average_norm_statistics(torch.nn.Sequential(learned, kept), world)
    return [
        *learned.running_mean.tolist(),
        *learned.running_var.tolist(),
    ], kept.running_mean.tolist()


def test_batch_statistics_that_are_learned_become_their_mean() -> None:
    first, second = run_ranks(statistics, 2)
    assert first[0] == second[0] == [1.5, 1.5, 2.5, 2.5]
    assert (first[1], second[1]) == ([1.0, 1.0], [2.0, 2.0]), "frozen ones stay as they were loaded"
