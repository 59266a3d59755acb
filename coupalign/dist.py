"""Ranks: who this process is, and the few collectives that the project uses. The only reader of the launcher's environment."""
from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as td

from coupalign.errors import InputError


@dataclass(frozen=True)
class World:
    """This process among the processes of the job."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process prints, tracks and publishes."""
        return self.rank == 0


@contextmanager
def session(rendezvous: str = "env://", timeout_minutes: float = 30.0) -> Iterator[World]:
    """Join the job's process group, yield this process's World, leave the group.

    Reads torchrun's and DeepSpeed's variables (RANK, WORLD_SIZE, LOCAL_RANK), else Slurm's (SLURM_PROCID …), else runs alone.

    Args:
        rendezvous: where ranks meet: env:// is MASTER_ADDR and MASTER_PORT; file:///path needs no port.
        timeout_minutes: of a collective.

    Raises:
        InputError: the launcher's variables are incomplete, or there are more local ranks than GPUs.
    """
    rank, size, local_rank, local_size = _places(os.environ)
    device = _device(local_rank, local_size)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_size))
    backend = "nccl" if device.type == "cuda" else "gloo"
    if size > 1 and rendezvous == "env://" and not {"MASTER_ADDR", "MASTER_PORT"} <= set(os.environ):
        raise InputError("MASTER_ADDR and MASTER_PORT are not set: the ranks cannot find each other (slurm/train.sbatch sets both)")
    where: dict[str, Any] = {"store": td.HashStore()} if size == 1 else {"init_method": rendezvous}
    td.init_process_group(backend, rank=rank, world_size=size, timeout=timedelta(minutes=timeout_minutes), **where)
    try:
        yield World(rank, size, local_rank, local_size, device)
    finally:
        td.destroy_process_group()


def any_rank(flag: bool, world: World) -> bool:
    """Whether `flag` is true on at least one rank; the same answer on every rank."""
    if world.size == 1:
        return flag
    count = torch.tensor([int(flag)], device=world.device)
    td.all_reduce(count, op=td.ReduceOp.MAX)
    return bool(count.item())


def gather_vector(values: torch.Tensor, world: World) -> torch.Tensor:
    """float64 [ranks, n] on the CPU: everybody's `values` [n], in the order of the ranks."""
    mine = values.detach().to(torch.float64)
    if world.size == 1:
        return mine.cpu()[None]
    everybody = [torch.empty_like(mine) for _ in range(world.size)]
    td.all_gather(everybody, mine)
    return torch.stack(everybody).cpu()


def gather_rows(rows: np.ndarray, world: World) -> np.ndarray:
    """int64 [sum of n, k]: the rows [n, k] of all ranks one after another; n may differ between ranks."""
    if world.size == 1:
        return rows
    counts = gather_vector(torch.tensor([float(len(rows))], device=world.device), world)[:, 0].long().tolist()
    padded = torch.zeros(max(counts), rows.shape[1], dtype=torch.int64)
    padded[:len(rows)] = torch.from_numpy(rows)
    mine = padded.to(world.device)
    everybody = [torch.empty_like(mine) for _ in range(world.size)]
    td.all_gather(everybody, mine)
    return np.concatenate([part[:count].cpu().numpy() for part, count in zip(everybody, counts)])


def from_main(value: Any, world: World) -> Any:
    """Rank 0's `value`, on every rank."""
    if world.size == 1:
        return value
    box: Sequence[Any] = [value]
    td.broadcast_object_list(box, src=0, device=world.device)
    return box[0]


def wait_for_all(world: World) -> None:
    """Return when every rank has come here."""
    if world.size > 1:
        td.barrier(device_ids=[world.device.index] if world.device.type == "cuda" else None)


def _places(environment: Any) -> tuple[int, int, int, int]:
    """(rank, size, local rank, local size) from torchrun's or DeepSpeed's variables, else Slurm's, else a single process."""
    if "RANK" in environment:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        local_size = environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE")
    elif "SLURM_PROCID" in environment and int(environment.get("SLURM_NTASKS", 1)) > 1:
        names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
        local_size = environment.get("SLURM_NTASKS_PER_NODE")
    else:
        return 0, 1, 0, 1
    missing = [name for name in names if name not in environment]
    if missing:
        raise InputError(f"the launcher set {names[0]} but not {', '.join(missing)}: start through torchrun, deepspeed or srun")
    rank, size, local_rank = (int(environment[name]) for name in names)
    return rank, size, local_rank, int(local_size or 1)


def _device(local_rank: int, local_size: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise InputError(f"local rank {local_rank} of {local_size} has no GPU: this host shows {torch.cuda.device_count()}")
    return torch.device("cuda", local_rank)
