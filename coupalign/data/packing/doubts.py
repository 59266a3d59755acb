"""Find refs whose annotations are probably not what was meant, though they can be packed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

from coupalign.data.masks import area, bounding_box, rle_from_segmentation
from coupalign.data.packing.refer import Referral
from coupalign.data.records import UNKNOWN
from coupalign.errors import first_of

# A mask agrees with the area that its annotation states if the smaller one is at least this share
# of the larger one, and with its box if the two overlap (intersection over union) by as much.
MIN_SHARE = 0.5
MARGIN = 2  # pixels on each side, by which both boxes are enlarged: pixels are coarse

Box = tuple[float, float, float, float]  # x, y, width, height
Kind = Literal["empty", "normalized", "different", "crowds", "wordless"]

MEANING: dict[Kind, str] = {
    "empty": "masks are empty: no pixel of the object is inside the picture",
    "normalized": "masks have no coordinate above 1, as if they were shares of the picture's "
    "sides; polygons must be in pixels",
    "different": "masks disagree with the area or the bbox of their own annotation",
    "crowds": "refs are of a class whose annotations are all marked iscrowd, as CVAT marks "
    "painted masks; how many others of the class are on the picture is not known",
    "wordless": "refs have a sentence without a word",
}


def find_doubts(referrals: Iterable[Referral]) -> list[str]:
    """Describe doubtful refs: one line per kind, with their number and the first of them."""
    named: dict[Kind, list[str]] = {kind: [] for kind in MEANING}
    total = 0
    for referral in referrals:
        total += 1
        for kind, detail in _doubts_about(referral):
            named[kind].append(
                f"{referral.dataset}/{referral.split_by} ref_id {referral.ref_id} "
                f"(ann_id {referral.ann_id}, image_id {referral.image_id}){detail}"
            )

    lines = []
    for kind, names in named.items():
        if names:
            lines.append(f"{len(names):,} of {total:,} {MEANING[kind]}: {first_of(names, '; ')}")
    return lines


def _doubts_about(referral: Referral) -> Iterator[tuple[Kind, str]]:
    """Yield what is doubtful about a ref, and details that its name does not say."""
    rle = rle_from_segmentation(referral.segmentation, referral.height, referral.width)
    pixels = area(rle)
    if _is_normalized(referral.segmentation):
        yield "normalized", ""
    elif pixels == 0:
        yield "empty", ""
    else:
        box = bounding_box(rle)
        if _areas_differ(pixels, box, referral):
            yield "different", f": {pixels:,} pixels, its area is {referral.stated_area:,.0f}"
        elif _boxes_differ(box, referral.stated_box):
            x, y, width, height = (round(side) for side in referral.stated_box or ())
            yield "different", f": in box {list(box)}, its bbox is {[x, y, width, height]}"

    if referral.same_class == UNKNOWN:
        yield "crowds", ""
    if not all(_has_a_word(sentence.cleaned) for sentence in referral.sentences):
        yield "wordless", ""


def _has_a_word(text: str) -> bool:
    """Whether a text has a letter or a digit, and not spaces, marks and emoji only."""
    return any(character.isalnum() for character in text)


def _is_normalized(segmentation: list | dict) -> bool:
    """Whether all polygons are in the first pixel of the picture."""
    if isinstance(segmentation, dict) or any(isinstance(part, dict) for part in segmentation):
        return False
    return all(0 <= value <= 1 for polygon in segmentation for value in polygon)


def _areas_differ(pixels: int, box: Box, referral: Referral) -> bool:
    stated, stated_box = referral.stated_area, referral.stated_box
    if stated is None:
        return False

    # Some tools write the area of the box, which says nothing about the mask.
    if stated_box and abs(stated - stated_box[2] * stated_box[3]) <= 0.01 * stated:
        return False

    # The pixels along the outline may count or not.
    slack = box[2] + box[3]
    return min(pixels, stated) + slack < MIN_SHARE * max(pixels, stated)


def _boxes_differ(box: Box, stated: Box | None) -> bool:
    if stated is None:
        return False
    first, second = _enlarged(box), _enlarged(stated)
    overlap = _length(first, second, 0) * _length(first, second, 1)
    union = first[2] * first[3] + second[2] * second[3] - overlap
    return overlap < MIN_SHARE * union


def _enlarged(box: Box) -> Box:
    x, y, width, height = box
    return x - MARGIN, y - MARGIN, width + 2 * MARGIN, height + 2 * MARGIN


def _length(first: Box, second: Box, axis: int) -> float:
    """How much two boxes have in common along an axis; 0: x, 1: y."""
    start = max(first[axis], second[axis])
    end = min(first[axis] + first[axis + 2], second[axis] + second[axis + 2])
    return max(0.0, end - start)
