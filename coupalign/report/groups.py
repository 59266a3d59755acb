"""Scores by group: size of the object, length and words of the sentence, others of its class.

The borders of the sizes are fixed, not terciles of a split, so that a line means the same for every
split and data set. Each border is twice the side of the one before: 10, 20 and 40 % of the image's
side.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import escape
from typing import NamedTuple

import numpy as np

from coupalign.data.sides import names_side
from coupalign.data.transforms import names_color
from coupalign.evaluation.metrics import IouRule, summarize
from coupalign.evaluation.rows import Rows

FEW_SAMPLES = 30  # a score of fewer says little

_SIZES = ("under 1 %", "1 to 4 %", "4 to 16 %", "over 16 %")
_LENGTHS = ("1–2 words", "3–4 words", "5–7 words", "8 or more")
_WORDS = ("place", "color", "order", "size", "none of them")
_OTHERS = ("0", "1", "2", "3 or more", "not known")


class GroupKind(NamedTuple):
    """A way to group samples: the heading of its table, its groups, and a note below it."""

    heading: str
    labels: tuple[str, ...]
    note: str


KINDS = {
    "size": GroupKind("Size of the object", _SIZES, "Share of the image that the truth covers."),
    "length": GroupKind("Length of the sentence", _LENGTHS, ""),
    "words": GroupKind(
        "Words of the sentence",
        _WORDS,
        "A sentence with several kinds of words counts for each of them.",
    ),
    "others": GroupKind(
        "Other objects of its class",
        _OTHERS,
        "Number of other objects of its class in the image, from which the sentence must tell it.",
    ),
}
_METRICS = ("oIoU", "mIoU", "P@0.5", "P@0.9", "bIoU")

# `names_side` knows left and right in all their forms.
_PLACE = re.compile(
    r"(?<![a-z])(?:"
    r"left|right|above|below|"
    r"(?:top|bottom|front|back|far|upper|lower|outer|inner)(?:most)?|"
    r"(?:fore|back)ground|middle|mid|center|centre|central|corner|side|edge|end|"
    r"behind|beside|between|beneath|under|underneath|over|"
    r"near(?:er|est)?|close(?:r|st)?|f[au]rthe(?:r|st)|next to"
    r")(?![a-z])",
    re.IGNORECASE,
)
_ORDER = re.compile(
    r"(?<![a-z0-9])(?:"
    r"first|second|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|last|"
    r"\d+ ?(?:st|nd|rd|th)|"
    r"(?:number|no\.?|#) ?\d+|"
    r"from (?:the )?(?:left|right|top|bottom|front|back)"
    r")(?![a-z0-9])",
    re.IGNORECASE,
)
_SIZE = re.compile(
    r"(?<![a-z])(?:"
    r"(?:big|bigg|small|larg|littl|tall|short|tini|tiny|hug|long|giant)(?:e|er|est)?"
    r")(?![a-z])",
    re.IGNORECASE,
)


def groups_of(sentence: str, area: int, pixels: int, same_class: int) -> dict[str, tuple[str, ...]]:
    """Return the groups of a sample by kind, see `KINDS`.

    Args:
        area, pixels: of the truth and of the image. 0 pixels: not known, so there is no size.
        same_class: other objects of its class in the image; -1: not known.
    """
    length = _LENGTHS[int(np.searchsorted((2, 4, 7), len(sentence.split())))]
    # -1 selects the last label, "not known".
    others = _OTHERS[min(same_class, 3)]
    groups = {"length": (length,), "words": _kinds_of_words(sentence), "others": (others,)}

    if pixels:
        share = 100 * area / pixels
        size = _SIZES[int(np.searchsorted((1, 4, 16), share, side="right"))]
        groups["size"] = (size,)
    return groups


def group_section(name: str, rows: Rows, iou_rule: IouRule) -> str:
    """Show the scores by group, one table per kind."""
    note = (
        'In percent; bIoU is the mean boundary IoU. <span class="few">few</span> marks '
        f"fewer than {FEW_SAMPLES} samples."
    )
    tables = "".join(_tables(rows, iou_rule))
    return (
        f'<section><h2>Scores by group: {escape(name)}</h2><p class="quiet">{note}</p>'
        f'<div class="groups">{tables}</div></section>'
    )


def _kinds_of_words(sentence: str) -> tuple[str, ...]:
    place, color, order, size, none_of_them = _WORDS
    named = {
        place: names_side(sentence) or _PLACE.search(sentence) is not None,
        color: names_color(sentence),
        order: _ORDER.search(sentence) is not None,
        size: _SIZE.search(sentence) is not None,
    }
    kinds = tuple(kind for kind, is_named in named.items() if is_named)
    return kinds or (none_of_them,)


def _tables(rows: Rows, iou_rule: IouRule) -> Iterator[str]:
    facts = zip(rows.sentences, rows.area.tolist(), rows.pixels.tolist(), rows.same_class.tolist())
    samples = [groups_of(*fact) for fact in facts]
    header = "".join(f"<th>{name}</th>" for name in ("n", *_METRICS))

    for kind, (heading, labels, note) in KINDS.items():
        lines = [_line("all", rows, np.ones(len(rows), bool), iou_rule)]
        for label in labels:
            members = np.array([label in sample.get(kind, ()) for sample in samples])
            if members.any():
                lines.append(_line(label, rows, members, iou_rule))
        yield (
            f'<div><h3>{heading}</h3><table class="bars"><tr><th></th>{header}</tr>'
            f"{''.join(lines)}</table>"
            f'<p class="quiet">{note}</p></div>'
        )


def _line(label: str, rows: Rows, members: np.ndarray, iou_rule: IouRule) -> str:
    """One line of a table: a group, the number of its samples and its scores."""
    samples = int(members.sum())
    few = ' <span class="few">few</span>' if samples < FEW_SAMPLES else ""

    scores = summarize(rows.counts[members], bootstrap=0, iou_rule=iou_rule)
    cells = []
    for metric in _METRICS:
        score = scores[metric]
        cells.append(f'<td class="bar" style="--part:{score:.3f}">{100 * score:.1f}</td>')
    return f"<tr><th>{escape(label)}{few}</th><td>{samples:,}</td>{''.join(cells)}</tr>"
