"""Drawing: masks, polygons and pictures agree with each other."""

from __future__ import annotations

import numpy as np
import pytest

from coupalign.data import masks
from coupalign.data.refshapes import drawing


def fill_even_odd(polygons: list[list[int]], shape: tuple[int, int]) -> np.ndarray:
    """Rasterize polygons along pixel borders by the even-odd rule at pixel centers."""
    crossings = np.zeros(shape, int)
    for polygon in polygons:
        corners = list(zip(polygon[::2], polygon[1::2]))
        for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1]):
            if x0 == x1:
                crossings[min(y0, y1) : max(y0, y1), x0:] += 1
    return crossings % 2 == 1


def test_traced_polygons_give_back_any_mask() -> None:
    """Random masks of odd sizes, with holes and with pixels that touch at corners."""
    rng = np.random.default_rng(0)
    for _ in range(150):
        height, width = (int(n) for n in rng.integers(1, 14, 2))
        mask = rng.random((height, width)) < rng.choice((0.1, 0.3, 0.6, 0.9, 1.0))

        polygons = drawing.trace_polygons(mask)

        assert np.array_equal(fill_even_odd(polygons, mask.shape), mask)
        if mask.any():
            rle = masks.rle_from_segmentation(polygons, height, width)
            assert np.array_equal(masks.decode(rle), mask)
        else:
            assert polygons == []


def test_picture_has_the_paint_of_the_object_inside_its_mask() -> None:
    rng = np.random.default_rng(3)
    circle = drawing.SceneObject(
        shape="circle",
        color="red",
        size="big",
        x=40,
        y=50,
        radius=18,
        angle=0,
        paint=(221, 38, 42),
    )
    background = np.full((96, 96, 3), 128, np.float32)

    labels = drawing.draw_labels([circle], [], [], 96)
    mask = drawing.visible_masks(labels, 1)[0]
    picture = np.asarray(drawing.colorize(labels, [circle], [], background, rng), float)

    # The tolerances leave room for uneven light, noise and the rim.
    assert mask.sum() == pytest.approx(drawing.full_area(circle), rel=0.02)
    y, x = np.mgrid[:96, :96] + 0.5
    distance = np.hypot(x - 40, y - 50)
    inside, outside = distance < 16, ~mask & (distance > 20)
    assert np.abs(picture[inside].mean(0) - circle.paint).max() < 20
    assert np.abs(picture[outside].mean(0) - 128).max() < 10
