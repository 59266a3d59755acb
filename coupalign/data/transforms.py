"""From a stored image to the square model input, and the augmentation of a training sample.

Images are used as their pixels are stored. An EXIF orientation is ignored: `pack` has turned each
photograph whose annotations do not mean the stored pixels.
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
from PIL import Image, ImageEnhance

from coupalign.data import masks
from coupalign.data.batch import Frame
from coupalign.data.pictures import load_pixels, open_picture
from coupalign.data.sides import is_english

PADDING = (124, 116, 104)  # the mean color of ImageNet, which the model normalizes to about 0

# Color spaces of a JPEG that libjpeg-turbo converts as Pillow does. CMYK differs by one level.
EXACT_COLOR_SPACES = ("YCbCr", "RGB", "Gray")

# What a shard may hold. Shards of `coupalign pack` hold JPEG.
STORED_FORMATS = ("JPEG", "PNG")

# A JPEG is decoded at no less than this factor times the size that is needed, as in Pillow's
# `thumbnail`. The resize that follows then hides what the decoder's own filter did.
REDUCING_GAP = 2

Jitter = tuple[float, float, float]  # factors of brightness, contrast and saturation


# --------------------------------------------------------------------------------------- images


def decode_image(data: bytes, frame: Frame | None = None) -> np.ndarray:
    """Decode a JPEG or PNG to RGB. Gray, palette and CMYK images are converted.

    libjpeg-turbo writes a flawless JPEG straight into the array. If it objects to anything, Pillow
    decides. It is built on the same library and gives the same pixels.

    Args:
        frame: where the image goes. It is then decoded at a half, a quarter or an eighth of its
            size, if that is still `REDUCING_GAP` times what is needed in both directions.

    Returns:
        uint8 [H, W, 3].

    Raises:
        ValueError: the bytes are no image, it is cut short, or it has another size than `frame`.
    """
    pixels, size = _decode_jpeg(data, frame) or _decode_any(data)
    if frame is not None and size != (frame.height, frame.width):
        raise ValueError(
            f"the picture is {size[::-1]}, its annotation says {(frame.width, frame.height)}"
        )
    return pixels


def _decode_jpeg(data: bytes, frame: Frame | None) -> tuple[np.ndarray, tuple[int, int]] | None:
    """Decode an ordinary JPEG without a flaw, else return None.

    Returns:
        the pixels, and the full size (height, width).
    """
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
        max_pixels = Image.MAX_IMAGE_PIXELS or math.inf
        if colors not in EXACT_COLOR_SPACES or height * width > max_pixels:
            return None

        smaller = {}
        factor = 1 if frame is None else reduction(height, width, frame)
        if factor > 1:
            smaller = {"min_height": -(-height // factor), "min_width": -(-width // factor)}
        return simplejpeg.decode_jpeg(data, "RGB", **smaller), (height, width)
    except ValueError:
        return None


def _decode_any(data: bytes) -> tuple[np.ndarray, tuple[int, int]]:
    image = open_picture(io.BytesIO(data), STORED_FORMATS)
    load_pixels(image)
    return np.array(image.convert("RGB")), (image.height, image.width)


def reduction(height: int, width: int, frame: Frame) -> int:
    """Return by which factor a JPEG is decoded smaller on its way into `frame`: 1, 2, 4 or 8."""
    excess = min(height / frame.inner_height, width / frame.inner_width) / REDUCING_GAP
    for factor in (8, 4, 2):
        if excess >= factor:
            return factor
    return 1


def frame_of(height: int, width: int, size: int, resize: Literal["squash", "letterbox"]) -> Frame:
    """Compute where an image goes inside the square."""
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
    *,
    mirrored: bool = False,
    jitter: Jitter | None = None,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Resize an image into the square, bilinear with antialiasing.

    A letterbox is padded with gray.

    Args:
        pixels: uint8 [H, W, 3], of the size of `frame` or decoded smaller.
        mirrored: exchange left and right, inside the frame.
        jitter: factors of brightness, contrast and saturation. None: leave the colors.
        out: uint8 [S, S, 3], written and returned. None: a new array.

    Returns:
        uint8 [S, S, 3].
    """
    square = np.empty((frame.size, frame.size, 3), np.uint8) if out is None else out
    inner = square[_inside(frame)]
    if inner.shape != square.shape:
        square[:] = np.tile(np.uint8(PADDING), (frame.size, 1))

    # An image that was decoded smaller may have a last row or column that stands for less than a
    # whole one. 513 rows at a quarter are 128.25, and libjpeg gives 129. So say the exact scales.
    scales = None
    if pixels.shape[:2] != (frame.height, frame.width):
        factor = reduction(frame.height, frame.width, frame)
        if factor > 1:
            scales = (
                factor * frame.inner_height / frame.height,
                factor * frame.inner_width / frame.width,
            )
    _resize(pixels, inner, scales)

    if jitter is not None:
        inner[:] = _change_colors(inner, jitter)
    if mirrored:
        _mirror(inner)
    return square


