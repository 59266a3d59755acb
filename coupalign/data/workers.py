"""Worker processes of a loader: how they start, what they may do, and who ends them.

They start from the fork server (see `fork_server`), which no signal to the run ends. A worker has
one thread and ignores the signals of the run, because the rank answers those and then ends its
workers. They end at the first of three events:

    the loader's owner calls `end_workers`       a normal end
    the DataLoader is garbage collected          `weakref.finalize`
    the program exits                            `atexit`

`atexit` is needed because multiprocessing has an exit handler of its own, which waits for children
to end. A worker that waits for its next task never ends, so the program would hang.

What a worker runs out of (shared memory, open files) reaches the rank as an InputError that says
what to raise, and a worker that was killed as a RunError.
"""

from __future__ import annotations

import atexit
import errno
import multiprocessing.queues
import os
import signal
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from coupalign.data.batch import Batch
from coupalign.data.fork_server import SIGNALS, fork_server
from coupalign.errors import InputError, RunError
from coupalign.limits import explain_shortage, free_shared_memory, shared_memory_remedy

PREFETCH = 2  # batches that each worker reads ahead

# Open files that the rank needs for its workers: pipes, and shared memory on its way.
_FILES = 10
_FILES_PER_WORKER = 6

# How long to wait for the exit status of a worker whose connection is lost.
_END_S = 5.0

_SHORTAGES = (MemoryError, OSError, RuntimeError, EOFError)


@dataclass(frozen=True)
class Failure:
    """An InputError on its way out of a worker process.

    Handed over as a value: an exception would arrive wrapped in the traceback of the worker.
    """

    message: str


def unwrap(item: Batch | Failure) -> Batch:
    """Return the batch, or raise the InputError that the worker met."""
    if isinstance(item, Failure):
        raise InputError(item.message)
    return item


def open_data_loader(
    dataset: Dataset, keys: object, workers: int, *, persistent: bool
) -> DataLoader:
    """Make a DataLoader that reads one micro-batch per item.

    Args:
        keys: iterable of what `dataset[...]` takes, one per item.
        workers: number of worker processes. 0: read in this process.
        persistent: keep the workers from one iteration to the next.
    """
    return DataLoader(
        _Explained(dataset),
        batch_size=None,
        sampler=keys,
        num_workers=workers,
        collate_fn=_unchanged,
        # A generator of its own: a DataLoader draws a seed for its workers, and that must not move
        # the global random state.
        generator=torch.Generator(),
        pin_memory=torch.cuda.is_available(),
        persistent_workers=persistent and workers > 0,
        prefetch_factor=PREFETCH if workers else None,
        worker_init_fn=_set_up_worker,
        multiprocessing_context=fork_server() if workers else None,
    )


def start_iteration(loader: DataLoader) -> Iterator[Batch | Failure]:
    """Begin an iteration, and see to it that its worker processes end.

    Raises (here and while iterating):
        InputError: there is too little of something, such as shared memory or open files.
        RunError: a worker process was killed.
    """
    try:
        if loader.num_workers:
            _try_to_open(_FILES + _FILES_PER_WORKER * loader.num_workers)
        items = iter(loader)
    except _SHORTAGES as error:
        shortage = _explain_start(error)
        if shortage is None:
            raise
        raise InputError(
            f"data.workers={loader.num_workers}: the worker processes cannot be started: {shortage}"
        ) from error

    if not loader.num_workers:
        return items
    _with_workers.add(items)
    weakref.finalize(loader, end_workers, items)

    # Exit handlers run last in, first out. Register again, to come before the handler that
    # multiprocessing may have registered meanwhile.
    atexit.unregister(_end_all_workers)
    atexit.register(_end_all_workers)
    return _WorkerItems(items)


def require_shared_memory(batch_bytes: int, workers: int) -> None:
    """Make sure that the batches that workers read ahead fit into shared memory.

    Args:
        batch_bytes: size of one batch.

    Raises:
        InputError: they do not fit.
    """
    needed, free = batch_bytes * workers * PREFETCH, free_shared_memory()
    if free is not None and needed > free:
        raise InputError(
            f"data.workers={workers}: {workers} x {PREFETCH} batches of {batch_bytes / 1e6:,.1f} "
            f"MB do not fit: {shared_memory_remedy()}"
        )


