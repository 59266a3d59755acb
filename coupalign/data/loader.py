"""The loaders of training and evaluation batches, as a rank sees them.

Their order depends on neither ranks nor worker processes. One item of the underlying DataLoader is
one micro-batch, requested by its keys (epoch, sample number). So a run resumes at any step without
decoding anything of the earlier ones.

`coupalign.data.build` makes loaders; `datasets` is what runs in their worker processes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import count

import numpy as np
from torch.utils.data import DataLoader

from coupalign.config.schema import DataConfig
from coupalign.data.batch import Batch
from coupalign.data.datasets import EvalSamples, TrainSamples
from coupalign.data.leak import TrainedOn, photos_of
from coupalign.data.order import EpochOrders
from coupalign.data.photos import Photos
from coupalign.data.samples import BadSample, Key
from coupalign.data.table import Rule
from coupalign.data.workers import (
    Failure,
    end_workers,
    open_data_loader,
    start_iteration,
    unwrap,
)
from coupalign.errors import InputError

log = logging.getLogger(__name__)

MIN_DRAWS = 100  # samples to draw before the share of bad ones is judged


class MicroBatchKeys:
    """The keys of one rank's micro-batches from `first_step` on, without end.

    Args:
        positions: which positions of a step this rank takes.
        accumulation: micro-batches per step on this rank.
    """

    def __init__(
        self, orders: EpochOrders, *, global_batch: int, positions: slice, accumulation: int
    ) -> None:
        self.orders = orders
        self.accumulation = accumulation
        self.first_step = 0
        self._global_batch = global_batch
        self._positions = positions

    def __iter__(self) -> Iterator[list[Key]]:
        for step in count(self.first_step):
            keys = self.orders.step(step, self._global_batch, self._positions)
            size = len(keys) // self.accumulation
            for first in range(0, len(keys), size):
                yield keys[first : first + size]


class TrainLoader:
    """The endless training batches of this rank. The step number is the whole state.

    Attributes:
        reader: reads single samples.
        samples: number of samples per epoch, over all ranks.
        fingerprint: SHA-256 of the shards and of what is read from them.
        micro_batches: per step on this rank.
        trained_on: the photographs of the samples.
        leaks: lines to print about leaks.
        bad: name -> reason, of the unreadable samples that this rank met.
    """

    def __init__(
        self,
        dataset: TrainSamples,
        keys: MicroBatchKeys,
        config: DataConfig,
        *,
        fingerprint: str,
        trained_on: TrainedOn,
        leaks: Sequence[str] = (),
    ) -> None:
        self.reader = dataset.reader
        self.samples = keys.orders.samples
        self.fingerprint = fingerprint
        self.micro_batches = keys.accumulation
        self.trained_on = trained_on
        self.leaks = leaks

        self.bad: dict[str, str] = {}
        self._drawn = 0
        self._bad_drawn = 0
        self._max_bad_share = config.max_bad_share

        self._keys = keys
        self._loader: DataLoader | None = open_data_loader(
            dataset, keys, config.workers, persistent=True
        )
        self._running: Iterator[tuple[int, list[Batch]]] | None = None

    def steps_from(self, step: int) -> Iterator[tuple[int, list[Batch]]]:
        """Begin to iterate at a step. An earlier iteration of this loader ends.

        Yields:
            (step, its micro-batches on this rank), without end.

        Raises (while iterating):
            InputError: a sample cannot be read; or, with `bad_samples: skip`, too many.
        """
        assert self._loader is not None, "the loader is closed"
        if self._running is not None:
            self._running.close()
        self._keys.first_step = step
        self._running = self._steps(self._loader, step)
        return self._running

    def count_not_mirrored(self) -> tuple[int, int]:
        """Count the sentences that `augment.flip` leaves alone, in the shard that is read first.

        Returns:
            the number of such sentences, and of all that were read.
        """
        _, first = next(iter(self._keys))[0]
        return self.reader.count_not_mirrored(first)

    @property
    def worker_pids(self) -> list[int]:
        """The process ids of the workers, once an iteration has begun."""
        items = self._worker_iterator()
        return [] if items is None else [worker.pid for worker in items._workers]

    def close(self) -> None:
        """End the iteration and the worker processes."""
        if self._running is not None:
            self._running.close()
        items = self._worker_iterator()
        if items is not None:
            end_workers(items)
        self._running = self._loader = None

    def _steps(self, loader: DataLoader, first: int) -> Iterator[tuple[int, list[Batch]]]:
        items = start_iteration(loader)
        for step in count(first):
            yield step, [self._next_batch(items) for _ in range(self.micro_batches)]

    def _next_batch(self, items: Iterator[Batch | Failure]) -> Batch:
        batch = unwrap(next(items))
        self._note_bad_samples(batch)
        return batch

    def _note_bad_samples(self, batch: Batch) -> None:
        """Count and log the samples that were replaced, and stop the run if there are too many."""
        self._drawn += len(batch) + len(batch.bad)
        self._bad_drawn += len(batch.bad)

        for entry in batch.bad:
            name, _, reason = entry.partition(": ")
            if name not in self.bad:
                log.warning("skipped a bad sample, %s: %s", name, reason)
            self.bad[name] = reason

        enough_drawn = self._drawn >= min(MIN_DRAWS, self.samples)
        if enough_drawn and self._bad_drawn > self._max_bad_share * self._drawn:
            examples = [f"{name}: {reason}" for name, reason in list(self.bad.items())[:3]]
            raise InputError(
                f"{self._bad_drawn} of {self._drawn} samples drawn cannot be read, more than "
                f"data.max_bad_share={self._max_bad_share}: {'; '.join(examples)}. "
                "`coupalign verify` lists what is damaged"
            )

    def _worker_iterator(self) -> Iterator | None:
        """Return the DataLoader's iterator, which holds the worker processes, if there are any."""
        if self._loader is None or not self._loader.num_workers:
            return None
        return self._loader._iterator


