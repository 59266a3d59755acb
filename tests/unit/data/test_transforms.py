"""Images and masks in the square, mirrored sentences, and when colors may change."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile
from torch.nn.functional import interpolate

from coupalign.data import masks
from coupalign.data.batch import Frame
from coupalign.data.transforms import (
    PADDING,
    decode_image,
    draw_jitter,
    frame_of,
    image_to_square,
    mask_to_square,
    names_color,
    reduction,
    rle_to_square,
)

sides = st.integers(1, 70)


def picture(height: int, width: int, mode: str = "RGB") -> Image.Image:
    generator = np.random.default_rng(height * 1000 + width)
    noise = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


def stored(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def inside_of(frame: Frame) -> tuple[slice, slice]:
    rows = slice(frame.top, frame.top + frame.inner_height)
    return rows, slice(frame.left, frame.left + frame.inner_width)


# -------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize(
    "mode, kind", [("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("P", "PNG"), ("LA", "PNG")]
)
def test_every_kind_of_image_becomes_rgb(mode: str, kind: str):
    decoded = decode_image(stored(picture(20, 30, mode), kind))

    assert decoded.dtype == np.uint8 and decoded.shape == (20, 30, 3)


@pytest.mark.parametrize(
    "options",
    [
        {"subsampling": 0},
        {"subsampling": 1},
        {"subsampling": 2},
        {"progressive": True},
        {"quality": 30},
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_decoded_pixels_equal_those_of_pillow(mode: str, options: dict):
    for height, width in ((64, 48), (37, 53), (1, 1)):
        data = stored(picture(height, width, mode), **options)
        assert np.array_equal(decode_image(data), Image.open(io.BytesIO(data)).convert("RGB"))


def test_decoded_photographs_equal_those_of_pillow(real_data: Path):
    photographs = sorted((real_data / "coco_pool" / "images" / "train2014").glob("*.jpg"))

    for file in photographs[:50]:
        expected = Image.open(file).convert("RGB")
        assert np.array_equal(decode_image(file.read_bytes()), expected), file


def test_image_that_libjpeg_warns_of_is_left_to_pillow():
    data = stored(picture(64, 64))
    odd = data[:-2] + bytes(5) + data[-2:]
    with pytest.raises(ValueError):
        simplejpeg.decode_jpeg(odd)

    assert np.array_equal(decode_image(odd), Image.open(io.BytesIO(odd)).convert("RGB"))


def test_decompression_bomb_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)

    with pytest.raises(ValueError, match="600 pixels; the limit is"):
        decode_image(stored(picture(20, 30)))


@given(
    st.integers(1, 5000),
    st.integers(1, 5000),
    st.sampled_from([64, 480]),
    st.sampled_from(["squash", "letterbox"]),
)
def test_reduction_leaves_twice_the_size_that_is_needed(
    height: int, width: int, size: int, resize: str
):
    frame = frame_of(height, width, size, resize)

    factor = reduction(height, width, frame)

    def leaves_enough(factor: int) -> bool:
        return height / factor >= 2 * frame.inner_height and width / factor >= 2 * frame.inner_width

    assert factor == 1 or leaves_enough(factor)
    assert factor == 8 or not leaves_enough(2 * factor)
    assert factor == 1 or max(height, width) > 640 or size < 480


@pytest.mark.parametrize(
    "height, width, factor", [(256, 256, 2), (255, 300, 1), (513, 700, 4), (1100, 1030, 8)]
)
def test_image_decoded_smaller_looks_the_same(height: int, width: int, factor: int):
    """It differs by less than half of what another usual filter (area, not triangle) changes."""
    # Half of the image is smooth, half is noise.
    coarse = picture(height // 6, width // 6).resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(coarse) // 2 + np.asarray(picture(height, width)) // 2
    data = stored(Image.fromarray(pixels), quality=90)
    frame = frame_of(height, width, 64, "squash")

    reduced, whole = decode_image(data, frame), decode_image(data)

    assert whole.shape == (height, width, 3)
    assert reduced.shape == (-(-height // factor), -(-width // factor), 3)
    expected = image_to_square(whole, frame).astype(int)
    area = np.asarray(Image.fromarray(whole).resize((64, 64), Image.Resampling.BOX))
    difference = np.abs(image_to_square(reduced, frame) - expected).mean()
    assert difference <= np.abs(area - expected).mean() / 2


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_image_of_another_size_is_refused(kind: str):
    with pytest.raises(
        ValueError, match=r"the picture is \(300, 200\), its annotation says \(200, 300\)"
    ):
        decode_image(stored(picture(200, 300), kind), frame_of(300, 200, 32, "squash"))


def test_rotation_tag_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6

    data = stored(picture(20, 30), exif=exif)

    assert Image.open(io.BytesIO(data)).getexif()[0x0112] == 6
    assert decode_image(data).shape == (20, 30, 3)


def test_image_cut_short_is_refused():
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    data = stored(picture(64, 64))
    progressive = stored(picture(64, 64), progressive=True)

    for wrong in (
        data[: len(data) // 2],
        data[:-20],
        progressive[: len(progressive) // 2],
        data[:10],
        b"",
        b"no picture at all",
    ):
        with pytest.raises(ValueError):
            decode_image(wrong)


# -------------------------------------------------------------------------------- in the square


@given(sides, sides, st.integers(4, 64), st.sampled_from(["squash", "letterbox"]))
def test_frame_is_inside_and_keeps_the_shape(height: int, width: int, size: int, resize: str):
    frame = frame_of(height, width, size, resize)

    assert 0 <= frame.top and frame.top + frame.inner_height <= size
    assert 0 <= frame.left and frame.left + frame.inner_width <= size
    assert size in (frame.inner_height, frame.inner_width)
    if resize == "letterbox":
        scale = size / max(height, width)
        assert abs(frame.inner_height - height * scale) <= max(0.5, 1 - height * scale)
        assert abs(frame.top - (size - frame.top - frame.inner_height)) <= 1


@given(sides, sides, st.integers(4, 64), st.sampled_from(["squash", "letterbox"]))
def test_mask_goes_where_pillow_puts_it(height: int, width: int, size: int, resize: str):
    mask = np.random.default_rng(height + 99 * width).random((height, width)) < 0.5
    frame = frame_of(height, width, size, resize)
    inner = Image.fromarray(mask.astype(np.uint8) * 255).resize(
        (frame.inner_width, frame.inner_height), Image.Resampling.NEAREST
    )
    expected = Image.new("L", (size, size))
    expected.paste(inner, (frame.left, frame.top))

    differs = mask_to_square(mask, frame) != (np.asarray(expected) > 0)

    # If a new center falls between two old pixels, Pillow's rounding errors choose one of them.
    # We always take the one after it.
    both = (height, frame.inner_height), (width, frame.inner_width)
    tie_rows, tie_columns = ((2 * np.arange(new) + 1) * old % (2 * new) == 0 for old, new in both)
    inside = differs[inside_of(frame)]
    assert differs.sum() == inside.sum()
    assert not inside[~tie_rows][:, ~tie_columns].any()


@given(sides, sides, st.integers(4, 64), st.booleans())
def test_image_is_resized_as_torch_does_and_almost_as_pillow_does(
    height: int, width: int, size: int, given_out: bool
):
    """Equal to torch from either memory order. Two levels from Pillow, one per rounding."""
    pixels, frame = np.array(picture(height, width)), frame_of(height, width, size, "squash")
    out = np.full((size, size, 3), 77, np.uint8) if given_out else None

    found = image_to_square(pixels, frame, out=out)

    assert found is out or not given_out
    pillow = np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR))
    assert np.abs(found.astype(int) - pillow).max() <= 2
    channels_last = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    for source in (channels_last, channels_last.contiguous()):
        expected = interpolate(source, (size, size), mode="bilinear", antialias=True)
        assert np.array_equal(found, expected[0].permute(1, 2, 0))


def test_most_pixels_equal_those_of_pillow_with_any_number_of_threads():
    image = picture(480, 640)

    found = []
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(image_to_square(np.asarray(image), frame_of(480, 640, 320, "squash")))
    torch.set_num_threads(before)

    assert np.array_equal(*found)
    pillow = np.asarray(image.resize((320, 320), Image.Resampling.BILINEAR))
    difference = np.abs(found[0].astype(int) - pillow)
    assert difference.max() <= 1 and (difference > 0).mean() < 0.1


def test_letterbox_is_padded_with_gray():
    pixels, frame = np.array(picture(30, 60)), frame_of(30, 60, 32, "letterbox")

    letterbox = image_to_square(pixels, frame)

    assert letterbox.shape == (32, 32, 3)
    assert (letterbox[:8] == PADDING).all() and (letterbox[24:] == PADDING).all()
    source = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    inner = interpolate(source, (16, 32), mode="bilinear", antialias=True)
    assert np.array_equal(letterbox[8:24], inner[0].permute(1, 2, 0))


def test_upright_letterbox_is_padded_at_the_sides():
    pixels = np.array(picture(30, 60)).swapaxes(0, 1)

    upright = image_to_square(pixels, frame_of(60, 30, 32, "letterbox"))

    assert (upright[:, :8] == PADDING).all() and (upright[:, 24:] == PADDING).all()
    assert np.ptp(upright[:, 8:24]) > 100


def test_letterbox_overwrites_its_row_and_no_other():
    pixels, frame = np.array(picture(30, 60)), frame_of(30, 60, 32, "letterbox")
    rows = np.full((3, 32, 32, 3), 77, np.uint8)

    image_to_square(pixels, frame, out=rows[1])

    assert np.array_equal(rows[1], image_to_square(pixels, frame))
    assert (rows[::2] == 77).all()


@pytest.mark.parametrize("small", [0, 1 << 16])
@given(
    sides,
    sides,
    st.integers(4, 64),
    st.sampled_from(["squash", "letterbox"]),
    st.booleans(),
    st.sampled_from([0, 0.5, 0.98, 1]),
)
def test_rle_to_square_equals_mask_to_square(
    small: int, height: int, width: int, size: int, resize: str, mirrored: bool, share: float
):
    mask = np.random.default_rng(height + 99 * width).random((height, width)) < share
    frame, out = frame_of(height, width, size, resize), np.ones((size, size), bool)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masks, "SMALL_MASK", small)
        rle_to_square(masks.encode(mask), frame, mirrored=mirrored, out=out)

    assert np.array_equal(out, mask_to_square(mask, frame, mirrored=mirrored))


def test_mask_of_another_size_is_refused():
    rle = masks.encode(np.ones((4, 5), bool))

    with pytest.raises(ValueError, match=r"the mask is \(4, 5\), its picture is \(5, 4\)"):
        rle_to_square(rle, frame_of(5, 4, 8, "squash"), out=np.empty((8, 8), bool))


@pytest.mark.parametrize("resize", ["squash", "letterbox"])
def test_image_and_mask_are_mirrored_alike_inside_the_frame(resize: str):
    pixels = np.zeros((40, 21, 3), np.uint8)
    pixels[10:30, 2:9] = 255
    frame = frame_of(40, 21, 32, resize)

    image = image_to_square(pixels, frame, mirrored=True)
    mask = mask_to_square(pixels[..., 0] > 0, frame, mirrored=True)

    inside = inside_of(frame)
    plain = image_to_square(pixels, frame)
    assert np.array_equal(image[inside], plain[inside][:, ::-1])

    # The two ways to resize differ at edges.
    assert mask.sum() > 0
    assert (mask != (image[..., 0] > 127))[inside].mean() < 0.06


# ------------------------------------------------------------------------------------ sentences


@pytest.mark.parametrize(
    "sentence",
    [
        "red car",
        "the whitish one",
        "dark-haired man",
        "grey shirt",
        "Blue",
        "multi-colored",
        "lighter one",
        "blonde",
        "orange",
        "man in blk",
    ],
)
def test_sentence_with_a_color_gets_no_jitter(sentence: str):
    assert names_color(sentence)
    assert draw_jitter(sentence, 0.5, np.random.default_rng(0)) is None


@pytest.mark.parametrize(
    "sentence",
    ["bored man", "the credit card", "tandem bike", "shredded lettuce", "left person", ""],
)
def test_word_that_contains_a_color_gets_jitter(sentence: str):
    assert not names_color(sentence)

    factors = draw_jitter(sentence, 0.5, np.random.default_rng(0))

    assert factors is not None
    assert all(0.5 <= factor <= 1.5 for factor in factors)


def test_jitter_changes_the_image_but_not_the_padding():
    image, frame = np.array(picture(20, 40)), frame_of(20, 40, 32, "letterbox")
    plain = image_to_square(image, frame)

    changed = image_to_square(image, frame, jitter=(0.6, 1.3, 0.7))
    unchanged = image_to_square(image, frame, jitter=(1.0, 1.0, 1.0))

    assert not np.array_equal(changed[8:24], plain[8:24])
    assert (changed[:8] == PADDING).all()
    assert np.array_equal(unchanged, plain)


def test_sentence_in_another_language_gets_no_jitter():
    for sentence in ("红色的杯子", "der rote Stuhl", "la silla roja"):
        assert draw_jitter(sentence, 0.5, np.random.default_rng(0)) is None


def test_jitter_of_strength_zero_is_none():
    assert draw_jitter("man", 0, np.random.default_rng(0)) is None


def test_random_stream_does_not_depend_on_the_sentence():
    states = []
    for sentence in ("man", "red man"):
        generator = np.random.default_rng(1)
        draw_jitter(sentence, 0.3, generator)
        states.append(generator.random())

    assert states[0] == states[1]
