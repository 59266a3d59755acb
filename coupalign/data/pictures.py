"""Open pictures that strangers made. Every module that opens one does so here.

A picture is what a viewer shows: its first frame, turned as its EXIF orientation says, on white
where it is transparent. Gray of 16 bits keeps its upper 8.

Only the formats of `FORMATS` are read, whatever the name of the file says. Pillow itself would also
hand PostScript to another program.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, UnidentifiedImageError

from coupalign.errors import InputError

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "AVIF")
JPEG_FORMATS = ("JPEG", "MPO")  # MPO: several JPEGs in one file, as some cameras write

# Where Pillow refuses a picture too. A photograph of 100 megapixels passes.
MAX_PIXELS = 178_956_970
MAX_BYTES = 2**30

BACKGROUND = (255, 255, 255)  # of what is transparent

# Pillow warns at half of its limit. Ours is the one that counts.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # tags of a TIFF, and a value


@dataclass(frozen=True, kw_only=True)
class DecodedPicture:
    """A picture as a viewer shows it.

    Attributes:
        image: in RGB.
        orientation: the EXIF orientation, 1 to 8. From 2 on, the picture was turned.
        doubt: why the orientation is not known, so that the picture is as it is stored; "" if it
            is known.
        jpeg: the bytes of its file, if it is a JPEG that was not turned.
    """

    image: Image.Image
    orientation: int
    doubt: str
    jpeg: bytes | None = None


def read_picture(path: Path) -> DecodedPicture:
    """Read a picture of any of `FORMATS` from a file.

    Raises:
        InputError: it is no such file, cut short, damaged or too large. The message names the file.
    """
    try:
        _check_file(path)
        with open(path, "rb") as file:
            image = open_picture(file)
            decoded = decode_picture(image)
            if image.format not in JPEG_FORMATS:
                return decoded

            file.seek(0)
            jpeg = file.read()
            refuse_missing_pixels(jpeg)
            return decoded if decoded.orientation > 1 else replace(decoded, jpeg=jpeg)
    except (OSError, ValueError, MemoryError) as error:
        raise InputError(f"{shown(path)}: cannot be read as an image: {_reason(error)}") from None


def open_header(path: Path) -> Image.Image:
    """Open a file of any of `FORMATS` to look at its size.

    Raises:
        OSError, ValueError: it cannot be read.
    """
    _check_file(path)
    return open_picture(path)


def open_picture(file: Path | BinaryIO, formats: Sequence[str] = FORMATS) -> Image.Image:
    """Read the header of a picture. Its pixels are decoded when they are used.

    Raises:
        OSError: the file cannot be read.
        ValueError: it has none of `formats`, its header is damaged, or it has too many pixels.
    """
    try:
        image = Image.open(file, formats=formats)
    except UnidentifiedImageError:
        raise ValueError(
            f"it is none of {', '.join(formats)}, or its beginning is damaged; "
            "convert it to JPEG or PNG"
        ) from None
    except Image.DecompressionBombError as error:
        pixels = int(re.search(r"\d+", str(error))[0])
        raise ValueError(
            f"it has {pixels:,} pixels; the limit is {MAX_PIXELS:,}. Make it smaller"
        ) from None
    except Exception as error:  # of a damaged header, Pillow raises nearly anything
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"its header is damaged: {_reason(error)}") from None

    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"it has {width:,} x {height:,} pixels; the limit is {MAX_PIXELS:,}. Make it smaller"
        )
    return image


def decode_picture(image: Image.Image) -> DecodedPicture:
    """Decode an opened picture and turn it as its EXIF orientation says.

    Args:
        image: of any mode. It is not changed, but its pixels are loaded.

    Raises:
        ValueError: the pixels are cut short or damaged, or their range is not defined.
    """
    # Pillow turns a TIFF itself while it loads it, and then forgets the orientation. A PNG may
    # have its EXIF data behind the pixels.
    turns_itself = image.format == "TIFF"
    orientation, doubt = 1, ""
    try:
        if not turns_itself:
            load_pixels(image)
        orientation = orientation_of(image)
    except UnknownOrientation as error:
        doubt = str(error)
    if turns_itself:
        load_pixels(image)

    upright = to_rgb(image)
    if not turns_itself:
        upright = turn(upright, orientation)
    # Whoever opens the result must not turn it again.
    upright.info = {}
    return DecodedPicture(image=upright, orientation=orientation, doubt=doubt)


def load_pixels(image: Image.Image) -> None:
    """Decode the pixels of an opened picture.

    Raises:
        ValueError: they are cut short or damaged.
    """
    try:
        image.load()
    except Exception as error:  # of damaged bytes, Pillow raises nearly anything
        raise ValueError(f"it is cut short or damaged: {_reason(error)}") from None


def refuse_missing_pixels(jpeg: bytes) -> None:
    """Refuse a JPEG whose data ends before its pixels do, although it has an end mark.

    Pillow would invent the rest, in gray.

    Raises:
        ValueError: pixels are missing.
    """
    try:
        # An eighth of the size is enough to see the end.
        simplejpeg.decode_jpeg(jpeg, "Gray", min_height=1, min_width=1)
    except ValueError as error:
        # libjpeg-turbo objects to harmless flaws too, and to colors that Pillow understands.
        if "premature end" in str(error).lower():
            raise ValueError(
                "it is cut short or damaged: a part of its pixels is missing"
            ) from None


# ------------------------------------------------------------------------------- orientation


class UnknownOrientation(ValueError):
    """The EXIF data of a picture cannot be read. The message says why."""


def orientation_of(image: Image.Image) -> int:
    """Read the EXIF orientation of a picture, 1 to 8. It is 1 if there is none.

    Raises:
        UnknownOrientation: the EXIF data is damaged, or the orientation is not a number to 8.
    """
    try:
        # `getexif` raises an error only once, and the plugin of JPEG has seen it already.
        if "exif" in image.info:
            Image.Exif().load(image.info["exif"])
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception as error:  # of damaged data, Pillow raises nearly anything
        raise UnknownOrientation(f"its EXIF data cannot be read: {_reason(error)}") from None

    # Cameras write 0 for an orientation that they did not measure.
    if value not in range(9):
        raise UnknownOrientation(f"its EXIF orientation is {value!r:.40}, not a number from 1 to 8")
    return int(value) or 1


def turn(image: Image.Image, orientation: int) -> Image.Image:
    """Turn the stored pixels as an EXIF orientation says, 1 to 8."""
    method = _TURNS.get(orientation)
    return image if method is None else image.transpose(method)


# ------------------------------------------------------------------------------------- colors


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a picture of any mode to RGB.

    Raises:
        ValueError: the range of its values is not defined, or Pillow cannot convert its mode.
    """
    try:
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            return Image.fromarray(_gray_of_8_bits(image)).convert("RGB")
        if not image.has_transparency_data:
            return image.convert("RGB")

        colors = image.convert("RGBA")
        on_background = Image.new("RGB", image.size, BACKGROUND)
        on_background.paste(colors, mask=colors.getchannel("A"))
        return on_background
    except ValueError as error:
        raise ValueError(f"its colors are not understood: {_reason(error)}") from None


