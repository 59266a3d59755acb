"""What a loader yields: tensors for the model, and what scoring needs to know of each sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Frame:
    """The rectangle that an image fills inside the square model input, in pixels.

    Attributes:
        height: of the original image.
        width: of the original image.
        size: side of the square.
        top: first row of the rectangle. 0 if the image was squashed.
        left: first column of the rectangle. 0 if the image was squashed.
        inner_height: of the rectangle. `size` if the image was squashed.
        inner_width: of the rectangle. `size` if the image was squashed.
    """

    height: int
    width: int
    size: int
    top: int
    left: int
    inner_height: int
    inner_width: int


@dataclass(frozen=True, kw_only=True)
class SampleInfo:
    """One sample of a batch, next to its tensors.

    Attributes:
        number: row in the loader's table of samples.
        name: "<dataset>/<split_by>/<ref_id>/<sent_id>". The last part is "all" if all sentences of
            the ref are read as one.
        sentence: the text that was tokenized.
        frame: where the image is in the square.
        image_id: as in the annotations.
        category: of the object, as in the annotations.
        same_class: number of other objects of the category on the image. −1: unknown.
        truth: bool [H, W], the mask at the original resolution. In evaluation only.
        image: uint8 [H, W, 3], the original image. Only if the loader was asked for images.
        cut: whether the sentence was longer than the token limit.
        unknown: whether none of its tokens is in the vocabulary.
    """

    number: int
    name: str
    sentence: str
    frame: Frame
    image_id: int
    category: str
    same_class: int = -1
    truth: np.ndarray | None = None
    image: np.ndarray | None = None
    cut: bool = False
    unknown: bool = False


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The tensors of a micro-batch, and what is known of its samples.

    Attributes:
        image: uint8 [B, 3, S, S], RGB; the model normalizes it. Channels last in memory, because
            images are decoded and resized that way, and the device transposes faster than a worker.
        words: int64 [B, T], token numbers.
        word_mask: bool [B, T], true up to and including [SEP].
        target: bool [B, S, S]. None in evaluation.
        info: one entry per sample.
        bad: "<name>: <reason>" of each unreadable sample that was replaced.
        spare: whether the batch only keeps this rank in step with ranks that have more batches.
            Run it through the model, because that may be collective, and drop the result.
    """

    image: Tensor
    words: Tensor
    word_mask: Tensor
    target: Tensor | None
    info: tuple[SampleInfo, ...]
    bad: tuple[str, ...] = ()
    spare: bool = False

    def __len__(self) -> int:
        return len(self.info)

    def __getstate__(self) -> dict[str, Any]:
        # Each tensor that leaves a worker process becomes a shared memory segment of its own, which
        # costs 0.2 ms on either side. Copying these two small tensors is faster.
        return {**self.__dict__, "words": self.words.numpy(), "word_mask": self.word_mask.numpy()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(
            state,
            words=torch.from_numpy(state["words"]),
            word_mask=torch.from_numpy(state["word_mask"]),
        )

    def to(self, device: torch.device | str) -> Batch:
        """Copy the batch to `device`. From pinned memory the copy does not block."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return self._map_tensors(move)

    def pin_memory(self) -> Batch:
        """Copy the batch to page-locked memory. The DataLoader calls this."""
        return self._map_tensors(Tensor.pin_memory)

    def _map_tensors(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return replace(
            self,
            image=change(self.image),
            words=change(self.words),
            word_mask=change(self.word_mask),
            target=None if self.target is None else change(self.target),
        )


def random_batch(samples: int, size: int, tokens: int, vocabulary: int) -> Batch:
    """Make a training batch of noise, with the shapes and the memory layout of the loader's.

    The sentences are full-length random tokens, and each target is a square.
    """
    image = torch.randint(0, 256, (samples, size, size, 3), dtype=torch.uint8)

    target = torch.zeros(samples, size, size, dtype=torch.bool)
    target[:, size // 4 : size // 2, size // 4 : size // 2] = True

    return Batch(
        image=image.permute(0, 3, 1, 2),
        words=torch.randint(vocabulary, (samples, tokens)),
        word_mask=torch.ones(samples, tokens, dtype=torch.bool),
        target=target,
        info=(),
    )
