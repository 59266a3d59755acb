"""From a stored picture to the square model input, and the random changes of a training sample.

Pictures are taken as their pixels are stored: an EXIF orientation is ignored, because the annotations of COCO refer to
the stored pixels.
"""

from __future__ import annotations

import io
import math
import re
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import simplejpeg
import torch
from PIL import Image, ImageEnhance, UnidentifiedImageError

from coupalign.data import masks
from coupalign.data.batch import Frame

PADDING = (124, 116, 104)  # the mean color of ImageNet, which the model normalizes to about 0
_ORDINARY = (
    "YCbCr",
    "RGB",
    "Gray",
)  # colors of a JPEG that libjpeg-turbo converts as Pillow does; CMYK differs by a level
_REDUCING_GAP = (
    2  # as Pillow's `thumbnail`: the rest of the way down hides what the decoder's own filter did
)

# -------------------------------------------------------------------------------------------------------- pictures


def decode_image(data: bytes, frame: Frame | None = None) -> np.ndarray:
    """Decode a JPEG or PNG to RGB; gray, palette and CMYK pictures are converted.

    libjpeg-turbo writes a flawless JPEG straight into the array. Whatever it objects to is Pillow's to judge, which stands on the same
    library and gives the same pixels.

    Args:
        frame: where the picture is to go. It is then decoded at a half, a quarter or an eighth of its size if that is still
            `_REDUCING_GAP` times what is needed, in both directions.

    Returns:
        uint8 [H, W, 3].

    Raises:
        ValueError: the bytes are no picture, the picture is cut short, or not of the size of `frame`.
    """
    pixels, size = _decode_jpeg(data, frame) or _decode_any(data)
    if frame is not None and size != (frame.height, frame.width):
        raise ValueError(
            f"the picture is {size[::-1]}, its annotation says {(frame.width, frame.height)}"
        )
    return pixels


