"""Read rank, world size and meeting point from the environment of the launcher.

torchrun and deepspeed set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. srun sets
SLURM_PROCID, SLURM_NTASKS and SLURM_LOCALID for each task of a step, but no meeting point.

Every function here is a pure function of the environment that it is given.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from coupalign.errors import InputError


def read_ranks(environment: Mapping[str, str]) -> tuple[int, int, int, int]:
    """Read (rank, size, local rank, local size) of this process.

    torchrun's or DeepSpeed's variables come first, then Slurm's. Without either, this is the only
    process: (0, 1, 0, 1).

    Raises:
        InputError: a variable is missing or not a number, or two of them contradict each other.
    """
    has_step = "SLURM_STEP_ID" in environment and "SLURM_PROCID" in environment
    slurm_tasks = int(environment.get("SLURM_NTASKS", 1))

    if "RANK" in environment:
        rank, size, local_rank = _read_integers(environment, "RANK", "WORLD_SIZE", "LOCAL_RANK")
        local_size = int(
            environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE") or local_rank + 1
        )

        # The first variable is set by torchrun, the second by deepspeed.
        has_launcher = "TORCHELASTIC_RUN_ID" in environment or "CROSS_RANK" in environment
        if has_step and not has_launcher:
            _check_against_slurm(environment, "RANK", rank, "SLURM_PROCID")
            _check_against_slurm(environment, "WORLD_SIZE", size, "SLURM_NTASKS")

    elif has_step and slurm_tasks > 1:
        rank, size, local_rank = _read_integers(
            environment, "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"
        )
        local_size = _tasks_on_this_node(environment)

    elif slurm_tasks > 1 and "SLURM_PROCID" in environment:
        raise InputError(
            f"this is the batch script of a Slurm job with {environment['SLURM_NTASKS']} tasks, "
            "but only srun starts tasks: put srun in front of the command (as slurm/train.sbatch "
            "does), or ask for one task"
        )
    else:
        return 0, 1, 0, 1

    if rank >= size or local_rank >= local_size:
        raise InputError(
            f"the launcher says rank {rank} of {size}, local rank {local_rank} of {local_size}, "
            "but ranks count from 0. Check whether your shell's start-up files or slurm/env.sh "
            "set RANK, WORLD_SIZE or LOCAL_RANK"
        )
    return rank, size, local_rank, local_size


def detect_launcher(environment: Mapping[str, str]) -> str:
    """Name what started this process, for people."""
    launchers = {
        "TORCHELASTIC_RUN_ID": "torchrun",
        "CROSS_RANK": "deepspeed",
        "RANK": "RANK in the environment",
        "SLURM_STEP_ID": "srun",
    }
    for variable, launcher in launchers.items():
        if variable in environment:
            return launcher
    return "no launcher"


def read_job_attempt(environment: Mapping[str, str]) -> str:
    """Read the number of the Slurm job and how often it was requeued: "1234/1"; "" without Slurm.

    Slurm starts an attempt of a job only when the one before it has ended.
    """
    if "SLURM_JOB_ID" not in environment:
        return ""
    return f"{environment['SLURM_JOB_ID']}/{environment.get('SLURM_RESTART_COUNT', '0')}"


def find_rendezvous(environment: Mapping[str, str]) -> dict[str, str]:
    """Find MASTER_ADDR and MASTER_PORT, where the ranks meet.

    Values that are set win. Otherwise the address is the first node of the Slurm step, and the
    port is derived from the job's number.

    Raises:
        InputError: a value is not set and there is no Slurm job to derive it from.
    """
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    if not nodes and not {"MASTER_ADDR", "MASTER_PORT"} <= environment.keys():
        raise InputError(
            "MASTER_ADDR and MASTER_PORT are not set, so the ranks cannot find each other. Start "
            "with launch/torchrun.sh, launch/deepspeed.sh or slurm/train.sbatch, which set both"
        )

    address = environment.get("MASTER_ADDR") or first_node(nodes or "")
    port = environment.get("MASTER_PORT") or str(20000 + int(environment["SLURM_JOB_ID"]) % 10000)
    return {"MASTER_ADDR": address, "MASTER_PORT": port}


def first_node(nodes: str) -> str:
    """Return the first host of Slurm's short form: "gpu[07-09,12],login" -> "gpu07"."""
    prefix, bracket, rest = nodes.partition("[")
    if not bracket or "," in prefix:
        return nodes.partition(",")[0]
    return prefix + re.split("[-,\\]]", rest)[0]


def _read_integers(environment: Mapping[str, str], *names: str) -> list[int]:
    missing = [name for name in names if name not in environment]
    if missing:
        raise InputError(
            f"the launcher set {names[0]} but not {', '.join(missing)}: start with torchrun, "
            f"deepspeed or srun, or remove {names[0]} from the environment"
        )
    for name in names:
        if not environment[name].isdigit():
            raise InputError(f"{name} is {environment[name]!r} in the environment, not a number")
    return [int(environment[name]) for name in names]


def _check_against_slurm(
    environment: Mapping[str, str], name: str, value: int, slurm_name: str
) -> None:
    if slurm_name in environment and int(environment[slurm_name]) != value:
        raise InputError(
            f"{name}={value} contradicts {slurm_name}={environment[slurm_name]}: srun started this "
            f"process, and something else set {name}. Remove RANK, WORLD_SIZE and LOCAL_RANK from "
            "slurm/env.sh and your shell's start-up files"
        )


def _tasks_on_this_node(environment: Mapping[str, str]) -> int:
    """Count the step's tasks on this node, from Slurm's short form: "2(x3),1" is 2, 2, 2, 1."""
    tasks_by_node: list[int] = []
    for group in environment.get("SLURM_STEP_TASKS_PER_NODE", "1").split(","):
        tasks, _, repeats = group.rstrip(")").partition("(x")
        tasks_by_node += [int(tasks)] * int(repeats or 1)

    node = int(environment.get("SLURM_NODEID", 0))
    return tasks_by_node[min(node, len(tasks_by_node) - 1)]
