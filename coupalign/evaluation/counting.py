"""Count the pixels of a batch on the device of its logits, without waiting for the device.

Samples with the same frame are counted together. Sentences about one image are neighbors in the
order of scoring, and many images have the same size, so a batch needs few kernel launches.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from coupalign.evaluation.protocols import Protocol, count_pixels, logits_at_original_size
from coupalign.evaluation.transfer import PendingCopy, start_copy

if TYPE_CHECKING:
    from coupalign.data.batch import Frame, SampleInfo

# Columns of a counted row: the number, what does not depend on the protocol (image id, area,
# pixels, same class, cut, unknown, broken), then I, U, bI, bU under each protocol.
_SAMPLE_COLUMNS = 7
_COUNT_COLUMNS = 4

# More samples would hardly save a launch, and their masks would not fit into a CPU's cache.
_MAX_GROUP = 8


@dataclass(frozen=True)
class CountedBatch:
    """A batch whose pixels are being counted. Reading the counts waits for the device.

    Attributes:
        infos: its samples, grouped by frame.
        counts: int32 [B, 1 + 4 * protocols] in the order of `infos`: whether the logits are
            broken, then I, U, bI, bU under each protocol.
        predictions: bool [H, W] by index into `infos`, for the samples that were asked for.
    """

    infos: tuple[SampleInfo, ...]
    counts: PendingCopy
    predictions: Mapping[int, PendingCopy]

    def rows(self) -> np.ndarray:
        """Wait for the counts and return one row per sample, int64 [B, `counted_width`].

        Columns: number, image id, area, pixels, same class, whether the sentence was cut, whether
        it has no known word, whether the logits are broken, then I, U, bI, bU under each protocol.
        """
        of_samples = []
        for info in self.infos:
            area, pixels = int(np.count_nonzero(info.truth)), info.truth.size
            flags = int(info.cut), int(info.unknown)
            of_samples.append((info.number, info.image_id, area, pixels, info.same_class, *flags))
        counts = self.counts.numpy().astype(np.int64)
        return np.hstack([np.asarray(of_samples, np.int64), counts])


def count_batch(
    logits: Tensor,
    infos: Sequence[SampleInfo],
    protocols: Sequence[Protocol],
    keep_predictions: Collection[int] = (),
) -> CountedBatch:
    """Count the pixels of a batch under all protocols.

    Args:
        logits: float [B, S, S], on any device.
        infos: of the samples, with their truths.
        keep_predictions: numbers of the samples whose predictions at the original size are kept.
    """
    counts: list[Tensor] = []
    ordered: list[SampleInfo] = []
    predictions: dict[int, PendingCopy] = {}

    for frame, indexes in _group_by_frame(infos):
        members = [infos[index] for index in indexes]
        # Not logits[indexes]: the device would wait for the host's index.
        squares = torch.stack([logits[index] for index in indexes])
        counts.append(_count_group(squares, frame, [info.truth for info in members], protocols))

        kept = [row for row, info in enumerate(members) if info.number in keep_predictions]
        if kept:
            masks = logits_at_original_size(squares, frame) > 0
            for row in kept:
                predictions[len(ordered) + row] = PendingCopy(masks[row])
        ordered += members

    return CountedBatch(
        infos=tuple(ordered),
        counts=PendingCopy(torch.cat(counts)),
        predictions=predictions,
    )


def counted_width(protocols: int) -> int:
    """Number of columns of a counted row under so many protocols."""
    return 1 + _SAMPLE_COLUMNS + _COUNT_COLUMNS * protocols


def rows_for_protocol(rows: np.ndarray, protocol: int) -> np.ndarray:
    """Select the columns of one protocol, by its index, from counted rows.

    Returns:
        int64 [n, 12]: number, I, U, bI, bU, image id, area, pixels, same class, cut, unknown,
        broken.
    """
    first = counted_width(protocol)
    number = rows[:, :1]
    counts = rows[:, first : first + _COUNT_COLUMNS]
    of_sample = rows[:, 1 : 1 + _SAMPLE_COLUMNS]
    return np.hstack([number, counts, of_sample])


def _group_by_frame(infos: Sequence[SampleInfo]) -> Iterator[tuple[Frame, list[int]]]:
    """Indexes of the samples that are counted together, with the frame that they share."""
    groups: dict[Frame, list[int]] = {}
    for index, info in enumerate(infos):
        assert info.truth is not None, f"{info.name}: the loader gave no truth"
        groups.setdefault(info.frame, []).append(index)

    for frame, indexes in groups.items():
        for first in range(0, len(indexes), _MAX_GROUP):
            yield frame, indexes[first : first + _MAX_GROUP]


def _count_group(
    squares: Tensor, frame: Frame, truths: Sequence[np.ndarray], protocols: Sequence[Protocol]
) -> Tensor:
    """Count samples of one frame, int32 [n, 1 + 4 * protocols]: whether broken, then the pixels."""
    # Protocols that resize the truth in the same way share one copy of it.
    truths_by_size = {}
    for resize_truth in dict.fromkeys(protocol.resize_truth for protocol in protocols):
        resized = np.stack([resize_truth(truth, frame) for truth in truths])
        truths_by_size[resize_truth] = start_copy(resized, squares.device)

    is_broken = ~torch.isfinite(squares).flatten(1).all(dim=1)
    columns = [is_broken.int()[:, None]]
    for protocol in protocols:
        prediction = protocol.predict(squares, frame)
        columns.append(count_pixels(prediction, truths_by_size[protocol.resize_truth]))
    return torch.cat(columns, dim=1)
