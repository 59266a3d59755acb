"""Pictures that strangers made: colors, orientation, limits, and what is no picture."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from coupalign.data import pictures
from coupalign.data.pictures import (
    UnknownOrientation,
    decode_picture,
    open_picture,
    orientation_of,
    read_picture,
)
from coupalign.errors import InputError

ORIENTATION = 0x0112
RAMP = np.linspace(0, 65535, 48 * 40).reshape(48, 40).astype(np.uint16)
RAMP_OF_8_BITS = (RAMP >> 8).astype(np.uint8)
NOISE = np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8)


def saved(path: Path, image: Image.Image, **options) -> Path:
    image.save(path, **options)
    return path


def pixels_of(path: Path) -> np.ndarray:
    return np.asarray(read_picture(path).image)


def rgb(gray: np.ndarray) -> np.ndarray:
    return np.stack([gray] * 3, axis=-1)


def jpeg_with_exif(path: Path, exif: bytes, image: Image.Image | None = None) -> Path:
    """Write a JPEG with an EXIF segment of any bytes, which Pillow would not write."""
    stream = io.BytesIO()
    (image or Image.fromarray(NOISE)).save(stream, "JPEG")
    jpeg = stream.getvalue()
    segment = b"Exif\0\0" + exif
    header = b"\xff\xe1" + struct.pack(">H", len(segment) + 2)
    path.write_bytes(jpeg[:2] + header + segment + jpeg[2:])
    return path


def png_claiming(path: Path, width: int, height: int) -> Path:
    """Write a PNG of one bit per pixel whose header claims a size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(1 + width // 8) * 10)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", rows), chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return path


def jpeg_claiming(path: Path, width: int, height: int) -> Path:
    """Write a JPEG of 64 x 64 whose header claims another size."""
    stream = io.BytesIO()
    Image.new("L", (64, 64)).save(stream, "JPEG")
    jpeg = bytearray(stream.getvalue())
    start = jpeg.index(b"\xff\xc0")
    jpeg[start + 5 : start + 9] = struct.pack(">HH", height, width)
    path.write_bytes(jpeg)
    return path


# ------------------------------------------------------------------------------------- colors


def write_tiff(path: Path, values: np.ndarray, *, order: str, photometric: int, bits: int) -> Path:
    """Write an uncompressed gray TIFF tag by tag: Pillow does not write all that it reads.

    Args:
        order: "<" or ">", the order of the bytes.
        photometric: 0 if zero is white, 1 if it is black.
    """
    height, width = values.shape
    tags = [
        (256, 3, width),
        (257, 3, height),
        (258, 3, bits),
        (259, 3, 1),
        (262, 3, photometric),
        (273, 4, 8),
        (277, 3, 1),
        (278, 3, height),
        (279, 4, values.nbytes),
        (339, 3, 3 if values.dtype.kind == "f" else 1),
    ]
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    directory = struct.pack(order + "H", len(tags))
    for tag, kind, value in tags:
        packed = struct.pack(order + ("Hxx" if kind == 3 else "I"), value)
        directory += struct.pack(order + "HHI", tag, kind, 1) + packed
    mark = b"II*\0" if order == "<" else b"MM\0*"
    start = struct.pack(order + "I", 8 + len(data))
    path.write_bytes(mark + start + data + directory + bytes(4))
    return path


def test_gray_of_16_bits_keeps_its_upper_8(tmp_path: Path):
    png = saved(tmp_path / "deep.png", Image.fromarray(RAMP))
    little = write_tiff(tmp_path / "l.tif", RAMP, order="<", photometric=1, bits=16)
    big = write_tiff(tmp_path / "b.tif", RAMP, order=">", photometric=1, bits=16)
    packed = saved(tmp_path / "z.tif", Image.fromarray(RAMP), compression="tiff_deflate")

    for path in (png, little, big, packed):
        assert np.array_equal(pixels_of(path), rgb(RAMP_OF_8_BITS)), path


def test_tiff_whose_zero_is_white_is_inverted(tmp_path: Path):
    white = write_tiff(tmp_path / "w.tif", 65535 - RAMP, order="<", photometric=0, bits=16)
    floating = write_tiff(
        tmp_path / "f.tif",
        (RAMP_OF_8_BITS / 255).astype(np.float32),
        order="<",
        photometric=0,
        bits=32,
    )

    assert np.array_equal(pixels_of(white), rgb(255 - ((65535 - RAMP) >> 8).astype(np.uint8)))
    assert np.array_equal(pixels_of(floating), rgb(255 - RAMP_OF_8_BITS))


def test_gray_of_12_bits_keeps_its_upper_8(tmp_path: Path):
    values = np.linspace(0, 4095, 48).astype(np.uint16).reshape(6, 8)
    # Two values share three bytes.
    pairs = values.reshape(-1, 2).tolist()
    packed = [[a >> 4, (a & 15) << 4 | b >> 8, b & 255] for a, b in pairs]
    path = write_tiff(tmp_path / "a.tif", values, order="<", photometric=1, bits=12)
    stored = bytearray(path.read_bytes())
    stored[8 : 8 + 72] = bytes(np.uint8(packed))
    # The length of the strip, which is the last but one of the tags.
    length = stored.index(struct.pack("<HHI", 279, 4, 1)) + 8
    stored[length : length + 4] = struct.pack("<I", 72)
    path.write_bytes(stored)

    assert np.array_equal(pixels_of(path), rgb((values >> 4).astype(np.uint8)))


@pytest.mark.parametrize("scale", [1, 255])
def test_floating_point_gray_is_scaled_to_its_white(tmp_path: Path, scale: int):
    values = (RAMP_OF_8_BITS / np.float32(255) * scale).astype(np.float32)
    path = saved(tmp_path / "f.tif", Image.fromarray(values))

    assert np.array_equal(pixels_of(path), rgb(RAMP_OF_8_BITS))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.float32([[0, 300]]), "floating-point gray from 0 to 300"),
        (np.float32([[-1, 1]]), "floating-point gray from -1 to 1"),
        (np.float32([[0, np.nan]]), "floating-point gray"),
        (np.int32([[0, 70000]]), "gray of 32 bits"),
    ],
)
def test_gray_without_a_known_white_is_refused(tmp_path: Path, values: np.ndarray, words: str):
    path = saved(tmp_path / "x.tif", Image.fromarray(values))

    with pytest.raises(InputError, match=rf"x\.tif: .*{words}"):
        read_picture(path)


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("a.png", "RGB"),
        ("a.png", "L"),
        ("a.png", "1"),
        ("a.png", "P"),
        ("a.gif", "P"),
        ("a.bmp", "RGB"),
        ("a.webp", "RGB"),
        ("a.tif", "RGB"),
        ("a.tif", "CMYK"),
        ("a.tif", "YCbCr"),
        ("a.jpg", "CMYK"),
        ("a.jpg", "L"),
    ],
)
def test_opaque_picture_is_that_of_pillow(tmp_path: Path, name: str, mode: str):
    options = {"lossless": True} if name == "a.webp" else {}
    path = saved(tmp_path / name, Image.fromarray(NOISE).convert(mode), **options)

    assert np.array_equal(pixels_of(path), Image.open(path).convert("RGB"))


