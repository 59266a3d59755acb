"""The samples that a scoring keeps to look at: best, worst, median, random."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from coupalign.evaluation.metrics import ious

if TYPE_CHECKING:
    pass

_DRAWN = 4  # random pictures kept for one shown: the ones near the median come from them


@dataclass(frozen=True)
class Picture:
    """One scored sample to look at.

    Attributes:
        image: uint8 [H, W, 3].
        truth, prediction: bool [H, W].
        same_class: other objects of the truth's class in the image; -1 where that is not known.
        boundary: boundary IoU as it was scored; none: that of the two masks.
    """

    number: int
    name: str
    sentence: str
    iou: float
    image: np.ndarray
    truth: np.ndarray
    prediction: np.ndarray
    same_class: int = -1
    boundary: float | None = None


def choose_pictures(
    pictures: Sequence[Picture], rows: np.ndarray, many: int
) -> dict[str, list[Picture]]:
    """Groups of at most `many` pictures for a page: {"random": …, "best": …, "median": …, "worst": …}.

    Best and worst are exact among the samples of the rank that kept the pictures; "random" is a fair draw from them, and
    "median" are those of a larger draw whose IoU is nearest to the median of `rows`. A picture may be in two groups,
    except that none is in both "random" and "median" where there are enough.
    """
    unique = list({picture.number: picture for picture in pictures}.values())
    ranked = sorted(unique, key=lambda picture: (picture.iou, picture.number))
    drawn = sorted(unique, key=_lot)[: _DRAWN * many]
    middle = float(np.median(ious(rows)))
    others = drawn[many:] or drawn
    near = sorted(others, key=lambda picture: (abs(picture.iou - middle), picture.number))
    return {
        "random": drawn[:many],
        "best": ranked[::-1][:many],
        "median": near[:many],
        "worst": ranked[:many],
    }


def _lot(picture: Picture) -> int:
    """A number drawn for each sample: the smallest lots of any samples are a fair and repeatable sample of them."""
    return (picture.number + 1) * 2654435761 % 2**32


def prune(shelf: list[Picture], many: int) -> list[Picture]:
    """Keep the best, the worst and a fair draw, which pruning again cannot bias: the memory is bounded."""
    ranked = sorted(shelf, key=lambda picture: (picture.iou, picture.number))
    ends = {picture.number for picture in ranked[:many] + ranked[max(0, len(ranked) - many) :]}
    drawn = {picture.number for picture in sorted(shelf, key=_lot)[: _DRAWN * many]}
    return [picture for picture in shelf if picture.number in ends | drawn]
