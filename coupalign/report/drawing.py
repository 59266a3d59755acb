"""Pictures of what a model sees, is asked and answers; numpy and PIL only.

Images are uint8 [H, W, 3] RGB, masks bool [H, W]. Small images are enlarged before anything is drawn on them, so that
lines and letters stay sharp; every number is computed at the original resolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from coupalign import files

Color = tuple[int, int, int]
Cell = tuple[str, Color, np.ndarray]  # label, its color, pixels

TRUTH: Color = (0, 196, 214)
PREDICTION: Color = (232, 30, 150)
HIT: Color = (30, 170, 75)
EXTRA: Color = (225, 45, 45)
MISSED: Color = (45, 95, 235)
INK, PAPER, FAINT = (25, 25, 30), (255, 255, 255), (110, 110, 118)
PANEL = (256, 480)  # least and most pixels of a panel's longer side
THUMB = (160, 160)  # the same of a small one
GAP = 8
TEXT, LABEL = 18, 14  # font sizes

_HEAT = (
    (68, 1, 84),
    (59, 82, 139),
    (33, 145, 140),
    (94, 201, 98),
    (253, 231, 37),
)  # dark to light, also in gray: viridis


def overlay(
    image: np.ndarray,
    mask: np.ndarray,
    color: Color = PREDICTION,
    alpha: float = 0.45,
    outline: int = 1,
) -> np.ndarray:
    """Tint the pixels of a mask and draw its border, `outline` pixels inside it and a white line around; uint8 [H, W, 3].

    The white line keeps the border visible on objects of the same color; `outline` 0 draws no border.
    """
    _check(image, mask)
    drawn = image.astype(np.float32)
    drawn[mask] += (np.array(color, np.float32) - drawn[mask]) * alpha
    drawn[_border(~mask, min(outline, 1))] = PAPER
    drawn[_border(mask, outline)] = color
    return (drawn + 0.5).astype(np.uint8)


def difference(
    image: np.ndarray, truth: np.ndarray, prediction: np.ndarray, alpha: float = 0.6
) -> np.ndarray:
    """Truth against prediction on a faded gray image: green hit, red predicted but wrong, blue missed; uint8 [H, W, 3]."""
    _check(image, truth)
    _check(image, prediction)
    gray = image.mean(2, keepdims=True) * 0.5 + 110
    drawn = np.repeat(gray, 3, 2).astype(np.float32)
    for part, color in (
        (truth & prediction, HIT),
        (prediction & ~truth, EXTRA),
        (truth & ~prediction, MISSED),
    ):
        drawn[part] += (np.array(color, np.float32) - drawn[part]) * alpha
        drawn[_border(part, 1)] = color
    return (drawn + 0.5).astype(np.uint8)


def heat(image: np.ndarray, values: np.ndarray, alpha: float = 0.65) -> np.ndarray:
    """A map float [H, W], 0 (violet) … 1 (yellow), over the photograph in gray; uint8 [H, W, 3]."""
    assert values.shape == image.shape[:2], (values.shape, image.shape)
    gray = np.repeat(image.mean(2, keepdims=True), 3, 2)
    colors = np.stack(
        [
            np.interp(values, np.linspace(0, 1, len(_HEAT)), channel)
            for channel in np.array(_HEAT).T
        ],
        axis=2,
    )
    return (gray + (colors - gray) * alpha + 0.5).astype(np.uint8)


def intersection_over_union(truth: np.ndarray, prediction: np.ndarray) -> float:
    """IoU of two masks; 1 where both are empty."""
    union = int((truth | prediction).sum())
    return int((truth & prediction).sum()) / union if union else 1.0


def sample_panels(
    image: np.ndarray,
    truth: np.ndarray | None,
    prediction: np.ndarray,
    bands: tuple[np.ndarray, np.ndarray] | None = None,
    facts: Sequence[str] = (),
) -> Image.Image:
    """One sample without its sentence.

    Args:
        truth: none: image and prediction only; else also the truth, the difference, and a panel with `facts` and the colors.
        bands: boundary bands of truth and prediction, bool [H, W] each, whose difference gets a panel, too.
    """
    panels = [("image", INK, _grown(image))]
    if truth is None:
        return _grid(
            [*panels, ("prediction", PREDICTION, _tinted(image, prediction, PREDICTION))], 2
        )
    panels += [
        ("truth", TRUTH, _tinted(image, truth, TRUTH)),
        ("prediction", PREDICTION, _tinted(image, prediction, PREDICTION)),
    ]
    for name, pair in (("difference", (truth, prediction)), ("boundaries", bands)):
        if pair is not None:
            panels.append(
                (
                    f"{name}: IoU {intersection_over_union(*pair):.2f}",
                    INK,
                    difference(_grown(image), *map(_grown, pair)),
                )
            )
    height, width = panels[0][2].shape[:2]
    return _grid([*panels, ("", INK, _fact_panel(width, height, facts))], 3)


def with_heading(picture: Image.Image, sentence: str, title: str = "") -> Image.Image:
    """A picture below a sentence in quotes and a fainter title, which are wrapped to its width."""
    width = picture.width - 2 * GAP
    lines = [(line, INK, TEXT) for line in wrap(f"“{sentence}”", width, TEXT)]
    lines += [(line, FAINT, LABEL) for line in wrap(title, width, LABEL)]
    top = GAP + sum(_line_height(size) for _, _, size in lines)
    canvas = Image.new("RGB", (picture.width, top + picture.height), PAPER)
    canvas.paste(picture, (0, top))
    _write(canvas, lines, GAP, GAP)
    return canvas


def heat_sheet(
    image: np.ndarray,
    sections: Sequence[tuple[str, Sequence[tuple[str, np.ndarray]]]],
    columns: int = 6,
) -> Image.Image:
    """Sections of small heat maps over one photograph: (heading, [(label, float [H, W] in 0 … 1), …]), below each other."""
    small = _grown(image, THUMB)
    height, width = small.shape[:2]
    grids = []
    for heading, maps in sections:
        cells = [
            (
                label,
                INK,
                heat(
                    small,
                    np.asarray(Image.fromarray(values.astype(np.float32)).resize((width, height))),
                ),
            )
            for label, values in maps
        ]
        grids.append((heading, _grid(cells, columns)))
    total = max(max(grid.width for _, grid in grids), 3 * THUMB[1])
    texts = [wrap(heading, total - 2 * GAP, LABEL) for heading, _ in grids]
    canvas = Image.new(
        "RGB",
        (
            total,
            sum(
                GAP + len(text) * _line_height(LABEL) + grid.height
                for text, (_, grid) in zip(texts, grids)
            ),
        ),
        PAPER,
    )
    y = 0
    for text, (_, grid) in zip(texts, grids):
        y = _write(canvas, [(line, INK, LABEL) for line in text], GAP, y + GAP)
        canvas.paste(grid, (0, y))
        y += grid.height
    return canvas


def contact_sheet(pictures: Sequence[Image.Image], columns: int) -> Image.Image:
    """Pictures in rows of `columns` on white, every row as high as its highest."""
    assert pictures and columns >= 1
    rows = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
    width = max(picture.width for picture in pictures)
    heights = [max(picture.height for picture in row) for row in rows]
    columns = min(columns, len(pictures))
    sheet = Image.new(
        "RGB", (columns * (width + GAP) + GAP, sum(heights) + GAP * (len(rows) + 1)), PAPER
    )
    y = GAP
    for row, height in zip(rows, heights):
        for column, picture in enumerate(row):
            sheet.paste(picture, (GAP + column * (width + GAP), y))
        y += height + GAP
    return sheet


def save_png(path: Path, picture: Image.Image, level: int = 6) -> None:
    """Write a PNG that appears whole or not at all; `level` is zlib's, 1 (quick) to 9 (small)."""
    with files.whole_file(Path(path)) as file:
        picture.save(file, format="PNG", compress_level=level)


