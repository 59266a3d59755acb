"""Batches for training and for scoring, in an order that depends on neither ranks nor worker processes.

One item of the DataLoader is one micro-batch, asked for by its keys (epoch, sample number); so a run resumes at any step
without decoding what came before, and a worker process holds no state.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import count

import numpy as np
from torch.utils.data import DataLoader, Dataset

from coupalign.config.schema import DataConfig
from coupalign.data.batch import Batch, SampleInfo
from coupalign.data.leak import Photo, TrainedOn, scored_photos
from coupalign.data.order import (
    EpochOrders,
)
from coupalign.data.samples import BadSample, Key, SampleReader
from coupalign.data.table import Rule
from coupalign.data.workers import (
    _data_loader,
    _end,
    _Failure,
    _start,
    _unwrap,
)
from coupalign.errors import InputError

log = logging.getLogger(__name__)

_SIDE_BY_SIDE = 32  # samples of a micro-batch that go through each step together; their stored photographs are held
_FEWEST_DRAWS = 100  # before the share of bad samples is judged
_MOST_REPLACEMENTS = 100  # bad samples in a row


# --------------------------------------------------------------------------------------------------------- building


# ---------------------------------------------------------------------------------------------------------- loaders


class TrainLoader:
    """Endless training batches; `(step)` is the whole state.

    Attributes: `reader`, `samples`, `fingerprint` (of the data and what is read of it), `micro_batches` (accumulation), `trained_on` (the
    photographs), `leaks` (what the leak guard has to say), and `bad`: name -> reason of the unreadable samples that this rank met.
    """

    def __init__(
        self,
        dataset: _TrainSamples,
        keys: _MicroBatchKeys,
        config: DataConfig,
        fingerprint: str,
        trained_on: TrainedOn,
        leaks: Sequence[str] = (),
    ) -> None:
        self.trained_on, self.leaks = trained_on, leaks
        self.reader = dataset.reader
        self.samples = keys.orders.samples
        self.fingerprint = fingerprint
        self.micro_batches = keys.accumulation
        self.bad: dict[str, str] = {}
        self._drawn = self._bad_drawn = 0
        self._max_bad_share = config.max_bad_share
        self._keys = keys
        self._loader: DataLoader | None = _data_loader(
            dataset, keys, config.workers, persistent=True
        )
        self._running: Iterator[tuple[int, list[Batch]]] | None = None

    def steps_from(self, step: int) -> Iterator[tuple[int, list[Batch]]]:
        """(step, its micro-batches on this rank), from `step` on, without end; ends an iteration begun before.

        Raises (while iterating):
            InputError: a sample cannot be read, or with `bad_samples: skip` too many.
        """
        assert self._loader is not None, "the loader is closed"
        if self._running is not None:
            self._running.close()
        self._keys.first_step = step
        self._running = self._steps(self._loader, step)
        return self._running

    @property
    def worker_pids(self) -> list[int]:
        """Of the worker processes, once an iteration has begun."""
        items = (
            self._loader._iterator
            if self._loader is not None and self._loader.num_workers
            else None
        )
        return [] if items is None else [worker.pid for worker in items._workers]

    def close(self) -> None:
        """End the worker processes."""
        if self._running is not None:
            self._running.close()
        if (
            self._loader is not None
            and self._loader.num_workers
            and self._loader._iterator is not None
        ):
            _end(self._loader._iterator)
        self._running = self._loader = None

    def _steps(self, loader: DataLoader, first: int) -> Iterator[tuple[int, list[Batch]]]:
        items = _start(loader)
        for step in count(first):
            yield step, [self._checked(next(items)) for _ in range(self.micro_batches)]

    def _checked(self, item: Batch | _Failure) -> Batch:
        batch = _unwrap(item)
        self._drawn += len(batch) + len(batch.bad)
        self._bad_drawn += len(batch.bad)
        for text in batch.bad:
            name, _, reason = text.partition(": ")
            if name not in self.bad:
                log.warning("skipped a bad sample, %s: %s", name, reason)
            self.bad[name] = reason
        enough = self._drawn >= min(_FEWEST_DRAWS, self.samples)
        if enough and self._bad_drawn > self._max_bad_share * self._drawn:
            named = "; ".join(f"{name}: {reason}" for name, reason in list(self.bad.items())[:3])
            raise InputError(
                f"{self._bad_drawn} of {self._drawn} samples drawn cannot be read, more than data.max_bad_share="
                f"{self._max_bad_share}: {named}. `coupalign verify` lists what is damaged"
            )
        return batch


class EvalLoader:
    """The evaluation batches of one rank, each iteration from the start.

    Attributes: `samples` (of all ranks), `fingerprint` (of the data), `members` (by sentence rule the numbers of its samples).
    """

    def __init__(
        self,
        dataset: _EvalSamples,
        batches: list[list[int]],
        config: DataConfig,
        fingerprint: str,
        members: dict[Rule, np.ndarray],
    ) -> None:
        self.samples = len(dataset.reader.table)
        self.fingerprint = fingerprint
        self.members = members
        self._dataset = dataset
        self._batches = batches
        self._workers = min(config.workers, len(batches))

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        loader = _data_loader(self._dataset, self._batches, self._workers, persistent=False)
        items = _start(loader)
        try:
            for item in items:
                yield _unwrap(item)
        finally:
            _end(items)

    @property
    def photos(self) -> set[Photo]:
        """The photographs of all ranks' samples."""
        return scored_photos(self._dataset.reader.table)

    @cached_property
    def words(self) -> tuple[tuple[str, str], ...]:
        """(name, its own sentence) of each sample of all ranks, by number; reads the records of the shards, not the pictures."""
        try:
            return tuple(self._dataset.reader.words(number) for number in range(self.samples))
        except BadSample as error:
            raise InputError(str(error)) from error


