"""Object masks: COCO polygons and run lengths <-> arrays. The only user of pycocotools.

A mask is bool [H, W]. An `rle` is `{"size": [H, W], "counts": str}`, COCO's compressed run lengths:
the lengths of runs of zeros and ones in turn, zeros first, column by column, packed into ASCII
(cocoapi, common/maskApi.c, rleToString; shards/README.md describes the packing).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from pycocotools import mask as coco

MIN_CORNERS = 3  # a polygon with fewer points has no area

# Decoding a whole mask of fewer pixels is faster than decoding some of its pixels.
SMALL_MASK = 1 << 16


def rle_from_segmentation(segmentation: list | dict, height: int, width: int) -> dict[str, Any]:
    """Convert the mask of a COCO annotation to an rle.

    Args:
        segmentation: a list of polygons, whose union is the mask; or the run lengths of a crowd,
            compressed or not.

    Raises:
        ValueError: `segmentation` is malformed. The message says how.
    """
    check_segmentation(segmentation, height, width)

    if isinstance(segmentation, list):
        polygons = [polygon for polygon in segmentation if len(polygon) >= 2 * MIN_CORNERS]
        separate = coco.frPyObjects(polygons, height, width)
        return _counts_to_str(coco.merge(separate, intersect=False))

    if isinstance(segmentation["counts"], list):
        return _counts_to_str(coco.frPyObjects(segmentation, height, width))

    return _counts_to_str(segmentation)


def check_segmentation(segmentation: Any, height: int, width: int) -> None:
    """Refuse what pycocotools would misread.

    It takes a list of four numbers for a box, and it trusts run lengths.

    Raises:
        ValueError: coordinates are not finite or not pairs, no polygon has an area, or the run
            lengths do not fill the image.
    """
    if isinstance(segmentation, dict):
        _check_run_lengths(segmentation, height, width)
        return

    is_list_of_lists = isinstance(segmentation, list) and all(
        isinstance(polygon, list) for polygon in segmentation
    )
    if not is_list_of_lists:
        raise ValueError("segmentation is neither a list of polygons nor run lengths")

    for polygon in segmentation:
        finite = all(isinstance(v, (int, float)) and math.isfinite(v) for v in polygon)
        if len(polygon) % 2 or not finite:
            raise ValueError(
                f"a polygon of {len(polygon)} values is not a list of finite x, y pairs"
            )

    if not any(len(polygon) >= 2 * MIN_CORNERS for polygon in segmentation):
        raise ValueError(f"segmentation has no polygon of {MIN_CORNERS} or more points")


def encode(mask: np.ndarray) -> dict[str, Any]:
    """Convert a mask, bool [H, W], to an rle."""
    assert mask.ndim == 2, mask.shape
    return _counts_to_str(coco.encode(np.asfortranarray(mask, dtype=np.uint8)))


def decode(rle: dict[str, Any]) -> np.ndarray:
    """Convert an rle to a mask, bool [H, W], C order."""
    return np.ascontiguousarray(coco.decode(_counts_to_bytes(rle))).view(bool)


def decode_at(rle: dict[str, Any], rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Decode some pixels of a mask: `decode(rle)[rows][:, columns]`, but faster.

    Args:
        rows: int [h], ascending; a row may repeat.
        columns: int [w], ascending; a column may repeat.

    Returns:
        bool [h, w].

    Raises:
        ValueError: the run lengths are damaged.
    """
    height, width = rle["size"]
    if height * width < SMALL_MASK:
        by_column = coco.decode(_counts_to_bytes(rle)).T  # contiguous in memory
        return by_column.take(columns, 0).take(rows, 1).T.view(bool)

    runs = _unpack_runs_fast(rle["counts"])
    if (runs < 0).any() or runs.sum() != height * width:
        raise ValueError(f"run lengths cover {runs.sum()} of {height * width} pixels")

    changes = np.cumsum(runs[:-1])
    return _pixels_between_changes(changes, height, rows, columns)


def area(rle: dict[str, Any]) -> int:
    """Count the pixels of a mask without decoding it."""
    return int(coco.area(_counts_to_bytes(rle)))


