"""Groups of samples: which one a sample belongs to, and that a group's scores are those of its rows alone."""

from __future__ import annotations

import re

import numpy as np
import pytest

from coupalign.evaluation.metrics import summarize
from coupalign.evaluation.rows import Rows
from coupalign.report.groups import FEW_SAMPLES, KINDS, group_section, groups_of


@pytest.mark.parametrize(
    ("sentence", "named"),
    [
        ("man", ("none of them",)),
        ("the bright leftover pizza", ("color",)),
        ("second hand", ("order",)),
        ("left", ("place",)),
        ("leftmost cup", ("place",)),
        ("TOP RIGHT", ("place",)),
        ("guy on l", ("place",)),
        ("middle one", ("place",)),
        ("woman in front", ("place",)),
        ("dog behind the chair", ("place",)),
        ("nearest bus", ("place",)),
        ("the square above the star", ("place",)),
        ("the red one", ("color",)),
        ("guy in grayish shirt", ("color",)),
        ("3rd zebra", ("order",)),
        ("last person", ("order",)),
        ("2nd from left", ("place", "order")),
        ("number 5", ("order",)),
        ("#5 jersey", ("order",)),
        ("the second red star from the top", ("place", "color", "order")),
        ("the bigger dog", ("size",)),
        ("tallest", ("size",)),
        ("little red square", ("color", "size")),
        ("shorts", ("none of them",)),
        ("backpack", ("none of them",)),
        ("topping", ("none of them",)),
        ("blast", ("none of them",)),
        ("", ("none of them",)),
    ],
)
def test_the_words_of_a_sentence(sentence: str, named: tuple[str, ...]):
    assert groups_of(sentence, 1, 100, 0)["words"] == named


@pytest.mark.parametrize(
    ("area", "size"),
    [
        (0, "under 1 %"),
        (99, "under 1 %"),
        (100, "1 to 4 %"),
        (399, "1 to 4 %"),
        (400, "4 to 16 %"),
        (1599, "4 to 16 %"),
        (1600, "over 16 %"),
        (10_000, "over 16 %"),
    ],
)
def test_sizes(area: int, size: str):
    assert groups_of("man", area, 10_000, 0)["size"] == (size,)
    assert "size" not in groups_of("man", area, 0, 0)


def test_lengths_and_others():
    lengths = [groups_of(" word" * count, 1, 9, 0)["length"][0] for count in range(1, 11)]
    assert lengths == ["1–2 words"] * 2 + ["3–4 words"] * 2 + ["5–7 words"] * 3 + ["8 or more"] * 3
    assert [groups_of("man", 1, 9, many)["others"] for many in (-1, 0, 1, 2, 3, 17)] == [
        ("not known",),
        ("0",),
        ("1",),
        ("2",),
        ("3 or more",),
        ("3 or more",),
    ]


@pytest.fixture
def rows() -> Rows:
    random = np.random.default_rng(0)
    count = 200
    union, edges = random.integers(1, 500, count), random.integers(0, 50, count)
    union[:5] = edges[:5] = 0
    counts = np.stack(
        [
            np.arange(count),
            random.integers(0, union + 1),
            union,
            random.integers(0, edges + 1),
            edges,
        ],
        axis=1,
    )
    sentences = tuple(
        str(words)
        for words in random.choice(
            ["left man", "red car", "dog", "a <b> on the second red chair"], count
        )
    )
    return Rows(
        names=("s",) * count,
        sentences=sentences,
        counts=counts,
        image_ids=random.integers(0, 50, count),
        area=random.integers(0, 4000, count),
        pixels=np.full(count, 10_000),
        same_class=random.choice([-1, 0, 1, 2, 5], count, p=[0.05, 0.4, 0.25, 0.25, 0.05]),
    )


@pytest.mark.parametrize("empty", ["one", "zero"])
def test_every_line_is_the_score_of_its_rows_alone(rows: Rows, empty: str):
    page = group_section("val & more", rows, empty)
    assert "val &amp; more" in page
    for kind, (heading, labels, _) in KINDS.items():
        table = page[page.index(f"<h3>{heading}</h3>") :].partition("</table>")[0]
        total = 0
        for label in labels:
            members = [
                number
                for number in range(len(rows))
                if label
                in groups_of(
                    rows.sentences[number],
                    rows.area[number],
                    rows.pixels[number],
                    rows.same_class[number],
                )[kind]
            ]
            found = re.search(
                rf'<tr><th>{label}(?P<few> <span class="few">few</span>)?</th><td>(?P<n>\d+)</td>(?P<cells>.*?)</tr>',
                table,
            )
            if not members:
                assert found is None
                continue
            expected = summarize(rows.counts[members], 0, empty=empty)
            assert int(found["n"]) == len(members) and (found["few"] is not None) == (
                len(members) < FEW_SAMPLES
            )
            shown = re.findall(r">([\d.]+)</td>", found["cells"])
            assert shown == [
                f"{100 * expected[metric]:.1f}"
                for metric in ("oIoU", "mIoU", "P@0.5", "P@0.9", "bIoU")
            ]
            total += len(members)
        assert total == len(rows) if kind != "words" else total > len(rows)
