"""Which sentence of which ref of which image each sample number stands for, over a mixture of sources; and how it is read."""
from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from coupalign.config.schema import DataConfig, Source
from coupalign.data import masks, transforms
from coupalign.data.batch import Batch, Frame, SampleInfo
from coupalign.data.index import ImageEntry, ShardIndex
from coupalign.data.shards import ShardStore
from coupalign.data.tokenizer import Tokenizer
from coupalign.errors import InputError

Sample = tuple[np.ndarray, np.ndarray | None, SampleInfo]      # image [S, S, 3], target [S, S] in training, the rest
Record = dict[str, Any]                                        # a ref as packed, with image_id, height, width of its image

_TEXT = {"cleaned": "sent", "raw": "raw"}      # what the configuration calls it -> its field in the record
_CONTROL = 77      # seeds the permutation of the language-blind control, the same in every run


class BadSample(Exception):
    """A sample that cannot be read; the message names shard, key, image and what is wrong."""


@dataclass(frozen=True)
class SampleTable:
    """int64 [n] each: the sample's index, its image in that index, its ref in that image, its sentence in that ref.

    A sentence of −1 stands for a random one. `shard` numbers the shards over all indexes.
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
        return replace(self, **{name: getattr(self, name)[numbers] for name in ("index", "image", "ref", "sentence", "shard")})

    @property
    def image_ids(self) -> np.ndarray:
        """int64 [n]"""
        return np.array([self.indexes[i].images[m].image_id for i, m in zip(self.index, self.image)], np.int64)

    def label(self, number: int) -> str:
        """What is known of a sample without reading it: "<set>/<ref_id>"."""
        entry = self.indexes[self.index[number]].images[self.image[number]].refs[self.ref[number]]
        return f"{entry.set}/{entry.ref_id}"


def build_table(sources: Sequence[Source], indexes: Sequence[ShardIndex], unit: Literal["ref", "sentence"]) -> SampleTable:
    """All samples of `sources`, one after another; `indexes` are the opened `Source.index`, one a source.

    Args:
        unit: a sample is a ref with a random sentence, or each sentence.

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
                if _wanted(source, ref.set, ref.split):
                    for sentence in (range(ref.sentences) if unit == "sentence" else (-1,) if ref.sentences else ()):
                        rows.append((place, image_no, ref_no, sentence, first_shard + image.shard))
        if len(rows) == before:
            raise InputError(_nothing_found(source, index))
    columns = np.array(rows, np.int64).reshape(-1, 5).T
    return SampleTable(tuple(kept), *np.ascontiguousarray(columns))


def _wanted(source: Source, set_name: str, split: str) -> bool:
    dataset, _, split_by = set_name.partition("/")
    return split == source.split and source.dataset in (None, dataset) and source.split_by in (None, split_by)


def _nothing_found(source: Source, index: ShardIndex) -> str:
    wanted = f"{source.dataset or '*'}/{source.split_by or '*'}"
    held = [f"{name} {split} ({counts['refs']} refs, {counts['sentences']} sentences)"
            for name, splits in sorted(index.counts.items()) for split, counts in splits.items()]
    return f"{index.location} has no sample of {wanted}, split {source.split!r}; it holds: {'; '.join(held) or 'nothing'}"


def spread(samples: int, limit: int | None) -> np.ndarray:
    """Evenly spaced numbers below `samples`, `limit` of them at most; int64."""
    count = min(samples, limit or samples)
    return np.arange(count) * samples // count


def other_sentences(table: SampleTable) -> np.ndarray:
    """For each sample the number of another one, whose sentence it is given in the language-blind control.

    A permutation without fixed points, always the same; the other sample belongs to another image wherever that is
    possible (to as few of the same image as there must be, where one image has more than half of all samples).
    """
    count = len(table)
    if count < 2:
        raise InputError("the language-blind control exchanges sentences between samples: it needs two or more")
    generator = np.random.default_rng(np.random.SeedSequence([_CONTROL, count]))
    _, group, sizes = np.unique(table.image_ids, return_inverse=True, return_counts=True)
    order = np.lexsort((generator.permutation(count), generator.permutation(len(sizes))[group]))
    # samples of an image stand side by side: a shift by the largest such group leads out of every group
    shift = int(sizes.max()) if sizes.max() < count else 1
    other = np.empty(count, np.int64)
    other[order] = np.roll(order, -shift)
    return other


# ---------------------------------------------------------------------------------------------------------- reading


