"""Object masks: COCO polygons and run lengths <-> arrays. The only user of pycocotools.

A mask is bool [H, W]. An `rle` is `{"size": [H, W], "counts": str}`, COCO's compressed run lengths: runs of zeros and ones in
turn, zeros first, column by column, packed into ASCII (cocoapi, common/maskApi.c, rleToString).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from pycocotools import mask as coco

CORNERS = 3  # a polygon of fewer points has no area
_SMALL = 1 << 16  # pixels of a mask below which it is quicker to decode all of it


def rle_from_segmentation(segmentation: list | dict, height: int, width: int) -> dict[str, Any]:
    """The mask of one COCO annotation: the union of its polygons, or its crowd run lengths, compressed or not.

    Raises:
        ValueError: `segmentation` is malformed; the message says how.
    """
    check_segmentation(segmentation, height, width)
    if isinstance(segmentation, list):
        polygons = [polygon for polygon in segmentation if len(polygon) >= 2 * CORNERS]
        return _readable(coco.merge(coco.frPyObjects(polygons, height, width), intersect=False))
    if isinstance(segmentation["counts"], list):
        return _readable(coco.frPyObjects(segmentation, height, width))
    return _readable(segmentation)


def check_segmentation(segmentation: Any, height: int, width: int) -> None:
    """Refuse what pycocotools would misread: it takes four numbers for a box and trusts run lengths.

    Raises:
        ValueError: odd or non-finite coordinates, no polygon with an area, run lengths that do not fill the image.
    """
    if isinstance(segmentation, dict):
        _check_runs(segmentation, height, width)
        return
    if not isinstance(segmentation, list) or not all(
        isinstance(polygon, list) for polygon in segmentation
    ):
        raise ValueError("segmentation is neither a list of polygons nor run lengths")
    for polygon in segmentation:
        if len(polygon) % 2 or not all(
            isinstance(v, (int, float)) and math.isfinite(v) for v in polygon
        ):
            raise ValueError(
                f"a polygon of {len(polygon)} values is not a list of finite x, y pairs"
            )
    if not any(len(polygon) >= 2 * CORNERS for polygon in segmentation):
        raise ValueError(f"segmentation has no polygon of {CORNERS} or more points")


def encode(mask: np.ndarray) -> dict[str, Any]:
    """Bool [H, W] -> rle."""
    assert mask.ndim == 2, mask.shape
    return _readable(coco.encode(np.asfortranarray(mask, dtype=np.uint8)))


def decode(rle: dict[str, Any]) -> np.ndarray:
    """Rle -> bool [H, W], C order."""
    return np.ascontiguousarray(coco.decode(_for_coco(rle))).view(bool)


def sample(rle: dict[str, Any], rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Some pixels of a mask: `decode(rle)[rows][:, columns]`, for rows and columns that ascend and may repeat.

    Returns:
        bool [len(rows), len(columns)].

    Raises:
        ValueError: the run lengths are damaged.
    """
    height, width = rle["size"]
    if height * width < _SMALL:
        return coco.decode(_for_coco(rle)).T.take(columns, 0).take(rows, 1).T.view(bool)
    runs = _read_runs(rle["counts"])
    if (runs < 0).any() or runs.sum() != height * width:
        raise ValueError(f"run lengths cover {runs.sum()} of {height * width} pixels")
    return _fill(np.cumsum(runs[:-1]), height, rows, columns)


def _fill(changes: np.ndarray, height: int, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """The sampled pixels of a mask whose value changes at these places, counted column by column; bool [len(rows), len(columns)].

    A change is marked at the first sampled row that it reaches, in each copy of its column. Going down from what the columns begin
    with, each row is then the row above with its marks exchanged: eight pixels at a time.
    """
    column, row = np.divmod(changes, height)
    first = np.searchsorted(columns, column)
    copies = np.searchsorted(columns, column, "right") - first
    marked_rows = np.repeat(np.searchsorted(rows, row), copies)  # len(rows): below the last one
    marked_columns = np.repeat(first - np.cumsum(copies) + copies, copies) + np.arange(copies.sum())
    marks = np.zeros((len(rows) + 1, -(-len(columns) // 8) * 8), np.uint8)
    marks[0, : len(columns)] = np.searchsorted(changes, columns * height) & 1
    np.bitwise_xor.at(marks.reshape(-1), marked_rows * marks.shape[1] + marked_columns, np.uint8(1))
    np.bitwise_xor.accumulate(marks.view(np.uint64), 0, out=marks.view(np.uint64))
    return marks[:-1, : len(columns)].view(bool)


def area(rle: dict[str, Any]) -> int:
    """Pixels of the mask, without decoding it."""
    return int(coco.area(_for_coco(rle)))


def _check_runs(rle: dict[str, Any], height: int, width: int) -> None:
    if list(rle.get("size", ())) != [height, width]:
        raise ValueError(
            f"run lengths are of size {rle.get('size')}, the image is [{height}, {width}]"
        )
    counts = rle.get("counts")
    if isinstance(counts, (str, bytes)):
        counts = _unpack_runs(
            counts.encode("ascii", "replace") if isinstance(counts, str) else counts
        )
    if not isinstance(counts, list) or not all(isinstance(run, int) and run >= 0 for run in counts):
        raise ValueError("run lengths are not whole numbers")
    if sum(counts) != height * width:
        raise ValueError(f"run lengths cover {sum(counts)} of {height * width} pixels")


def _unpack_runs(text: bytes) -> list[int]:
    """The runs in a compressed string: 5 bits a byte, low first, 0x20 = more follow; from the fourth on, differences."""
    runs: list[int] = []
    value = shift = 0
    for byte in text:
        byte -= 48
        if not 0 <= byte < 64:
            raise ValueError("compressed run lengths hold a foreign byte")
        value |= (byte & 0x1F) << shift
        shift += 5
        if byte & 0x20:
            continue
        if byte & 0x10:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = shift = 0
    if shift:
        raise ValueError("compressed run lengths are cut short")
    return runs


def _read_runs(text: str) -> np.ndarray:
    """`_unpack_runs` without a loop, int64 [runs]."""
    data = np.frombuffer(text.encode("ascii", "replace"), np.uint8).astype(np.int64) - 48
    last = np.flatnonzero(data & 0x20 == 0)  # the byte that ends each value
    if not len(last) or last[-1] != len(data) - 1 or data.min() < 0 or data.max() > 63:
        raise ValueError("compressed run lengths are cut short or hold a foreign byte")
    first = np.concatenate([[0], last[:-1] + 1])
    place = np.arange(len(data)) - np.repeat(first, last - first + 1)
    runs = np.add.reduceat((data & 0x1F) << 5 * place, first)
    runs -= np.where(data[last] & 0x10, 1 << 5 * (last - first + 1), 0)
    for start in (1, 2):  # from the fourth on, differences to the last but one
        runs[start::2] = np.cumsum(runs[start::2])
    return runs


def _readable(rle: dict[str, Any]) -> dict[str, Any]:
    counts = rle["counts"]
    return {
        "size": [int(n) for n in rle["size"]],
        "counts": counts if isinstance(counts, str) else counts.decode("ascii"),
    }


def _for_coco(rle: dict[str, Any]) -> dict[str, Any]:
    return {"size": rle["size"], "counts": rle["counts"].encode("ascii")}
