"""Draw what a model sees, is asked and answers, with numpy and PIL only.

Images are uint8 [H, W, 3] RGB, masks bool [H, W]. Small images are enlarged before anything is
drawn on them, so that lines and letters stay sharp. Every number is computed at the original
resolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from coupalign import files

Color = tuple[int, int, int]
Panel = tuple[str, Color, np.ndarray]  # label, color of its swatch (INK: none), pixels
TextLine = tuple[str, Color, int]  # text, color, font size
LabeledMap = tuple[str, np.ndarray]  # label, float [H, W] in 0 … 1
MapSection = tuple[str, Sequence[LabeledMap]]  # heading, maps

TRUTH: Color = (0, 196, 214)
PREDICTION: Color = (232, 30, 150)
HIT: Color = (30, 170, 75)
EXTRA: Color = (225, 45, 45)
MISSED: Color = (45, 95, 235)
INK: Color = (25, 25, 30)
PAPER: Color = (255, 255, 255)
FAINT: Color = (110, 110, 118)

PANEL_SIDE = (256, 480)  # smallest and largest longer side of a panel, in pixels
THUMBNAIL_SIDE = (160, 160)  # the same of a heat map
GAP = 8
TEXT_SIZE = 18
LABEL_SIZE = 14

# Viridis: from dark to light, also in gray.
_HEAT_COLORS = (
    (68, 1, 84),
    (59, 82, 139),
    (33, 145, 140),
    (94, 201, 98),
    (253, 231, 37),
)


# ------------------------------------------------------------------------------------ on an image


def overlay(
    image: np.ndarray,
    mask: np.ndarray,
    color: Color = PREDICTION,
    *,
    alpha: float = 0.45,
    outline: int = 1,
) -> np.ndarray:
    """Tint the pixels of a mask and draw its border; uint8 [H, W, 3].

    A white line around the border keeps it visible on objects of the same color.

    Args:
        outline: width of the border inside the mask, in pixels. 0 draws no border.
    """
    _check(image, mask)
    drawn = np.array(image)
    # Compute the colors of the mask only: photographs may have many megapixels.
    inside = image[mask].astype(np.float32)
    drawn[mask] = inside + (np.array(color, np.float32) - inside) * alpha + 0.5
    drawn[_border(~mask, min(outline, 1))] = PAPER
    drawn[_border(mask, outline)] = color
    return drawn


def difference(
    image: np.ndarray, truth: np.ndarray, prediction: np.ndarray, *, alpha: float = 0.6
) -> np.ndarray:
    """Draw truth against prediction on a faded gray image; uint8 [H, W, 3].

    Green: hit. Red: predicted but wrong. Blue: missed.
    """
    _check(image, truth)
    _check(image, prediction)

    # Fade the image, so that the colors of the masks stand out.
    gray = image.mean(2, keepdims=True) * 0.5 + 110
    drawn = np.repeat(gray, 3, 2).astype(np.float32)

    regions = (
        (truth & prediction, HIT),
        (prediction & ~truth, EXTRA),
        (truth & ~prediction, MISSED),
    )
    for region, color in regions:
        drawn[region] += (np.array(color, np.float32) - drawn[region]) * alpha
        drawn[_border(region, 1)] = color
    return (drawn + 0.5).astype(np.uint8)


def heat(image: np.ndarray, values: np.ndarray, *, alpha: float = 0.65) -> np.ndarray:
    """Draw a map float [H, W], 0 (violet) … 1 (yellow), over the gray image; uint8 [H, W, 3]."""
    assert values.shape == image.shape[:2], (values.shape, image.shape)
    gray = np.repeat(image.mean(2, keepdims=True), 3, 2)

    stops = np.linspace(0, 1, len(_HEAT_COLORS))
    channels = [np.interp(values, stops, channel) for channel in np.array(_HEAT_COLORS).T]
    colors = np.stack(channels, axis=2)
    return (gray + (colors - gray) * alpha + 0.5).astype(np.uint8)


def intersection_over_union(truth: np.ndarray, prediction: np.ndarray) -> float:
    """Compute the IoU of two masks; 1 if both are empty."""
    union = int((truth | prediction).sum())
    if not union:
        return 1.0
    return int((truth & prediction).sum()) / union


# ----------------------------------------------------------------------------------------- sheets


def sample_panels(
    image: np.ndarray,
    truth: np.ndarray | None,
    prediction: np.ndarray,
    *,
    bands: tuple[np.ndarray, np.ndarray] | None = None,
    facts: Sequence[str] = (),
) -> Image.Image:
    """Draw one sample without its sentence.

    Args:
        truth: None draws image and prediction only. Otherwise the truth, the difference and a
            panel with `facts` and the colors are drawn too.
        bands: boundary bands of truth and prediction, bool [H, W] each, whose difference gets a
            panel too.
    """
    panels: list[Panel] = [("image", INK, _fit(image))]
    if truth is not None:
        panels.append(("truth", TRUTH, _tint(image, truth, TRUTH)))
    panels.append(("prediction", PREDICTION, _tint(image, prediction, PREDICTION)))
    if truth is None:
        return _grid(panels, columns=2)

    for name, masks in (("difference", (truth, prediction)), ("boundaries", bands)):
        if masks is not None:
            label = f"{name}: IoU {intersection_over_union(*masks):.2f}"
            panels.append((label, INK, difference(_fit(image), *map(_fit, masks))))
    height, width = panels[0][2].shape[:2]
    panels.append(("", INK, _fact_panel(width, height, facts)))
    return _grid(panels, columns=3)


def with_heading(picture: Image.Image, sentence: str, title: str = "") -> Image.Image:
    """Put a sentence in quotes and a fainter title above a picture, wrapped to its width."""
    width = picture.width - 2 * GAP
    lines = [(line, INK, TEXT_SIZE) for line in wrap(f"“{sentence}”", width, TEXT_SIZE)]
    lines += [(line, FAINT, LABEL_SIZE) for line in wrap(title, width, LABEL_SIZE)]

    top = GAP + sum(_line_height(size) for _, _, size in lines)
    canvas = Image.new("RGB", (picture.width, top + picture.height), PAPER)
    canvas.paste(picture, (0, top))
    _write_lines(canvas, lines, GAP, GAP)
    return canvas


def heat_sheet(image: np.ndarray, sections: Sequence[MapSection], columns: int = 6) -> Image.Image:
    """Draw sections of small heat maps over one image, below each other."""
    thumbnail = _fit(image, THUMBNAIL_SIDE)
    height, width = thumbnail.shape[:2]

    grids = []
    for _, maps in sections:
        panels: list[Panel] = []
        for label, values in maps:
            resized = Image.fromarray(values.astype(np.float32)).resize((width, height))
            panels.append((label, INK, heat(thumbnail, np.asarray(resized))))
        grids.append(_grid(panels, columns))

    # A sheet of few maps is still wide enough for its headings.
    sheet_width = max(3 * THUMBNAIL_SIDE[1], *(grid.width for grid in grids))
    headings = []
    for heading, _ in sections:
        lines = wrap(heading, sheet_width - 2 * GAP, LABEL_SIZE)
        headings.append([(line, INK, LABEL_SIZE) for line in lines])

    sheet_height = sum(GAP + grid.height for grid in grids)
    sheet_height += sum(len(lines) for lines in headings) * _line_height(LABEL_SIZE)
    sheet = Image.new("RGB", (sheet_width, sheet_height), PAPER)
    y = 0
    for lines, grid in zip(headings, grids):
        y = _write_lines(sheet, lines, GAP, y + GAP)
        sheet.paste(grid, (0, y))
        y += grid.height
    return sheet


def contact_sheet(pictures: Sequence[Image.Image], columns: int) -> Image.Image:
    """Put pictures in rows of `columns` on white, each row as high as its highest picture."""
    assert pictures and columns >= 1
    rows = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
    width = max(picture.width for picture in pictures)
    heights = [max(picture.height for picture in row) for row in rows]

    sheet_width = GAP + min(columns, len(pictures)) * (width + GAP)
    sheet_height = GAP + sum(height + GAP for height in heights)
    sheet = Image.new("RGB", (sheet_width, sheet_height), PAPER)
    y = GAP
    for row, height in zip(rows, heights):
        for column, picture in enumerate(row):
            sheet.paste(picture, (GAP + column * (width + GAP), y))
        y += height + GAP
    return sheet


def save_png(path: Path, picture: Image.Image, level: int = 6) -> None:
    """Write a PNG that appears whole or not at all.

    Args:
        level: of zlib, 1 (fast) to 9 (small).
    """
    with files.whole_file(Path(path)) as file:
        picture.save(file, format="PNG", compress_level=level)


def wrap(text: str, width: float, size: int) -> list[str]:
    """Break a text into lines of at most `width` pixels at a font size.

    A word that is too long for a line is broken too.
    """
    font = _font(size)
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue

        lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines


# ----------------------------------------------------------------------------------------- pieces


def _check(image: np.ndarray, mask: np.ndarray) -> None:
    is_image = image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
    assert is_image, (image.dtype, image.shape)
    is_mask = mask.dtype == bool and mask.shape == image.shape[:2]
    assert is_mask, (mask.dtype, mask.shape, image.shape)


def _border(mask: np.ndarray, thickness: int) -> np.ndarray:
    """Pixels of the mask within `thickness` steps of a pixel outside it.

    Beyond the edge of the picture nothing counts as outside.
    """
    inner = mask
    for _ in range(thickness):
        padded = np.pad(inner, 1, mode="edge")
        rows = padded[:-2, 1:-1] & padded[2:, 1:-1]
        columns = padded[1:-1, :-2] & padded[1:-1, 2:]
        inner = inner & rows & columns
    return mask & ~inner


def _fit(array: np.ndarray, side: tuple[int, int] = PANEL_SIDE) -> np.ndarray:
    """Resize an image (bicubic) or mask (nearest), its longer side within `side`."""
    height, width = array.shape[:2]
    longer = max(height, width)
    scale = np.clip(longer, *side) / longer
    size = [max(1, round(length * scale)) for length in (width, height)]

    is_mask = array.dtype == bool
    resampling = Image.Resampling.NEAREST if is_mask else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(array).resize(size, resampling))


def _tint(image: np.ndarray, mask: np.ndarray, color: Color) -> np.ndarray:
    return overlay(_fit(image), _fit(mask), color, outline=2)


def _grid(panels: Sequence[Panel], columns: int) -> Image.Image:
    """Put panels of one size in rows, each above its label, which is cut if it is too long."""
    height, width = panels[0][2].shape[:2]
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    across = width + GAP
    down = height + _line_height(LABEL_SIZE) + GAP

    canvas = Image.new("RGB", (columns * across + GAP, rows * down + GAP), PAPER)
    for index, (label, color, pixels) in enumerate(panels):
        row, column = divmod(index, columns)
        x, y = GAP + column * across, GAP + row * down
        canvas.paste(Image.fromarray(pixels), (x, y))
        _write_label(canvas, (x, y + height + 3), _cut(label, width), color)
    return canvas


def _fact_panel(width: int, height: int, facts: Sequence[str]) -> np.ndarray:
    """A panel of text: the facts, then the colors of the difference."""
    canvas = Image.new("RGB", (width, height), PAPER)
    lines: list[TextLine] = []
    for fact in facts:
        lines += [(line, INK, LABEL_SIZE) for line in wrap(fact, width - GAP, LABEL_SIZE)]
    y = _write_lines(canvas, lines, GAP, GAP // 2) + GAP // 2

    legend = (
        ("hit", HIT),
        ("extra: predicted, not true", EXTRA),
        ("missed: true, not predicted", MISSED),
    )
    for label, color in legend:
        _write_label(canvas, (GAP, y), _cut(label, width - 3 * GAP), color)
        y += _line_height(LABEL_SIZE)
    return np.asarray(canvas)


def _write_lines(canvas: Image.Image, lines: Sequence[TextLine], x: int, y: int) -> int:
    """Write lines below each other; returns where the next one would start."""
    draw = ImageDraw.Draw(canvas)
    for text, color, size in lines:
        draw.text((x, y), text, color, _font(size))
        y += _line_height(size)
    return y


def _write_label(canvas: Image.Image, corner: tuple[int, int], label: str, color: Color) -> None:
    """Write a label behind a swatch of its color; INK draws no swatch."""
    draw = ImageDraw.Draw(canvas)
    x, y = corner
    if color != INK:
        draw.rectangle((x, y + 4, x + 10, y + 14), fill=color)
        x += 16
    draw.text((x, y), label, INK, _font(LABEL_SIZE))


def _cut(label: str, width: int) -> str:
    """The part of a label that fits into one line."""
    lines = wrap(label, width, LABEL_SIZE)
    return lines[0] if lines else ""


def _line_height(size: int) -> int:
    return round(size * 1.35)


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """DejaVu Sans if the system has it, else the font inside Pillow."""
    try:
        return ImageFont.truetype("DejaVuSans.ttf", size)
    except OSError:
        return ImageFont.load_default(size)
