"""Pictures into the square, mirrored sentences, and when colors may change."""
from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile

from coupalign.data.transforms import (
    PADDING,
    decode_image,
    draw_jitter,
    frame_of,
    image_to_square,
    mask_to_square,
    mirror_sentence,
    names_color,
)

sides = st.integers(1, 70)


def picture(height: int, width: int, mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def stored(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("mode, kind", [("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("P", "PNG"), ("LA", "PNG")])
def test_every_kind_of_picture_becomes_rgb(mode: str, kind: str):
    decoded = decode_image(stored(picture(20, 30, mode), kind))
    assert decoded.mode == "RGB" and decoded.size == (30, 20)


def test_a_rotation_tag_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = stored(picture(20, 30), exif=exif)
    assert Image.open(io.BytesIO(data)).getexif()[0x0112] == 6
    assert decode_image(data).size == (30, 20)


def test_a_picture_cut_short_is_an_error():
    data = stored(picture(64, 64))
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    for wrong in (data[:len(data) // 2], data[:10], b"", b"no picture at all"):
        with pytest.raises(ValueError):
            decode_image(wrong)


@given(sides, sides, st.integers(4, 64), st.sampled_from(["squash", "letterbox"]))
def test_the_frame_lies_inside_and_keeps_the_shape(height: int, width: int, size: int, resize: str):
    frame = frame_of(height, width, size, resize)
    assert 0 <= frame.top and frame.top + frame.inner_height <= size
    assert 0 <= frame.left and frame.left + frame.inner_width <= size
    assert size in (frame.inner_height, frame.inner_width)
    if resize == "letterbox":
        scale = size / max(height, width)
        assert abs(frame.inner_height - height * scale) <= max(0.5, 1 - height * scale)
        assert abs(frame.top - (size - frame.top - frame.inner_height)) <= 1


@given(sides, sides, st.integers(4, 64), st.sampled_from(["squash", "letterbox"]))
def test_a_mask_goes_where_pil_puts_it(height: int, width: int, size: int, resize: str):
    mask = np.random.default_rng(height + 99 * width).random((height, width)) < 0.5
    frame = frame_of(height, width, size, resize)
    expected = Image.new("L", (size, size))
    inner = Image.fromarray(mask.astype(np.uint8) * 255).resize((frame.inner_width, frame.inner_height), Image.Resampling.NEAREST)
    expected.paste(inner, (frame.left, frame.top))
    differs = mask_to_square(mask, frame) != (np.asarray(expected) > 0)
    # where a new center falls between two old pixels, PIL's rounding errors choose; ours is always the one after it
    both = (height, frame.inner_height), (width, frame.inner_width)
    ties = [(2 * np.arange(new) + 1) * old % (2 * new) == 0 for old, new in both]
    inside = differs[frame.top:frame.top + frame.inner_height, frame.left:frame.left + frame.inner_width]
    assert differs.sum() == inside.sum() and not inside[~ties[0]][:, ~ties[1]].any()


def test_an_image_is_resized_as_pil_does_and_padded_with_gray():
    image = picture(30, 60)
    squash = image_to_square(image, frame_of(30, 60, 32, "squash"))
    assert squash.dtype == np.uint8 and np.array_equal(squash, np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR)))
    letterbox = image_to_square(image, frame_of(30, 60, 32, "letterbox"))
    assert np.array_equal(letterbox[8:24], np.asarray(image.resize((32, 16), Image.Resampling.BILINEAR)))
    assert (letterbox[:8] == PADDING).all() and (letterbox[24:] == PADDING).all()


@pytest.mark.parametrize("resize", ["squash", "letterbox"])
def test_image_and_mask_are_mirrored_alike_inside_the_frame(resize: str):
    values = np.zeros((40, 21, 3), np.uint8)
    values[10:30, 2:9] = 255
    frame = frame_of(40, 21, 32, resize)
    image = image_to_square(Image.fromarray(values), frame, mirrored=True)
    mask = mask_to_square(values[..., 0] > 0, frame, mirrored=True)
    inside = np.s_[frame.top:frame.top + frame.inner_height, frame.left:frame.left + frame.inner_width]
    assert np.array_equal(image[inside], image_to_square(Image.fromarray(values), frame)[inside][:, ::-1])
    assert mask.sum() > 0 and (mask != (image[..., 0] > 127))[inside].mean() < 0.06      # the two resize rules differ at edges


@pytest.mark.parametrize("sentence, mirrored", [
    ("the left man", "the right man"), ("leftmost zebra", "rightmost zebra"), ("right-most", "left-most"),
    ("left-hand side, right hand side", "right-hand side, left hand side"), ("lefthand man", "righthand man"),
    ("Left guy ON THE RIGHT", "Right guy ON THE LEFT"), ("upper-left, topright", "upper-right, topleft"),
    ("second from the left.", "second from the right."), ("left's", "right's"),
    ("man on the right behind her", "man on the left behind her"),
    ("leftover pizza in bright light", "leftover pizza in bright light"), ("copyright uprights", "copyright uprights"), ("", ""),
])
def test_left_and_right_change_places_as_whole_words(sentence: str, mirrored: str):
    assert mirror_sentence(sentence) == mirrored and mirror_sentence(mirrored) == sentence


@pytest.mark.parametrize("sentence", ["man right next to her", "cup right behind", "at 3 o'clock", "guy on l", "lft guy",
                                      "all right", "clockwise second", "r side"])
def test_what_a_mirror_would_make_doubtful_is_not_mirrored(sentence: str):
    assert mirror_sentence(sentence) is None


@pytest.mark.parametrize("sentence", ["red car", "the whitish one", "dark-haired man", "grey shirt", "Blue", "multi-colored",
                                      "lighter one", "blonde", "orange", "man in blk"])
def test_colors_are_recognized(sentence: str):
    assert names_color(sentence)
    assert draw_jitter(sentence, 0.5, np.random.default_rng(0)) is None


@pytest.mark.parametrize("sentence", ["bored man", "the credit card", "tandem bike", "shredded lettuce", "left person", ""])
def test_words_that_only_contain_a_color(sentence: str):
    assert not names_color(sentence)
    factors = draw_jitter(sentence, 0.5, np.random.default_rng(0))
    assert factors is not None and all(0.5 <= factor <= 1.5 for factor in factors)


def test_jitter_changes_the_image_but_not_the_padding():
    image, frame = picture(20, 40), frame_of(20, 40, 32, "letterbox")
    changed = image_to_square(image, frame, jitter=(0.6, 1.3, 0.7))
    assert not np.array_equal(changed[8:24], image_to_square(image, frame)[8:24]) and (changed[:8] == PADDING).all()
    assert np.array_equal(image_to_square(image, frame, jitter=(1.0, 1.0, 1.0)), image_to_square(image, frame))
    assert draw_jitter("man", 0, np.random.default_rng(0)) is None


def test_the_stream_of_random_numbers_does_not_depend_on_the_sentence():
    states = []
    for sentence in ("man", "red man"):
        dice = np.random.default_rng(1)
        draw_jitter(sentence, 0.3, dice)
        states.append(dice.random())
    assert states[0] == states[1]
