"""Scores by group: how large the object is, how long the sentence, what it names, how many others of its class there are.

The borders of the sizes are fixed, and not terciles of a split, so that a row means the same for every split and data
set; each is twice the side of the one before (10, 20 and 40 % of the image's side).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import escape

import numpy as np

from coupalign.data.transforms import mirror_sentence, names_color
from coupalign.evaluation.metrics import EmptyUnion, summarize
from coupalign.evaluation.rows import Rows

FEW = 30  # samples; a score of fewer says little

_SIZES = ("under 1 %", "1 to 4 %", "4 to 16 %", "over 16 %")
_LENGTHS = ("1–2 words", "3–4 words", "5–7 words", "8 or more")
_WORDS = ("place", "color", "order", "size", "none of them")
_OTHERS = ("0", "1", "2", "3 or more", "not known")
KINDS = {
    "size": ("Size of the object", _SIZES, "Share of the image that the truth covers."),
    "length": ("Length of the sentence", _LENGTHS, ""),
    "words": (
        "Words of the sentence",
        _WORDS,
        "A sentence with several kinds of words counts for each of them.",
    ),
    "others": (
        "Other objects of its class",
        _OTHERS,
        "How many the image holds beside the one that is meant: what the sentence "
        "must tell it from.",
    ),
}
_METRICS = ("oIoU", "mIoU", "P@0.5", "P@0.9", "bIoU")

# Left and right in all their forms are known to `mirror_sentence`.
_PLACE = re.compile(
    r"(?<![a-z])(?:left|right|above|below|"
    r"(?:top|bottom|front|back|far|upper|lower|outer|inner)(?:most)?|"
    r"(?:fore|back)ground|middle|mid|center|centre|central|corner|side|edge|end|behind|beside|between|beneath|"
    r"under|underneath|over|near(?:er|est)?|close(?:r|st)?|f[au]rthe(?:r|st)|next to)(?![a-z])",
    re.IGNORECASE,
)
_ORDER = re.compile(
    r"(?<![a-z0-9])(?:first|second|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|last|"
    r"\d+ ?(?:st|nd|rd|th)|(?:number|no\.?|#) ?\d+|from (?:the )?(?:left|right|top|bottom|front|back))(?![a-z0-9])",
    re.IGNORECASE,
)
_SIZE = re.compile(
    r"(?<![a-z])(?:(?:big|bigg|small|larg|littl|tall|short|tini|tiny|hug|long|giant)(?:e|er|est)?)(?![a-z])",
    re.IGNORECASE,
)


def groups_of(sentence: str, area: int, pixels: int, same_class: int) -> dict[str, tuple[str, ...]]:
    """The groups of a sample by kind, see `KINDS`; no size where `pixels` is 0."""
    found = {
        "length": (_LENGTHS[int(np.searchsorted((2, 4, 7), len(sentence.split())))],),
        "words": _named(sentence),
        "others": (_OTHERS[min(same_class, 3)],),
    }  # -1 is the last one
    if pixels:
        found["size"] = (
            _SIZES[int(np.searchsorted((1, 4, 16), 100 * area / pixels, side="right"))],
        )
    return found


def _named(sentence: str) -> tuple[str, ...]:
    sides = (
        mirror_sentence(sentence) != sentence
    )  # none: it is unsure, because of a word that is a place in most sentences
    told = (
        sides or _PLACE.search(sentence) is not None,
        names_color(sentence),
        _ORDER.search(sentence) is not None,
        _SIZE.search(sentence) is not None,
    )
    return tuple(word for word, is_said in zip(_WORDS, told) if is_said) or _WORDS[-1:]


def group_section(name: str, rows: Rows, empty: EmptyUnion) -> str:
    """A table for each kind of group."""
    note = f'In percent; bIoU is the mean boundary IoU. <span class="few">few</span> marks fewer than {FEW} samples.'
    tables = "".join(_tables(rows, empty))
    return f'<section><h2>Scores by group: {escape(name)}</h2><p class="quiet">{note}</p><div class="groups">{tables}</div></section>'


def _tables(rows: Rows, empty: EmptyUnion) -> Iterator[str]:
    samples = [
        groups_of(*sample)
        for sample in zip(
            rows.sentences, rows.area.tolist(), rows.pixels.tolist(), rows.same_class.tolist()
        )
    ]
    for kind, (heading, labels, note) in KINDS.items():
        lines = [_line("all", rows, np.ones(len(rows), bool), empty)]
        for label in labels:
            members = np.array([label in sample.get(kind, ()) for sample in samples])
            if members.any():
                lines.append(_line(label, rows, members, empty))
        head = "".join(f"<th>{metric}</th>" for metric in ("n", *_METRICS))
        yield (
            f'<div><h3>{heading}</h3><table class="bars"><tr><th></th>{head}</tr>{"".join(lines)}</table>'
            f'<p class="quiet">{note}</p></div>'
        )


def _line(label: str, rows: Rows, members: np.ndarray, empty: EmptyUnion) -> str:
    scores = summarize(rows.counts[members], bootstrap=0, empty=empty)
    cells = "".join(
        f'<td class="bar" style="--part:{scores[metric]:.3f}">{100 * scores[metric]:.1f}</td>'
        for metric in _METRICS
    )
    few = ' <span class="few">few</span>' if members.sum() < FEW else ""
    return f"<tr><th>{escape(label)}{few}</th><td>{int(members.sum()):,}</td>{cells}</tr>"
