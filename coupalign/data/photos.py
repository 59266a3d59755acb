"""Recognize a photograph wherever it is packed: under another name, number or encoding.

    mark = mark_photo(jpg, "COCO_train2014_000000000009.jpg")     while packing; the index holds it
    found = compare(scored, trained)                              both are `Photos`

Two files show the same photograph if one of these holds:

- their bytes are the same;
- they look the same: their perceptual hashes differ in at most MAX_DISTANCE of 256 bits, also if
  one of them is mirrored;
- they have the same number in COCO, and their hashes do not contradict it: other collections
  number their pictures from 1, too.

Shards that an earlier version packed have no hashes. Then only the number counts, or the name of
the collection with the image id and the length of the file. What that cannot rule out is unknown.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from coupalign.data.pictures import (
    UnknownOrientation,
    load_pixels,
    open_picture,
    orientation_of,
    turn,
)
from coupalign.errors import quoted

COCO = ("refcoco", "refcoco+", "refcocog")
NO_NUMBER = -1

# Measured on 252 photographs of COCO and on 4,500 RefShapes; the table is in docs/method.md.
# Different pictures differ in 96 bits or more (RefShapes: 50). JPEG at quality 50 to 95, half to
# twice the size, gray, brighter by a fifth, mirrored: at most 26 (RefShapes: 40).
LOOK_SIDE = 16
MAX_DISTANCE = 32
MAX_DISTANCE_OF_A_NUMBER = 64

_DECODED_SIDE = 128  # pixels that are enough for the hash
_BLOCK = 1 << 18  # pairs that are compared at a time, which fit the processor's cache

_COCO_NAME = re.compile(r"(?:COCO_[a-z]+20\d\d_)?(\d{12})\.(?:jpg|jpeg|png)", re.IGNORECASE)
_DIGEST = re.compile(r"[0-9a-f]{16}")
_LOOK = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class PhotoMark:
    """What a photograph is recognized by.

    Attributes:
        number: in COCO, by the name of its file. None: the name is not one of COCO.
        sha256: of the stored bytes, the first 16 hex digits.
        look: perceptual hash of the decoded picture, 64 hex digits.
    """

    number: int | None
    sha256: str
    look: str

    def to_json(self) -> list[Any]:
        return [self.number, self.sha256, self.look]

    @classmethod
    def from_json(cls, value: Any) -> PhotoMark:
        """Read what `to_json` returned.

        Raises:
            ValueError: it is something else.
        """
        number, sha256, look = value
        if number is not None and not (type(number) is int and 0 <= number < 10**12):
            raise ValueError(f"{quoted(number)} is not the number of a COCO photograph")
        for text, pattern in ((sha256, _DIGEST), (look, _LOOK)):
            if not (type(text) is str and pattern.fullmatch(text)):
                raise ValueError(f"{quoted(text)} is not the hash of a photograph")
        return cls(number, sha256, look)


def mark_photo(data: bytes, file_name: str) -> PhotoMark:
    """Compute what a photograph is recognized by.

    Args:
        data: its bytes as they are stored.
        file_name: its name in the annotations.

    Raises:
        ValueError: the picture does not decode.
    """
    named = _COCO_NAME.fullmatch(PurePosixPath(file_name).name)
    return PhotoMark(
        number=int(named[1]) if named else None,
        sha256=hashlib.sha256(data).hexdigest()[:16],
        look=_look_of(data),
    )


def _look_of(data: bytes) -> str:
    """Hash how a picture looks: 64 hex digits, of the picture turned as its EXIF data says."""
    import imagehash

    image = open_picture(io.BytesIO(data))
    image.draft("L", (_DECODED_SIDE, _DECODED_SIDE))  # a JPEG is decoded at a fraction of its size
    load_pixels(image)
    try:
        upright = turn(image, orientation_of(image))
    except UnknownOrientation:
        upright = image
    return str(imagehash.phash(upright, hash_size=LOOK_SIDE))


def bits_between(one: str, other: str) -> int:
    """Count the bits in which two perceptual hashes differ."""
    return (int(one, 16) ^ int(other, 16)).bit_count()


# -------------------------------------------------------------------------------- many of them


@dataclass(frozen=True, eq=False, kw_only=True)
class Photos:
    """Different photographs, column by column.

    Attributes:
        number: in COCO, or NO_NUMBER; int64 [n].
        sha256: the first 8 bytes of the digest; uint64 [n]. 0: no hashes, from an old index.
        look: perceptual hashes; uint64 [n, 4].
        old_id: digest of collection, image id and length; uint64 [n]. 0: a COCO photograph.
    """

    number: np.ndarray
    sha256: np.ndarray
    look: np.ndarray
    old_id: np.ndarray

    def __len__(self) -> int:
        return len(self.number)

    @property
    def hashed(self) -> np.ndarray:
        """Which of them have hashes; bool [n]."""
        return self.sha256 != 0

    def take(self, rows: np.ndarray | slice) -> Photos:
        """Return some of them."""
        return Photos(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    @classmethod
    def join(cls, parts: Sequence[Photos]) -> Photos:
        """Return the photographs of all parts, each once."""
        columns = {}
        for field in fields(cls):
            columns[field.name] = np.concatenate([getattr(part, field.name) for part in parts])
        joined = cls(**columns)
        first, _ = joined._distinct()
        return joined.take(first)

    def _distinct(self) -> tuple[np.ndarray, np.ndarray]:
        """Find equal ones. Returns the first of each, in order, and the place of each in that."""
        # The same bytes are the same photograph, whatever it is called.
        unhashed = ~self.hashed
        keys = np.stack(
            [self.sha256, np.where(unhashed, self.number, 0).astype(np.uint64), self.old_id], 1
        )
        keys[self.hashed, 2] = 0
        _, first, inverse = np.unique(keys, axis=0, return_index=True, return_inverse=True)
        order = np.argsort(first)
        return first[order], np.argsort(order)[inverse.reshape(-1)]

    def to_json(self) -> dict[str, Any]:
        """Return the columns as text; about 110 bytes per photograph."""
        return {
            "coco": self.number.tolist(),
            "sha256": _to_hex(self.sha256),
            "look": _to_hex(self.look),
            "old_id": _to_hex(self.old_id),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Photos:
        """Read what `to_json` returned.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        numbers = value["coco"]
        if not all(type(number) is int and NO_NUMBER <= number < 10**12 for number in numbers):
            raise ValueError("`coco` is not a list of numbers of COCO photographs")
        count = len(numbers)
        return cls(
            number=np.array(numbers, np.int64),
            sha256=_from_hex(value["sha256"], (count,)),
            look=_from_hex(value["look"], (count, 4)),
            old_id=_from_hex(value["old_id"], (count,)),
        )


