"""Join the job's process group and exchange values between ranks.

Nothing else in the package reads the launcher's environment or calls torch.distributed's
collectives directly.
"""

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

from coupalign.distributed.launcher import (
    detect_launcher,
    find_rendezvous,
    read_job_attempt,
    read_ranks,
)
from coupalign.distributed.parent import stop_with_launcher
from coupalign.distributed.watchdog import Watchdog, current_phase, doing
from coupalign.errors import InputError, RunError, describe_error
from coupalign.limits import explain_shortage

T = TypeVar("T")

# What the libraries say when another process went away, in lower case.
_LOST_RANK_MESSAGES = (
    # gloo
    "connection closed by peer",
    "connection reset by peer",
    "socket closed",
    "broken pipe",
    "application timeout caused pair closure",
    "for recv operation to complete",
    "for send operation to complete",
    "monitoredbarrier",
    # the store of torch.distributed
    "connection was likely closed",
    "remote peer closed the connection",
    # NCCL, and torch about it
    "remote process exited",
    "ncclremoteerror",
    "connection closed by remote peer",
    "nccl communicator was aborted",
    "watchdog caught collective operation timeout",
)


@dataclass(frozen=True)
class World:
    """This process among the processes of the job.

    Attributes:
        rank: of this process, from 0 to size - 1.
        size: number of processes of the job.
        local_rank: among the processes on this host.
        local_size: number of processes on this host.
        device: on which this process computes.
    """

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
        rendezvous: where the ranks meet. env:// uses MASTER_ADDR and MASTER_PORT; file:///path
            needs no port.
        hang_minutes: if this rank calls no `doing` for so long, its Watchdog ends the process.

    Raises:
        InputError: the launcher's variables are incomplete or contradict each other, or there are
            more local ranks than GPUs.
        RunError: another rank went away, or this one ran out of memory or another resource.
    """
    stop_with_launcher()
    rank, size, local_rank, local_size = read_ranks(os.environ)
    device = _choose_device(local_rank, local_size)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_size))

    if size > 1 and rendezvous == "env://":
        os.environ |= find_rendezvous(os.environ)

    # The watchdog must come first: it says more than the timeout of a collective.
    timeout = timedelta(minutes=hang_minutes + 5)
    if size == 1:
        store = td.HashStore()
    else:
        store, _, _ = next(td.rendezvous(rendezvous, rank, size, timeout=timeout))
    store.set_timeout(timeout)

    backend = "nccl" if device.type == "cuda" else "gloo"
    td.init_process_group(backend, rank=rank, world_size=size, timeout=timeout, store=store)
    watchdog = Watchdog(rank, size, store.clone(), 60 * hang_minutes)
    world = World(rank, size, local_rank, local_size, device)
    try:
        yield world
        # If the rank that holds the store left first, the others would fail while leaving.
        doing("leaving the job")
        wait_for_all(world)
    except (RuntimeError, MemoryError, OSError) as error:
        failure = None if isinstance(error, RunError) else _describe_failure(rank, error)
        if failure is None:
            raise
        raise RunError(failure) from error
    finally:
        td.destroy_process_group()
        watchdog.close()


class AgreedFlag:
    """A flag that is true if it is true on any rank; every rank gets the same answer.

        stopped = AgreedFlag(lambda: stop.name is not None, world)
        for batch in batches:
            if stopped(): ...

    For a loop that every rank runs equally often. An exchange waits for the device and for the
    slowest rank, so the ranks also agree when to ask again: about every `every_s` seconds, and
    never more than twice as many calls later than last time. Until then the answer is False.

    Args:
        flag: this rank's value.
        every_s: about how often the ranks exchange their values, in seconds.
    """

    def __init__(self, flag: Callable[[], bool], world: World, every_s: float = 1.0) -> None:
        self.flag, self.world, self.every_s = flag, world, every_s
        self.calls = self.calls_to_skip = 0
        self.asked_at = time.perf_counter()

    def __call__(self) -> bool:
        if self.world.size == 1:
            return self.flag()

        self.calls += 1
        if self.calls <= self.calls_to_skip:
            return False

        seconds_per_call = (time.perf_counter() - self.asked_at) / self.calls
        answer, slowest_s = max_over_ranks([float(self.flag()), seconds_per_call], self.world)
        calls_per_exchange = int(self.every_s / max(slowest_s, 1e-9))
        self.calls_to_skip = min(2 * self.calls, calls_per_exchange)
        self.calls = 0
        self.asked_at = time.perf_counter()
        return answer > 0


def max_over_ranks(values: Sequence[float], world: World) -> list[float]:
    """Return the elementwise maximum of all ranks' `values`, on every rank."""
    if world.size == 1:
        return list(values)
    largest = torch.tensor(values, dtype=torch.float64, device=world.device)
    td.all_reduce(largest, op=td.ReduceOp.MAX)
    return largest.tolist()


