"""Object masks: COCO polygons and run lengths <-> arrays. The only user of pycocotools.

A mask is bool [H, W]. An `rle` is `{"size": [H, W], "counts": str}`, COCO's compressed run lengths:
the lengths of runs of zeros and ones in turn, zeros first, column by column, packed into ASCII
(cocoapi, common/maskApi.c, rleToString; shards/README.md describes the packing).

pycocotools trusts its input. Pixels beyond run lengths that end early are uninitialized memory, and
a far coordinate ends the process. So everything is checked here before it gets there.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from pycocotools import mask as coco

from coupalign.errors import quoted

MIN_CORNERS = 3  # a polygon with fewer points has no area
MAX_SIDE = 65_535  # pixels; JPEG has no larger pictures

# pycocotools walks along the outline of a polygon in steps of a fifth of a pixel, and keeps each.
MAX_COORDINATE = 100_000  # pixels, on both sides of zero
MAX_OUTLINE = 2_000_000  # pixels

# A packed run length has 5 bits per byte, and no image has more than MAX_SIDE ** 2 pixels.
MAX_RUN_BYTES = 7

# Decoding a whole mask of fewer pixels is faster than decoding some of its pixels.
SMALL_MASK = 1 << 16


def rle_from_segmentation(segmentation: list | dict, height: int, width: int) -> dict[str, Any]:
    """Convert the mask of a COCO annotation to an rle.

    Args:
        segmentation: run lengths, compressed or not; or a list of polygons and run lengths, whose
            union is the mask.

    Raises:
        ValueError: `segmentation` is malformed. The message says how.
    """
    check_segmentation(segmentation, height, width)
    if isinstance(segmentation, dict):
        return _compressed(segmentation)

    polygons = [part for part in segmentation if _has_corners(part)]
    separate = coco.frPyObjects(polygons, height, width) if polygons else []
    separate += [_compressed(part) for part in segmentation if isinstance(part, dict)]
    return _counts_to_str(coco.merge(separate, intersect=False))


def check_segmentation(segmentation: Any, height: int, width: int) -> None:
    """Refuse what pycocotools would misread.

    It takes a list of four numbers for a box, and it trusts run lengths and coordinates.

    Raises:
        ValueError: coordinates are not finite, far away or not pairs, nothing has an area, or the
            run lengths do not fill the image.
    """
    if isinstance(segmentation, dict):
        _check_run_lengths(segmentation, height, width)
        return

    if not isinstance(segmentation, list):
        raise ValueError(
            "segmentation is neither a list of polygons nor run lengths, "
            f"it is {quoted(segmentation)}"
        )
    if not segmentation:
        raise ValueError("segmentation is empty: the object has no polygon and no run lengths")

    for part in segmentation:
        if isinstance(part, dict):
            _check_run_lengths(part, height, width)
        elif isinstance(part, list):
            _check_polygon(part)
        else:
            raise ValueError(
                "segmentation is neither a list of polygons nor run lengths, it is a list with "
                f"{quoted(part)}; a polygon is a list of its own, [[x, y, x, y, …]]"
            )

    if not any(isinstance(part, dict) or _has_corners(part) for part in segmentation):
        raise ValueError(f"segmentation has no polygon of {MIN_CORNERS} or more points")


def check_size(height: Any, width: Any) -> None:
    """Refuse what is not the height and width of a picture.

    Raises:
        ValueError: one of them is not a whole number from 1 to MAX_SIDE.
    """
    for name, side in (("height", height), ("width", width)):
        if type(side) is not int or not 0 < side <= MAX_SIDE:
            raise ValueError(f"{name} is {quoted(side)}, not a number of pixels up to {MAX_SIDE}")


def encode(mask: np.ndarray) -> dict[str, Any]:
    """Convert a mask, bool [H, W], to an rle."""
    assert mask.ndim == 2, mask.shape
    return _counts_to_str(coco.encode(np.asfortranarray(mask, dtype=np.uint8)))


def decode(rle: dict[str, Any]) -> np.ndarray:
    """Convert an rle to a mask, bool [H, W], C order.

    Raises:
        ValueError: the run lengths are damaged or do not fill the image.
    """
    _runs_of(rle)
    return np.ascontiguousarray(coco.decode(_counts_to_bytes(rle))).view(bool)


def decode_at(rle: dict[str, Any], rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Decode some pixels of a mask: `decode(rle)[rows][:, columns]`, but faster.

    Args:
        rows: int [h], ascending; a row may repeat.
        columns: int [w], ascending; a column may repeat.

    Returns:
        bool [h, w].

    Raises:
        ValueError: the run lengths are damaged or do not fill the image.
    """
    runs = _runs_of(rle)
    height, width = rle["size"]
    if height * width < SMALL_MASK:
        by_column = coco.decode(_counts_to_bytes(rle)).T  # contiguous in memory
        return by_column.take(columns, 0).take(rows, 1).T.view(bool)

    changes = np.cumsum(runs[:-1])
    return _pixels_between_changes(changes, height, rows, columns)


def area(rle: dict[str, Any]) -> int:
    """Count the pixels of a mask without decoding it.

    Raises:
        ValueError: the run lengths are damaged or do not fill the image.
    """
    return int(_runs_of(rle)[1::2].sum())


