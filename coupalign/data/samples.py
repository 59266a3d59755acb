"""Read samples: from a number in the table to pixels, mask and sentence.

    reader = SampleReader(config, table, tokenizer)
    buffers = reader.allocate(samples=8, target=True)
    infos = reader.read_train_samples(seed, keys, buffers.image.numpy(), buffers.target.numpy())
    batch = reader.collate(buffers, infos)

A reader holds no state that results depend on, so any process may read any sample at any time.
"""

from __future__ import annotations

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
from coupalign.data.index import ImageEntry, check_bytes, sample_key
from coupalign.data.records import UNKNOWN, check_ref, read_record
from coupalign.data.shards import ShardStore
from coupalign.data.sides import mirror_sentence
from coupalign.data.table import ALL, RANDOM, SampleTable
from coupalign.data.tokenizer import Tokenizer
from coupalign.errors import InputError

Key = tuple[int, int]  # epoch, sample number
RefRecord = dict[str, Any]  # a ref as packed, with image_id, height and width of its image

# data.sentence -> the field of a packed sentence.
_TEXT_FIELD = {"cleaned": "sent", "raw": "raw"}


class BadSample(Exception):
    """A sample that cannot be read. The message names shard, file, image and what is wrong."""


@dataclass(frozen=True)
class BatchBuffers:
    """The memory of a batch. Each sample is written straight into its row.

    Attributes:
        image: uint8 [B, S, S, 3].
        target: bool [B, S, S]. None in evaluation.
    """

    image: Tensor
    target: Tensor | None


@dataclass(frozen=True)
class _Draft:
    """A training sample before its pixels are read: its text, and how to change the image."""

    info: SampleInfo
    record: RefRecord
    mirrored: bool
    jitter: transforms.Jitter | None


