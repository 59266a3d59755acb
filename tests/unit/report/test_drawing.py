"""Drawing: pixels that must change do, others do not; sizes, wrapping, complete files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from coupalign.report import drawing


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)


@pytest.fixture
def mask() -> np.ndarray:
    mask = np.zeros((40, 60), bool)
    mask[10:30, 20:50] = True
    return mask


# ------------------------------------------------------------------------------------ on an image


def test_overlay_tints_inside_and_outlines_border(image: np.ndarray, mask: np.ndarray) -> None:
    before = image.copy()

    drawn = drawing.overlay(image, mask, (255, 0, 0), alpha=0.5, outline=1)

    assert drawn.dtype == np.uint8
    assert drawn.shape == image.shape
    assert np.array_equal(image, before)

    # The border of the mask, and the white line around it.
    assert (drawn[10, 20:50] == (255, 0, 0)).all()
    assert (drawn[10:30, 49] == (255, 0, 0)).all()
    assert (drawn[9, 20:50] == 255).all()

    # The inside is tinted, everything else is unchanged.
    tinted = image[11:29, 21:49] * 0.5 + (127.5, 0, 0)
    assert np.abs(drawn[11:29, 21:49].astype(int) - tinted).max() <= 1
    assert np.array_equal(drawn[:9], image[:9])
    assert np.array_equal(drawn[:, 51:], image[:, 51:])


def test_overlay_without_outline_changes_mask_only(image: np.ndarray, mask: np.ndarray) -> None:
    drawn = drawing.overlay(image, mask, outline=0)

    assert np.array_equal(drawn[~mask], image[~mask])


@pytest.mark.parametrize("value", [True, False])
def test_overlay_draws_no_border_of_empty_or_full_mask(image: np.ndarray, value: bool) -> None:
    mask = np.full(image.shape[:2], value)

    assert np.array_equal(drawing.overlay(image, mask, alpha=0.0), image)


def test_difference_colors_hit_extra_and_missed(mask: np.ndarray) -> None:
    truth, prediction = mask, np.roll(mask, 8, axis=1)
    gray = np.full((40, 60, 3), 128, np.uint8)

    drawn = drawing.difference(gray, truth, prediction, alpha=1.0)

    assert (drawn[truth & prediction] == drawing.HIT).all()
    assert (drawn[prediction & ~truth] == drawing.EXTRA).all()
    assert (drawn[truth & ~prediction] == drawing.MISSED).all()
    assert np.ptp(drawn[~truth & ~prediction], axis=1).max() == 0


def test_heat_is_violet_at_zero_and_yellow_at_one(image: np.ndarray) -> None:
    values = np.zeros((40, 60))
    values[:, 30:] = 1

    drawn = drawing.heat(image, values, alpha=1.0)

    assert (drawn[:, :30] == (68, 1, 84)).all()
    assert (drawn[:, 30:] == (253, 231, 37)).all()


def test_heat_without_alpha_is_gray_image(image: np.ndarray) -> None:
    drawn = drawing.heat(image, np.zeros((40, 60)), alpha=0.0)

    assert np.ptp(drawn, axis=2).max() == 0
    assert np.abs(drawn[..., 0] - image.mean(2)).max() <= 1


def test_intersection_over_union(mask: np.ndarray) -> None:
    empty = np.zeros_like(mask)

    assert drawing.intersection_over_union(mask, mask) == 1.0
    assert drawing.intersection_over_union(empty, empty) == 1.0
    assert drawing.intersection_over_union(mask, empty) == 0.0
    shifted = np.roll(mask, 10, axis=1)
    assert drawing.intersection_over_union(mask, shifted) == pytest.approx(20 / 40)


# ----------------------------------------------------------------------------------------- sheets


@pytest.mark.parametrize("shape", [(96, 96), (30, 200), (480, 640), (1000, 700), (2, 3)])
def test_panels_are_between_256_and_480_pixels(shape: tuple[int, int]) -> None:
    image, mask = np.zeros((*shape, 3), np.uint8), np.zeros(shape, bool)

    six = drawing.sample_panels(image, mask, mask, bands=(mask, mask), facts=["IoU 1"])
    two = drawing.sample_panels(image, None, mask)

    scale = min(max(max(shape), 256), 480) / max(shape)
    width = max(1, round(shape[1] * scale))
    assert six.width == 3 * width + 4 * drawing.GAP
    assert two.width == 2 * width + 3 * drawing.GAP


def test_boundaries_have_a_panel_if_given(image: np.ndarray, mask: np.ndarray) -> None:
    bands = mask, np.zeros_like(mask)

    with_bands = np.asarray(drawing.sample_panels(image, mask, mask, bands=bands))
    without = np.asarray(drawing.sample_panels(image, mask, mask))

    assert with_bands.shape == without.shape
    assert not np.array_equal(with_bands, without)
    assert (with_bands == drawing.MISSED).all(2).any()
    assert not (without == drawing.EXTRA).all(2).all()


def test_long_sentence_makes_picture_higher_not_wider(image: np.ndarray, mask: np.ndarray) -> None:
    panels = drawing.sample_panels(image, mask, mask)

    short = drawing.with_heading(panels, "cat", "one")
    long = drawing.with_heading(panels, "the second cat from the left at the café " * 9, "one")
    without_title = drawing.with_heading(panels, "")

    assert long.width == short.width == panels.width
    assert long.height > short.height + 20
    assert without_title.height < short.height
    below = short.crop((0, short.height - panels.height, short.width, short.height))
    assert np.array_equal(np.asarray(below), np.asarray(panels))


@pytest.mark.parametrize(("maps", "rows"), [(1, 1), (3, 1), (4, 2), (7, 3)])
def test_heat_sheet_holds_every_map(image: np.ndarray, maps: int, rows: int) -> None:
    labeled = [(f"word{number}", np.ones((40, 60))) for number in range(maps)]

    sheet = drawing.heat_sheet(image, [("first", labeled), ("second", labeled)], columns=3)

    pixels = np.asarray(sheet).astype(int)
    yellow = (pixels[..., 0] > pixels[..., 2] + 60).sum()
    height, width = round(40 * 160 / 60), 160
    assert yellow > 0.95 * 2 * maps * height * width
    assert 2 * rows * height < sheet.height < 2 * (rows * (height + 40) + 40)


def test_contact_sheet_puts_pictures_in_rows() -> None:
    sizes = [(30, 20), (10, 40), (20, 10)]
    colors = ["red", "green", "blue"]
    pictures = [Image.new("RGB", size, color) for size, color in zip(sizes, colors)]

    sheet = drawing.contact_sheet(pictures, columns=2)

    gap = drawing.GAP
    assert sheet.size == (2 * 30 + 3 * gap, 40 + 10 + 3 * gap)
    assert sheet.getpixel((gap, gap)) == (255, 0, 0)
    assert sheet.getpixel((30 + 2 * gap, gap)) == (0, 128, 0)
    assert sheet.getpixel((gap, 40 + 2 * gap)) == (0, 0, 255)


def test_wrapped_lines_fit_and_lose_no_letter() -> None:
    text = "a small red star left of the blue square " + "x" * 80

    lines = drawing.wrap(text, 120, 18)

    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert all(drawing._font(18).getlength(line) <= 120 for line in lines)
    assert drawing.wrap("", 120, 18) == []


def test_save_png_writes_picture(tmp_path: Path) -> None:
    picture = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))

    drawing.save_png(tmp_path / "deep" / "a.png", picture)

    with Image.open(tmp_path / "deep" / "a.png") as saved:
        assert np.array_equal(np.asarray(saved), np.asarray(picture))


def test_failed_save_png_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)

    with pytest.raises(OSError, match="disk full"):
        drawing.save_png(tmp_path / "b.png", Image.new("RGB", (4, 4)))
    assert list(tmp_path.iterdir()) == []
