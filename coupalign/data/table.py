"""The table of samples: which refs and sentences of which indexes, in a fixed order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from coupalign.config.schema import Source
from coupalign.data.index import ShardIndex
from coupalign.errors import InputError

ALL = -2  # in place of a sentence's number: all of the ref, joined with a space


Rule = Literal["each", "first", "concatenated"]


RULES: tuple[Rule, ...] = ("each", "first", "concatenated")


_CONTROL = 77  # seeds the permutation of the language-blind control, the same in every run


@dataclass(frozen=True)
class SampleTable:
    """int64 [n] each: the sample's index, its image in that index, its ref in that image, its sentence in that ref.

    A sentence of −1 stands for a random one, `ALL` for all of them joined. `shard` numbers the shards over all indexes.
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
        """The table of some of the samples, numbered anew."""
        return replace(
            self,
            **{
                name: getattr(self, name)[numbers]
                for name in ("index", "image", "ref", "sentence", "shard")
            },
        )

    @property
    def image_ids(self) -> np.ndarray:
        """int64 [n]"""
        return np.array(
            [self.indexes[i].images[m].image_id for i, m in zip(self.index, self.image)], np.int64
        )

    def label(self, number: int) -> str:
        """What is known of a sample without reading it: "<set>/<ref_id>"."""
        entry = self.indexes[self.index[number]].images[self.image[number]].refs[self.ref[number]]
        return f"{entry.set}/{entry.ref_id}"


def build_table(
    sources: Sequence[Source],
    indexes: Sequence[ShardIndex],
    unit: Literal["ref", "sentence", "sentence and all"],
) -> SampleTable:
    """All samples of `sources`, one after another; `indexes` are the opened `Source.index`, one a source.

    Args:
        unit: a sample is a ref with a random sentence, or each sentence, or each sentence and then all of them joined.

    Raises:
        InputError: a source has no sample; the message lists what its index holds.
    """
    kept: list[ShardIndex] = []
    rows: list[tuple[int, int, int, int, int]] = []
    for source, index in zip(sources, indexes, strict=True):
        if index not in kept:
            kept.append(index)
        place = kept.index(index)
        first_shard = sum(len(other.shards) for other in kept[:place])
        before = len(rows)
        for image_no, image in enumerate(index.images):
            for ref_no, ref in enumerate(image.refs):
                if wanted(source, ref.set, ref.split):
                    rows += (
                        (place, image_no, ref_no, read, first_shard + image.shard)
                        for read in _readings(ref.sentences, unit)
                    )
        if len(rows) == before:
            raise InputError(_nothing_found(source, index))
    columns = np.array(rows, np.int64).reshape(-1, 5).T
    return SampleTable(tuple(kept), *np.ascontiguousarray(columns))


def _readings(sentences: int, unit: str) -> list[int]:
    """What is read of a ref with so many sentences, a number for each of its samples; see `SampleTable`."""
    if not sentences:
        return []
    if unit == "ref":
        return [-1]
    return [*range(sentences)] + ([ALL] if unit == "sentence and all" else [])


def wanted(source: Source, set_name: str, split: str) -> bool:
    """Whether `source` asks for a split of a set, such as "refcoco/unc"."""
    dataset, _, split_by = set_name.partition("/")
    return (
        split == source.split
        and source.dataset in (None, dataset)
        and source.split_by in (None, split_by)
    )


def _nothing_found(source: Source, index: ShardIndex) -> str:
    wanted = f"{source.dataset or '*'}/{source.split_by or '*'}"
    held = [
        f"{name} {split} ({counts['refs']} refs, {counts['sentences']} sentences)"
        for name, splits in sorted(index.counts.items())
        for split, counts in splits.items()
    ]
    return f"{index.location} has no sample of {wanted}, split {source.split!r}; it holds: {'; '.join(held) or 'nothing'}"


def evaluation_table(
    sources: Sequence[Source],
    indexes: Sequence[ShardIndex],
    rules: Sequence[Rule],
    limit: int | None = None,
) -> tuple[SampleTable, dict[Rule, np.ndarray]]:
    """The samples that the sentence rules ask for, each once, and by rule the numbers of its own samples among them.

    each: every sentence of every ref. first: the first sentence of every ref. concatenated: all sentences of a ref, joined with
    a space, as one text. What "first" asks for is among the samples of "each", unless a limit thins both out.

    Args:
        limit: evenly spaced samples of each rule only.

    Raises:
        InputError: a source has no sample.
    """
    table = build_table(sources, indexes, "sentence and all")
    followed = {
        "each": table.sentence >= 0,
        "first": table.sentence == 0,
        "concatenated": table.sentence == ALL,
    }
    chosen = {rule: np.flatnonzero(followed[rule]) for rule in rules}
    chosen = {rule: numbers[spread(len(numbers), limit)] for rule, numbers in chosen.items()}
    used = np.unique(np.concatenate(list(chosen.values())))
    return table.take(used), {
        rule: np.searchsorted(used, numbers) for rule, numbers in chosen.items()
    }


def spread(samples: int, limit: int | None) -> np.ndarray:
    """Evenly spaced numbers below `samples`, `limit` of them at most; int64."""
    count = min(samples, limit or samples)
    return np.arange(count) * samples // count


def other_sentences(table: SampleTable) -> np.ndarray:
    """For each sample the number of another one, whose sentence it is given in the language-blind control.

    A permutation without fixed points, always the same; the other sample belongs to another image wherever that is
    possible (to as few of the same image as there must be, where one image has more than half of all samples). Single
    sentences are exchanged among themselves, and joined ones among themselves.
    """
    other = np.empty(len(table), np.int64)
    for joined in (False, True):
        numbers = np.flatnonzero((table.sentence == ALL) == joined)
        if len(numbers):
            other[numbers] = numbers[_exchange(table.take(numbers).image_ids)]
    return other


def _exchange(images: np.ndarray) -> np.ndarray:
    """A permutation of samples on these images [n] that has no fixed points and leads to another image where it can."""
    count = len(images)
    if count < 2:
        raise InputError(
            "the language-blind control exchanges sentences between samples: it needs two or more"
        )
    generator = np.random.default_rng(np.random.SeedSequence([_CONTROL, count]))
    _, group, sizes = np.unique(images, return_inverse=True, return_counts=True)
    order = np.lexsort((generator.permutation(count), generator.permutation(len(sizes))[group]))
    # samples of an image stand side by side: a shift by the largest such group leads out of every group
    shift = int(sizes.max()) if sizes.max() < count else 1
    other = np.empty(count, np.int64)
    other[order] = np.roll(order, -shift)
    return other
