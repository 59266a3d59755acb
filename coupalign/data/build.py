"""Build the tokenizer and the loaders that a configuration describes.

tokenizer = open_tokenizer(config.data)
loader = build_train_loader(
    config.data, seed=0, global_batch=32, max_micro_batch=8, world=world, tokenizer=tokenizer
)
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence

from coupalign.config.schema import DataConfig, Source
from coupalign.data.datasets import EvalSamples, TrainSamples
from coupalign.data.index import ShardIndex
from coupalign.data.leak import TrainedOn, apply_leak_policy
from coupalign.data.loader import EvalLoader, MicroBatchKeys, TrainLoader
from coupalign.data.order import (
    EpochOrders,
    ShardLayout,
    micro_batches,
    part_share,
    part_slices,
    rank_slice,
)
from coupalign.data.samples import SampleReader
from coupalign.data.shards import is_remote, open_index, open_vocabulary
from coupalign.data.table import Rule, SampleTable, build_table, evaluation_table, sentence_donors
from coupalign.data.tokenizer import Tokenizer
from coupalign.data.workers import require_shared_memory
from coupalign.distributed.world import World
from coupalign.errors import InputError

log = logging.getLogger(__name__)


def open_tokenizer(config: DataConfig) -> Tokenizer:
    """Open `data.tokenizer`, or the vocabulary that was packed with the first training source.

    Raises:
        InputError: the configuration names neither, or the tokenizer cannot be read.
    """
    if config.tokenizer is not None:
        return Tokenizer.open(config.tokenizer)

    sources = config.train or config.evaluate
    if not sources:
        raise InputError(
            "there is no vocabulary: data.tokenizer and data.train are both empty. Set one of them"
        )
    return Tokenizer.open(open_vocabulary(open_index(sources[0].index), config.cache_dir))


def build_train_loader(
    config: DataConfig,
    *,
    seed: int,
    global_batch: int,
    max_micro_batch: int | None,
    world: World,
    tokenizer: Tokenizer,
) -> TrainLoader:
    """Build the loader of this rank's endless training batches.

    Args:
        seed: of the order, the sentences drawn and the augmentation.
        global_batch: samples per optimizer step, over all ranks.
        max_micro_batch: the most samples per forward pass on this rank. None: no limit.

    Raises:
        InputError: the ranks or the canonical nodes cannot share `global_batch` evenly, there are
            fewer samples than canonical nodes, a source is empty or cannot be opened, or
            photographs to be scored are among those to train on.
    """
    if not config.train:
        raise InputError("data.train is empty: name at least one source to train on")

    # Refuse a batch that cannot be shared before anything is opened.
    positions = rank_slice(global_batch, world)
    part_share(global_batch, config.canonical_nodes, world.size)

    # Which samples there are.
    indexes = _open_indexes(config.train)
    table = build_table(config.train, indexes, config.unit)
    table, leaks = apply_leak_policy(config, table, indexes, _open_indexes(config.evaluate))

    # In which order this rank reads them.
    parts_read = len(part_slices(global_batch, config.canonical_nodes, positions))
    _warn_of_small_cache(config, table, parts_read)
    layout = ShardLayout.from_samples(table.shard)
    orders = EpochOrders(layout, seed, config.shuffle_window, config.canonical_nodes)
    accumulation, micro_batch = micro_batches(global_batch, max_micro_batch, world.size)
    require_shared_memory(train_bytes(config, micro_batch), config.workers)
    keys = MicroBatchKeys(
        orders, global_batch=global_batch, positions=positions, accumulation=accumulation
    )

    # Leaving samples out changes the order, so their number goes into the fingerprint.
    unit = f"{config.unit}, {len(table)}" if config.leaks == "exclude" else config.unit
    return TrainLoader(
        TrainSamples(SampleReader(config, table, tokenizer), seed),
        keys,
        config,
        fingerprint=_fingerprint(config.train, indexes, unit),
        trained_on=TrainedOn.from_table(table, config.leaks),
        leaks=leaks,
    )


def build_eval_loader(
    config: DataConfig,
    sources: Sequence[Source],
    *,
    batch: int,
    world: World,
    tokenizer: Tokenizer,
    limit: int | None = None,
    shuffle_sentences: bool = False,
    images: bool = False,
    rules: Sequence[Rule] = ("each",),
) -> EvalLoader:
    """Build the loader of this rank's evaluation batches: each text of `sources` once.

    The samples are cut into batches first, whatever the number of ranks. Then rank r of R takes the
    batches r, r + R, … So a sample has the same neighbors in its batch on any number of ranks.
    Sentences about one photograph are neighbors, so most of them share one decoding.

    Every rank yields the same number of batches, because a sharded forward pass is collective. A
    rank that has run out gets a spare batch, see `Batch.spare`. An unreadable sample always ends
    the evaluation.

    Args:
        batch: samples per batch.
        limit: the most samples to take of each rule, evenly spaced and renumbered. None: all.
        shuffle_sentences: the language-blind control: give each sample the sentence of another one.
        images: also hand out each photograph at its original size.
        rules: which sentences of a ref to read, see `evaluation_table`.

    Raises:
        InputError: a source is empty or cannot be opened.
    """
    assert 0 <= world.rank < world.size and batch >= 1
    if not sources:
        raise InputError("there is nothing to evaluate: name at least one source in data.evaluate")

    indexes = _open_indexes(sources)
    table, members = evaluation_table(sources, indexes, rules, limit)
    donors = sentence_donors(table) if shuffle_sentences else None
    batches, spare = eval_batches(len(table), batch, world)
    largest = max((len(numbers) for numbers in batches), default=0)
    require_shared_memory(evaluation_bytes(config, largest), min(config.workers, len(batches)))

    return EvalLoader(
        EvalSamples(SampleReader(config, table, tokenizer), donors, images),
        batches,
        config,
        fingerprint=_fingerprint(sources, indexes, "sentence"),
        members=members,
        spare=spare,
    )


def train_bytes(config: DataConfig, samples: int) -> int:
    """The bytes of a training batch in shared memory: photographs and masks."""
    return 4 * config.image_size**2 * samples


def evaluation_bytes(config: DataConfig, samples: int) -> int:
    """The bytes of an evaluation batch in shared memory: photographs."""
    return 3 * config.image_size**2 * samples


def _open_indexes(sources: Sequence[Source]) -> list[ShardIndex]:
    """Open the index of each source; sources that share an index share the object."""
    opened: dict[str, ShardIndex] = {}
    indexes = []
    for source in sources:
        if source.index not in opened:
            opened[source.index] = open_index(source.index)
        indexes.append(opened[source.index])
    return indexes


def _fingerprint(sources: Sequence[Source], indexes: Sequence[ShardIndex], unit: str) -> str:
    """Hash (SHA-256) what decides which samples there are, and their bytes, but not their path."""
    selections = [
        [index.fingerprint, source.dataset, source.split_by, source.split]
        for source, index in zip(sources, indexes)
    ]
    return hashlib.sha256(json.dumps([unit, selections]).encode()).hexdigest()


def _warn_of_small_cache(config: DataConfig, table: SampleTable, parts_read: int) -> None:
    """Warn if the shard cache cannot hold the shuffle windows that this rank reads at a time.

    Args:
        parts_read: how many canonical nodes' parts this rank reads, each in a window of its own.
    """
    sizes = []
    for index in table.indexes:
        if is_remote(index.location):
            sizes += [shard.bytes for shard in index.shards]

    # A part has at most this many shards: an even share, plus one that a cut divides.
    shards_per_part = -(-len(sizes) // config.canonical_nodes) + 1
    shards = min(config.shuffle_window, shards_per_part) * parts_read
    needed = sum(sorted(sizes)[-shards:])

    if needed > config.cache_gb * 1e9:
        log.warning(
            "data.cache_gb=%g is less than the %.3g GB of the shuffle windows that a process reads "
            "at a time: shards will be fetched again and again. Raise it, or lower "
            "data.shuffle_window=%d",
            config.cache_gb,
            needed / 1e9,
            config.shuffle_window,
        )


def eval_batches(samples: int, batch: int, world: World) -> tuple[list[list[int]], int]:
    """Deal the samples to ranks, batch by batch.

    Returns:
        the sample numbers of each batch of this rank, as many batches on every rank; and how many
        of the last ones are spare. Each sample is in exactly one batch that is not spare.
    """
    batches = []
    for first in range(0, samples, batch):
        batches.append(list(range(first, min(first + batch, samples))))
    own = batches[world.rank :: world.size]

    # A spare batch is one sample, of the last own batch because that is at hand.
    spare = -(-len(batches) // world.size) - len(own)
    filler = own[-1][-1:] if own else [0]
    return own + [filler] * spare, spare