def wrap(text: str, width: float, size: int) -> list[str]:
    """Break a text into lines of at most `width` pixels at a font size; a word that is too long is broken too."""
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


def _check(image: np.ndarray, mask: np.ndarray) -> None:
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3, (
        image.dtype,
        image.shape,
    )
    assert mask.dtype == bool and mask.shape == image.shape[:2], (
        mask.dtype,
        mask.shape,
        image.shape,
    )


def _border(mask: np.ndarray, thickness: int) -> np.ndarray:
    """Pixels of the mask within `thickness` steps of a pixel outside it; beyond the picture nothing is outside."""
    inner = mask
    for _ in range(thickness):
        padded = np.pad(inner, 1, mode="edge")
        inner = inner & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inner


def _grown(array: np.ndarray, limits: tuple[int, int] = PANEL) -> np.ndarray:
    """An image (bicubic) or mask (nearest) at the size of a panel."""
    least, most = limits
    height, width = array.shape[:2]
    scale = np.clip(max(height, width), least, most) / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    if array.dtype == bool:
        return np.asarray(Image.fromarray(array).resize(size, Image.Resampling.NEAREST))
    return np.asarray(Image.fromarray(array).resize(size, Image.Resampling.BICUBIC))


def _tinted(image: np.ndarray, mask: np.ndarray, color: Color) -> np.ndarray:
    return overlay(_grown(image), _grown(mask), color, outline=2)