class EvalLoader:
    """The evaluation batches of this rank. Each iteration begins at the first of them.

    Args:
        batches: the sample numbers of each batch.
        spare: how many of the last batches are not this rank's own, see `Batch.spare`.

    Attributes:
        samples: number of samples, over all ranks.
        fingerprint: SHA-256 of the shards and of what is read from them.
        shards: name and first digits of the fingerprint of each index, to print with a score.
        members: for each sentence rule, the numbers of its samples.
    """

    def __init__(
        self,
        dataset: EvalSamples,
        batches: list[list[int]],
        config: DataConfig,
        *,
        fingerprint: str,
        members: dict[Rule, np.ndarray],
        spare: int = 0,
    ) -> None:
        self.samples = len(dataset.reader.table)
        self.fingerprint = fingerprint
        self.shards = ", ".join(
            f"{index.name} {index.fingerprint[:8]}" for index in dataset.reader.table.indexes
        )
        self.members = members
        self._dataset = dataset
        self._batches = batches
        self._own = len(batches) - spare
        self._workers = min(config.workers, len(batches))

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        loader = open_data_loader(self._dataset, self._batches, self._workers, persistent=False)
        items = start_iteration(loader)
        try:
            for position, item in enumerate(items):
                yield replace(unwrap(item), spare=position >= self._own)
        finally:
            end_workers(items)

    @property
    def photos(self) -> Photos:
        """The photographs of all ranks' samples."""
        return photos_of(self._dataset.reader.table)

    @cached_property
    def names_and_sentences(self) -> tuple[tuple[str, str], ...]:
        """The name and own sentence of each sample of all ranks, by sample number.

        Reads the records from the shards, but no image.

        Raises:
            InputError: a record cannot be read.
        """
        reader = self._dataset.reader
        try:
            return tuple(reader.read_name_and_sentence(number) for number in range(self.samples))
        except BadSample as error:
            raise InputError(str(error)) from error