def distinct_photos(
    described: Iterable[tuple[PhotoMark | None, str, int, int]],
) -> tuple[Photos, np.ndarray]:
    """Collect photographs, each once.

    Args:
        described: mark, data set, image id and length of each.

    Returns:
        the photographs, and which of them each of `described` is; int64.
    """
    numbers, digests, looks, old_ids = [], [], [], []
    for mark, dataset, image_id, length in described:
        # An index without marks says by the name of the set whether the image id is COCO's.
        by_name = image_id if dataset in COCO else None
        number = by_name if mark is None else mark.number
        numbers.append(NO_NUMBER if number is None else number)
        digests.append("0" * 16 if mark is None else mark.sha256)
        looks.append("0" * 64 if mark is None else mark.look)
        old_ids.append(old_id_of(dataset, image_id, length))

    everything = Photos(
        number=np.array(numbers, np.int64),
        sha256=_from_hex("".join(digests), (len(digests),)),
        look=_from_hex("".join(looks), (len(looks), 4)),
        old_id=np.array(old_ids, np.uint64),
    )
    first, which = everything._distinct()
    return everything.take(first), which


def old_id_of(dataset: str, image_id: int, length: int) -> int:
    """Digest what identified a photograph of another collection before there were hashes."""
    if dataset in COCO:
        return 0
    text = f"{dataset}\n{image_id}\n{length}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") or 1


