"""Worker processes of the loaders: started from the fork server, ended with the run."""

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


def _data_loader(dataset: Dataset, keys: object, workers: int, persistent: bool) -> DataLoader:
    # its own generator: the seed that a DataLoader draws for its workers must not move the global random state
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=keys,
        num_workers=workers,
        collate_fn=_same,
        generator=torch.Generator(),
        pin_memory=torch.cuda.is_available(),
        persistent_workers=persistent and workers > 0,
        worker_init_fn=_start_worker,
        multiprocessing_context=fork_server() if workers else None,
    )


def _same(item: object) -> object:
    return item


def _start(loader: DataLoader) -> Iterator[Batch | _Failure]:
    """Begin an iteration whose worker processes end with `loader`, or with the program, whichever is first."""
    items = iter(loader)
    if loader.num_workers:
        atexit.unregister(_end_all)
        atexit.register(
            _end_all
        )  # anew, to come before the exit handler of multiprocessing, which waits for the workers
        _running.add(items)
        weakref.finalize(loader, _end, items)
    return items


_running: set[Iterator] = set()


def _end_all() -> None:
    for items in tuple(_running):
        _end(items)


def _end(items: Iterator) -> None:
    if items in _running:
        _running.remove(items)
        items._shutdown_workers()
        for worker in items._workers:
            if worker.is_alive():
                worker.kill()  # it does not listen to SIGTERM


def _start_worker(_: int) -> None:
    """One thread each; a signal meant for the run is the main process's to answer, which then ends its workers."""
    torch.set_num_threads(1)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@dataclass(frozen=True)
class _Failure:
    """An InputError on its way out of a worker process, without the traceback that torch would wrap around it."""

    message: str


def _unwrap(item: Batch | _Failure) -> Batch:
    if isinstance(item, _Failure):
        raise InputError(item.message)
    return item