class SampleReader:
    """Turns a sample's number into arrays; can be pickled and forked.

    Its methods raise BadSample where the sample cannot be read, InputError where its shard cannot be opened at all.
    """

    def __init__(self, config: DataConfig, table: SampleTable, tokenizer: Tokenizer) -> None:
        self.config = config
        self.table = table
        self._tokenizer = tokenizer
        self._stores = [ShardStore(index, config.cache_dir, config.cache_gb * 1e9) for index in table.indexes]

    def train_sample(self, seed: int, epoch: int, number: int) -> Sample:
        """A sample with its random changes, which depend on seed, epoch and number only."""
        dice = np.random.default_rng(np.random.SeedSequence([seed, epoch, number]))
        ref, chosen = self._record(number), int(self.table.sentence[number])
        drawn, coin = int(dice.integers(len(ref["sentences"]))), dice.random()
        chosen = drawn if chosen < 0 else chosen
        name, sentence = self._words(number, ref, chosen)
        mirror = transforms.mirror_sentence(sentence) if coin < self.config.augment.flip else None
        mirrored, sentence = mirror is not None, mirror or sentence
        jitter = transforms.draw_jitter(sentence, self.config.augment.color_jitter, dice)
        frame = self._frame(ref)
        pixels = transforms.image_to_square(self._picture(number, ref), frame, mirrored, jitter)
        target = transforms.mask_to_square(self._mask(number, ref), frame, mirrored)
        return pixels, target, SampleInfo(number, name, sentence, frame, ref["image_id"], ref["category"])

    def eval_sample(self, number: int, other: int | None, picture: bool) -> Sample:
        """A sample as it is, with its truth; with the sentence of the sample `other` where that is given."""
        ref = self._record(number)
        name, sentence = self._words(number, ref, int(self.table.sentence[number]))
        if other is not None:
            _, sentence = self._words(other, self._record(other), int(self.table.sentence[other]))
        image, frame = self._picture(number, ref), self._frame(ref)
        info = SampleInfo(number, name, sentence, frame, ref["image_id"], ref["category"],
                          truth=self._mask(number, ref), image=np.asarray(image) if picture else None)
        return transforms.image_to_square(image, frame), None, info

    def name(self, number: int) -> str:
        """The full name of an evaluation sample."""
        return self._words(number, self._record(number), int(self.table.sentence[number]))[0]

    def collate(self, samples: Sequence[Sample], bad: Sequence[str] = ()) -> Batch:
        """Stack samples and number their words."""
        images, targets, infos = zip(*samples)
        words, word_mask, cut = self._tokenizer.encode([info.sentence for info in infos], self.config.max_tokens)
        image = np.empty((len(samples), 3, self.config.image_size, self.config.image_size), np.uint8)
        for row, pixels in zip(image, images):
            row[:] = pixels.transpose(2, 0, 1)
        target = None if targets[0] is None else torch.from_numpy(np.stack(targets))
        infos = tuple(replace(info, cut=True) if too_long else info for info, too_long in zip(infos, cut))
        return Batch(torch.from_numpy(image), words, word_mask, target, infos, tuple(bad))

    def _record(self, number: int) -> Record:
        store, image = self._place(number)
        with self._reading(number, "json"):
            record = json.loads(store.read(image.shard, *image.json))
            ref, expected = record["refs"][self.table.ref[number]], image.refs[self.table.ref[number]]
            found = record["image_id"], ref["ref_id"], len(ref["sentences"])
            if found != (image.image_id, expected.ref_id, expected.sentences):
                raise ValueError("the record is not the one that its index describes")
            place = {"image_id": image.image_id, "height": int(record["height"]), "width": int(record["width"])}
            return {**ref, **place, "category": str(ref["category"])}

    def _words(self, number: int, ref: Record, chosen: int) -> tuple[str, str]:
        """The full name of a sample and its sentence."""
        with self._reading(number, "json"):
            sentence = ref["sentences"][chosen]
            return f"{self.table.label(number)}/{sentence['sent_id']}", sentence[_TEXT[self.config.sentence]]

    def _picture(self, number: int, ref: Record) -> Image.Image:
        store, image = self._place(number)
        with self._reading(number, "jpg"):
            picture = transforms.decode_image(store.read(image.shard, *image.jpg))
            if picture.size != (ref["width"], ref["height"]):
                raise ValueError(f"the picture is {picture.size}, its annotation says {(ref['width'], ref['height'])}")
            return picture

    def _mask(self, number: int, ref: Record) -> np.ndarray:
        with self._reading(number, "json"):
            mask = masks.decode(ref["rle"])
            if mask.shape != (ref["height"], ref["width"]):
                raise ValueError(f"the mask is {mask.shape}, its picture is {(ref['height'], ref['width'])}")
            return mask

    def _frame(self, ref: Record) -> Frame:
        return transforms.frame_of(ref["height"], ref["width"], self.config.image_size, self.config.resize)

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
            reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__} {error}"
            raise BadSample(f"{self.table.label(number)}: {image.image_id:012d}.{part} (image {image.image_id}) in "
                            f"{store.address(image.shard)}: {reason}") from error
