"""Batches for training and for scoring, in an order that depends on neither ranks nor worker processes.

One item of the DataLoader is one micro-batch, asked for by its keys (epoch, sample number); so a run resumes at any step
without decoding what came before, and a worker process holds no state.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import logging
import signal
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from coupalign.config.schema import DataConfig, Source
from coupalign.data.batch import Batch, SampleInfo
from coupalign.data.index import ShardIndex
from coupalign.data.leak import Photo, TrainedOn, guard, scored_photos, trained_on
from coupalign.data.order import (
    EpochOrders,
    ShardLayout,
    micro_batches,
    part_share,
    part_slices,
    rank_slice,
)
from coupalign.data.samples import (
    BadSample,
    Key,
    Rule,
    SampleReader,
    SampleTable,
    build_table,
    evaluation_table,
    other_sentences,
)
from coupalign.data.server import SIGNALS, fork_server
from coupalign.data.shards import is_remote, open_index, open_vocabulary
from coupalign.data.tokenizer import Tokenizer
from coupalign.errors import InputError

log = logging.getLogger(__name__)

_SIDE_BY_SIDE = 32  # samples of a micro-batch that go through each step together; their stored photographs are held
_FEWEST_DRAWS = 100  # before the share of bad samples is judged
_MOST_REPLACEMENTS = 100  # bad samples in a row


# --------------------------------------------------------------------------------------------------------- building


def open_tokenizer(config: DataConfig) -> Tokenizer:
    """The tokenizer that the configuration names, else the vocabulary packed with its first training source."""
    if config.tokenizer is not None:
        return Tokenizer.open(config.tokenizer)
    sources = config.train or config.evaluate
    if not sources:
        raise InputError("data.tokenizer and data.train are both empty: there is no vocabulary")
    return Tokenizer.open(open_vocabulary(open_index(sources[0].index), config.cache_dir))


def build_train_loader(
    config: DataConfig,
    seed: int,
    global_batch: int,
    max_micro_batch: int | None,
    rank: int,
    ranks: int,
    tokenizer: Tokenizer,
) -> TrainLoader:
    """The endless training batches of one rank.

    Raises:
        InputError: the ranks or the canonical nodes cannot share `global_batch`, there are fewer samples than canonical nodes,
            a source is empty or cannot be opened, photographs to be scored are among those to train on.
    """
    if not config.train:
        raise InputError("data.train is empty: name at least one source to train on")
    taken = rank_slice(global_batch, rank, ranks)
    part_share(global_batch, config.canonical_nodes, ranks)
    indexes = _open_indexes(config.train)
    table = build_table(config.train, indexes, config.unit)
    table, leaks = guard(config, table, indexes, _open_indexes(config.evaluate))
    _warn_of_small_cache(
        config, table, len(part_slices(global_batch, config.canonical_nodes, taken))
    )
    orders = EpochOrders(
        ShardLayout.of_samples(table.shard), seed, config.shuffle_window, config.canonical_nodes
    )
    accumulation, _ = micro_batches(global_batch, max_micro_batch, ranks)
    keys = _MicroBatchKeys(orders, global_batch, taken, accumulation)
    dataset = _TrainSamples(SampleReader(config, table, tokenizer), seed)
    fingerprint = _fingerprint(
        config.train,
        indexes,
        f"{config.unit}, {len(table)}" if config.mix == "clean" else config.unit,
    )
    return TrainLoader(dataset, keys, config, fingerprint, trained_on(table, config.mix), leaks)


def build_eval_loader(
    config: DataConfig,
    sources: Sequence[Source],
    batch: int,
    rank: int,
    ranks: int,
    tokenizer: Tokenizer,
    limit: int | None = None,
    shuffle_sentences: bool = False,
    images: bool = False,
    rules: Sequence[Rule] = ("each",),
) -> EvalLoader:
    """Every text of `sources` that the sentence rules ask for once, in batches of `batch` neighbors.

    Rank r of R takes the batches r, r + R, …; sentences about one photograph stand side by side, so it is decoded once for most of them.
    Each rank gives the same number of batches (a sharded forward pass is collective): one that has run out repeats its
    last sample, which scoring recognizes by its number. An unreadable sample always ends the evaluation.

    Args:
        limit: evenly spaced samples of each rule only, numbered anew.
        shuffle_sentences: the language-blind control: each sample gets the sentence of another one.
        images: hand out the pictures at their original size, too.
        rules: which sentences of a ref are read, see `evaluation_table`.

    Raises:
        InputError: a source is empty or cannot be opened.
    """
    assert 0 <= rank < ranks and batch >= 1
    if not sources:
        raise InputError("there is nothing to evaluate: name at least one source in data.evaluate")
    indexes = _open_indexes(sources)
    table, members = evaluation_table(sources, indexes, rules, limit)
    others = other_sentences(table) if shuffle_sentences else None
    dataset = _EvalSamples(SampleReader(config, table, tokenizer), others, images)
    return EvalLoader(
        dataset,
        _eval_batches(len(table), batch, rank, ranks),
        config,
        _fingerprint(sources, indexes, "sentence"),
        members,
    )


def _open_indexes(sources: Sequence[Source]) -> list[ShardIndex]:
    opened = {
        location: open_index(location)
        for location in dict.fromkeys(source.index for source in sources)
    }
    return [opened[source.index] for source in sources]


def _fingerprint(sources: Sequence[Source], indexes: Sequence[ShardIndex], unit: str) -> str:
    """SHA-256 over what decides which samples there are, and their bytes; where the shards lie does not matter."""
    parts = [
        [index.fingerprint, source.dataset, source.split_by, source.split]
        for source, index in zip(sources, indexes)
    ]
    return hashlib.sha256(json.dumps([unit, parts]).encode()).hexdigest()


def _warn_of_small_cache(config: DataConfig, table: SampleTable, parts: int) -> None:
    """`parts`: how many canonical nodes' parts this rank reads at a time, each of them in its own window."""
    remote = sorted(
        shard.bytes
        for index in table.indexes
        if is_remote(index.location)
        for shard in index.shards
    )
    shards = min(config.shuffle_window, -(-len(remote) // config.canonical_nodes) + 1) * parts
    if (window := sum(remote[-shards:])) > config.cache_gb * 1e9:
        log.warning(
            "data.cache_gb=%g is less than the %.3g GB of the shuffle windows that a process reads at a time: shards will be "
            "fetched again and again; raise it, or lower data.shuffle_window=%d",
            config.cache_gb,
            window / 1e9,
            config.shuffle_window,
        )


def _eval_batches(samples: int, batch: int, rank: int, ranks: int) -> list[list[int]]:
    batches = [
        list(range(first, min(first + batch, samples))) for first in range(0, samples, batch)
    ]
    own = batches[rank::ranks]
    spare = own[-1][-1:] if own else [0]
    return own + [spare] * (-(-len(batches) // ranks) - len(own))


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


@dataclass(frozen=True)
class _Failure:
    """An InputError on its way out of a worker process, without the traceback that torch would wrap around it."""

    message: str


def _unwrap(item: Batch | _Failure) -> Batch:
    if isinstance(item, _Failure):
        raise InputError(item.message)
    return item


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
