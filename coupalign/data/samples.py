"""Which sentence of which ref of which image each sample number stands for, over a mixture of sources; and how it is read."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from coupalign.config.schema import DataConfig, Source
from coupalign.data import masks, transforms
from coupalign.data.batch import Batch, Frame, SampleInfo
from coupalign.data.index import ImageEntry, ShardIndex
from coupalign.data.shards import ShardStore
from coupalign.data.tokenizer import Tokenizer
from coupalign.errors import InputError

Key = tuple[int, int]  # epoch, sample number
Record = dict[str, Any]  # a ref as packed, with image_id, height, width of its image

_TEXT = {
    "cleaned": "sent",
    "raw": "raw",
}  # what the configuration calls it -> its field in the record
ALL = -2  # in place of a sentence's number: all of the ref, joined with a space
Rule = Literal["each", "first", "concatenated"]
RULES: tuple[Rule, ...] = ("each", "first", "concatenated")
_CONTROL = 77  # seeds the permutation of the language-blind control, the same in every run


class BadSample(Exception):
    """A sample that cannot be read; the message names shard, key, image and what is wrong."""


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


# ---------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Canvas:
    """What the samples of a batch are written into, each in its row: image uint8 [B, S, S, 3], target bool [B, S, S] in training."""

    image: Tensor
    target: Tensor | None


@dataclass(frozen=True)
class _Draft:
    """A training sample without its pixels: what it says, and what the dice decided."""

    info: SampleInfo
    ref: Record
    mirrored: bool
    jitter: tuple[float, float, float] | None


def _room(*shape: int, dtype: torch.dtype) -> Tensor:
    """Memory without values; in a worker process it is shared with the main one, so that handing it over copies nothing."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=dtype)
    shared = torch.UntypedStorage._new_shared(
        math.prod(shape) * dtype.itemsize
    )  # as torch's own default_collate does
    return torch.empty(0, dtype=dtype).set_(shared, 0, shape)