class SampleReader:
    """Reads samples by number. It can be pickled and forked.

    Its methods raise BadSample if a sample cannot be read, and InputError if its shard cannot be
    opened at all.
    """

    def __init__(self, config: DataConfig, table: SampleTable, tokenizer: Tokenizer) -> None:
        self.config = config
        self.table = table
        self._tokenizer = tokenizer
        self._stores = [
            ShardStore(index, config.cache_dir, config.cache_gb * 1e9) for index in table.indexes
        ]
        self._latest: dict[str, tuple[tuple[int, ...], Any]] = {}  # see `_reuse`

    def allocate(self, samples: int, *, target: bool) -> BatchBuffers:
        """Allocate the memory of a batch, with or without its targets."""
        size = self.config.image_size
        image = _allocate(samples, size, size, 3, dtype=torch.uint8)
        targets = _allocate(samples, size, size, dtype=torch.bool) if target else None
        return BatchBuffers(image, targets)

    def read_train_samples(
        self, seed: int, keys: Sequence[Key], image: np.ndarray, target: np.ndarray
    ) -> list[SampleInfo]:
        """Read, augment and write training samples.

        The augmentation of a sample depends on seed, epoch and sample number only.

        All samples pass through one stage before any of them enters the next. One at a time, the
        code of each stage would be evicted from the processor's caches before it is used again.

        Args:
            keys: (epoch, sample number) of each sample.
            image: uint8 [n, S, S, 3], written.
            target: bool [n, S, S], written.
        """
        # Read the stored bytes.
        stored = []
        for _, number in keys:
            record = self._read_record(number)
            with self._bad_sample_if_wrong(number, "jpg"):
                stored.append((record, self._read_jpeg(number)))

        # Draw the sentences and the augmentation.
        drafts = []
        for key, (record, _) in zip(keys, stored):
            generator = np.random.default_rng(np.random.SeedSequence([seed, *key]))
            drafts.append(self._draft(key[1], record, generator))

        # Decode and resize the images.
        for draft, (_, jpeg), square in zip(drafts, stored, image):
            frame = draft.info.frame
            with self._bad_sample_if_wrong(draft.info.number, "jpg"):
                pixels = transforms.decode_image(jpeg, frame)
                transforms.image_to_square(
                    pixels, frame, mirrored=draft.mirrored, jitter=draft.jitter, out=square
                )

        # Write the masks.
        for draft, square in zip(drafts, target):
            with self._bad_sample_if_wrong(draft.info.number, "json"):
                rle = draft.record["rle"]
                transforms.rle_to_square(rle, draft.info.frame, mirrored=draft.mirrored, out=square)

        return [draft.info for draft in drafts]

    def read_eval_sample(
        self, number: int, donor: int | None, *, with_image: bool, square: np.ndarray
    ) -> SampleInfo:
        """Read a sample without augmentation. The returned info has its truth.

        Args:
            donor: the sample whose sentence to use. None: the sample's own.
            with_image: also return the image at its original size.
            square: uint8 [S, S, 3], the model input, written.
        """
        record = self._read_record(number)
        name, sentence = self.read_name_and_sentence(number, record)
        if donor is not None:
            _, sentence = self.read_name_and_sentence(donor)

        frame = self._frame(record)
        image_key = (int(self.table.index[number]), int(self.table.image[number]))
        with self._bad_sample_if_wrong(number, "jpg"):
            pixels = self._reuse(
                "decoded for the frame",
                image_key,
                lambda: transforms.decode_image(self._read_jpeg(number), frame),
            )
            square[:] = self._reuse(
                "square", image_key, lambda: transforms.image_to_square(pixels, frame)
            )

            # A large image was decoded smaller than it is.
            if with_image and transforms.reduction(frame.height, frame.width, frame) > 1:
                pixels = self._reuse(
                    "original size",
                    image_key,
                    lambda: transforms.decode_image(self._read_jpeg(number)),
                )

        ref_key = (*image_key, int(self.table.ref[number]))
        truth = self._reuse("truth", ref_key, lambda: self._decode_mask(number, record))

        info = self._info(number, record, name, sentence)
        return replace(info, truth=truth, image=pixels if with_image else None)

    def read_name_and_sentence(
        self, number: int, record: RefRecord | None = None
    ) -> tuple[str, str]:
        """Read the full name and the sentence of an evaluation sample.

        Args:
            record: that of the sample, if it was read already.
        """
        record = self._read_record(number) if record is None else record
        return self._name_and_sentence(number, record, int(self.table.sentence[number]))

    def read_stored(self, number: int) -> tuple[bytes, RefRecord]:
        """Read the bytes of a sample's JPEG, and its record."""
        return self._read_jpeg(number), self._read_record(number)

    def count_not_mirrored(self, first: int, most: int = 1000) -> tuple[int, int]:
        """Count the sentences that `augment.flip` leaves alone, see `mirror_sentence`.

        Args:
            first: a sample. Only samples of its shard are read.
            most: refs to read.

        Returns:
            the number of such sentences, and of all that were read.
        """
        table, field = self.table, _TEXT_FIELD[self.config.sentence]
        same_shard = np.flatnonzero(table.shard == table.shard[first])
        # With a sample per sentence, several samples have the same ref.
        refs = np.stack([column[same_shard] for column in (table.index, table.image, table.ref)])
        _, one_of_each = np.unique(refs, axis=1, return_index=True)

        left_alone = total = 0
        for number in same_shard[one_of_each[:most]].tolist():
            try:
                record = self._read_record(number)
            except BadSample:
                continue  # the loader reports it when it is drawn

            for sentence in record["sentences"]:
                total += 1
                left_alone += mirror_sentence(sentence[field]) is None
        return left_alone, total

    def collate(
        self, buffers: BatchBuffers, infos: Sequence[SampleInfo], bad: Sequence[str] = ()
    ) -> Batch:
        """Tokenize the sentences, and make a batch of the samples that were written.

        Args:
            bad: "<name>: <reason>" of each sample that was replaced.
        """
        sentences = [info.sentence for info in infos]
        words, word_mask, cut = self._tokenizer.encode(sentences, self.config.max_tokens)
        unknown = self._tokenizer.unknown(words)
        infos = [
            replace(info, cut=was_cut, unknown=is_unknown)
            for info, was_cut, is_unknown in zip(infos, cut, unknown)
        ]

        return Batch(
            image=buffers.image.permute(0, 3, 1, 2),
            words=words,
            word_mask=word_mask,
            target=buffers.target,
            info=tuple(infos),
            bad=tuple(bad),
        )

    # ------------------------------------------------------------------ one sample, step by step

    def _read_record(self, number: int) -> RefRecord:
        store, image = self._locate(number)
        entry = image.refs[self.table.ref[number]]

        with self._bad_sample_if_wrong(number, "json"):
            text = store.read(image.shard, *image.json)
            check_bytes(image, text=text)
            record = read_record(text, image)
            height, width = record["height"], record["width"]
            ref = record["refs"][self.table.ref[number]]
            check_ref(ref, entry, height, width)

            return {
                "same_class": UNKNOWN,
                **ref,
                "image_id": image.image_id,
                "height": height,
                "width": width,
            }

    def _read_jpeg(self, number: int) -> bytes:
        store, image = self._locate(number)
        jpg = store.read(image.shard, *image.jpg)
        check_bytes(image, jpg=jpg)
        return jpg

    def _draft(self, number: int, record: RefRecord, generator: np.random.Generator) -> _Draft:
        """Draw the sentence of a training sample, and its augmentation."""
        # Every draw is made, used or not: the stream does not depend on settings or on the text.
        drawn = int(generator.integers(len(record["sentences"])))
        coin = generator.random()

        chosen = int(self.table.sentence[number])
        if chosen == RANDOM:
            chosen = drawn
        name, sentence = self._name_and_sentence(number, record, chosen)

        mirrored_sentence = None
        if coin < self.config.augment.flip:
            mirrored_sentence = mirror_sentence(sentence)
        if mirrored_sentence is not None:
            sentence = mirrored_sentence

        jitter = transforms.draw_jitter(sentence, self.config.augment.color_jitter, generator)
        info = self._info(number, record, name, sentence)
        return _Draft(info, record, mirrored_sentence is not None, jitter)

    def _name_and_sentence(self, number: int, record: RefRecord, chosen: int) -> tuple[str, str]:
        """Return the full name of a sample, and the sentence `chosen` (a number, or `ALL`)."""
        field = _TEXT_FIELD[self.config.sentence]
        label = self.table.label(number)
        with self._bad_sample_if_wrong(number, "json"):
            if chosen == ALL:
                texts = [sentence[field] for sentence in record["sentences"]]
                return f"{label}/all", " ".join(texts)

            sentence = record["sentences"][chosen]
            return f"{label}/{sentence['sent_id']}", sentence[field]

    def _decode_mask(self, number: int, record: RefRecord) -> np.ndarray:
        """Decode the mask of a sample, bool [H, W]."""
        with self._bad_sample_if_wrong(number, "json"):
            return masks.decode(record["rle"])

    def _info(self, number: int, record: RefRecord, name: str, sentence: str) -> SampleInfo:
        return SampleInfo(
            number=number,
            name=name,
            sentence=sentence,
            frame=self._frame(record),
            image_id=record["image_id"],
            category=record["category"],
            same_class=record["same_class"],
        )

    def _frame(self, record: RefRecord) -> Frame:
        return transforms.frame_of(
            record["height"], record["width"], self.config.image_size, self.config.resize
        )

    def _locate(self, number: int) -> tuple[ShardStore, ImageEntry]:
        index = self.table.index[number]
        image = self.table.indexes[index].images[self.table.image[number]]
        return self._stores[index], image

    def _reuse(self, what: str, key: tuple[int, ...], make: Callable[[], Any]) -> Any:
        """Return what was made last for the same key, else make it.

        In the order of scoring, sentences about an image are neighbors. So the latest result is the
        only one worth keeping. Callers must not change it.
        """
        if what not in self._latest or self._latest[what][0] != key:
            self._latest[what] = key, make()
        return self._latest[what][1]

    @contextmanager
    def _bad_sample_if_wrong(self, number: int, file: str) -> Iterator[None]:
        """Turn an error about wrong bytes into a BadSample that says where they are.

        Args:
            file: the file of the sample that is being read, "jpg" or "json".
        """
        try:
            yield
        except InputError:
            raise
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            reason = str(error)
            if not isinstance(error, ValueError):
                reason = f"{type(error).__name__} {error}"

            store, image = self._locate(number)
            raise BadSample(
                f"{self.table.label(number)}: {sample_key(image.image_id)}.{file} "
                f"(image {image.image_id}) in {store.address(image.shard)}: {reason}"
            ) from error


def _allocate(*shape: int, dtype: torch.dtype) -> Tensor:
    """Allocate memory without setting values; in a worker process, memory shared with the rank.

    Shared memory lets a worker hand over a batch without copying it.
    """
    if get_worker_info() is None:
        return torch.empty(shape, dtype=dtype)

    # The same call as in torch's default_collate.
    shared = torch.UntypedStorage._new_shared(math.prod(shape) * dtype.itemsize)
    return torch.empty(0, dtype=dtype).set_(shared, 0, shape)
