"""Doubtful annotations: each kind is named and counted, real ones are not doubted."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from coupalign.data.masks import encode
from coupalign.data.packing.doubts import find_doubts
from coupalign.data.packing.refer import Referral, Sentence, read_annotation_set
from coupalign.data.records import UNKNOWN
from tests.unit.data.conftest import box
from tests.unit.data.packing.small_set import pack_quietly, recipe_of

REFERRAL = Referral(
    dataset="mine",
    split_by="own",
    split="val",
    ref_id=3,
    ann_id=7,
    image_id=1,
    category="thing",
    file_name="1.jpg",
    height=48,
    width=64,
    crowd=False,
    same_class=0,
    segmentation=[box(5, 5, 15, 10)],
    sentences=(Sentence(1, "Left.", "left"),),
    stated_area=150.0,
    stated_box=(5.0, 5.0, 15.0, 10.0),
)
NAME = "mine/own ref_id 3 (ann_id 7, image_id 1)"


@pytest.mark.parametrize(
    "changes, words",
    [
        # Polygons that were drawn on a larger copy of the picture.
        (
            {"segmentation": [box(100, 90, 60, 50)], "stated_box": (100.0, 90.0, 60.0, 50.0)},
            "masks are empty",
        ),
        ({"segmentation": [[0.1, 0.1, 0.5, 0.1, 0.5, 0.6]]}, "masks have no coordinate above 1"),
        ({"segmentation": encode(np.zeros((48, 64), bool))}, "masks are empty"),
        ({"stated_area": 3000.0}, r"disagree .*: 150 pixels, its area is 3,000"),
        ({"stated_area": 20.0}, "disagree"),
        (
            {"stated_box": (30.0, 20.0, 15.0, 10.0)},
            r"disagree .*: in box \[5, 5, 15, 10\], its bbox is \[30, 20, 15, 10\]",
        ),
        ({"same_class": UNKNOWN}, "marked iscrowd"),
        ({"sentences": (Sentence(1, ".", " "),)}, "refs have a sentence without a word"),
        ({"sentences": (Sentence(1, "?!", "\u200b"),)}, "refs have a sentence without a word"),
        ({"sentences": (Sentence(1, "x", "\U0001f600 ."),)}, "refs have a sentence without a word"),
    ],
)
def test_doubtful_ref_is_named_and_counted(changes: dict, words: str) -> None:
    doubtful = replace(REFERRAL, **changes)

    [line] = find_doubts([replace(REFERRAL, ref_id=1), doubtful])

    assert line.startswith("1 of 2 ")
    assert NAME in line
    assert re.search(words, line)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"stated_area": None, "stated_box": None},
        {"stated_area": 130.0, "stated_box": (4.0, 6.0, 17.0, 9.0)},
        # A thin diagonal, whose tool wrote the area of the box.
        {
            "segmentation": [[5, 5, 7, 5, 41, 41, 39, 41]],
            "stated_area": 36.0 * 36,
            "stated_box": (5.0, 5.0, 36.0, 36.0),
        },
        # Three pixels, of which a polygon may miss two.
        {
            "segmentation": [box(5, 5, 1, 1)],
            "stated_area": 3.0,
            "stated_box": (4.6, 4.7, 2.0, 1.5),
        },
    ],
)
def test_plausible_ref_is_not_doubted(changes: dict) -> None:
    assert find_doubts([replace(REFERRAL, **changes)]) == []


def test_many_doubts_are_counted_and_the_first_ones_listed() -> None:
    refs = [replace(REFERRAL, ref_id=number, stated_area=9999.0) for number in range(1000, 3500)]

    [line] = find_doubts(refs)

    assert line.startswith("2,500 of 2,500 masks disagree")
    assert "ref_id 1004" in line and "ref_id 1005" not in line and line.endswith("…")


def test_pack_warns_of_empty_masks(refer_root: Path, tmp_path: Path) -> None:
    for file in refer_root.glob("*/instances.json"):
        tree = json.loads(file.read_text())
        tree["annotations"][0]["segmentation"] = [box(500, 500, 9, 9)]
        file.write_text(json.dumps(tree))

    report = pack_quietly(recipe_of(refer_root), tmp_path / "out")

    warning = next(warning for warning in report.to_json()["warnings"] if "empty" in warning)
    assert warning.startswith("2 of 28 masks are empty")
    assert "refcoco/unc ref_id 0" in warning and "refcocog/umd ref_id 0" in warning


@pytest.mark.parametrize(
    "folder, dataset, split_by",
    [
        ("coco_pool", "refcoco", "unc"),
        ("mini_refcoco", "refcocog", "demo"),
        ("real_records", "refcoco", "unc"),
        ("real_records", "refcoco+", "unc"),
        ("real_records", "refcocog", "umd"),
        ("real_records", "refcocog", "google"),
    ],
)
def test_real_refs_are_not_doubted(
    real_data: Path, folder: str, dataset: str, split_by: str
) -> None:
    referrals, _ = read_annotation_set(real_data / folder, dataset, split_by)

    assert referrals and find_doubts(referrals) == []


def test_real_annotations_are_not_doubted(real_data: Path) -> None:
    tree = json.loads((real_data / "coco_pool/refcoco/instances.json").read_text())
    sizes = {image["id"]: (image["height"], image["width"]) for image in tree["images"]}

    refs = []
    for annotation in tree["annotations"]:
        height, width = sizes[annotation["image_id"]]
        refs.append(
            replace(
                REFERRAL,
                height=height,
                width=width,
                segmentation=annotation["segmentation"],
                stated_area=annotation["area"],
                stated_box=tuple(annotation["bbox"]),
            )
        )

    assert len(refs) > 2000 and find_doubts(refs) == []
