"""Build the tokenizer and the loaders that a configuration describes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from coupalign.config.schema import DataConfig, Source
from coupalign.data.index import ShardIndex
from coupalign.data.leak import guard, trained_on
from coupalign.data.loader import (
    EvalLoader,
    TrainLoader,
    _EvalSamples,
    _MicroBatchKeys,
    _TrainSamples,
    log,
)
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
from coupalign.data.table import Rule, SampleTable, build_table, evaluation_table, other_sentences
from coupalign.data.tokenizer import Tokenizer
from coupalign.errors import InputError


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
