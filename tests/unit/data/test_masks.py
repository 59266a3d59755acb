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
from coupalign.data.masks import (
    area,
    bounding_box,
    check_segmentation,
    decode,
    decode_at,
    encode,
    rle_from_segmentation,
)

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
        ([], "empty"),
        ([[1.0, 2.0, 3.0, 4.0]], "no polygon"),
        ([[1.0, 2.0, 3.0]], "pairs"),
        ([[1.0, 2.0, 3.0, float("nan"), 5.0, 6.0]], "coordinate nan"),
        ([[1.0, 2.0, 3.0, "4", 5.0, 6.0]], "holds '4', which is not a number"),
        ([[1.0, 2.0, 3.0, True, 5.0, 6.0]], "holds True"),
        ([1.0, 2.0], "neither.*a polygon is a list of its own"),
        ("poly", "neither"),
        ([None], "neither"),
        ({"size": [4, 5], "counts": [19]}, "19 of 20"),
        ({"size": [5, 4], "counts": [20]}, "size"),
        ({"size": [4, 5], "counts": [21, -1]}, "whole"),
        ({"size": [4, 5], "counts": "\u00e9"}, "foreign"),
        ({"size": [4, 5], "counts": [19, True]}, "whole"),
        ({"size": [4, 5], "counts": [10.0, 10.0]}, "whole"),
        ({"size": [4, 5], "counts": [10**5000]}, "bits"),
        ({"size": [4, 5], "counts": ""}, "cut short"),
        ({"size": None, "counts": "d0"}, "size None"),
        ([{"size": [4, 5], "counts": [20]}, {"size": [4, 5], "counts": [19]}], "19 of 20"),
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


# --------------------------------------------------------------------------------- Far coordinates


@pytest.mark.parametrize("value", [1e6, 5e8, -5e8, 1e9, 1e10, 1e300, float("inf"), 10**400])
def test_far_coordinate_never_reaches_pycocotools(value: float) -> None:
    """It ends the process, or fills its memory (cocoapi, issue 380)."""
    polygon = [5.0, 5.0, value, 5.0, value, 20.0, 5.0, 20.0]

    with pytest.raises(ValueError, match="coordinates are finite .* at most 100,000 away"):
        rle_from_segmentation([polygon], 48, 64)


def test_polygon_beyond_the_picture_is_cut_off_at_its_edges() -> None:
    truth = np.zeros((48, 64), bool)
    truth[5:20, 5:] = True

    far = rle_from_segmentation([[5.0, 5, 1e5, 5, 1e5, 20, 5, 20]], 48, 64)
    outside = rle_from_segmentation([rectangle(100, 90, 60, 50)], 48, 64)

    assert np.array_equal(decode(far), truth)
    assert area(outside) == 0


def test_outline_that_would_fill_the_memory_is_refused() -> None:
    zigzag = [value for step in range(1000) for value in (step, 1e5 * (step % 2))]

    with pytest.raises(ValueError, match="outline of a polygon is 100,000,000 pixels long"):
        check_segmentation([zigzag], 48, 64)


# ----------------------------------------------------------------------------------- Lists of rles


@given(st.lists(hnp.arrays(bool, (9, 11)), min_size=1, max_size=4), st.booleans())
def test_list_of_run_lengths_and_polygons_is_united(parts: list[np.ndarray], plain: bool) -> None:
    """RRS-IS-D and RefCLEF have a list with one rle."""
    rles = [encode(part) for part in parts]
    if plain:
        rles[0]["counts"] = slow_runs(parts[0])
    square = np.zeros((9, 11), bool)
    square[2:5, 3:7] = True

    alone = rle_from_segmentation(rles, 9, 11)
    with_polygon = rle_from_segmentation([rectangle(3, 2, 4, 3), *rles], 9, 11)

    union = np.any(parts, axis=0)
    assert np.array_equal(decode(alone), union)
    assert np.array_equal(decode(with_polygon), union | square)


@given(MASKS)
def test_bounding_box_is_the_smallest_one(mask: np.ndarray) -> None:
    x, y, width, height = bounding_box(encode(mask))

    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not mask.any():
        assert (x, y, width, height) == (0, 0, 0, 0)
    else:
        assert (x, y) == (columns[0], rows[0])
        assert (x + width - 1, y + height - 1) == (columns[-1], rows[-1])


# ------------------------------------------------------------------------------ Damaged run lengths


