"""Worker processes of a loader: how they start, what they may do, and who ends them.

They start from the fork server (see `fork_server`), which no signal to the run ends. A worker has
one thread and ignores the signals of the run, because the rank answers those and then ends its
workers. They end at the first of three events:

    the loader's owner calls `end_workers`       a normal end
    the DataLoader is garbage collected          `weakref.finalize`
    the program exits                            `atexit`

`atexit` is needed because multiprocessing has an exit handler of its own, which waits for children
to end. A worker that waits for its next task never ends, so the program would hang.
"""

from __future__ import annotations

import atexit
import signal
import weakref
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Dataset

from coupalign.data.batch import Batch
from coupalign.data.fork_server import SIGNALS, fork_server
from coupalign.errors import InputError


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
        dataset,
        batch_size=None,
        sampler=keys,
        num_workers=workers,
        collate_fn=_unchanged,
        # A generator of its own: a DataLoader draws a seed for its workers, and that must not move
        # the global random state.
        generator=torch.Generator(),
        pin_memory=torch.cuda.is_available(),
        persistent_workers=persistent and workers > 0,
        worker_init_fn=_set_up_worker,
        multiprocessing_context=fork_server() if workers else None,
    )


def start_iteration(loader: DataLoader) -> Iterator[Batch | Failure]:
    """Begin an iteration, and see to it that its worker processes end."""
    items = iter(loader)
    if loader.num_workers:
        _with_workers.add(items)
        weakref.finalize(loader, end_workers, items)

        # Exit handlers run last in, first out. Register again, to come before the handler that
        # multiprocessing may have registered meanwhile.
        atexit.unregister(_end_all_workers)
        atexit.register(_end_all_workers)
    return items


def end_workers(items: Iterator) -> None:
    """End the worker processes of an iteration. Does nothing if it has none, or they have ended."""
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


def _set_up_worker(_: int) -> None:
    torch.set_num_threads(1)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _unchanged(item: object) -> object:
    return item