def end_workers(items: Iterator) -> None:
    """End the worker processes of an iteration. Does nothing if it has none, or they have ended."""
    if isinstance(items, _WorkerItems):
        items = items.items
    if items not in _with_workers:
        return
    _with_workers.remove(items)

    items._shutdown_workers()
    for worker in items._workers:
        if worker.is_alive():
            worker.kill()  # a worker ignores SIGTERM


_with_workers: set[Iterator] = set()  # iterations whose worker processes have not been ended


def _end_all_workers() -> None:
    for items in tuple(_with_workers):
        end_workers(items)


class _Explained(Dataset):
    """A data set that returns what a user must fix as a `Failure`."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset

    def __getitem__(self, keys: Any) -> Batch | Failure:
        try:
            return self._dataset[keys]
        except InputError as error:
            return Failure(str(error))
        except _SHORTAGES as error:
            shortage = explain_shortage(error)
            if shortage is None:
                raise
            return Failure(f"a batch of samples cannot be read: {shortage}")


class _WorkerItems(Iterator):
    """The items of worker processes, with errors in words."""

    def __init__(self, items: Iterator) -> None:
        self.items = items

    def __next__(self) -> Batch | Failure:
        try:
            return next(self.items)
        except _SHORTAGES as error:
            # A worker that ended while it sent a batch shows first as a lost connection.
            if isinstance(error, (ConnectionError, EOFError)):
                wait([worker.sentinel for worker in self.items._workers], _END_S)
            ended = [worker for worker in self.items._workers if worker.exitcode]
            if ended:
                raise _explain_end(ended[0].pid, ended[0].exitcode) from error
            shortage = explain_shortage(error)
            if shortage is None:
                raise
            raise InputError(f"a batch of a data worker cannot be received: {shortage}") from error


def _try_to_open(files: int) -> None:
    """Raise OSError if this process may not open so many more files.

    A DataLoader that fails while it starts its workers leaves some of them behind.
    """
    handles = []
    try:
        for _ in range(files):
            handles.append(os.open(os.devnull, os.O_RDONLY))
    finally:
        for handle in handles:
            os.close(handle)


def _explain_start(error: BaseException) -> str | None:
    # A queue has semaphores, which are files in shared memory.
    if getattr(error, "errno", None) == errno.ENOSPC:
        return shared_memory_remedy()
    return explain_shortage(error)


def _explain_end(pid: int, exit_code: int) -> InputError | RunError:
    """Say how a worker process ended; `exit_code` is negative for a signal."""
    if exit_code == -signal.SIGBUS:
        return InputError(f"data worker {pid} ended with a bus error: {shared_memory_remedy()}")

    resume = "The same command resumes from the newest checkpoint"
    if exit_code == -signal.SIGKILL:
        return RunError(
            f"data worker {pid} was killed (SIGKILL), as the system does when memory is short. "
            f"Lower data.workers or give the job more memory. {resume}"
        )
    how = f"status {exit_code}"
    if exit_code < 0:
        how = signal.Signals(-exit_code).name
    return RunError(f"data worker {pid} ended with {how}; its own output says why. {resume}")


def _set_up_worker(_: int) -> None:
    torch.set_num_threads(1)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    # A batch that cannot be sent would only be printed, and the rank would wait for it forever.
    multiprocessing.queues.Queue._on_queue_feeder_error = _send_failure_instead


def _send_failure_instead(
    queue: multiprocessing.queues.Queue, error: Exception, item: tuple[int, object]
) -> None:
    """Send a failure in the place of an item that the thread of the queue could not send."""
    shortage = explain_shortage(error) or f"{type(error).__name__}: {error}"
    number, _ = item
    queue.put((number, Failure(f"a data worker cannot send a batch: {shortage}")))


def _unchanged(item: object) -> object:
    return item