def _gray_of_8_bits(image: Image.Image) -> np.ndarray:
    """Reduce gray of 12, 16 or 32 bits or of floating point to uint8 [H, W].

    Pillow would cut at 255, which makes nearly all of a picture white.
    """
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})
    match image.mode:
        case "F":
            low, high = float(values.min()), float(values.max())
            # Any other range, and NaN, has no white that everybody agrees on.
            if not (low >= 0 and high <= 255):
                raise ValueError(
                    f"floating-point gray from {low:g} to {high:g}; scale it to 0 to 1, or save "
                    "it with 8 or 16 bits"
                )
            gray = np.rint(values * 255 if high <= 1 else values)
        case "I" if image.format != "PNG":
            raise ValueError("gray of 32 bits, whose white is not defined; save it with 8 or 16")
        case _:
            bits = tags.get(_BITS_PER_SAMPLE, (16,))[0]
            gray = values >> (bits - 8)

    gray = gray.astype(np.uint8)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        gray = 255 - gray
    if "transparency" in image.info:
        gray[values == image.info["transparency"]] = BACKGROUND[0]
    return gray


def shown(name: Path | str) -> str:
    """Return a file name for a message. Line feeds and the like are escaped."""
    text = str(name)
    return text if text.isprintable() else repr(text)


def _check_file(path: Path) -> None:
    """Refuse what is not a file that can be read to its end.

    Raises:
        OSError: there is no such file.
        ValueError: it is a folder, a device or a pipe, or larger than MAX_BYTES.
    """
    size = path.stat().st_size
    if not path.is_file():
        raise ValueError("it is not a file")
    if size > MAX_BYTES:
        raise ValueError(f"it has {size:,} bytes; the limit is {MAX_BYTES:,}")


def _reason(error: Exception) -> str:
    """Return the message of an error in one short line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join((text or type(error).__name__).split())[:200]
