"""Rank, world size and meeting point from the variables that real launchers set."""

from __future__ import annotations

import pytest

from coupalign.distributed.launcher import (
    detect_launcher,
    find_rendezvous,
    first_node,
    read_job_attempt,
    read_ranks,
)
from coupalign.errors import InputError

TASK = {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "6",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_NODELIST": "gpu[07-08,12]",
}
TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "TORCHELASTIC_RUN_ID": "x",
}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1, 0, 1)),
        (TORCHRUN, (3, 8, 1, 2)),
        (
            {
                "RANK": "3",
                "WORLD_SIZE": "8",
                "LOCAL_RANK": "1",
                "LOCAL_SIZE": "4",
                "CROSS_RANK": "0",
            },
            (3, 8, 1, 4),
        ),
        (TASK, (5, 6, 1, 2)),
        (TASK | {"SLURM_STEP_TASKS_PER_NODE": "2(x2),1,3", "SLURM_NODEID": "3"}, (5, 6, 1, 3)),
        # torchrun inside a step of one task per node
        (TASK | TORCHRUN, (3, 8, 1, 2)),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, (0, 1, 0, 1)),
        # a batch script with one task
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, (0, 1, 0, 1)),
        # a shell that salloc opened
        ({"SLURM_NTASKS": "8"}, (0, 1, 0, 1)),
    ],
)
def test_read_ranks_understands_every_launcher(
    environment: dict[str, str], expected: tuple[int, ...]
) -> None:
    assert read_ranks(environment) == expected


def test_rank_is_that_of_the_job_and_not_the_local_one() -> None:
    """ETRIS and DETRIS take the local rank for the rank."""
    environment = {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"}

    assert read_ranks(environment) == (9, 16, 1, 8)


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"RANK": "0", "LOCAL_RANK": "0"}, "WORLD_SIZE"),
        (TORCHRUN | {"RANK": "first"}, "RANK is 'first'"),
        (TORCHRUN | {"RANK": "8"}, "rank 8 of 8"),
        (TORCHRUN | {"LOCAL_RANK": "2"}, "local rank 2 of 2"),
        (
            TASK | {"RANK": "0", "WORLD_SIZE": "6", "LOCAL_RANK": "0"},
            "RANK=0 contradicts SLURM_PROCID=5",
        ),
        (
            TASK | {"RANK": "5", "WORLD_SIZE": "1", "LOCAL_RANK": "0"},
            "rank 5 of 1|WORLD_SIZE=1 contradicts SLURM_NTASKS=6",
        ),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_JOB_ID": "1"}, "put srun in front"),
    ],
)
def test_read_ranks_refuses_missing_and_contradicting_variables(
    environment: dict[str, str], named: str
) -> None:
    with pytest.raises(InputError, match=named):
        read_ranks(environment)


def test_rendezvous_uses_set_variables_then_slurm() -> None:
    both_set = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    address_set = TASK | {"MASTER_ADDR": "10.0.0.1"}

    assert find_rendezvous(both_set) == both_set
    assert find_rendezvous(TASK) == {"MASTER_ADDR": "gpu07", "MASTER_PORT": "23456"}
    assert find_rendezvous(address_set) == {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "23456"}

    with pytest.raises(InputError, match="launch/torchrun.sh"):
        find_rendezvous({"MASTER_ADDR": "10.0.0.1"})


@pytest.mark.parametrize(
    ("environment", "launcher"),
    [
        (TORCHRUN, "torchrun"),
        ({"RANK": "0", "CROSS_RANK": "0"}, "deepspeed"),
        ({"RANK": "0"}, "RANK in the environment"),
        (TASK, "srun"),
        ({}, "no launcher"),
    ],
)
def test_detect_launcher(environment: dict[str, str], launcher: str) -> None:
    assert detect_launcher(environment) == launcher


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[07-09,12],login", "gpu07"),
        ("n1,n2", "n1"),
        ("login,gpu[01-02]", "login"),
        ("node[3]", "node3"),
        ("n-a[1-2]", "n-a1"),
        ("single", "single"),
    ],
)
def test_first_node_of_slurms_short_form(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


def test_job_attempt_counts_requeues() -> None:
    assert read_job_attempt({}) == ""
    assert read_job_attempt({"SLURM_JOB_ID": "7"}) == "7/0"
    assert read_job_attempt({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2"}) == "7/2"
