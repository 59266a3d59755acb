"""Pictures: pixels that must change change, others do not; sizes, wrapping, whole files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from coupalign.report import drawing as viz


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)


@pytest.fixture
def mask() -> np.ndarray:
    mask = np.zeros((40, 60), bool)
    mask[10:30, 20:50] = True
    return mask


def test_overlay_tints_inside_outlines_the_border_and_leaves_the_rest(
    image: np.ndarray, mask: np.ndarray
) -> None:
    before = image.copy()
    drawn = viz.overlay(image, mask, (255, 0, 0), alpha=0.5, outline=1)
    assert drawn.dtype == np.uint8 and drawn.shape == image.shape
    assert np.array_equal(image, before)
    assert (drawn[10, 20:50] == (255, 0, 0)).all() and (drawn[10:30, 49] == (255, 0, 0)).all()
    assert (
        np.abs(drawn[11:29, 21:49].astype(int) - (image[11:29, 21:49] * 0.5 + (127.5, 0, 0))).max()
        <= 1
    )
    assert (drawn[9, 20:50] == 255).all()
    assert np.array_equal(drawn[:9], image[:9]) and np.array_equal(drawn[:, 51:], image[:, 51:])


def test_overlay_without_outline_touches_the_mask_only(image: np.ndarray, mask: np.ndarray) -> None:
    drawn = viz.overlay(image, mask, outline=0)
    assert np.array_equal(drawn[~mask], image[~mask])


@pytest.mark.parametrize("value", [True, False])
def test_an_empty_or_full_mask_draws_no_border(image: np.ndarray, value: bool) -> None:
    full = np.full(image.shape[:2], value)
    drawn = viz.overlay(image, full, alpha=0.0)
    assert np.array_equal(drawn, image)


def test_difference_colors_hit_extra_and_missed(mask: np.ndarray) -> None:
    truth, prediction = mask, np.roll(mask, 8, axis=1)
    drawn = viz.difference(np.full((40, 60, 3), 128, np.uint8), truth, prediction, alpha=1.0)
    assert (drawn[truth & prediction] == viz.HIT).all()
    assert (drawn[prediction & ~truth] == viz.EXTRA).all()
    assert (drawn[truth & ~prediction] == viz.MISSED).all()
    assert np.ptp(drawn[~truth & ~prediction], axis=1).max() == 0


def test_intersection_over_union(mask: np.ndarray) -> None:
    empty = np.zeros_like(mask)
    assert (
        viz.intersection_over_union(mask, mask) == viz.intersection_over_union(empty, empty) == 1.0
    )
    assert viz.intersection_over_union(mask, empty) == 0.0
    assert viz.intersection_over_union(mask, np.roll(mask, 10, axis=1)) == pytest.approx(20 / 40)


@pytest.mark.parametrize("shape", [(96, 96), (30, 200), (480, 640), (1000, 700), (2, 3)])
def test_panels_are_at_least_256_and_at_most_480_pixels(shape: tuple[int, int]) -> None:
    image, mask = np.zeros((*shape, 3), np.uint8), np.zeros(shape, bool)
    scale = min(max(max(shape), 256), 480) / max(shape)
    width = max(1, round(shape[1] * scale))
    assert (
        viz.sample_panels(image, mask, mask, bands=(mask, mask), facts=["IoU 1"]).width
        == 3 * width + 4 * viz.GAP
    )
    assert viz.sample_panels(image, None, mask).width == 2 * width + 3 * viz.GAP


def test_boundaries_have_a_panel_where_they_are_given(image: np.ndarray, mask: np.ndarray) -> None:
    bands = mask, np.zeros_like(mask)
    with_bands, without = (
        np.asarray(viz.sample_panels(image, mask, mask, bands=given)) for given in (bands, None)
    )
    assert (
        with_bands.shape == without.shape
        and (with_bands == viz.MISSED).all(2).any()
        and not (without == viz.EXTRA).all(2).all()
    )
    assert not np.array_equal(with_bands, without)


def test_a_long_sentence_makes_the_picture_higher_not_wider(
    image: np.ndarray, mask: np.ndarray
) -> None:
    panels = viz.sample_panels(image, mask, mask)
    short = viz.with_heading(panels, "cat", "one")
    long = viz.with_heading(panels, "the second cat from the left at the café " * 9, "one")
    assert long.width == short.width == panels.width and long.height > short.height + 20
    below = short.crop((0, short.height - panels.height, short.width, short.height))
    assert np.array_equal(np.asarray(below), np.asarray(panels))
    assert viz.with_heading(panels, "").height < short.height


def test_heat_is_violet_at_zero_and_yellow_at_one(image: np.ndarray) -> None:
    values = np.zeros((40, 60))
    values[:, 30:] = 1
    drawn = viz.heat(image, values, alpha=1.0)
    assert (drawn[:, :30] == (68, 1, 84)).all() and (drawn[:, 30:] == (253, 231, 37)).all()
    faint = viz.heat(image, values, alpha=0.0)
    assert np.ptp(faint, axis=2).max() == 0 and np.abs(faint[..., 0] - image.mean(2)).max() <= 1


@pytest.mark.parametrize(("count", "rows"), [(1, 1), (3, 1), (4, 2), (7, 3)])
def test_a_heat_sheet_holds_every_map(image: np.ndarray, count: int, rows: int) -> None:
    maps = [(f"word{number}", np.ones((40, 60))) for number in range(count)]
    sheet = np.asarray(viz.heat_sheet(image, [("first", maps), ("second", maps)], columns=3))
    yellow = (sheet[..., 0] > sheet[..., 2].astype(int) + 60).sum()
    height, width = round(40 * 160 / 60), 160
    assert yellow > 0.95 * 2 * count * height * width
    assert 2 * rows * height < sheet.shape[0] < 2 * (rows * (height + 40) + 40)


def test_wrapped_lines_fit_and_lose_no_letter() -> None:
    text = "a small red star left of the blue square " + "x" * 80
    lines = viz.wrap(text, 120, 18)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert all(viz._font(18).getlength(line) <= 120 for line in lines)
    assert viz.wrap("", 120, 18) == []


def test_save_png_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    viz.save_png(tmp_path / "deep" / "a.png", picture)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "deep" / "a.png")), np.asarray(picture))
    monkeypatch.setattr(
        Image.Image, "save", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full"))
    )
    with pytest.raises(OSError, match="disk full"):
        viz.save_png(tmp_path / "b.png", picture)
    assert [p.name for p in tmp_path.iterdir()] == ["deep"]
