"""Groups of samples: which ones a sample is in, and that their scores are of their rows alone."""

from __future__ import annotations

import re

import numpy as np
import pytest

from coupalign.evaluation.metrics import summarize
from coupalign.evaluation.rows import Rows
from coupalign.report.groups import FEW_SAMPLES, KINDS, group_section, groups_of


@pytest.mark.parametrize(
    ("sentence", "kinds"),
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
def test_words_of_sentence_are_recognized(sentence: str, kinds: tuple[str, ...]):
    assert groups_of(sentence, 1, 100, 0)["words"] == kinds


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
def test_size_is_share_of_image(area: int, size: str):
    assert groups_of("man", area, 10_000, 0)["size"] == (size,)


def test_size_is_unknown_without_pixels():
    assert "size" not in groups_of("man", 99, 0, 0)


def test_length_counts_words():
    lengths = [groups_of(" word" * words, 1, 9, 0)["length"][0] for words in range(1, 11)]

    assert lengths == ["1–2 words"] * 2 + ["3–4 words"] * 2 + ["5–7 words"] * 3 + ["8 or more"] * 3


@pytest.mark.parametrize(
    ("same_class", "label"),
    [(-1, "not known"), (0, "0"), (1, "1"), (2, "2"), (3, "3 or more"), (17, "3 or more")],
)
def test_others_count_objects_of_same_class(same_class: int, label: str):
    assert groups_of("man", 1, 9, same_class)["others"] == (label,)


@pytest.fixture
def rows() -> Rows:
    random = np.random.default_rng(0)
    samples = 200
    union, band_union = random.integers(1, 500, samples), random.integers(0, 50, samples)
    union[:5] = band_union[:5] = 0
    intersection = random.integers(0, union + 1)
    band_intersection = random.integers(0, band_union + 1)

    texts = ["left man", "red car", "dog", "a <b> on the second red chair"]
    return Rows(
        names=("s",) * samples,
        sentences=tuple(str(text) for text in random.choice(texts, samples)),
        counts=np.column_stack(
            [np.arange(samples), intersection, union, band_intersection, band_union]
        ),
        image_ids=random.integers(0, 50, samples),
        area=random.integers(0, 4000, samples),
        pixels=np.full(samples, 10_000),
        same_class=random.choice([-1, 0, 1, 2, 5], samples, p=[0.05, 0.4, 0.25, 0.25, 0.05]),
    )


def members_of(rows: Rows, kind: str, label: str) -> list[int]:
    """Indexes of the rows that are in a group."""
    members = []
    for index, sentence in enumerate(rows.sentences):
        facts = (rows.area[index], rows.pixels[index], rows.same_class[index])
        if label in groups_of(sentence, *facts)[kind]:
            members.append(index)
    return members


def find_line(table: str, label: str) -> re.Match[str] | None:
    few = r'(?P<few> <span class="few">few</span>)?'
    pattern = rf"<tr><th>{label}{few}</th><td>(?P<n>\d+)</td>(?P<cells>.*?)</tr>"
    return re.search(pattern, table)


@pytest.mark.parametrize("iou_rule", ["one", "zero", "strict"])
def test_each_line_is_score_of_its_rows_alone(rows: Rows, iou_rule: str):
    page = group_section("val & more", rows, iou_rule)

    assert "val &amp; more" in page
    for kind, (heading, labels, _) in KINDS.items():
        table = page[page.index(f"<h3>{heading}</h3>") :].partition("</table>")[0]
        total = 0
        for label in labels:
            members = members_of(rows, kind, label)
            line = find_line(table, label)
            if not members:
                assert line is None
                continue

            assert int(line["n"]) == len(members)
            assert (line["few"] is not None) == (len(members) < FEW_SAMPLES)
            scores = summarize(rows.counts[members], 0, iou_rule=iou_rule)
            metrics = ("oIoU", "mIoU", "P@0.5", "P@0.9", "bIoU")
            shown = re.findall(r">([\d.]+)</td>", line["cells"])
            assert shown == [f"{100 * scores[metric]:.1f}" for metric in metrics]
            total += len(members)

        # A sentence with several kinds of words counts for each of them.
        assert total > len(rows) if kind == "words" else total == len(rows)