def rle_to_square(
    rle: dict[str, Any], frame: Frame, *, mirrored: bool = False, out: np.ndarray
) -> None:
    """Write a mask that is stored as `rle` into the square, without decoding all of it.

    The result is that of `mask_to_square`.

    Args:
        mirrored: exchange left and right, inside the frame.
        out: bool [S, S], written.

    Raises:
        ValueError: the mask is damaged, or has another size than `frame`.
    """
    if tuple(rle["size"]) != (frame.height, frame.width):
        raise ValueError(
            f"the mask is {tuple(rle['size'])}, its picture is {(frame.height, frame.width)}"
        )

    rows = _nearest(frame.height, frame.inner_height)
    columns = _nearest(frame.width, frame.inner_width)
    inner = masks.decode_at(rle, rows, columns)

    if inner.shape != out.shape:
        out[:] = False
    out[_inside(frame)] = inner
    if mirrored:
        _mirror(out[_inside(frame)])


def mask_to_square(mask: np.ndarray, frame: Frame, *, mirrored: bool = False) -> np.ndarray:
    """Resize a mask into the square by nearest neighbor. Padding is False.

    `rle_to_square` is the fast way to do the same.

    Args:
        mask: bool [H, W], of the size of `frame`.
        mirrored: exchange left and right, inside the frame.

    Returns:
        bool [S, S].
    """
    rows = _nearest(frame.height, frame.inner_height)
    columns = _nearest(frame.width, frame.inner_width)
    if mirrored:
        columns = columns[::-1]
    inner = mask.take(rows, 0).take(columns, 1)
    if inner.shape == (frame.size, frame.size):
        return inner

    square = np.zeros((frame.size, frame.size), bool)
    square[_inside(frame)] = inner
    return square


def _resize(pixels: np.ndarray, out: np.ndarray, scales: tuple[float, float] | None) -> None:
    """Resize uint8 [H, W, 3] into `out` [h, w, 3], bilinear with antialiasing.

    torch's kernel descends from Pillow-SIMD and is within two levels of Pillow. Both round after
    each of the two directions; torch has weights of 16 bits. The operator behind
    `F.interpolate(antialias=True)` is called by its own name, because only this writes into `out`.

    Args:
        scales: new height over old height, and the same of the width. None: as the sizes say.
    """
    # The operator would not see gaps between the rows.
    target = out if out.flags.c_contiguous else np.empty(out.shape, np.uint8)

    source = _as_channels_last(np.require(pixels, np.uint8, ["C", "W"]))
    written = _as_channels_last(target)
    scale_height, scale_width = scales or (None, None)
    torch.ops.aten._upsample_bilinear2d_aa.out(
        source, list(out.shape[:2]), False, scale_height, scale_width, out=written
    )

    if target is not out:
        out[:] = target


def _as_channels_last(array: np.ndarray) -> torch.Tensor:
    """View [H, W, 3] as a tensor [1, 3, H, W] whose channels are last in memory."""
    return torch.from_numpy(array.reshape(1, *array.shape).transpose(0, 3, 1, 2))


def _change_colors(pixels: np.ndarray, factors: Jitter) -> np.ndarray:
    image = Image.fromarray(pixels)
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for enhancer, factor in zip(enhancers, factors):
        image = enhancer(image).enhance(factor)
    return np.asarray(image)


def _mirror(array: np.ndarray) -> None:
    """Exchange left and right of [H, W, …] in place.

    numpy would walk backwards byte by byte, which is twenty times slower.
    """
    view = torch.from_numpy(array)
    view.copy_(view.flip(1))


def _inside(frame: Frame) -> tuple[slice, slice]:
    rows = slice(frame.top, frame.top + frame.inner_height)
    columns = slice(frame.left, frame.left + frame.inner_width)
    return rows, columns


@lru_cache(maxsize=256)
def _nearest(old: int, new: int) -> np.ndarray:
    """Return the old pixel below the center of each new one; int64 [new]."""
    return ((2 * np.arange(new) + 1) * old) // (2 * new)


# ------------------------------------------------------------------------------------- sentences


def names_color(sentence: str) -> bool:
    """Return whether a sentence names a color or brightness.

    A change of color could then make the sentence wrong.
    """
    return _COLORS.search(sentence) is not None


def draw_jitter(sentence: str, strength: float, generator: np.random.Generator) -> Jitter | None:
    """Draw factors of brightness, contrast and saturation, each in 1 ± strength.

    Returns:
        the factors; None if `strength` is 0, or the sentence names a color, or may name one in
        another language.
    """
    # Draw in any case: the stream of random numbers does not depend on the text.
    factors = generator.uniform(1 - strength, 1 + strength, 3)
    if strength == 0 or names_color(sentence) or not is_english(sentence):
        return None
    return float(factors[0]), float(factors[1]), float(factors[2])


def _any_of(words: str) -> str:
    """Return a pattern that matches any of the words."""
    return "|".join(words.split())


_COLOR = _any_of(
    "black white gray grey red green blue yellow orange purple pink brown tan beige gold golden "
    "silver blonde? brunette navy teal maroon turquoise cyan magenta violet indigo lavender khaki "
    "cream ivory crimson scarlet olive lime peach bronze copper rust charcoal rainbow dark light "
    "bright pale faded shiny colou?r colou?red colou?rful colou?rless blk wht grn blu yello gry drk"
)
_IRREGULAR_COLOR = _any_of(
    "reddish whit(?:er|est|ish) redd(?:er|est) bluish purplish pal(?:er|est)"
)
_COLORS = re.compile(
    rf"(?<![a-z])(?:multi-?)?(?:{_COLOR})(?:s|y|er|est|ish)?(?![a-z])"
    rf"|(?<![a-z])(?:{_IRREGULAR_COLOR})(?![a-z])",
    re.IGNORECASE,
)