def slow_unpack(text: bytes) -> list[int]:
    """Unpack compressed run lengths byte by byte, as cocoapi's rleFrString does."""
    runs: list[int] = []
    value = shift = 0
    for byte in text:
        byte -= 48
        if not 0 <= byte < 64:
            raise ValueError("foreign byte")
        value |= (byte & 0x1F) << shift
        shift += 5
        if byte & 0x20:
            continue
        if byte & 0x10:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = shift = 0
    if shift or not runs:
        raise ValueError("cut short")
    return runs


def slow_decode(rle: dict) -> np.ndarray:
    """Decode pixel by pixel; bool [H, W]."""
    height, width = rle["size"]
    runs = slow_unpack(rle["counts"].encode("ascii"))
    if min(runs) < 0 or sum(runs) != height * width:
        raise ValueError("the runs do not fill the image")
    pixels = [number % 2 == 1 for number, run in enumerate(runs) for _ in range(run)]
    return np.array(pixels, bool).reshape(width, height).T


@st.composite
def damaged_rles(draw: st.DrawFn) -> dict:
    """Run lengths of random masks, with none or some characters changed."""
    noise = np.random.default_rng(draw(st.integers(0, 10**6)))
    height, width = noise.integers(1, 13, 2)
    rle = encode(noise.random((height, width)) < draw(st.sampled_from([0, 0.1, 0.5, 1])))
    characters = list(rle["counts"])
    kind = draw(st.sampled_from(["none", "bit", "characters", "cut", "text", "size"]))
    if kind == "bit":
        at = draw(st.integers(0, len(characters) - 1))
        characters[at] = chr(ord(characters[at]) ^ 1 << draw(st.integers(0, 7)))
    if kind == "characters":
        for _ in range(draw(st.integers(1, 3))):
            at = draw(st.integers(0, len(characters) - 1))
            characters[at] = chr(draw(st.integers(48, 111)))
    if kind == "cut":
        del characters[draw(st.integers(0, len(characters) - 1)) :]
    if kind == "text":
        characters = list(draw(st.text(alphabet="0PoO`~é\\ \x00", max_size=6)))
    if kind == "size":
        rle["size"] = [draw(st.integers(-1, 12)), draw(st.integers(-1, 12))]
    return {**rle, "counts": "".join(characters)}


@settings(max_examples=500)
@given(damaged_rles())
def test_run_lengths_are_decoded_as_slowly_or_refused(rle: dict) -> None:
    """pycocotools leaves uninitialized memory where run lengths end before the image does."""
    height, width = rle["size"]
    rows, columns = np.arange(max(height, 0)), np.arange(max(width, 0))
    try:
        truth = slow_decode(rle)
        is_image = min(height, width) > 0
    except ValueError:
        is_image = False

    if is_image:
        assert np.array_equal(decode(rle), truth)
        assert np.array_equal(decode_at(rle, rows, columns), truth)
        assert area(rle) == truth.sum()
        check_segmentation(rle, height, width)
    else:
        for refuse in (decode, area, bounding_box, lambda rle: decode_at(rle, rows, columns)):
            with pytest.raises(ValueError):
                refuse(rle)


@pytest.mark.parametrize(
    "rle",
    [
        {"size": [4, 5], "counts": "P" * 40 + "0"},
        {"size": [4, 5], "counts": b"d0"},
        {"size": [4, 5, 1], "counts": "d0"},
        {"size": [4.0, 5.0], "counts": "d0"},
        {"size": [True, 20], "counts": "d0"},
        {"size": [4, 70000], "counts": "d0"},
        {"size": (4, 5), "counts": "d0"},
        {"size": [4, 5]},
        {"counts": "d0"},
    ],
)
def test_rle_of_wrong_types_is_refused(rle: dict) -> None:
    for refuse in (decode, area, bounding_box):
        with pytest.raises(ValueError, match="size|height|width|large"):
            refuse(rle)


@given(st.integers(1, 60), st.integers(1, 60), st.sampled_from([0, 0.02, 0.5, 1]))
def test_unpacking_equals_the_loop(height: int, width: int, share: float):
    noise = np.random.default_rng(height * 61 + width).random((height, width))

    text = masks.encode(noise < share)["counts"].encode()

    assert masks._unpack_runs(text).tolist() == slow_unpack(text)


@pytest.mark.parametrize(
    "counts, message",
    [
        ("", "cut short"),
        ("o", "cut short"),
        ("0 ", "foreign"),
        ("0~~", "foreign"),
        ("0é", "foreign"),
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
