"""The samples that a scoring keeps to look at: best, worst, median, random."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from coupalign.evaluation.metrics import ious

# Random pictures kept per one shown: those near the median are chosen from the rest.
_DRAWN_PER_SHOWN = 4


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One scored sample to look at.

    Attributes:
        number: of the sample in the loader's table.
        image: uint8 [H, W, 3].
        truth, prediction: bool [H, W].
        same_class: other objects of the truth's class in the image; -1: not known.
        boundary: boundary IoU as it was scored; None: compute it from the two masks.
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
    pictures: Sequence[Picture], rows: np.ndarray, per_group: int
) -> dict[str, list[Picture]]:
    """Choose at most `per_group` pictures for each group of a page.

    Best and worst are exact among the samples of the rank that kept the pictures. "random" is an
    unbiased draw from them. "median" are those of a larger draw whose IoU is nearest to the median
    of `rows`. A picture may be in two groups, but never in both "random" and "median" if there are
    enough of them.

    Returns:
        {"random": …, "best": …, "median": …, "worst": …}
    """
    unique = list({picture.number: picture for picture in pictures}.values())
    drawn = sorted(unique, key=_random_order)[: _DRAWN_PER_SHOWN * per_group]
    by_iou = sorted(unique, key=_iou_order)

    median = float(np.median(ious(rows)))
    not_random = drawn[per_group:] or drawn
    near_median = sorted(
        not_random, key=lambda picture: (abs(picture.iou - median), picture.number)
    )
    return {
        "random": drawn[:per_group],
        "best": by_iou[::-1][:per_group],
        "median": near_median[:per_group],
        "worst": by_iou[:per_group],
    }


def prune_shelf(shelf: list[Picture], per_group: int) -> list[Picture]:
    """Keep the best, the worst and a fixed pseudo-random subset, so memory stays bounded.

    Safe to call repeatedly: the subset does not depend on the order of samples.
    """
    by_iou = sorted(shelf, key=_iou_order)
    worst = by_iou[:per_group]
    best = by_iou[max(0, len(by_iou) - per_group) :]
    drawn = sorted(shelf, key=_random_order)[: _DRAWN_PER_SHOWN * per_group]

    kept = {picture.number for picture in [*worst, *best, *drawn]}
    return [picture for picture in shelf if picture.number in kept]


def _iou_order(picture: Picture) -> tuple[float, int]:
    return (picture.iou, picture.number)


def _random_order(picture: Picture) -> int:
    """Hash the sample's number: the smallest hashes are a fair and repeatable draw."""
    return (picture.number + 1) * 2654435761 % 2**32
