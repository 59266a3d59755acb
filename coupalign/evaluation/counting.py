"""Counts the pixels of a batch on the device of its logits, and hands out integers that nobody has to wait for.

Samples of one frame are counted together: the sentences about a photograph stand side by side in the order of scoring, and many
photographs have the same size, so a batch takes few launches.
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

_COUNTED = 4  # integers of a sample under one protocol: I, U, bI, bU
_TOGETHER = 8  # samples at most: more would save hardly a launch, and the masks of more leave the cache of a CPU
_KNOWN = (
    6  # integers of a sample under all of them: image id, area, pixels, same class, cut, broken
)


@dataclass(frozen=True)
class Counted:
    """A batch whose pixels have been counted, or will have been once somebody looks.

    Attributes:
        infos: its samples, those of one frame side by side.
        counts: int32 [B, 1 + 4 * protocols], in that order: whether the logits are broken, then I, U, bI, bU under each protocol.
        predictions: bool [H, W] by place among `infos`, of the samples that were to be shown.
        on_gpu: where it was counted.
    """

    infos: tuple[SampleInfo, ...]
    counts: PendingCopy
    predictions: Mapping[int, PendingCopy]
    on_gpu: bool

    def rows(self) -> np.ndarray:
        """int64 [B, `row_width`]: number, image id, area, pixels, same class, whether the sentence was cut, whether the logits are
        broken, then I, U, bI, bU under each protocol."""
        known = [
            (
                info.number,
                info.image_id,
                int(np.count_nonzero(info.truth)),
                info.truth.size,
                info.same_class,
                int(info.cut),
            )
            for info in self.infos
        ]
        return np.hstack([np.asarray(known, np.int64), self.counts.numpy().astype(np.int64)])


def count_batch(
    logits: Tensor,
    infos: Sequence[SampleInfo],
    protocols: Sequence[Protocol],
    shown: Collection[int] = (),
) -> Counted:
    """Count the pixels of a batch under all protocols.

    Args:
        logits: float [B, S, S], on any device.
        infos: of the samples, with their truths.
        shown: numbers of the samples whose predictions at the original size are wanted, too.
    """
    counts: list[Tensor] = []
    ordered: list[SampleInfo] = []
    predictions: dict[int, PendingCopy] = {}
    for frame, places in _groups(infos):
        members = [infos[place] for place in places]
        squares = torch.stack(
            [logits[place] for place in places]
        )  # an index made by the host would be waited for
        counts.append(_count_group(squares, frame, [info.truth for info in members], protocols))
        wanted = [place for place, info in enumerate(members) if info.number in shown]
        if wanted:
            masks = logits_at_original_size(squares, frame) > 0
            predictions |= {len(ordered) + place: PendingCopy(masks[place]) for place in wanted}
        ordered += members
    return Counted(tuple(ordered), PendingCopy(torch.cat(counts)), predictions, logits.is_cuda)


def row_width(protocols: int) -> int:
    """Columns of a row for so many protocols."""
    return 1 + _KNOWN + _COUNTED * protocols


def rows_under(rows: np.ndarray, place: int) -> np.ndarray:
    """The rows of the protocol at that place, [n, 11]: number, I, U, bI, bU, then what is known of the sample."""
    first = row_width(place)
    return np.hstack([rows[:, :1], rows[:, first : first + _COUNTED], rows[:, 1 : 1 + _KNOWN]])


def _groups(infos: Sequence[SampleInfo]) -> Iterator[tuple[Frame, list[int]]]:
    """Places of samples that are counted together, with the frame that they share."""
    groups: dict[Frame, list[int]] = {}
    for place, info in enumerate(infos):
        assert info.truth is not None, f"{info.name}: the loader gave no truth"
        groups.setdefault(info.frame, []).append(place)
    for frame, places in groups.items():
        for first in range(0, len(places), _TOGETHER):
            yield frame, places[first : first + _TOGETHER]


def _count_group(
    squares: Tensor, frame: Frame, truths: Sequence[np.ndarray], protocols: Sequence[Protocol]
) -> Tensor:
    """int32 [n, 1 + 4 * protocols] of samples of one frame: whether broken, and the pixels."""
    placed = {
        place: start_copy(np.stack([place(truth, frame) for truth in truths]), squares.device)
        for place in dict.fromkeys(protocol.place for protocol in protocols)
    }
    broken = ~torch.isfinite(squares).flatten(1).all(dim=1)
    return torch.cat(
        [
            broken.int()[:, None],
            *(
                count_pixels(protocol.predict(squares, frame), placed[protocol.place])
                for protocol in protocols
            ),
        ],
        dim=1,
    )