def _to_hex(column: np.ndarray) -> str:
    return column.astype(">u8").tobytes().hex()


def _from_hex(text: str, shape: tuple[int, ...]) -> np.ndarray:
    """Read a column of 64-bit numbers, 16 hex digits each."""
    data = bytes.fromhex(text)
    return np.frombuffer(data, ">u8").reshape(shape).astype(np.uint64)


# ---------------------------------------------------------------------------------- comparing


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Which of the scored photographs were trained on.

    Attributes:
        seen: those that were; bool [scored].
        unknown: those that may have been: hashes are missing on either side; bool [scored].
        used: those of the trained ones that are scored; bool [trained].
        renumbered: how many have the COCO number of a trained one, but show something else.
    """

    seen: np.ndarray
    unknown: np.ndarray
    used: np.ndarray
    renumbered: int


def compare(scored: Photos, trained: Photos) -> Comparison:
    """Find the scored photographs among the trained ones.

    Takes about 5 s for 20,000 x 20,000, in blocks of bounded memory.
    """
    seen = np.zeros(len(scored), bool)
    used = np.zeros(len(trained), bool)
    for rows, columns in matching_pairs(scored, trained):
        seen[rows] = True
        used[columns] = True

    unknown = np.zeros(len(scored), bool)
    if len(trained):
        unknown = ~seen if not trained.hashed.all() else ~seen & ~scored.hashed

    has_number = scored.number != NO_NUMBER
    renumbered = ~seen & ~unknown & has_number & np.isin(scored.number, trained.number)
    return Comparison(seen=seen, unknown=unknown, used=used, renumbered=int(renumbered.sum()))


def matching_pairs(ones: Photos, others: Photos) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Find the pairs that show the same photograph, block by block.

    Yields:
        rows of `ones` and rows of `others`, of the same length.
    """
    block = max(1, _BLOCK // max(1, len(others)))
    for start in range(0, len(ones), block):
        same = _same(ones.take(slice(start, start + block)), others)
        rows, columns = np.nonzero(same)
        if len(rows):
            yield rows + start, columns


def _same(ones: Photos, others: Photos) -> np.ndarray:
    """Compare each of `ones` with each of `others`; bool [ones, others]."""
    both_hashed = ones.hashed[:, None] & others.hashed
    has_number = (ones.number != NO_NUMBER)[:, None]
    same_number = has_number & (ones.number[:, None] == others.number)

    distance = _distance(ones.look, others.look)
    np.minimum(distance, _distance(_mirrored(ones.look), others.look), out=distance)
    same = ones.sha256[:, None] == others.sha256
    same |= distance <= MAX_DISTANCE
    same |= same_number & (distance <= MAX_DISTANCE_OF_A_NUMBER)
    same &= both_hashed

    if not both_hashed.all():
        same_old_id = (ones.old_id != 0)[:, None] & (ones.old_id[:, None] == others.old_id)
        same |= ~both_hashed & (same_number | same_old_id)
    return same


def _distance(ones: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Count the bits in which hashes differ; uint64 [a, 4] and [b, 4] -> uint16 [a, b]."""
    distance = np.zeros((len(ones), len(others)), np.uint16)
    for word in range(ones.shape[1]):
        distance += np.bitwise_count(ones[:, word, None] ^ others[:, word])
    return distance


def _mirrored(looks: np.ndarray) -> np.ndarray:
    """Return the hashes of the mirrored pictures, nearly.

    A bit is the sign of a cosine coefficient. Mirroring turns those of odd horizontal frequency.
    """
    return looks ^ np.uint64(0x5555555555555555)