class SampleReader:
    """Turns a sample's number into arrays; can be pickled and forked.

    Its methods raise BadSample where the sample cannot be read, InputError where its shard cannot be opened at all.
    """

    def __init__(self, config: DataConfig, table: SampleTable, tokenizer: Tokenizer) -> None:
        self.config = config
        self.table = table
        self._tokenizer = tokenizer
        self._stores = [
            ShardStore(index, config.cache_dir, config.cache_gb * 1e9) for index in table.indexes
        ]
        self._latest: dict[
            str, tuple[tuple[int, ...], Any]
        ] = {}  # of the evaluation sample before, see `_shared`

    def train_samples(
        self, seed: int, keys: Sequence[Key], image: np.ndarray, target: np.ndarray
    ) -> list[SampleInfo]:
        """Write the samples of the keys (epoch, number) into `image`, uint8 [n, S, S, 3], and `target`, bool [n, S, S].

        The random changes of a sample depend on seed, epoch and number only. A sample alone would drive the code of each step out of
        the processor's caches before the next one needs it; so the samples go from step to step side by side.
        """
        stored = [self._read(number) for _, number in keys]
        dice = [np.random.default_rng(np.random.SeedSequence([seed, *key])) for key in keys]
        drafts = [
            self._draft(number, ref, rolled)
            for (_, number), (ref, _), rolled in zip(keys, stored, dice)
        ]
        for draft, (_, jpg), square in zip(drafts, stored, image):
            with self._reading(draft.info.number, "jpg"):
                pixels = transforms.decode_image(jpg, draft.info.frame)
                transforms.image_to_square(
                    pixels, draft.info.frame, draft.mirrored, draft.jitter, square
                )
        for draft, square in zip(drafts, target):
            with self._reading(draft.info.number, "json"):
                transforms.rle_to_square(draft.ref["rle"], draft.info.frame, draft.mirrored, square)
        return [draft.info for draft in drafts]

    def _read(self, number: int) -> tuple[Record, bytes]:
        """The record of a sample and its photograph as it is stored."""
        ref = self._record(number)
        with self._reading(number, "jpg"):
            return ref, self._stored(number)

    def _draft(self, number: int, ref: Record, dice: np.random.Generator) -> _Draft:
        """The sentence of a sample, if that is to be drawn, and its random changes."""
        chosen, drawn, coin = (
            int(self.table.sentence[number]),
            int(dice.integers(len(ref["sentences"]))),
            dice.random(),
        )
        name, sentence = self._words(number, ref, drawn if chosen < 0 else chosen)
        mirror = transforms.mirror_sentence(sentence) if coin < self.config.augment.flip else None
        mirrored, sentence = mirror is not None, mirror or sentence
        jitter = transforms.draw_jitter(sentence, self.config.augment.color_jitter, dice)
        info = SampleInfo(
            number,
            name,
            sentence,
            self._frame(ref),
            ref["image_id"],
            ref["category"],
            ref["same_class"],
        )
        return _Draft(info, ref, mirrored, jitter)

    def eval_sample(
        self, number: int, other: int | None, picture: bool, image: np.ndarray
    ) -> SampleInfo:
        """Write a sample as it is into `image`, uint8 [S, S, 3]; its truth, and its picture if asked for, are in what is returned.

        It has the sentence of the sample `other` where that is given.
        """
        ref = self._record(number)
        name, sentence = self._words(number, ref, int(self.table.sentence[number]))
        if other is not None:
            _, sentence = self._words(other, self._record(other), int(self.table.sentence[other]))
        frame, photograph = (
            self._frame(ref),
            (int(self.table.index[number]), int(self.table.image[number])),
        )
        with self._reading(number, "jpg"):
            pixels = self._shared(
                "pixels", photograph, lambda: transforms.decode_image(self._stored(number), frame)
            )
            image[:] = self._shared(
                "square", photograph, lambda: transforms.image_to_square(pixels, frame)
            )
            if picture and transforms.reduction(frame.height, frame.width, frame) > 1:
                pixels = self._shared(
                    "whole", photograph, lambda: transforms.decode_image(self._stored(number))
                )
        truth = self._shared(
            "truth", (*photograph, int(self.table.ref[number])), lambda: self._mask(number, ref)
        )
        return SampleInfo(
            number,
            name,
            sentence,
            frame,
            ref["image_id"],
            ref["category"],
            ref["same_class"],
            truth=truth,
            image=pixels if picture else None,
        )

    def words(self, number: int) -> tuple[str, str]:
        """The full name of an evaluation sample and its own sentence."""
        return self._words(number, self._record(number), int(self.table.sentence[number]))

    def stored(self, number: int) -> tuple[bytes, Record]:
        """The photograph of a sample as it is stored, and its record."""
        return self._stored(number), self._record(number)

    def canvas(self, samples: int, target: bool) -> Canvas:
        """Room for that many samples, with or without their targets."""
        size = self.config.image_size
        return Canvas(
            _room(samples, size, size, 3, dtype=torch.uint8),
            _room(samples, size, size, dtype=torch.bool) if target else None,
        )

    def collate(
        self, canvas: Canvas, infos: Sequence[SampleInfo], bad: Sequence[str] = ()
    ) -> Batch:
        """The batch of the samples that were written; their words are numbered."""
        words, word_mask, cut = self._tokenizer.encode(
            [info.sentence for info in infos], self.config.max_tokens
        )
        infos = tuple(
            replace(info, cut=True) if too_long else info for info, too_long in zip(infos, cut)
        )
        return Batch(
            canvas.image.permute(0, 3, 1, 2), words, word_mask, canvas.target, infos, tuple(bad)
        )

    def _shared(self, part: str, key: tuple[int, ...], make: Callable[[], Any]) -> Any:
        """What `make` gave for the same key just before, else what it gives now. In the order of scoring, sentences about a
        photograph stand side by side; nobody changes what they share."""
        if part not in self._latest or self._latest[part][0] != key:
            self._latest[part] = key, make()
        return self._latest[part][1]

    def _record(self, number: int) -> Record:
        store, image = self._place(number)
        with self._reading(number, "json"):
            record = json.loads(store.read(image.shard, *image.json))
            ref, expected = (
                record["refs"][self.table.ref[number]],
                image.refs[self.table.ref[number]],
            )
            found = record["image_id"], ref["ref_id"], len(ref["sentences"])
            if found != (image.image_id, expected.ref_id, expected.sentences):
                raise ValueError("the record is not the one that its index describes")
            place = {
                "image_id": image.image_id,
                "height": int(record["height"]),
                "width": int(record["width"]),
            }
            return {
                **ref,
                **place,
                "category": str(ref["category"]),
                "same_class": int(ref.get("same_class", -1)),
            }

    def _words(self, number: int, ref: Record, chosen: int) -> tuple[str, str]:
        """The full name of a sample and its sentence."""
        with self._reading(number, "json"):
            text = _TEXT[self.config.sentence]
            if chosen == ALL:
                return f"{self.table.label(number)}/all", " ".join(
                    sentence[text] for sentence in ref["sentences"]
                )
            sentence = ref["sentences"][chosen]
            return f"{self.table.label(number)}/{sentence['sent_id']}", sentence[text]

    def _stored(self, number: int) -> bytes:
        store, image = self._place(number)
        return store.read(image.shard, *image.jpg)

    def _mask(self, number: int, ref: Record) -> np.ndarray:
        with self._reading(number, "json"):
            mask = masks.decode(ref["rle"])
            if mask.shape != (ref["height"], ref["width"]):
                raise ValueError(
                    f"the mask is {mask.shape}, its picture is {(ref['height'], ref['width'])}"
                )
            return mask

    def _frame(self, ref: Record) -> Frame:
        return transforms.frame_of(
            ref["height"], ref["width"], self.config.image_size, self.config.resize
        )

    def _place(self, number: int) -> tuple[ShardStore, ImageEntry]:
        index = self.table.index[number]
        return self._stores[index], self.table.indexes[index].images[self.table.image[number]]

    @contextmanager
    def _reading(self, number: int, part: str) -> Iterator[None]:
        """Say of whatever is wrong inside where it lies."""
        try:
            yield
        except InputError:
            raise
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            store, image = self._place(number)
            reason = (
                str(error) if isinstance(error, ValueError) else f"{type(error).__name__} {error}"
            )
            raise BadSample(
                f"{self.table.label(number)}: {image.image_id:012d}.{part} (image {image.image_id}) in "
                f"{store.address(image.shard)}: {reason}"
            ) from error
