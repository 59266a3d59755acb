"""Object masks: COCO polygons and run lengths <-> arrays. The only user of pycocotools.

A mask is bool [H, W]. An `rle` is `{"size": [H, W], "counts": str}`, COCO's compressed run lengths: runs of zeros and ones in
turn, zeros first, column by column, packed into ASCII (cocoapi, common/maskApi.c, rleToString).
"""
from __future__ import annotations

import math
from typing import Any

import numpy as np
from pycocotools import mask as coco

CORNERS = 3   # a polygon of fewer points has no area


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
    if not isinstance(segmentation, list) or not all(isinstance(polygon, list) for polygon in segmentation):
        raise ValueError("segmentation is neither a list of polygons nor run lengths")
    for polygon in segmentation:
        if len(polygon) % 2 or not all(isinstance(v, (int, float)) and math.isfinite(v) for v in polygon):
            raise ValueError(f"a polygon of {len(polygon)} values is not a list of finite x, y pairs")
    if not any(len(polygon) >= 2 * CORNERS for polygon in segmentation):
        raise ValueError(f"segmentation has no polygon of {CORNERS} or more points")


def encode(mask: np.ndarray) -> dict[str, Any]:
    """Bool [H, W] -> rle."""
    assert mask.ndim == 2, mask.shape
    return _readable(coco.encode(np.asfortranarray(mask, dtype=np.uint8)))


def decode(rle: dict[str, Any]) -> np.ndarray:
    """Rle -> bool [H, W], C order."""
    return np.ascontiguousarray(coco.decode(_for_coco(rle))).astype(bool)


def area(rle: dict[str, Any]) -> int:
    """Pixels of the mask, without decoding it."""
    return int(coco.area(_for_coco(rle)))


def _check_runs(rle: dict[str, Any], height: int, width: int) -> None:
    if list(rle.get("size", ())) != [height, width]:
        raise ValueError(f"run lengths are of size {rle.get('size')}, the image is [{height}, {width}]")
    counts = rle.get("counts")
    if isinstance(counts, (str, bytes)):
        counts = _unpack_runs(counts.encode("ascii", "replace") if isinstance(counts, str) else counts)
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


def _readable(rle: dict[str, Any]) -> dict[str, Any]:
    counts = rle["counts"]
    return {"size": [int(n) for n in rle["size"]], "counts": counts if isinstance(counts, str) else counts.decode("ascii")}


def _for_coco(rle: dict[str, Any]) -> dict[str, Any]:
    return {"size": rle["size"], "counts": rle["counts"].encode("ascii")}