class _MicroBatchKeys:
    """The keys of one rank's micro-batches from `first_step` on, without end."""

    def __init__(
        self, orders: EpochOrders, global_batch: int, taken: slice, accumulation: int
    ) -> None:
        self.orders = orders
        self.accumulation = accumulation
        self.first_step = 0
        self._global_batch = global_batch
        self._taken = taken

    def __iter__(self) -> Iterator[list[Key]]:
        for step in count(self.first_step):
            keys = self.orders.step(step, self._global_batch, self._taken)
            size = len(keys) // self.accumulation
            for first in range(0, len(keys), size):
                yield keys[first : first + size]


# ---------------------------------------------------------------------------------------------------------- samples


class _TrainSamples(Dataset):
    """(epoch, number) keys of a micro-batch -> Batch, under the policy for bad samples."""

    def __init__(self, reader: SampleReader, seed: int) -> None:
        self.reader = reader
        self._seed = seed

    def __getitem__(self, keys: Sequence[Key]) -> Batch | _Failure:
        bad: list[str] = []
        try:
            canvas = self.reader.canvas(len(keys), target=True)
            image, target = canvas.image.numpy(), canvas.target.numpy()
            groups = [
                slice(first, first + _SIDE_BY_SIDE) for first in range(0, len(keys), _SIDE_BY_SIDE)
            ]
            infos = [
                info
                for group in groups
                for info in self._group(keys[group], image[group], target[group], bad)
            ]
            return self.reader.collate(canvas, infos, bad)
        except InputError as error:
            return _Failure(str(error))

    def _group(
        self, keys: Sequence[Key], image: np.ndarray, target: np.ndarray, bad: list[str]
    ) -> list[SampleInfo]:
        """Write the samples, which differ from `keys` where one of these cannot be read."""
        try:
            return self.reader.train_samples(self._seed, keys, image, target)
        except BadSample:
            rows = [slice(row, row + 1) for row in range(len(keys))]
            return [
                self._readable(key, image[row], target[row], bad) for key, row in zip(keys, rows)
            ]

    def _readable(
        self, key: Key, image: np.ndarray, target: np.ndarray, bad: list[str]
    ) -> SampleInfo:
        """Write the sample, or with `skip` the next one that can be read: the size of a batch does not change."""
        (epoch, number), total = key, len(self.reader.table)
        for step in range(min(total, _MOST_REPLACEMENTS)):
            try:
                return self.reader.train_samples(
                    self._seed, [(epoch, (number + step) % total)], image, target
                )[0]
            except BadSample as error:
                if self.reader.config.bad_samples == "fail":
                    raise InputError(
                        f"unreadable sample {error}. Pack the shard again, or set data.bad_samples=skip"
                    ) from error
                bad.append(str(error))
        raise InputError(f"{len(bad)} samples in a row cannot be read, the last one {bad[-1]}")


class _EvalSamples(Dataset):
    """Numbers of an evaluation batch -> Batch."""

    def __init__(self, reader: SampleReader, others: np.ndarray | None, images: bool) -> None:
        self.reader = reader
        self._others = others
        self._images = images

    def __getitem__(self, numbers: Sequence[int]) -> Batch | _Failure:
        others = [None if self._others is None else int(self._others[number]) for number in numbers]
        try:
            canvas = self.reader.canvas(len(numbers), target=False)
            rows = zip(numbers, others, canvas.image.numpy())
            return self.reader.collate(
                canvas,
                [
                    self.reader.eval_sample(n, other, self._images, image)
                    for n, other, image in rows
                ],
            )
        except BadSample as error:
            return _Failure(
                f"unreadable sample {error}. An evaluation leaves no sample out: pack the shard again"
            )
        except InputError as error:
            return _Failure(str(error))
