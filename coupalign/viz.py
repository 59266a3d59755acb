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

TRUTH: Color = (0, 196, 214)
PREDICTION: Color = (232, 30, 150)
HIT: Color = (30, 170, 75)
EXTRA: Color = (225, 45, 45)
MISSED: Color = (45, 95, 235)
INK, PAPER, FAINT = (25, 25, 30), (255, 255, 255), (110, 110, 118)
PANEL = (256, 480)       # least and most pixels of a panel's longer side
GAP = 8
TEXT, LABEL = 18, 14     # font sizes


def overlay(image: np.ndarray, mask: np.ndarray, color: Color = PREDICTION, alpha: float = 0.45, outline: int = 1) -> np.ndarray:
    """Tint the pixels of a mask and draw its border, `outline` pixels inside it and a white line around; uint8 [H, W, 3].

    The white line keeps the border visible on objects of the same color; `outline` 0 draws no border.
    """
    _check(image, mask)
    drawn = image.astype(np.float32)
    drawn[mask] += (np.array(color, np.float32) - drawn[mask]) * alpha
    drawn[_border(~mask, min(outline, 1))] = PAPER
    drawn[_border(mask, outline)] = color
    return (drawn + 0.5).astype(np.uint8)


def difference(image: np.ndarray, truth: np.ndarray, prediction: np.ndarray, alpha: float = 0.6) -> np.ndarray:
    """Truth against prediction on a faded gray image: green hit, red predicted but wrong, blue missed; uint8 [H, W, 3]."""
    _check(image, truth)
    _check(image, prediction)
    gray = image.mean(2, keepdims=True) * 0.5 + 110
    drawn = np.repeat(gray, 3, 2).astype(np.float32)
    for part, color in ((truth & prediction, HIT), (prediction & ~truth, EXTRA), (truth & ~prediction, MISSED)):
        drawn[part] += (np.array(color, np.float32) - drawn[part]) * alpha
        drawn[_border(part, 1)] = color
    return (drawn + 0.5).astype(np.uint8)


def intersection_over_union(truth: np.ndarray, prediction: np.ndarray) -> float:
    """IoU of two masks; 1 where both are empty."""
    union = int((truth | prediction).sum())
    return int((truth & prediction).sum()) / union if union else 1.0


def sample_picture(image: np.ndarray, sentence: str, truth: np.ndarray | None, prediction: np.ndarray,
                   title: str = "") -> Image.Image:
    """One sample under its sentence: image, truth, prediction, difference with IoU; image and prediction without a truth."""
    panels = [("image", INK, _grown(image))]
    if truth is not None:
        panels.append(("truth", TRUTH, overlay(_grown(image), _grown(truth), TRUTH, outline=2)))
    panels.append(("prediction", PREDICTION, overlay(_grown(image), _grown(prediction), PREDICTION, outline=2)))
    if truth is not None:
        score = f"IoU {intersection_over_union(truth, prediction):.2f}"
        panels.append((score, INK, difference(_grown(image), _grown(truth), _grown(prediction))))
    height, width = panels[0][2].shape[:2]
    total = len(panels) * width + (len(panels) - 1) * GAP + 2 * GAP
    lines = [(line, INK, TEXT) for line in wrap(f"“{sentence}”", total - 2 * GAP, TEXT)]
    lines += [(line, FAINT, LABEL) for line in wrap(title, total - 2 * GAP, LABEL)]
    top = GAP + sum(_line_height(size) for _, _, size in lines) + GAP // 2
    canvas = Image.new("RGB", (total, top + height + _line_height(LABEL) + GAP), PAPER)
    draw = ImageDraw.Draw(canvas)
    y = GAP
    for line, ink, size in lines:
        draw.text((GAP, y), line, ink, _font(size))
        y += _line_height(size)
    for number, (label, ink, pixels) in enumerate(panels):
        x = GAP + number * (width + GAP)
        canvas.paste(Image.fromarray(pixels), (x, top))
        _swatch(draw, (x, top + height + 3), label, ink)
        if number == 3:
            _legend(draw, (x + width, top + height + 3))
    return canvas


def contact_sheet(pictures: Sequence[Image.Image], columns: int) -> Image.Image:
    """Pictures in rows of `columns` on white, every row as high as its highest."""
    assert pictures and columns >= 1
    rows = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
    width = max(picture.width for picture in pictures)
    heights = [max(picture.height for picture in row) for row in rows]
    columns = min(columns, len(pictures))
    sheet = Image.new("RGB", (columns * (width + GAP) + GAP, sum(heights) + GAP * (len(rows) + 1)), PAPER)
    y = GAP
    for row, height in zip(rows, heights):
        for column, picture in enumerate(row):
            sheet.paste(picture, (GAP + column * (width + GAP), y))
        y += height + GAP
    return sheet


def save_png(path: Path, picture: Image.Image) -> None:
    """Write a PNG that appears whole or not at all."""
    with files.whole_file(Path(path)) as file:
        picture.save(file, format="PNG")


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
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3, (image.dtype, image.shape)
    assert mask.dtype == bool and mask.shape == image.shape[:2], (mask.dtype, mask.shape, image.shape)


def _border(mask: np.ndarray, thickness: int) -> np.ndarray:
    """Pixels of the mask within `thickness` steps of a pixel outside it; beyond the picture nothing is outside."""
    inner = mask
    for _ in range(thickness):
        padded = np.pad(inner, 1, mode="edge")
        inner = inner & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inner


def _grown(array: np.ndarray) -> np.ndarray:
    """An image (bicubic) or mask (nearest) at the size of a panel."""
    least, most = PANEL
    height, width = array.shape[:2]
    scale = np.clip(max(height, width), least, most) / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    if array.dtype == bool:
        return np.asarray(Image.fromarray(array).resize(size, Image.Resampling.NEAREST))
    return np.asarray(Image.fromarray(array).resize(size, Image.Resampling.BICUBIC))


def _swatch(draw: ImageDraw.ImageDraw, place: tuple[int, int], label: str, ink: Color) -> None:
    """A panel's name, behind a square of its color."""
    x, y = place
    if ink != INK:
        draw.rectangle((x, y + 4, x + 10, y + 14), fill=ink)
        x += 16
    draw.text((x, y), label, INK, _font(LABEL))


def _legend(draw: ImageDraw.ImageDraw, corner: tuple[int, int]) -> None:
    """The colors of the difference, set flush right."""
    x, y = corner
    for word, color in (("missed", MISSED), ("extra", EXTRA), ("hit", HIT)):
        x -= round(_font(LABEL).getlength(word)) + 8
        draw.text((x, y), word, color, _font(LABEL))


def _line_height(size: int) -> int:
    return round(size * 1.35)


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """DejaVu Sans where the system has it, else the font inside Pillow."""
    try:
        return ImageFont.truetype("DejaVuSans.ttf", size)
    except OSError:
        return ImageFont.load_default(size)
