"""Who this process is and where the ranks meet, from the environment of whichever launcher started it; pure functions of it.

torchrun and deepspeed set RANK, WORLD_SIZE and LOCAL_RANK, and MASTER_ADDR and MASTER_PORT. srun sets SLURM_PROCID,
SLURM_NTASKS and SLURM_LOCALID for each task of a step, and no meeting point.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from coupalign.errors import InputError


def read_ranks(environment: Mapping[str, str]) -> tuple[int, int, int, int]:
    """(rank, size, local rank, local size) from torchrun's or DeepSpeed's variables, else Slurm's, else a single process.

    Raises:
        InputError: a variable is missing or no number, or two of them contradict each other; names them and the remedy.
    """
    in_step = "SLURM_STEP_ID" in environment and "SLURM_PROCID" in environment
    if "RANK" in environment:
        rank, size, local_rank = _numbers(environment, "RANK", "WORLD_SIZE", "LOCAL_RANK")
        local_size = int(
            environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE") or local_rank + 1
        )
        started_by_launcher = (
            "TORCHELASTIC_RUN_ID" in environment or "CROSS_RANK" in environment
        )  # torchrun, deepspeed
        if in_step and not started_by_launcher:
            _compare(
                environment, ("RANK", rank, "SLURM_PROCID"), ("WORLD_SIZE", size, "SLURM_NTASKS")
            )
    elif in_step and int(environment.get("SLURM_NTASKS", 1)) > 1:
        rank, size, local_rank = _numbers(
            environment, "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"
        )
        local_size = _tasks_here(environment)
    elif int(environment.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in environment:
        raise InputError(
            f"this is the batch script of a Slurm job with {environment['SLURM_NTASKS']} tasks, which only srun starts: "
            "put srun in front (slurm/train.sbatch does), or ask for one task"
        )
    else:
        return 0, 1, 0, 1
    if rank >= size or local_rank >= local_size:
        raise InputError(
            f"the launcher says rank {rank} of {size}, local rank {local_rank} of {local_size}: ranks count from 0. Look for "
            "RANK, WORLD_SIZE and LOCAL_RANK in your shell's start-up files and in slurm/env.sh"
        )
    return rank, size, local_rank, local_size


def launcher_of(environment: Mapping[str, str]) -> str:
    """What started this process, for people."""
    signs = {
        "TORCHELASTIC_RUN_ID": "torchrun",
        "CROSS_RANK": "deepspeed",
        "RANK": "RANK in the environment",
        "SLURM_STEP_ID": "srun",
    }
    return next((name for sign, name in signs.items() if sign in environment), "no launcher")


def rendezvous_of(environment: Mapping[str, str]) -> dict[str, str]:
    """MASTER_ADDR and MASTER_PORT: those that are set, else the first node of the Slurm step and a port from the job's number.

    Raises:
        InputError: there is no Slurm job to take them from.
    """
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    if not nodes and not {"MASTER_ADDR", "MASTER_PORT"} <= environment.keys():
        raise InputError(
            "MASTER_ADDR and MASTER_PORT are not set: the ranks cannot find each other. Start through launch/torchrun.sh, "
            "launch/deepspeed.sh or slurm/train.sbatch, which set both"
        )
    address = environment.get("MASTER_ADDR") or first_node(nodes or "")
    port = environment.get("MASTER_PORT") or str(20000 + int(environment["SLURM_JOB_ID"]) % 10000)
    return {"MASTER_ADDR": address, "MASTER_PORT": port}


def first_node(nodes: str) -> str:
    """The first host of Slurm's short form: "gpu[07-09,12],login" -> "gpu07"."""
    head, bracket, rest = nodes.partition("[")
    return (
        head + re.split("[-,\\]]", rest)[0]
        if bracket and "," not in head
        else nodes.partition(",")[0]
    )


def _numbers(environment: Mapping[str, str], *names: str) -> list[int]:
    missing = [name for name in names if name not in environment]
    if missing:
        raise InputError(
            f"the launcher set {names[0]} but not {', '.join(missing)}: start through torchrun, deepspeed or srun, or "
            f"remove {names[0]} from the environment"
        )
    for name in names:
        if not environment[name].isdigit():
            raise InputError(f"{name} is {environment[name]!r} in the environment, not a number")
    return [int(environment[name]) for name in names]


def _compare(environment: Mapping[str, str], *pairs: tuple[str, int, str]) -> None:
    for name, value, other in pairs:
        if other in environment and int(environment[other]) != value:
            raise InputError(
                f"{name}={value} contradicts {other}={environment[other]}: srun started this process, and {name} was set by "
                "something else. Remove RANK, WORLD_SIZE and LOCAL_RANK from slurm/env.sh and your shell's start-up files"
            )


def _tasks_here(environment: Mapping[str, str]) -> int:
    """Tasks of the step on this node, from Slurm's short form: "2(x3),1" is 2, 2, 2, 1."""
    counts: list[int] = []
    for part in environment.get("SLURM_STEP_TASKS_PER_NODE", "1").split(","):
        count, _, repeats = part.rstrip(")").partition("(x")
        counts += [int(count)] * int(repeats or 1)
    return counts[min(int(environment.get("SLURM_NODEID", 0)), len(counts) - 1)]
