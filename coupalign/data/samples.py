"""Which sentence of which ref of which image each sample number stands for, over a mixture of sources; and how it is read."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from coupalign.config.schema import DataConfig
from coupalign.data import masks, transforms
from coupalign.data.batch import Batch, Frame, SampleInfo
from coupalign.data.index import ImageEntry
from coupalign.data.shards import ShardStore
from coupalign.data.table import ALL, SampleTable
from coupalign.data.tokenizer import Tokenizer
from coupalign.errors import InputError

Key = tuple[int, int]  # epoch, sample number
Record = dict[str, Any]  # a ref as packed, with image_id, height, width of its image

_TEXT = {
    "cleaned": "sent",
    "raw": "raw",
}  # what the configuration calls it -> its field in the record


class BadSample(Exception):
    """A sample that cannot be read; the message names shard, key, image and what is wrong."""


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
