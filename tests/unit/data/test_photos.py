"""Recognizing photographs: equal content under any name; different content under none."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from coupalign.data import photos
from coupalign.data.photos import (
    MAX_DISTANCE,
    NO_NUMBER,
    PhotoMark,
    Photos,
    bits_between,
    compare,
    distinct_photos,
    mark_photo,
)
from tests.unit.data.photographs import encode, photograph


def to_hex(bits: int, digits: int) -> str:
    return f"{bits:0{digits}x}"


marks = st.builds(
    PhotoMark,
    st.none() | st.integers(0, 5),
    st.integers(1, 6).map(lambda digest: to_hex(digest, 16)),
    st.sets(st.integers(0, 255), max_size=80).map(
        lambda bits: to_hex(sum(1 << bit for bit in bits), 64)
    ),
)


def is_same(one: PhotoMark | None, other: PhotoMark | None, ids: tuple[int, int]) -> bool:
    """The rule, pair by pair."""
    if one is None or other is None:
        number = ids[0] if one is None else one.number
        return number is not None and number == (ids[1] if other is None else other.number)
    mirror = f"{int(one.look, 16) ^ int('5' * 64, 16):064x}"
    bits = min(bits_between(one.look, other.look), bits_between(mirror, other.look))
    same_number = one.number is not None and one.number == other.number
    return one.sha256 == other.sha256 or bits <= (64 if same_number else 32)


@given(st.lists(marks | st.none(), max_size=8), st.lists(marks | st.none(), max_size=8))
@settings(deadline=None)
def test_comparison_follows_the_rule(
    scored: list[PhotoMark | None], trained: list[PhotoMark | None]
) -> None:
    # Old entries are of COCO, each with a number of its own.
    sides = []
    for side in (scored, trained):
        first_of_digest = {mark.sha256: mark for mark in reversed(side) if mark is not None}
        described = []
        for number, mark in enumerate(side):
            kept = mark if mark is None else first_of_digest[mark.sha256]
            described.append((kept, "refcoco", number, 1))
        sides.append(described)

    columns = [distinct_photos(side) for side in sides]
    found = compare(columns[0][0], columns[1][0])

    for row, (mark, _, number, _) in zip(columns[0][1], sides[0]):
        matches = [
            is_same(mark, other, (number, other_number)) for other, _, other_number, _ in sides[1]
        ]
        assert found.seen[row] == any(matches)
        has_old = any(other is None for other in trained) or (mark is None and bool(trained))
        assert found.unknown[row] == (has_old and not any(matches))
    for row, (mark, _, number, _) in zip(columns[1][1], sides[1]):
        matches = [
            is_same(other, mark, (other_number, number)) for other, _, other_number, _ in sides[0]
        ]
        assert found.used[row] == any(matches)


def test_blocks_do_not_change_the_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)

    def draw(count: int) -> Photos:
        return Photos(
            number=np.full(count, NO_NUMBER),
            sha256=rng.integers(1, 40, count).astype(np.uint64),
            look=rng.integers(0, 2**64, (count, 4), dtype=np.uint64),
            old_id=np.zeros(count, np.uint64),
        )

    ones, others = draw(37), draw(23)
    whole = compare(ones, others)
    monkeypatch.setattr(photos, "_BLOCK", 50)
    in_blocks = compare(ones, others)

    assert 0 < whole.seen.sum() < 37
    assert (whole.seen == in_blocks.seen).all() and (whole.used == in_blocks.used).all()


@given(st.lists(marks, max_size=6))
def test_photos_survive_json(some: list[PhotoMark]) -> None:
    columns, which = distinct_photos([(mark, "mine", 1, 2) for mark in some])

    again = Photos.from_json(columns.to_json())

    assert again.to_json() == columns.to_json()
    assert len(again) == len({mark.sha256 for mark in some})
    for mark, row in zip(some, which):
        assert to_hex(int(columns.sha256[row]), 16) == mark.sha256
        assert PhotoMark.from_json(mark.to_json()) == mark


@pytest.mark.parametrize(
    "name, number",
    [
        ("COCO_train2014_000000000009.jpg", 9),
        ("COCO_val2014_000000581929.jpg", 581929),
        ("train2017/000000000009.jpg", 9),
        ("000000000009.JPG", 9),
        ("9.jpg", None),
        ("mine_000000000009.jpg", None),
        ("COCO_train2014_000000000009_0.jpg", None),
        ("000000000009.txt", None),
        ("", None),
    ],
)
def test_number_is_that_of_coco_names(name: str, number: int | None) -> None:
    assert mark_photo(encode(photograph(1)), name).number == number


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        [1, "0" * 16],
        [-1, "0" * 16, "0" * 64],
        [True, "0" * 16, "0" * 64],
        [10**12, "0" * 16, "0" * 64],
        [None, "0" * 15, "0" * 64],
        [None, "A" * 16, "0" * 64],
        [None, "0" * 16, "0" * 63],
        [None, "0" * 16, "../" + "0" * 61],
        [None, 5, "0" * 64],
    ],
)
def test_foreign_mark_is_refused(value: object) -> None:
    with pytest.raises((ValueError, TypeError)):
        PhotoMark.from_json(value)


def test_damaged_picture_has_no_mark() -> None:
    with pytest.raises(ValueError, match="cut short or damaged"):
        mark_photo(encode(photograph(1))[:2000], "x.jpg")


def test_look_does_not_depend_on_the_stored_format() -> None:
    stream = io.BytesIO()
    photograph(3).save(stream, "PNG")

    bits = bits_between(
        mark_photo(stream.getvalue(), "x").look, mark_photo(encode(photograph(3)), "x").look
    )

    assert bits <= 8


def test_different_photographs_look_different() -> None:
    looks = [mark_photo(encode(photograph(seed)), "x").look for seed in range(40)]

    nearest = min(bits_between(a, b) for n, a in enumerate(looks) for b in looks[:n])

    assert nearest > 2 * MAX_DISTANCE


def test_real_photographs_look_different_and_their_copies_alike(real_data) -> None:
    names = {path.name: path for path in sorted(real_data.rglob("*.jpg"))}
    described, copies = [], []
    for number, path in enumerate(names.values()):
        data = path.read_bytes()
        described.append((mark_photo(data, "x"), "mine", number, 1))
        image = Image.open(io.BytesIO(data)).convert("RGB")
        half = image.resize((image.width // 2, image.height // 2), Image.Resampling.BILINEAR)
        copies.append((mark_photo(encode(half, 50), "x"), "mine", number, 1))

    originals, _ = distinct_photos(described)
    copied, _ = distinct_photos(copies)

    pairs = [(rows, columns) for rows, columns in photos.matching_pairs(copied, originals)]
    rows = np.concatenate([rows for rows, _ in pairs])
    columns = np.concatenate([columns for _, columns in pairs])
    assert rows.tolist() == columns.tolist() == list(range(len(names)))
