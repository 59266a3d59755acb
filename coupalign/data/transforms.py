"""From a stored picture to the square model input, and the random changes of a training sample.

Pictures are taken as their pixels are stored: an EXIF orientation is ignored, because the annotations of COCO refer to
the stored pixels.
"""
from __future__ import annotations

import io
import re
from typing import Literal

import numpy as np
from PIL import Image, ImageEnhance, UnidentifiedImageError

from coupalign.data.batch import Frame

PADDING = (124, 116, 104)       # the mean color of ImageNet, which the model normalizes to about 0

# -------------------------------------------------------------------------------------------------------- pictures


def decode_image(data: bytes) -> Image.Image:
    """Decode a JPEG or PNG to RGB; gray, palette and CMYK pictures are converted.

    Raises:
        ValueError: the bytes are no picture, or the picture is cut short.
    """
    try:
        return Image.open(io.BytesIO(data)).convert("RGB")
    except (OSError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError(str(error)) from error


def frame_of(height: int, width: int, size: int, resize: Literal["squash", "letterbox"]) -> Frame:
    """Where an image of that size comes to lie in the square."""
    if resize == "squash":
        return Frame(height, width, size, 0, 0, size, size)
    scale = size / max(height, width)
    inner_height, inner_width = max(1, round(height * scale)), max(1, round(width * scale))
    return Frame(height, width, size, (size - inner_height) // 2, (size - inner_width) // 2, inner_height, inner_width)


def image_to_square(image: Image.Image, frame: Frame, mirrored: bool = False,
                    jitter: tuple[float, float, float] | None = None) -> np.ndarray:
    """Resize (bilinear with antialiasing) into the square, on a gray-mean ground where it is letterboxed.

    Args:
        mirrored: left and right exchanged, inside the frame.
        jitter: factors of brightness, contrast and saturation.

    Returns:
        uint8 [S, S, 3].
    """
    inner = image.resize((frame.inner_width, frame.inner_height), Image.Resampling.BILINEAR)
    if jitter is not None:
        for enhance, factor in zip((ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), jitter):
            inner = enhance(inner).enhance(factor)
    pixels = np.asarray(inner)
    pixels = pixels[:, ::-1] if mirrored else pixels
    if (frame.inner_height, frame.inner_width) == (frame.size, frame.size):
        return pixels
    square = np.empty((frame.size, frame.size, 3), np.uint8)
    square[:] = PADDING
    square[_inside(frame)] = pixels
    return square


def mask_to_square(mask: np.ndarray, frame: Frame, mirrored: bool = False) -> np.ndarray:
    """The mask, bool [H, W], as bool [S, S]: the nearest pixel, False where there is no image."""
    rows = _nearest(frame.height, frame.inner_height)
    columns = _nearest(frame.width, frame.inner_width)
    inner = mask.take(rows, 0).take(columns[::-1] if mirrored else columns, 1)
    if inner.shape == (frame.size, frame.size):
        return inner
    square = np.zeros((frame.size, frame.size), bool)
    square[_inside(frame)] = inner
    return square


def _inside(frame: Frame) -> tuple[slice, slice]:
    return slice(frame.top, frame.top + frame.inner_height), slice(frame.left, frame.left + frame.inner_width)


def _nearest(old: int, new: int) -> np.ndarray:
    """The old pixel below the center of each new one."""
    return ((2 * np.arange(new) + 1) * old) // (2 * new)


# ------------------------------------------------------------------------------------------------------- sentences

_OPPOSITE = {"left": "right", "right": "left"}
_SIDE = re.compile(
    r"(?<![a-z0-9])(top|bottom|upper|lower|far|front|back|mid|middle|center)?(left|right)"
    r"(most|hand|handed|hander|side|sided|ward|wards|er)?(?![a-z0-9])", re.IGNORECASE)
# "right" that means "directly" unless a word before it makes it a place, abbreviations, and places on a clock or a map
_UNSURE = re.compile(
    r"(?<![\w])(?:(?<!the )(?<!on )(?<!to )(?<!at )(?<!far )(?<!top )(?<!bottom )(?<!upper )(?<!lower )right "
    r"(?:next|behind|above|below|beneath|under|underneath|over|beside|near|by|there|here|now|before|after|where|up|in|on top|at)"
    r"|all right|l|r|lt|rt|lft|rgt|rite|o'?clock|(?:anti|counter)?-?clockwise|east|west)(?![\w])", re.IGNORECASE)

_COLORS = re.compile(
    r"(?<![a-z])(?:multi-?)?(?:black|white|gray|grey|red|green|blue|yellow|orange|purple|pink|brown|tan|beige|gold|golden|silver|"
    r"blonde?|brunette|navy|teal|maroon|turquoise|cyan|magenta|violet|indigo|lavender|khaki|cream|ivory|crimson|scarlet|olive|"
    r"lime|peach|bronze|copper|rust|charcoal|rainbow|dark|light|bright|pale|faded|shiny|colou?r|colou?red|colou?rful|colou?rless|"
    r"blk|wht|grn|blu|yello|gry|drk)"
    r"(?:s|y|er|est|ish)?(?![a-z])|(?<![a-z])(?:reddish|whit(?:er|est|ish)|redd(?:er|est)|bluish|purplish|pal(?:er|est))(?![a-z])",
    re.IGNORECASE)


def mirror_sentence(sentence: str) -> str | None:
    """The sentence for the mirrored image: left and right exchanged as whole words ("leftmost", "left-hand", "topright" …).

    Words that only contain one ("bright", "leftover") stay. None where it is not certain what the sentence means in a
    mirror ("right behind", "at 3 o'clock", "guy on l"): such a sample is not to be mirrored.
    """
    return None if _UNSURE.search(sentence) else _SIDE.sub(_exchange, sentence)


def _exchange(match: re.Match[str]) -> str:
    before, side, after = match.group(1) or "", match.group(2), match.group(3) or ""
    other = _OPPOSITE[side.lower()]
    other = other.upper() if side.isupper() else other.capitalize() if side[0].isupper() else other
    return before + other + after


def names_color(sentence: str) -> bool:
    """Whether the sentence tells the object by its color or brightness, so that a change of color could make it wrong."""
    return _COLORS.search(sentence) is not None


# -------------------------------------------------------------------------------------------------------- the dice


def draw_jitter(sentence: str, strength: float, generator: np.random.Generator) -> tuple[float, float, float] | None:
    """Factors of brightness, contrast and saturation, each in 1 ± strength; None where the sentence names a color."""
    factors = generator.uniform(1 - strength, 1 + strength, 3)      # drawn in any case: the stream does not depend on the text
    if strength == 0 or names_color(sentence):
        return None
    return float(factors[0]), float(factors[1]), float(factors[2])
