"""What the loader hands over: tensors for the model, and for each sample what scoring and pictures need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Frame:
    """Where an image lies inside the square model input; pixels.

    `height` and `width` are the original's, `size` is the side of the square. Squash: top 0, left 0, inner sides `size`.
    """

    height: int
    width: int
    size: int
    top: int
    left: int
    inner_height: int
    inner_width: int


@dataclass(frozen=True)
class SampleInfo:
    """One sample, beside its tensors.

    `number` is its place in the loader's table of samples, `name` is "<dataset>/<split_by>/<ref_id>/<sent_id>", with "all" for
    the last part where all sentences of the ref are read as one. `same_class` is how many other objects of the category are on
    the image, -1 where the shard does not know. `truth` (bool [H, W], original resolution) is given in evaluation only, `image`
    (uint8 [H, W, 3]) only where pictures were asked for. `cut` says that the sentence was longer than the token limit.
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


@dataclass(frozen=True)
class Batch:
    """image uint8 [B, 3, S, S] (RGB; the model normalizes), words int64 [B, T], word_mask bool [B, T], target bool [B, S, S].

    The image's channels lie innermost in memory: a picture is decoded and resized that way, and the device turns it faster than the
    loader would. `target` is None in evaluation. `bad` names the unreadable samples that were replaced, with the reason.
    """

    image: Tensor
    words: Tensor
    word_mask: Tensor
    target: Tensor | None
    info: tuple[SampleInfo, ...]
    bad: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.info)

    def __getstate__(self) -> dict[str, Any]:
        # out of a worker process each tensor goes as shared memory of its own, 0.2 ms on either side; the few words are quicker copied
        return {**self.__dict__, "words": self.words.numpy(), "word_mask": self.word_mask.numpy()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(
            state,
            words=torch.from_numpy(state["words"]),
            word_mask=torch.from_numpy(state["word_mask"]),
        )

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`; from pinned memory the copy does not block."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return self._with(move)

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory; called by the DataLoader."""
        return self._with(Tensor.pin_memory)

    def _with(self, change: Callable[[Tensor], Tensor]) -> Batch:
        target = None if self.target is None else change(self.target)
        return replace(
            self,
            image=change(self.image),
            words=change(self.words),
            word_mask=change(self.word_mask),
            target=target,
        )


def random_batch(samples: int, size: int, tokens: int, vocabulary: int) -> Batch:
    """A training batch of the loader's shapes and memory layout: noise, whole sentences of random words, a square for a target."""
    image = torch.randint(0, 256, (samples, size, size, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    target = torch.zeros(samples, size, size, dtype=torch.bool)
    target[:, size // 4 : size // 2, size // 4 : size // 2] = True
    return Batch(
        image,
        torch.randint(vocabulary, (samples, tokens)),
        torch.ones(samples, tokens, dtype=torch.bool),
        target,
        (),
    )