def with_hidden_left_half() -> tuple[Image.Image, np.ndarray]:
    """An RGBA picture whose left half is transparent, and what a viewer shows on white."""
    alpha = np.full(NOISE.shape[:2], 255, np.uint8)
    alpha[:, :10] = 0
    shown = NOISE.copy()
    shown[:, :10] = 255
    return Image.fromarray(np.dstack([NOISE, alpha])), shown


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.tif"])
def test_transparent_pixels_are_white(tmp_path: Path, name: str):
    picture, shown = with_hidden_left_half()
    options = {"lossless": True, "exact": True} if name == "a.webp" else {}

    assert np.array_equal(pixels_of(saved(tmp_path / name, picture, **options)), shown)


def test_half_transparent_pixel_is_mixed_with_white(tmp_path: Path):
    path = saved(tmp_path / "a.png", Image.new("RGBA", (2, 2), (0, 100, 200, 51)))

    # 0.2 of the color and 0.8 of white.
    assert pixels_of(path)[0, 0].tolist() == [204, 224, 244]


@pytest.mark.parametrize(
    ("mode", "key", "hidden", "shown"),
    [
        ("L", 7, 7, 8),
        ("P", 7, 7, 8),
        ("1", 1, 1, 0),
        ("RGB", (7, 7, 7), (7, 7, 7), (8, 7, 7)),
        ("I;16", 7 << 8, 7 << 8, 8 << 8),
    ],
)
def test_color_that_means_transparent_is_white(
    tmp_path: Path, mode: str, key: int | tuple, hidden: int | tuple, shown: int | tuple
):
    picture = Image.new(mode, (2, 1), hidden)
    if mode == "P":
        picture.putpalette([index for index in range(256) for _ in range(3)])
    picture.putpixel((1, 0), shown)
    path = saved(tmp_path / "a.png", picture, transparency=key)

    decoded = pixels_of(path)

    assert decoded[0, 0].tolist() == [255, 255, 255]
    expected = {"L": 8, "P": 8, "1": 0, "RGB": (8, 7, 7), "I;16": 8}[mode]
    assert decoded[0, 1].tolist() == list(np.broadcast_to(expected, 3))