def _pixels_between_changes(
    changes: np.ndarray, height: int, rows: np.ndarray, columns: np.ndarray
) -> np.ndarray:
    """Compute some pixels of a mask from the positions at which its value changes.

    Each change is marked at the first requested row that it affects, in every copy of its column.
    Then, from top to bottom, a row is the row above, inverted where it has a mark.

    Args:
        changes: int64 [c], counted column by column, ascending.
        height: of the mask.
        rows: int [h], ascending.
        columns: int [w], ascending.

    Returns:
        bool [h, w].
    """
    # Padded to a multiple of eight columns, to process eight pixels at a time. The last row
    # collects the marks below all requested rows.
    padded_width = -(-len(columns) // 8) * 8
    marks = np.zeros((len(rows) + 1, padded_width), np.uint8)

    # A column begins with a one if the number of changes up to its first pixel is odd.
    marks[0, : len(columns)] = np.searchsorted(changes, columns * height) & 1

    # Find, for each change, the copies of its column: `first`, `first` + 1, ...
    column, row = np.divmod(changes, height)
    first = np.searchsorted(columns, column)
    copies = np.searchsorted(columns, column, "right") - first

    # Mark them. xor, because two changes may meet in the same pixel.
    marked_rows = np.repeat(np.searchsorted(rows, row), copies)
    number_in_all = np.arange(copies.sum())
    number_of_first = np.cumsum(copies) - copies
    marked_columns = np.repeat(first - number_of_first, copies) + number_in_all
    marked = marked_rows * padded_width + marked_columns
    np.bitwise_xor.at(marks.reshape(-1), marked, np.uint8(1))

    by_eight = marks.view(np.uint64)
    np.bitwise_xor.accumulate(by_eight, 0, out=by_eight)
    return marks[:-1, : len(columns)].view(bool)


def _check_run_lengths(rle: dict[str, Any], height: int, width: int) -> None:
    if list(rle.get("size", ())) != [height, width]:
        raise ValueError(
            f"run lengths are of size {rle.get('size')}, the image is [{height}, {width}]"
        )

    runs = rle.get("counts")
    if isinstance(runs, str):
        runs = runs.encode("ascii", "replace")
    if isinstance(runs, bytes):
        runs = _unpack_runs(runs)

    if not isinstance(runs, list) or not all(isinstance(run, int) and run >= 0 for run in runs):
        raise ValueError("run lengths are not whole numbers")
    if sum(runs) != height * width:
        raise ValueError(f"run lengths cover {sum(runs)} of {height * width} pixels")


def _unpack_runs(text: bytes) -> list[int]:
    """Unpack compressed run lengths, byte by byte.

    A byte minus 48 holds 5 bits of a value, low bits first. 0x20 means that more follow; 0x10 in
    the last byte is the sign. From the fourth value on, values are differences to the last but one.
    """
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


def _unpack_runs_fast(text: str) -> np.ndarray:
    """Do the same as `_unpack_runs`, without a loop over bytes; int64 [runs]."""
    data = np.frombuffer(text.encode("ascii", "replace"), np.uint8).astype(np.int64) - 48

    # Find the first and the last byte of each value.
    last = np.flatnonzero(data & 0x20 == 0)
    if not len(last) or last[-1] != len(data) - 1 or data.min() < 0 or data.max() > 63:
        raise ValueError("compressed run lengths are cut short or hold a foreign byte")
    first = np.concatenate([[0], last[:-1] + 1])
    lengths = last - first + 1

    # Put the 5 bits of each byte in place, and add up the bytes of a value.
    byte_in_value = np.arange(len(data)) - np.repeat(first, lengths)
    runs = np.add.reduceat((data & 0x1F) << 5 * byte_in_value, first)

    # Apply the sign.
    runs -= np.where(data[last] & 0x10, 1 << 5 * lengths, 0)

    # From the fourth value on, undo the differences to the last but one.
    for start in (1, 2):
        runs[start::2] = np.cumsum(runs[start::2])
    return runs


def _counts_to_str(rle: dict[str, Any]) -> dict[str, Any]:
    """Make an rle of pycocotools fit for JSON."""
    counts = rle["counts"]
    if not isinstance(counts, str):
        counts = counts.decode("ascii")
    return {"size": [int(side) for side in rle["size"]], "counts": counts}


def _counts_to_bytes(rle: dict[str, Any]) -> dict[str, Any]:
    """Make an rle fit for pycocotools."""
    return {"size": rle["size"], "counts": rle["counts"].encode("ascii")}
