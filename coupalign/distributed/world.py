"""Ranks: joining the job's process group, and the few collectives that the project uses. The only reader of the launcher's environment."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as td

from coupalign.distributed.launcher import launcher_of, read_ranks, rendezvous_of
from coupalign.distributed.watchdog import Watchdog, doing
from coupalign.errors import InputError, RunError

T = TypeVar("T")


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
def rank_session(rendezvous: str = "env://", hang_minutes: float = 30.0) -> Iterator[World]:
    """Join the job's process group, yield this process's World, leave the group.

    Args:
        rendezvous: where ranks meet: env:// is MASTER_ADDR and MASTER_PORT; file:///path needs no port.
        hang_minutes: without a new `doing` on this rank, after which `watch.Watch` ends the process.

    Raises:
        InputError: the launcher's variables are incomplete or contradict each other, or there are more local ranks than GPUs.
    """
    rank, size, local_rank, local_size = read_ranks(os.environ)
    device = _device(local_rank, local_size)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_size))
    backend = "nccl" if device.type == "cuda" else "gloo"
    if size > 1 and rendezvous == "env://":
        os.environ |= rendezvous_of(os.environ)
    # Our own watch comes first: it says more than the timeout of a collective.
    timeout = timedelta(minutes=hang_minutes + 5)
    store = (
        td.HashStore()
        if size == 1
        else next(td.rendezvous(rendezvous, rank, size, timeout=timeout))[0]
    )
    store.set_timeout(timeout)
    td.init_process_group(backend, rank=rank, world_size=size, timeout=timeout, store=store)
    watch = Watchdog(rank, size, store.clone(), 60 * hang_minutes)
    world = World(rank, size, local_rank, local_size, device)
    try:
        yield world
        doing("leaving the job")
        wait_for_all(world)  # or a rank that is still leaving loses the one that holds the store
    finally:
        td.destroy_process_group()
        watch.close()


class AgreedFlag:
    """Whether `flag` is true on at least one rank: the same answer on every rank, for a loop that all of them go through equally often.

        stopped = AnyRank(lambda: stop.name is not None, world)
        for batch in batches:
            if stopped(): ...

    An answer costs a wait for the device and for the slowest rank. So the ranks also agree after how many rounds to ask again: as many as
    the slowest does in `every_s` seconds, and at most twice as many as lay before this question. In between the answer is no.
    """

    def __init__(self, flag: Callable[[], bool], world: World, every_s: float = 1.0) -> None:
        self.flag, self.world, self.every_s = flag, world, every_s
        self.rounds = self.pause = 0
        self.asked_at = time.perf_counter()

    def __call__(self) -> bool:
        if self.world.size == 1:
            return self.flag()
        self.rounds += 1
        if self.rounds <= self.pause:
            return False
        answer, slowest_s = max_over_ranks(
            [float(self.flag()), (time.perf_counter() - self.asked_at) / self.rounds], self.world
        )
        self.rounds, self.pause = 0, min(2 * self.rounds, int(self.every_s / max(slowest_s, 1e-9)))
        self.asked_at = time.perf_counter()
        return answer > 0


def max_over_ranks(values: Sequence[float], world: World) -> list[float]:
    """The largest of everybody's values, one by one; the same answer on every rank."""
    if world.size == 1:
        return list(values)
    largest = torch.tensor(values, dtype=torch.float64, device=world.device)
    td.all_reduce(largest, op=td.ReduceOp.MAX)
    return largest.tolist()


def gather_vector(values: torch.Tensor, world: World) -> torch.Tensor:
    """float64 [ranks, n] on the CPU: everybody's `values` [n], in the order of the ranks."""
    return gather_on_device(values, world).cpu()


def gather_on_device(values: torch.Tensor, world: World) -> torch.Tensor:
    """The same where the values are, which waits for nothing."""
    mine = values.detach().to(torch.float64)
    if world.size == 1:
        return mine[None]
    everybody = [torch.empty_like(mine) for _ in range(world.size)]
    td.all_gather(everybody, mine)
    return torch.stack(everybody)


def gather_rows(rows: np.ndarray, world: World) -> np.ndarray:
    """int64 [sum of n, k]: the rows [n, k] of all ranks one after another; n may differ between ranks."""
    if world.size == 1:
        return rows
    counts = (
        gather_vector(torch.tensor([float(len(rows))], device=world.device), world)[:, 0]
        .long()
        .tolist()
    )
    padded = torch.zeros(max(counts), rows.shape[1], dtype=torch.int64)
    padded[: len(rows)] = torch.from_numpy(rows)
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


def on_main(act: Callable[[], T], world: World) -> T:
    """What `act` returns on rank 0, on every rank; an InputError or OSError there is raised on every rank, too."""
    outcome: tuple[Any, Exception | None] = (None, None)
    if world.is_main:
        try:
            outcome = act(), None
        except (InputError, RunError, OSError) as error:
            outcome = None, error
    value, problem = from_main(outcome, world)
    if problem is not None:
        raise problem
    return value


def gather_objects(value: Any, world: World) -> list[Any]:
    """Everybody's `value`, in the order of the ranks, on every rank; small things that can be pickled."""
    if world.size == 1:
        return [value]
    everybody: list[Any] = [None] * world.size
    td.all_gather_object(everybody, value)
    return everybody


def sum_over_ranks(tensor: torch.Tensor, world: World) -> None:
    """Add up everybody's `tensor`, in place."""
    if world.size > 1:
        td.all_reduce(tensor)


def launcher_name() -> str:
    """What started this process: torchrun, deepspeed, srun, or nothing."""
    return launcher_of(os.environ)


def wait_for_all(world: World) -> None:
    """Return when every rank has come here."""
    if world.size > 1:
        td.barrier(device_ids=[world.device.index] if world.device.type == "cuda" else None)


def _device(local_rank: int, local_size: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise InputError(
            f"local rank {local_rank} of {local_size} has no GPU: this host shows {torch.cuda.device_count()}"
        )
    return torch.device("cuda", local_rank)
