"""The table of samples: which sentence of which ref on which image each sample number stands for.

    table = build_table(config.train, indexes, "ref")                    training: one row per ref
    table, members = evaluation_table(sources, indexes, ("each",))       scoring, by sentence rule
    donors = sentence_donors(table)                                      the language-blind control

A table is built from the indexes alone; no shard is read. Its order is that of the sources, the
images of their index, the refs of an image and the sentences of a ref, so a sample number has the
same meaning on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from coupalign.addresses import hide_secret
from coupalign.config.schema import Source
from coupalign.data.index import ShardIndex
from coupalign.errors import InputError

Rule = Literal["each", "first", "concatenated"]
RULES: tuple[Rule, ...] = ("each", "first", "concatenated")

# In `SampleTable.sentence`, in place of the number of a sentence.
RANDOM = -1  # one of the ref's sentences, drawn again in each epoch
ALL = -2  # all of the ref's sentences, joined with a space

MAX_LISTED = 20  # splits in a message
_CONTROL_SEED = 77  # of the language-blind control, the same in every run


@dataclass(frozen=True, kw_only=True)
class SampleTable:
    """The samples, column by column: int64 [n] each.

    Attributes:
        indexes: the indexes that the samples come from, each once.
        index: number of the sample's index, in `indexes`.
        image: number of its image, in that index.
        ref: number of its ref, on that image.
        sentence: number of its sentence, in that ref; or `RANDOM` or `ALL`.
        shard: number of its shard, counted over all indexes.
    """

    indexes: tuple[ShardIndex, ...]
    index: np.ndarray
    image: np.ndarray
    ref: np.ndarray
    sentence: np.ndarray
    shard: np.ndarray

    def __len__(self) -> int:
        return len(self.index)

    def take(self, numbers: np.ndarray) -> SampleTable:
        """Return the table of some of the samples, renumbered from 0."""
        return replace(
            self,
            index=self.index[numbers],
            image=self.image[numbers],
            ref=self.ref[numbers],
            sentence=self.sentence[numbers],
            shard=self.shard[numbers],
        )

    @property
    def image_ids(self) -> np.ndarray:
        """The image id of each sample, int64 [n]."""
        image_ids = np.empty(len(self), np.int64)
        for number, (index, image) in enumerate(zip(self.index, self.image)):
            image_ids[number] = self.indexes[index].images[image].image_id
        return image_ids

    def label(self, number: int) -> str:
        """Name a sample without reading it: "<set>/<ref_id>"."""
        image = self.indexes[self.index[number]].images[self.image[number]]
        ref = image.refs[self.ref[number]]
        return f"{ref.set}/{ref.ref_id}"


def build_table(
    sources: Sequence[Source],
    indexes: Sequence[ShardIndex],
    unit: Literal["ref", "sentence", "sentence and all"],
) -> SampleTable:
    """List all samples of `sources`, one source after another.

    Args:
        indexes: the opened index of each source.
        unit: what one sample is. "ref": a ref with a random sentence. "sentence": each sentence.
            "sentence and all": each sentence of a ref, then all of them joined.

    Raises:
        InputError: a source has no sample. The message lists what its index holds.
    """
    distinct: list[ShardIndex] = []
    parts: list[np.ndarray] = []
    for source, index in zip(sources, indexes, strict=True):
        if index not in distinct:
            distinct.append(index)
        index_no = distinct.index(index)
        first_shard = sum(len(earlier.shards) for earlier in distinct[:index_no])

        refs = []
        for image_no, image in enumerate(index.images):
            shard = first_shard + image.shard
            for ref_no, ref in enumerate(image.refs):
                if matches_source(source, ref.set, ref.split):
                    refs.append((index_no, image_no, ref_no, ref.sentences, shard))

        rows = _rows_of_refs(np.array(refs, np.int64).reshape(-1, 5), unit)
        if not len(rows):
            raise InputError(_no_sample_message(source, index))
        parts.append(rows)

    columns = np.ascontiguousarray(np.concatenate(parts or [np.empty((0, 5), np.int64)]).T)
    return SampleTable(
        indexes=tuple(distinct),
        index=columns[0],
        image=columns[1],
        ref=columns[2],
        sentence=columns[3],
        shard=columns[4],
    )


def matches_source(source: Source, set_name: str, split: str) -> bool:
    """Return whether `source` selects a split of a set; a set's name is like "refcoco/unc"."""
    dataset, _, split_by = set_name.partition("/")
    return (
        split == source.split
        and source.dataset in (None, dataset)
        and source.split_by in (None, split_by)
    )


