"""Who a process is, and collectives that must give the same answer on every rank."""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from coupalign import dist
from coupalign.dist import World, _places
from coupalign.errors import InputError
from tests.distributed.ranks import run_ranks


def collect(world: World) -> dict[str, Any]:
    rows = np.arange(world.rank * 3, dtype=np.int64).reshape(-1, 3) + 100 * world.rank      # 0, 1 and 2 rows
    dist.wait_for_all(world)
    return {"rows": dist.gather_rows(rows, world), "any": dist.any_rank(world.rank == 1, world), "none": dist.any_rank(False, world),
            "vector": dist.gather_vector(torch.tensor([world.rank, 0.5]), world), "main": dist.from_main(world.rank * 2 + 7, world)}


def test_collectives_agree_on_three_ranks() -> None:
    results = run_ranks(collect, 3)
    for result in results:
        assert result["rows"].tolist() == [[100, 101, 102], [200, 201, 202], [203, 204, 205]]
        assert (result["any"], result["none"], result["main"]) == (True, False, 7)
        assert result["vector"].tolist() == [[0, 0.5], [1, 0.5], [2, 0.5]]


def test_alone_needs_no_launcher() -> None:
    with dist.session() as world:
        assert (world.rank, world.size, world.is_main) == (0, 1, True)
        assert dist.gather_rows(np.ones((2, 3), np.int64), world).tolist() == [[1, 1, 1]] * 2


def fail_on_one(world: World) -> None:
    if world.rank == 1:
        raise RuntimeError("deliberate")


def test_the_harness_reports_a_failing_rank() -> None:
    with pytest.raises(AssertionError, match="(?s)rank 1.*deliberate"):
        run_ranks(fail_on_one, 2)


@pytest.mark.parametrize(("environment", "expected"), [
    ({}, (0, 1, 0, 1)),
    ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, (3, 8, 1, 2)),
    ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4"}, (3, 8, 1, 4)),
    ({"SLURM_PROCID": "5", "SLURM_NTASKS": "6", "SLURM_LOCALID": "1", "SLURM_NTASKS_PER_NODE": "2"}, (5, 6, 1, 2)),
    ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, (0, 1, 0, 1)),
])
def test_places_come_from_whichever_launcher_there_is(environment: dict[str, str], expected: tuple[int, ...]) -> None:
    assert _places(environment) == expected


def test_half_an_environment_is_named() -> None:
    with pytest.raises(InputError, match="WORLD_SIZE"):
        _places({"RANK": "0", "LOCAL_RANK": "0"})