def _grid(cells: Sequence[Cell], columns: int) -> Image.Image:
    """Panels of one size in rows, each above its label; a label too long for its panel is cut."""
    height, width = cells[0][2].shape[:2]
    columns, below = min(columns, len(cells)), _line_height(LABEL)
    rows = -(-len(cells) // columns)
    canvas = Image.new(
        "RGB", (columns * (width + GAP) + GAP, rows * (height + below + GAP) + GAP), PAPER
    )
    draw = ImageDraw.Draw(canvas)
    for number, (label, ink, pixels) in enumerate(cells):
        x, y = (
            GAP + number % columns * (width + GAP),
            GAP + number // columns * (height + below + GAP),
        )
        canvas.paste(Image.fromarray(pixels), (x, y))
        _swatch(draw, (x, y + height + 3), "".join(wrap(label, width, LABEL)[:1]), ink)
    return canvas


def _fact_panel(width: int, height: int, facts: Sequence[str]) -> np.ndarray:
    """A panel of words: the facts, then the colors of the difference."""
    canvas = Image.new("RGB", (width, height), PAPER)
    lines = [(line, INK, LABEL) for fact in facts for line in wrap(fact, width - GAP, LABEL)]
    y = _write(canvas, lines, GAP, GAP // 2) + GAP // 2
    for word, color in (
        ("hit", HIT),
        ("extra: predicted, not true", EXTRA),
        ("missed: true, not predicted", MISSED),
    ):
        _swatch(
            ImageDraw.Draw(canvas), (GAP, y), "".join(wrap(word, width - 3 * GAP, LABEL)[:1]), color
        )
        y += _line_height(LABEL)
    return np.asarray(canvas)


def _write(canvas: Image.Image, lines: Sequence[tuple[str, Color, int]], x: int, y: int) -> int:
    """Write (text, color, font size) lines below each other; returns where the next would stand."""
    draw = ImageDraw.Draw(canvas)
    for line, ink, size in lines:
        draw.text((x, y), line, ink, _font(size))
        y += _line_height(size)
    return y


def _swatch(draw: ImageDraw.ImageDraw, place: tuple[int, int], label: str, ink: Color) -> None:
    """A panel's name, behind a square of its color."""
    x, y = place
    if ink != INK:
        draw.rectangle((x, y + 4, x + 10, y + 14), fill=ink)
        x += 16
    draw.text((x, y), label, INK, _font(LABEL))


def _line_height(size: int) -> int:
    return round(size * 1.35)


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """DejaVu Sans where the system has it, else the font inside Pillow."""
    try:
        return ImageFont.truetype("DejaVuSans.ttf", size)
    except OSError:
        return ImageFont.load_default(size)