def evaluation_table(
    sources: Sequence[Source],
    indexes: Sequence[ShardIndex],
    rules: Sequence[Rule],
    limit: int | None = None,
) -> tuple[SampleTable, dict[Rule, np.ndarray]]:
    """List the samples that the sentence rules ask for, each of them once.

    The rules are: each (every sentence of every ref), first (the first sentence of every ref) and
    concatenated (all sentences of a ref, joined with a space, as one text). The samples of "first"
    are among those of "each", unless a limit thins out both.

    Args:
        limit: the most samples to take of each rule, evenly spaced. None: all.

    Returns:
        the table, and for each rule the numbers of its samples in the table.

    Raises:
        InputError: a source has no sample.
    """
    table = build_table(sources, indexes, "sentence and all")
    follows_rule = {
        "each": table.sentence >= 0,
        "first": table.sentence == 0,
        "concatenated": table.sentence == ALL,
    }

    chosen: dict[Rule, np.ndarray] = {}
    for rule in rules:
        numbers = np.flatnonzero(follows_rule[rule])
        chosen[rule] = numbers[evenly_spaced(len(numbers), limit)]

    # Keep what at least one rule asks for, and renumber.
    used = np.unique(np.concatenate(list(chosen.values())))
    members = {rule: np.searchsorted(used, numbers) for rule, numbers in chosen.items()}
    return table.take(used), members


def evenly_spaced(samples: int, limit: int | None) -> np.ndarray:
    """Choose at most `limit` evenly spaced numbers below `samples`; int64. None: all of them."""
    count = min(samples, limit or samples)
    return np.arange(count) * samples // count


def sentence_donors(table: SampleTable) -> np.ndarray:
    """Choose, for the language-blind control, whose sentence each sample gets; int64 [n].

    The choice is a permutation without fixed points, and the same in every run. The donor belongs
    to another image wherever possible. (If one image has more than half of all samples, as few as
    possible get a sentence of the same image.) Single sentences are exchanged among themselves, and
    joined sentences among themselves.

    Raises:
        InputError: there is only one sample of a kind.
    """
    donors = np.empty(len(table), np.int64)
    for joined in (False, True):
        numbers = np.flatnonzero((table.sentence == ALL) == joined)
        if len(numbers):
            image_ids = table.take(numbers).image_ids
            donors[numbers] = numbers[_derangement(image_ids)]
    return donors


def _derangement(image_ids: np.ndarray) -> np.ndarray:
    """Permute samples without fixed points, to another image where possible; int64 [n] -> [n]."""
    samples = len(image_ids)
    if samples < 2:
        raise InputError(
            "the language-blind control exchanges sentences between samples: it needs two or more"
        )

    # Put the images, and the samples of an image, into a random order. The samples of an image
    # stay neighbors.
    generator = np.random.default_rng(np.random.SeedSequence([_CONTROL_SEED, samples]))
    _, group, sizes = np.unique(image_ids, return_inverse=True, return_counts=True)
    sample_keys = generator.permutation(samples)
    image_keys = generator.permutation(len(sizes))
    order = np.lexsort((sample_keys, image_keys[group]))

    # A shift by the size of the largest group leads out of every group.
    shift = int(sizes.max()) if sizes.max() < samples else 1
    donors = np.empty(samples, np.int64)
    donors[order] = np.roll(order, -shift)
    return donors


def _rows_of_refs(refs: np.ndarray, unit: str) -> np.ndarray:
    """List the samples of some refs; int64 [refs, 5] -> [samples, 5].

    The fourth column holds the number of sentences of a ref, and then the number of a sample's
    sentence as in `SampleTable.sentence`. A ref without a sentence has no sample.
    """
    refs = refs[refs[:, 3] > 0]
    if unit == "ref":
        rows = refs.copy()
        rows[:, 3] = RANDOM
        return rows

    # Each sentence of a ref is a row, and one more row may be for all of them.
    samples = refs[:, 3] + (unit == "sentence and all")
    rows = np.repeat(refs, samples, axis=0)
    first = np.repeat(np.cumsum(samples) - samples, samples)
    number = np.arange(len(rows)) - first
    rows[:, 3] = np.where(number < rows[:, 3], number, ALL)
    return rows


def _no_sample_message(source: Source, index: ShardIndex) -> str:
    asked_for = f"{source.dataset or '*'}/{source.split_by or '*'}"
    held = [
        f"{name} {split} ({counts['refs']} refs, {counts['sentences']} sentences)"
        for name, splits in sorted(index.counts.items())
        for split, counts in splits.items()
    ]
    if len(held) > MAX_LISTED:
        held[MAX_LISTED:] = [f"and {len(held) - MAX_LISTED} more splits"]
    return (
        f"{hide_secret(index.location)} has no sample of {asked_for}, split {source.split!r}; "
        f"it holds: {'; '.join(held) or 'nothing'}"
    )