def gather_vector(values: torch.Tensor, world: World) -> torch.Tensor:
    """Gather every rank's `values` [n], in rank order; returns float64 [ranks, n] on the CPU."""
    return gather_on_device(values, world).cpu()


def gather_on_device(values: torch.Tensor, world: World) -> torch.Tensor:
    """Gather like `gather_vector`, but leave the result on the device and wait for nothing."""
    own = values.detach().to(torch.float64)
    if world.size == 1:
        return own[None]
    gathered = [torch.empty_like(own) for _ in range(world.size)]
    td.all_gather(gathered, own)
    return torch.stack(gathered)


def gather_rows(rows: np.ndarray, world: World) -> np.ndarray:
    """Concatenate the rows [n, k] of all ranks, where n may differ; returns int64 [sum of n, k]."""
    if world.size == 1:
        return rows

    # all_gather needs equal shapes, so pad to the longest.
    own_length = torch.tensor([float(len(rows))], device=world.device)
    lengths = gather_vector(own_length, world)[:, 0].long().tolist()
    padded = torch.zeros(max(lengths), rows.shape[1], dtype=torch.int64)
    padded[: len(rows)] = torch.from_numpy(rows)

    own = padded.to(world.device)
    gathered = [torch.empty_like(own) for _ in range(world.size)]
    td.all_gather(gathered, own)
    return np.concatenate(
        [block[:length].cpu().numpy() for block, length in zip(gathered, lengths)]
    )


def from_main(value: Any, world: World) -> Any:
    """Return rank 0's `value` on every rank."""
    if world.size == 1:
        return value
    box: Sequence[Any] = [value]
    td.broadcast_object_list(box, src=0, device=world.device)
    return box[0]


def on_main(function: Callable[[], T], world: World) -> T:
    """Call `function` on rank 0 and return its result on every rank.

    Raises:
        InputError, RunError, OSError: if `function` raised one, it is raised on every rank.
    """
    outcome: tuple[Any, Exception | None] = (None, None)
    if world.is_main:
        try:
            outcome = function(), None
        except (InputError, RunError, OSError) as error:
            outcome = None, error

    value, problem = from_main(outcome, world)
    if problem is not None:
        raise problem
    return value


def gather_objects(value: Any, world: World) -> list[Any]:
    """Return all ranks' `value` in rank order, on every rank. For small picklable values."""
    if world.size == 1:
        return [value]
    gathered: list[Any] = [None] * world.size
    td.all_gather_object(gathered, value)
    return gathered


def sum_over_ranks(tensor: torch.Tensor, world: World) -> None:
    """Add up all ranks' `tensor`, in place."""
    if world.size > 1:
        td.all_reduce(tensor)


def is_lost_rank(error: BaseException) -> bool:
    """Whether a collective failed because another process went away."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        message in text for message in _LOST_RANK_MESSAGES
    )


def job_attempt() -> str:
    """Name the Slurm job and which attempt of it this is, as JOB/ATTEMPT; empty without Slurm."""
    return read_job_attempt(os.environ)


def launcher_name() -> str:
    """Name what started this process: torchrun, deepspeed, srun or nothing."""
    return detect_launcher(os.environ)


def wait_for_all(world: World) -> None:
    """Return once every rank has called this."""
    if world.size > 1:
        td.barrier(device_ids=[world.device.index] if world.device.type == "cuda" else None)


def _describe_failure(rank: int, error: Exception) -> str | None:
    """Say in words why this rank cannot continue; None for an error that is not of its place."""
    if is_lost_rank(error):
        return (
            f"rank {rank} lost contact with another rank while {current_phase()!r} "
            f"({describe_error(error)}). That rank's own output says why it ended. Run the same "
            "command to start again"
        )
    shortage = explain_shortage(error)
    if shortage is None:
        return None
    return f"rank {rank}, while {current_phase()!r}: {shortage}"


def _choose_device(local_rank: int, local_size: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    gpus = torch.cuda.device_count()
    if local_rank >= gpus:
        raise InputError(
            f"local rank {local_rank} of {local_size} has no GPU: this host shows {gpus}. "
            "Start as many processes per host as it has GPUs"
        )
    return torch.device("cuda", local_rank)