def bounding_box(rle: dict[str, Any]) -> tuple[int, int, int, int]:
    """Return x, y, width and height of the smallest box around a mask; zeros if it is empty.

    Raises:
        ValueError: the run lengths are damaged or do not fill the image.
    """
    _runs_of(rle)
    x, y, width, height = coco.toBbox(_counts_to_bytes(rle)).astype(int).tolist()
    return x, y, width, height


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


def _has_corners(part: list | dict) -> bool:
    """Whether a part of a segmentation is a polygon that may have an area."""
    return isinstance(part, list) and len(part) >= 2 * MIN_CORNERS


def _check_polygon(polygon: list) -> None:
    for value in polygon:
        if type(value) not in (int, float):
            raise ValueError(f"a polygon holds {quoted(value)}, which is not a number")

        # Not finite numbers fail this comparison, too.
        if not -MAX_COORDINATE <= value <= MAX_COORDINATE:
            raise ValueError(
                f"a polygon holds the coordinate {quoted(value)}; coordinates are finite numbers "
                f"of pixels, at most {MAX_COORDINATE:,} away from zero"
            )

    if len(polygon) % 2:
        raise ValueError(f"a polygon of {len(polygon)} values is not a list of x, y pairs")

    # The exact length is needed only where a coarse bound exceeds the limit.
    if polygon and len(polygon) * (max(polygon) - min(polygon)) > MAX_OUTLINE:
        corners = np.array(polygon, float).reshape(-1, 2)
        steps = np.abs(corners - np.roll(corners, -1, axis=0)).max(axis=1)
        if steps.sum() > MAX_OUTLINE:
            raise ValueError(
                f"the outline of a polygon is {steps.sum():,.0f} pixels long, "
                f"more than {MAX_OUTLINE:,}"
            )


def _check_run_lengths(rle: dict[str, Any], height: int, width: int) -> None:
    if rle.get("size") != [height, width]:
        raise ValueError(
            f"run lengths are of size {quoted(rle.get('size'))}, the image is [{height}, {width}]"
        )

    runs = rle.get("counts")
    if isinstance(runs, str):
        _runs_of(rle)
        return

    if not isinstance(runs, list) or not all(type(run) is int and run >= 0 for run in runs):
        raise ValueError("run lengths are neither a text nor whole numbers")
    if sum(runs) != height * width:
        raise ValueError(f"run lengths cover {quoted(sum(runs))} of {height * width} pixels")


def _runs_of(rle: dict[str, Any]) -> np.ndarray:
    """Unpack the run lengths of an rle and check that they fill its image; int64 [runs]."""
    size, counts = rle.get("size"), rle.get("counts")
    if type(size) is not list or len(size) != 2 or type(counts) is not str:
        raise ValueError("the mask is not an rle with a size [H, W] and a text of counts")
    height, width = size
    check_size(height, width)

    try:
        runs = _unpack_runs(counts.encode("ascii"))
    except UnicodeEncodeError:
        raise ValueError("compressed run lengths hold a foreign character") from None

    # At most 35 bits per run, so the sum cannot overflow.
    pixels = height * width
    if runs.min() < 0 or runs.sum() != pixels:
        raise ValueError(f"run lengths cover {runs.sum()} of {pixels} pixels")
    return runs


# Cached, because a loader checks the area of a mask before it decodes it.
@lru_cache(maxsize=256)
def _unpack_runs(text: bytes) -> np.ndarray:
    """Unpack compressed run lengths; int64 [runs], read-only.

    A byte minus 48 holds 5 bits of a value, low bits first. 0x20 means that more follow; 0x10 in
    the last byte is the sign. From the fourth value on, values are differences to the last but one.
    """
    data = np.frombuffer(text, np.uint8).astype(np.int64) - 48

    # Find the first and the last byte of each value.
    last = np.flatnonzero(data & 0x20 == 0)
    if not len(last) or last[-1] != len(data) - 1 or data.min() < 0 or data.max() > 63:
        raise ValueError("compressed run lengths are cut short or hold a foreign byte")
    first = np.concatenate([[0], last[:-1] + 1])
    lengths = last - first + 1
    if lengths.max() > MAX_RUN_BYTES:
        raise ValueError("compressed run lengths hold a number that is too large")

    # Put the 5 bits of each byte in place, and add up the bytes of a value.
    byte_in_value = np.arange(len(data)) - np.repeat(first, lengths)
    runs = np.add.reduceat((data & 0x1F) << 5 * byte_in_value, first)

    # Apply the sign.
    runs -= np.where(data[last] & 0x10, 1 << 5 * lengths, 0)

    # From the fourth value on, undo the differences to the last but one.
    for start in (1, 2):
        runs[start::2] = np.cumsum(runs[start::2])
    runs.flags.writeable = False
    return runs


def _compressed(rle: dict[str, Any]) -> dict[str, Any]:
    """Compress run lengths that were checked and may be plain numbers."""
    if isinstance(rle["counts"], list):
        height, width = rle["size"]
        rle = coco.frPyObjects(rle, height, width)
    return _counts_to_str(rle)


def _counts_to_str(rle: dict[str, Any]) -> dict[str, Any]:
    """Make an rle of pycocotools fit for JSON."""
    counts = rle["counts"]
    if not isinstance(counts, str):
        counts = counts.decode("ascii")
    return {"size": [int(side) for side in rle["size"]], "counts": counts}


def _counts_to_bytes(rle: dict[str, Any]) -> dict[str, Any]:
    """Make an rle fit for pycocotools."""
    return {"size": rle["size"], "counts": rle["counts"].encode("ascii")}