@pytest.mark.parametrize("mode", ["L", "P"])
def test_gray_and_palette_with_alpha_are_put_on_white(mode: str):
    picture = Image.new("L", (2, 1), 9).convert(mode)
    alpha = Image.new("L", (2, 1), 255)
    alpha.putpixel((1, 0), 0)
    picture.putalpha(alpha)
    assert picture.mode == mode + "A"

    decoded = np.asarray(decode_picture(picture).image)

    assert decoded[0].tolist() == [[9, 9, 9], [255, 255, 255]]


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp", "a.tif"])
def test_first_frame_of_an_animation_is_shown(tmp_path: Path, name: str):
    frames = [Image.new("RGB", (8, 6), color) for color in ("red", "blue")]
    options = {"lossless": True} if name == "a.webp" else {}

    path = saved(tmp_path / name, frames[0], save_all=True, append_images=frames[1:], **options)

    assert (pixels_of(path) == (255, 0, 0)).all()


def test_avif_is_read(tmp_path: Path):
    path = saved(tmp_path / "a.avif", Image.new("RGB", (16, 12), (200, 30, 30)))

    assert np.abs(pixels_of(path).astype(int) - (200, 30, 30)).max() < 8


# -------------------------------------------------------------------------------- orientation


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif", "packed.tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_shown_as_pillow_turns_it(tmp_path: Path, name: str, orientation: int):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"a.webp": {"lossless": True}, "packed.tif": {"compression": "tiff_lzw"}}
    image = Image.fromarray(NOISE)
    path = saved(tmp_path / name, image, exif=exif, **options.get(name, {}))
    plain = saved(tmp_path / f"plain-{name}", image, **options.get(name, {}))

    decoded = read_picture(path)

    assert decoded.orientation == orientation
    assert not decoded.doubt
    expected = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: a[::-1].transpose(1, 0, 2),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: a.transpose(1, 0, 2)[::-1],
    }[orientation](pixels_of(plain))
    assert np.array_equal(decoded.image, expected)


def test_odd_values_beside_the_orientation_do_not_matter(tmp_path: Path):
    # XResolution is the rational -1/0, which Pillow cannot write back.
    entries = struct.pack("<HHII", ORIENTATION, 3, 1, 6) + struct.pack("<HHII", 0x11A, 10, 1, 38)
    exif = b"II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4) + struct.pack("<ii", -1, 0)

    decoded = read_picture(jpeg_with_exif(tmp_path / "phone.jpg", exif))

    assert decoded.orientation == 6
    assert decoded.image.size == (30, 20)


def test_damaged_exif_leaves_the_picture_as_stored_and_in_doubt(tmp_path: Path):
    decoded = read_picture(jpeg_with_exif(tmp_path / "a.jpg", b"no TIFF at all"))

    assert "its EXIF data cannot be read" in decoded.doubt
    assert decoded.orientation == 1
    assert decoded.image.size == (20, 30)


@pytest.mark.parametrize(
    "exif",
    [
        b"II*\0\xff\xff\xff\xff",
        b"II*\0" + struct.pack("<IH", 8, 1) + struct.pack("<HHII", ORIENTATION, 3, 1, 9) + bytes(4),
        b"II*\0" + struct.pack("<IH", 8, 1) + struct.pack("<HHI4s", ORIENTATION, 2, 2, b"x"),
    ],
)
def test_picture_without_a_readable_orientation_is_as_stored(tmp_path: Path, exif: bytes):
    decoded = read_picture(jpeg_with_exif(tmp_path / "a.jpg", exif))

    assert decoded.image.size == (20, 30)
    assert decoded.orientation == 1