def _decode_jpeg(data: bytes, frame: Frame | None) -> tuple[np.ndarray, tuple[int, int]] | None:
    """The pixels and the full size (height, width), or None for all that is not an ordinary JPEG without a flaw."""
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
        if colors not in _ORDINARY or height * width > (Image.MAX_IMAGE_PIXELS or math.inf):
            return None
        by = 1 if frame is None else reduction(height, width, frame)
        least = {"min_height": -(-height // by), "min_width": -(-width // by)} if by > 1 else {}
        return simplejpeg.decode_jpeg(data, "RGB", **least), (height, width)
    except ValueError:
        return None


def _decode_any(data: bytes) -> tuple[np.ndarray, tuple[int, int]]:
    try:
        image = Image.open(io.BytesIO(data)).convert("RGB")
    except (OSError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError(str(error)) from error
    return np.array(image), (image.height, image.width)


def reduction(height: int, width: int, frame: Frame) -> int:
    """By how much a JPEG of that size is decoded smaller on its way into `frame`: 1, 2, 4 or 8."""
    room = min(height / frame.inner_height, width / frame.inner_width) / _REDUCING_GAP
    return next((by for by in (8, 4, 2) if room >= by), 1)


def frame_of(height: int, width: int, size: int, resize: Literal["squash", "letterbox"]) -> Frame:
    """Where an image of that size comes to lie in the square."""
    if resize == "squash":
        inner_height = inner_width = size
    else:
        scale = size / max(height, width)
        inner_height = max(1, round(height * scale))
        inner_width = max(1, round(width * scale))

    return Frame(
        height=height,
        width=width,
        size=size,
        top=(size - inner_height) // 2,
        left=(size - inner_width) // 2,
        inner_height=inner_height,
        inner_width=inner_width,
    )


def image_to_square(
    pixels: np.ndarray,
    frame: Frame,
    mirrored: bool = False,
    jitter: tuple[float, float, float] | None = None,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Resize (bilinear with antialiasing) into the square, on a gray-mean ground where it is letterboxed.

    Args:
        pixels: uint8 [H, W, 3], of the size of `frame` or decoded smaller.
        mirrored: left and right exchanged, inside the frame.
        jitter: factors of brightness, contrast and saturation.
        out: uint8 [S, S, 3], written and returned; none: a new array.

    Returns:
        uint8 [S, S, 3].
    """
    square = np.empty((frame.size, frame.size, 3), np.uint8) if out is None else out
    inner = square[_inside(frame)]
    if inner.shape != square.shape:
        square[:] = np.tile(np.uint8(PADDING), (frame.size, 1))
    by = (
        1
        if pixels.shape[:2] == (frame.height, frame.width)
        else reduction(frame.height, frame.width, frame)
    )
    _resize(
        pixels,
        inner,
        None
        if by == 1
        else (by * frame.inner_height / frame.height, by * frame.inner_width / frame.width),
    )
    if jitter is not None:
        inner[:] = _jittered(inner, jitter)
    if mirrored:
        _mirror(inner)
    return square


def _mirror(array: np.ndarray) -> None:
    """Exchange left and right in place, [H, W, …]; numpy would walk backwards byte by byte, twenty times slower."""
    view = torch.from_numpy(array)
    view.copy_(view.flip(1))


def _resize(pixels: np.ndarray, out: np.ndarray, scales: tuple[float, float] | None) -> None:
    """Bilinear with antialiasing, uint8 [H, W, 3] -> [h, w, 3], into `out`.

    torch's kernel descends from Pillow-SIMD and is within two levels of Pillow: both round after each of the two directions, torch
    with weights of 16 bits. The operator behind `F.interpolate(antialias=True)` is called by its name: only so it writes into `out`.

    Args:
        scales: new by old height and width, where the last old row and column stand for less than a whole one (513 rows, decoded
            at a quarter, are 128.25, and libjpeg gives 129); none: as the sizes say.
    """
    target = (
        out if out.flags.c_contiguous else np.empty(out.shape, np.uint8)
    )  # the operator would not see gaps between the rows
    source, written = (
        torch.from_numpy(
            array.reshape(1, *array.shape).transpose(0, 3, 1, 2)
        )  # [1, 3, H, W], channels last
        for array in (np.require(pixels, np.uint8, ["C", "W"]), target)
    )
    torch.ops.aten._upsample_bilinear2d_aa.out(
        source, list(out.shape[:2]), False, *(scales or (None, None)), out=written
    )
    if target is not out:
        out[:] = target


def _jittered(pixels: np.ndarray, factors: tuple[float, float, float]) -> np.ndarray:
    image = Image.fromarray(pixels)
    for enhance, factor in zip(
        (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), factors
    ):
        image = enhance(image).enhance(factor)
    return np.asarray(image)


def rle_to_square(rle: dict[str, Any], frame: Frame, mirrored: bool, out: np.ndarray) -> None:
    """Write `mask_to_square` of the mask that is stored as `rle` into `out`, bool [S, S], without decoding all of it.

    Raises:
        ValueError: the mask is damaged or not of the size of `frame`.
    """
    if tuple(rle["size"]) != (frame.height, frame.width):
        raise ValueError(
            f"the mask is {tuple(rle['size'])}, its picture is {(frame.height, frame.width)}"
        )
    inner = masks.decode_at(
        rle, _nearest(frame.height, frame.inner_height), _nearest(frame.width, frame.inner_width)
    )
    if inner.shape != out.shape:
        out[:] = False
    out[_inside(frame)] = inner
    if mirrored:
        _mirror(out[_inside(frame)])


def mask_to_square(mask: np.ndarray, frame: Frame, mirrored: bool = False) -> np.ndarray:
    """The mask, bool [H, W], as bool [S, S]: the nearest pixel, False where there is no image. `rle_to_square` is the fast way."""
    rows = _nearest(frame.height, frame.inner_height)
    columns = _nearest(frame.width, frame.inner_width)
    inner = mask.take(rows, 0).take(columns[::-1] if mirrored else columns, 1)
    if inner.shape == (frame.size, frame.size):
        return inner
    square = np.zeros((frame.size, frame.size), bool)
    square[_inside(frame)] = inner
    return square


def _inside(frame: Frame) -> tuple[slice, slice]:
    return slice(frame.top, frame.top + frame.inner_height), slice(
        frame.left, frame.left + frame.inner_width
    )


@lru_cache(maxsize=256)
def _nearest(old: int, new: int) -> np.ndarray:
    """The old pixel below the center of each new one."""
    return ((2 * np.arange(new) + 1) * old) // (2 * new)


# ------------------------------------------------------------------------------------------------------- sentences

_OPPOSITE = {"left": "right", "right": "left"}
_SIDE = re.compile(
    r"(?<![a-z0-9])(top|bottom|upper|lower|far|front|back|mid|middle|center)?(left|right)"
    r"(most|hand|handed|hander|side|sided|ward|wards|er)?(?![a-z0-9])",
    re.IGNORECASE,
)
# "right" that means "directly" unless a word before it makes it a place, abbreviations, and places on a clock or a map
_UNSURE = re.compile(
    r"(?<![\w])(?:(?<!the )(?<!on )(?<!to )(?<!at )(?<!far )(?<!top )(?<!bottom )(?<!upper )(?<!lower )right "
    r"(?:next|behind|above|below|beneath|under|underneath|over|beside|near|by|there|here|now|before|after|where|up|in|on top|at)"
    r"|all right|l|r|lt|rt|lft|rgt|rite|o'?clock|(?:anti|counter)?-?clockwise|east|west)(?![\w])",
    re.IGNORECASE,
)

_COLORS = re.compile(
    r"(?<![a-z])(?:multi-?)?(?:black|white|gray|grey|red|green|blue|yellow|orange|purple|pink|brown|tan|beige|gold|golden|silver|"
    r"blonde?|brunette|navy|teal|maroon|turquoise|cyan|magenta|violet|indigo|lavender|khaki|cream|ivory|crimson|scarlet|olive|"
    r"lime|peach|bronze|copper|rust|charcoal|rainbow|dark|light|bright|pale|faded|shiny|colou?r|colou?red|colou?rful|colou?rless|"
    r"blk|wht|grn|blu|yello|gry|drk)"
    r"(?:s|y|er|est|ish)?(?![a-z])|(?<![a-z])(?:reddish|whit(?:er|est|ish)|redd(?:er|est)|bluish|purplish|pal(?:er|est))(?![a-z])",
    re.IGNORECASE,
)


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


def draw_jitter(
    sentence: str, strength: float, generator: np.random.Generator
) -> tuple[float, float, float] | None:
    """Factors of brightness, contrast and saturation, each in 1 ± strength; None where the sentence names a color."""
    factors = generator.uniform(
        1 - strength, 1 + strength, 3
    )  # drawn in any case: the stream does not depend on the text
    if strength == 0 or names_color(sentence):
        return None
    return float(factors[0]), float(factors[1]), float(factors[2])
