"""Masks compared with slow arithmetic in numpy."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from coupalign.data import masks
from coupalign.data.masks import area, check_segmentation, decode, encode, rle_from_segmentation

MASKS = hnp.arrays(bool, st.tuples(st.integers(1, 40), st.integers(1, 40)))


def slow_runs(mask: np.ndarray) -> list[int]:
    """Run lengths by counting, column by column, zeros first."""
    runs, value = [0], False
    for pixel in mask.flatten(order="F"):
        if pixel != value:
            runs.append(0)
            value = not value
        runs[-1] += 1
    return runs


def rectangle(x: int, y: int, w: int, h: int) -> list[float]:
    return [float(v) for v in (x, y, x, y + h, x + w, y + h, x + w, y)]


@given(MASKS)
def test_decode_undoes_encode(mask: np.ndarray) -> None:
    rle = json.loads(json.dumps(encode(mask)))

    assert rle["size"] == list(mask.shape)
    assert decode(rle).dtype == bool and np.array_equal(decode(rle), mask)
    assert area(rle) == mask.sum()


@given(MASKS)
def test_run_lengths_may_be_plain_or_compressed(mask: np.ndarray) -> None:
    height, width = mask.shape
    segmentation = {"size": [height, width], "counts": slow_runs(mask)}

    plain = rle_from_segmentation(segmentation, height, width)

    assert np.array_equal(decode(plain), mask)
    assert rle_from_segmentation(encode(mask), height, width) == encode(mask) == plain


@given(
    st.lists(
        st.tuples(st.integers(0, 30), st.integers(0, 20), st.integers(1, 12), st.integers(1, 9)),
        min_size=1,
        max_size=5,
    )
)
def test_polygons_are_united(boxes: list[tuple[int, int, int, int]]) -> None:
    truth = np.zeros((30, 44), bool)
    for x, y, w, h in boxes:
        truth[y : y + h, x : x + w] = True

    rle = rle_from_segmentation([rectangle(*box) for box in boxes], 30, 44)

    assert np.array_equal(decode(rle), truth)


def test_overlap_of_two_polygons_counts_once() -> None:
    """The refer toolbox adds polygons; LAVT, CARIS, DMMI, PolyFormer take 2 for background."""
    truth = np.zeros((9, 9), bool)
    truth[1:5, 1:5] = truth[3:7, 3:7] = True

    rle = rle_from_segmentation([rectangle(1, 1, 4, 4), rectangle(3, 3, 4, 4)], 9, 9)

    assert np.array_equal(decode(rle), truth)
    assert area(rle) == 16 + 16 - 4


@settings(max_examples=40)
@given(st.lists(st.tuples(st.floats(0, 40), st.floats(0, 30)), min_size=3, max_size=3))
def test_triangle_agrees_with_geometry_away_from_its_edges(
    corners: list[tuple[float, float]],
) -> None:
    points = np.array(corners)

    mask = decode(rle_from_segmentation([points.flatten().tolist()], 32, 42))

    # For each edge: on which side of it a pixel is, and how far away.
    x, y = np.meshgrid(np.arange(42) + 0.5, np.arange(32) + 0.5)
    signed, distance = [], []
    for a, b in zip(points, np.roll(points, -1, axis=0)):
        side = (b[0] - a[0]) * (y - a[1]) - (b[1] - a[1]) * (x - a[0])
        length2 = max(float(((b - a) ** 2).sum()), 1e-12)
        t = np.clip(((x - a[0]) * (b[0] - a[0]) + (y - a[1]) * (b[1] - a[1])) / length2, 0, 1)
        signed.append(side)
        distance.append(np.hypot(x - a[0] - t * (b[0] - a[0]), y - a[1] - t * (b[1] - a[1])))

    inside = np.all(np.array(signed) > 0, axis=0) | np.all(np.array(signed) < 0, axis=0)
    clear = np.min(distance, axis=0) > 1.5
    assert np.array_equal(mask[clear], inside[clear])


def test_polygon_without_area_is_left_out() -> None:
    line = [3.0, 3.0, 8.0, 8.0]

    rle = rle_from_segmentation([line, rectangle(1, 1, 4, 5)], 20, 20)

    assert area(rle) == 20


@pytest.mark.parametrize(
    "segmentation, message",
    [
        ([], "no polygon"),
        ([[1.0, 2.0, 3.0, 4.0]], "no polygon"),
        ([[1.0, 2.0, 3.0]], "pairs"),
        ([[1.0, 2.0, 3.0, float("nan"), 5.0, 6.0]], "pairs"),
        ([1.0, 2.0], "neither"),
        ("poly", "neither"),
        ({"size": [4, 5], "counts": [19]}, "19 of 20"),
        ({"size": [5, 4], "counts": [20]}, "size"),
        ({"size": [4, 5], "counts": [21, -1]}, "whole"),
        ({"size": [4, 5], "counts": "\u00e9"}, "20 pixels|foreign"),
        ({"size": [4, 5], "counts": "P"}, "cut short"),
        ({"size": [4, 5]}, "whole"),
    ],
)
def test_malformed_segmentation_is_refused(segmentation: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_segmentation(segmentation, 4, 5)


def test_overlapping_polygons_of_a_real_annotation_count_once(real_data: Path) -> None:
    instances = json.loads((real_data / "mini_refcoco/refcocog/instances.json").read_text())
    annotation = next(a for a in instances["annotations"] if a["id"] == 41510)
    image = next(i for i in instances["images"] if i["id"] == annotation["image_id"])
    size, polygons = (image["height"], image["width"]), annotation["segmentation"]

    united = area(rle_from_segmentation(polygons, *size))

    one_by_one = [area(rle_from_segmentation([polygon], *size)) for polygon in polygons]
    assert sum(one_by_one) - united == 106


def test_areas_of_real_annotations_agree(real_data: Path) -> None:
    instances = json.loads((real_data / "coco_pool/refcoco/instances.json").read_text())
    sizes = {image["id"]: (image["height"], image["width"]) for image in instances["images"]}

    ratios, crowds = [], 0
    for annotation in instances["annotations"]:
        segmentation = annotation["segmentation"]
        pixels = area(rle_from_segmentation(segmentation, *sizes[annotation["image_id"]]))
        if annotation["iscrowd"]:
            crowds += 1
            assert pixels == sum(segmentation["counts"][1::2])
        else:
            ratios.append(pixels / max(annotation["area"], 1))

    # `area` is the polygon's, not the pixels': small objects differ by up to a half.
    assert crowds and 0.99 < np.median(ratios) < 1.01


@given(st.integers(1, 60), st.integers(1, 60), st.sampled_from([0, 0.02, 0.5, 1]))
def test_fast_unpacking_equals_the_loop(height: int, width: int, share: float):
    noise = np.random.default_rng(height * 61 + width).random((height, width))

    text = masks.encode(noise < share)["counts"]

    assert masks._unpack_runs_fast(text).tolist() == masks._unpack_runs(text.encode())


@pytest.mark.parametrize(
    "counts, message",
    [
        ("", "cut short"),
        ("o", "cut short"),
        ("0 ", "foreign"),
        ("0~~", "foreign"),
        ("0é", "cover"),
        ("50", "cover 5 of"),
        ("0O", "cover .* of 100000 pixels"),
    ],
)
def test_decode_at_refuses_damaged_run_lengths(counts: str, message: str):
    with pytest.raises(ValueError, match=message):
        masks.decode_at({"size": [400, 250], "counts": counts}, np.arange(400), np.arange(250))


@pytest.mark.parametrize(
    "rows, columns",
    [
        (np.arange(400), np.arange(250)),
        (np.arange(0, 400, 7), np.repeat(np.arange(250), 2)),
        (np.array([399]), np.array([0, 0, 249])),
    ],
)
def test_decode_at_gives_the_pixels_of_the_mask(rows: np.ndarray, columns: np.ndarray):
    mask = np.zeros((400, 250), bool)
    mask[100:300, 50:] = mask[:, :3] = mask[399, 249] = True

    found = masks.decode_at(masks.encode(mask), rows, columns)

    assert np.array_equal(found, mask[rows][:, columns])