def test_orientation_that_is_none_is_in_doubt(tmp_path: Path):
    entry = struct.pack("<HHII", ORIENTATION, 3, 1, 9)
    path = jpeg_with_exif(
        tmp_path / "a.jpg", b"II*\0" + struct.pack("<IH", 8, 1) + entry + bytes(4)
    )

    assert "its EXIF orientation is 9" in read_picture(path).doubt
    with Image.open(path) as image, pytest.raises(UnknownOrientation):
        orientation_of(image)


@given(st.binary(max_size=120), st.sampled_from([b"", b"II*\0\x08\0\0\0", b"MM\0*\0\0\0\x08"]))
def test_no_exif_data_prevents_the_reading_of_a_picture(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, start: bytes
):
    path = jpeg_with_exif(tmp_path_factory.mktemp("exif") / "a.jpg", start + data)

    decoded = read_picture(path)

    assert sorted(decoded.image.size) == [20, 30]
    assert decoded.orientation in range(1, 9)


# ------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize(("width", "height"), [(50_000, 50_000), (16_000, 11_500)])
def test_picture_with_too_many_pixels_is_refused(tmp_path: Path, width: int, height: int):
    for path in (
        png_claiming(tmp_path / "big.png", width, height),
        jpeg_claiming(tmp_path / "big.jpg", width, height),
    ):
        with pytest.raises(
            InputError, match=rf"{path.name}: .*{width * height:,} pixels; the limit"
        ):
            read_picture(path)


def test_own_limit_holds_where_that_of_pillow_is_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    path = png_claiming(tmp_path / "big.png", 50_000, 40_000)

    with pytest.raises(InputError, match=r"it has 50,000 x 40,000 pixels; the limit is"):
        read_picture(path)


def test_large_picture_cut_short_is_refused(tmp_path: Path):
    path = jpeg_claiming(tmp_path / "cut.jpg", 12_000, 12_000)

    with pytest.raises(InputError, match=r"cut\.jpg: cannot be read as an image: it is cut short"):
        read_picture(path)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_jpeg_with_an_end_mark_but_without_half_of_its_pixels_is_refused(tmp_path: Path, mode: str):
    path = saved(tmp_path / "half.jpg", Image.fromarray(NOISE).convert(mode))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 3 // 4] + b"\xff\xd9")
    Image.open(path).load()

    with pytest.raises(InputError, match=r"half\.jpg: .*a part of its pixels is missing"):
        read_picture(path)


def test_file_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pictures, "MAX_BYTES", 100)
    path = saved(tmp_path / "a.png", Image.fromarray(NOISE))

    with pytest.raises(InputError, match="the limit is 100"):
        read_picture(path)


def test_postscript_is_never_given_to_another_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "a.jpg"
    path.write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n"
    )
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a program was started"))
    assert Image.open(path).format == "EPS"

    with pytest.raises(InputError, match=r"a\.jpg: .*none of JPEG"):
        read_picture(path)
    with pytest.raises(ValueError, match="none of JPEG"):
        open_picture(path, ("JPEG",))


@pytest.mark.parametrize("kind", ["folder", "pipe", "text", "empty", "missing"])
def test_what_is_no_picture_is_refused_by_name(tmp_path: Path, kind: str):
    path = tmp_path / "a.jpg"
    match kind:
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "text":
            path.write_text("not an image")
        case "empty":
            path.touch()

    with pytest.raises(InputError, match=r"a\.jpg: cannot be read as an image"):
        read_picture(path)


def test_odd_name_is_escaped_in_the_message(tmp_path: Path):
    path = tmp_path / "a\n\x1b[2Jb.jpg"
    path.touch()

    with pytest.raises(InputError) as raised:
        read_picture(path)

    assert str(raised.value).isprintable()


@given(
    st.sampled_from(["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "AVIF"]),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=6),
    st.floats(0.2, 1),
)
def test_damaged_bytes_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory,
    kind: str,
    changes: list[tuple[float, int]],
    kept: float,
):
    stream = io.BytesIO()
    Image.fromarray(NOISE).save(stream, kind)
    data = bytearray(stream.getvalue())
    for place, value in changes:
        data[int(place * (len(data) - 1))] = value
    path = tmp_path_factory.mktemp("damaged") / "a"
    path.write_bytes(data[: int(kept * len(data))])

    try:
        decoded = read_picture(path)
    except InputError as error:
        assert "cannot be read as an image" in str(error)
        assert "\n" not in str(error)
    else:
        assert decoded.image.mode == "RGB"
