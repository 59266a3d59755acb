"""The index of a shard set: where each image is, how many bytes it has, and how to check them.

shards/README.md specifies the file, `index.json`. It is a `wids` shard index at the same time.
`coupalign pack` writes it last, so a directory that has an index is finished.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from coupalign.addresses import hide_secret
from coupalign.data.packing.counts import COUNTED, count_entries
from coupalign.data.photos import PhotoMark
from coupalign.errors import InputError, quoted
from coupalign.files import parse_strict_json, whole_file

INDEX_NAME = "index.json"
FORMAT = "coupalign-shards"
FORMAT_VERSION = 1

# An index may come from anyone. A million images need about 250 MB.
MAX_INDEX_BYTES = 1 << 28
MAX_NUMBER = 2**63 - 1
MAX_FILE_BYTES = 1 << 31  # of a photograph or a record
MAX_SENTENCES = 100_000_000  # in all
BYTES_PER_SENTENCE = 20  # in a record, at least

_SHA256 = re.compile(r"[0-9a-f]{64}")
_FILE_NAME = re.compile(r"[^./\\\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]{0,199}")
_SET_NAME = re.compile(r"(?!\.{1,2}/)[\w.+-]{1,100}/(?!\.{1,2}$)[\w.+-]{1,100}")
_SPLIT = re.compile(r"[^./\\\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]{0,99}")

Span = tuple[int, int]  # first byte of a file's data inside the tar, and its length


@dataclass(frozen=True)
class Shard:
    """One tar file."""

    url: str  # file name, next to the index
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class RefEntry:
    """What the index says about a ref."""

    set: str  # data set and partition, such as "refcoco/unc"
    split: str
    ref_id: int
    sentences: int


@dataclass(frozen=True)
class ImageEntry:
    """Where an image and its record are, and which refs it has."""

    image_id: int
    shard: int  # number of its shard in the index
    jpg: Span
    json: Span
    refs: tuple[RefEntry, ...]
    # What the photograph is recognized by. None: packed by an early version.
    photo: PhotoMark | None = None
    # CRC-32 of the bytes at `jpg` and at `json`. None: packed by an early version.
    crc: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """An opened index.

    Attributes:
        location: directory or URL prefix, without a trailing slash.
        name: of the shard set.
        shards: the tar files.
        images: sorted by shard, then by position in the tar.
        counts: of images, refs and sentences, by set and split.
        vocabulary: file name, next to the index. None: packed without one.
        fingerprint: SHA-256 of the index file. Equal fingerprints mean equal data.
        tool: name and version of the program that wrote it.
        source_fingerprint: of the annotations that were packed.
        vocabulary_sha256: of the vocabulary file.
    """

    location: str
    name: str
    shards: tuple[Shard, ...]
    images: tuple[ImageEntry, ...]
    counts: dict[str, dict[str, dict[str, int]]]
    vocabulary: str | None
    fingerprint: str
    tool: str
    source_fingerprint: str = ""
    vocabulary_sha256: str | None = None

    def address(self, shard: int) -> str:
        """Return the path or URL of a shard."""
        return f"{self.location}/{self.shards[shard].url}"


class DamagedIndex(InputError):
    """An index is ours, but something in it is wrong."""


def read_index(location: str | Path, text: bytes | None = None) -> ShardIndex:
    """Read the index of a shard set.

    Args:
        location: the shard directory or its index.json. If `text` is given, the URL of either.
        text: the bytes of the index, if they were fetched from a remote place.

    Raises:
        InputError: there is no index, or another tool or format version wrote it.
        DamagedIndex: a value in it is wrong. The message names it.
    """
    base, file = _base_and_file(str(location))
    if text is None:
        try:
            with open(file, "rb") as stream:
                text = stream.read(MAX_INDEX_BYTES + 1)
        except FileNotFoundError:
            raise InputError(
                f"{file}: no such file; is {base} a packed (and finished) shard directory?"
            ) from None
        except OSError as error:
            raise InputError(f"{file}: cannot be read: {error}") from None
    if len(text) > MAX_INDEX_BYTES:
        raise DamagedIndex(
            f"{hide_secret(file)}: more than {MAX_INDEX_BYTES:,} bytes, the limit; "
            "pack several sets instead of one"
        )
    return _parse(text, base, file)


def write_index(index: ShardIndex) -> None:
    """Write `<location>/index.json` atomically, with one line per image.

    `fingerprint` is not written: it is the SHA-256 of this file.
    """
    shardlist = [
        {
            "url": shard.url,
            "nsamples": shard.samples,
            "filesize": shard.bytes,
            "sha256": shard.sha256,
        }
        for shard in index.shards
    ]
    head = {
        "wids_version": 1,
        "name": index.name,
        "shardlist": shardlist,
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "tool": index.tool,
        "source_fingerprint": index.source_fingerprint,
        "vocabulary": index.vocabulary,
        "vocabulary_sha256": index.vocabulary_sha256,
        "counts": index.counts,
    }
    lines = [
        json.dumps(image_to_json(image), ensure_ascii=False, separators=(",", ":"))
        for image in index.images
    ]

    with whole_file(Path(index.location) / INDEX_NAME, "w") as file:
        # Leave the object open, to add the images as its last key.
        without_end = json.dumps(head, ensure_ascii=False, indent=1).removesuffix("\n}")
        file.write(without_end + ',\n "images": [\n')
        file.write(",\n".join(lines) + "\n]}\n")


def image_to_json(image: ImageEntry) -> dict[str, Any]:
    """Return an image as the index holds it. `image_from_json` is the inverse."""
    record: dict[str, Any] = {
        "id": image.image_id,
        "shard": image.shard,
        "jpg": list(image.jpg),
        "json": list(image.json),
        "refs": [[ref.set, ref.split, ref.ref_id, ref.sentences] for ref in image.refs],
    }
    if image.photo is not None:
        record["photo"] = image.photo.to_json()
    if image.crc is not None:
        record["crc"] = list(image.crc)
    return record


def image_from_json(record: Mapping[str, Any]) -> ImageEntry:
    """Read an image as the index holds it.

    Raises:
        KeyError, TypeError, ValueError: the record is damaged.
    """
    refs = tuple(_ref_from_json(*values) for values in record["refs"])
    image = ImageEntry(
        image_id=_whole_number("id", record["id"], least=-MAX_NUMBER),
        shard=_whole_number("shard", record["shard"]),
        jpg=_span(record["jpg"]),
        json=_span(record["json"]),
        refs=refs,
        photo=None if "photo" not in record else PhotoMark.from_json(record["photo"]),
        crc=None if "crc" not in record else _crcs(record["crc"]),
    )

    # A record holds its sentences, so it cannot have fewer bytes than they need.
    sentences = sum(ref.sentences for ref in refs)
    if sentences * BYTES_PER_SENTENCE > image.json[1]:
        raise ValueError(
            f"image {image.image_id} has {sentences} sentences in a record of {image.json[1]} bytes"
        )
    return image


def _crcs(values: Any) -> tuple[int, int]:
    of_jpg, of_json = (_whole_number("crc", value) for value in values)
    return of_jpg, of_json


def check_bytes(image: ImageEntry, *, jpg: bytes | None = None, text: bytes | None = None) -> None:
    """Compare bytes of a shard with their checksums in the index, if it has them.

    Raises:
        ValueError: they are not those that were packed.
    """
    if image.crc is None:
        return
    for data, crc in zip((jpg, text), image.crc):
        if data is not None and zlib.crc32(data) != crc:
            raise ValueError("its bytes are not those that were packed: the shard is damaged")


def _ref_from_json(name: Any, split: Any, ref_id: Any, sentences: Any) -> RefEntry:
    return RefEntry(
        set=_text("set", name, _SET_NAME),
        split=_text("split", split, _SPLIT),
        ref_id=_whole_number("ref_id", ref_id, least=-MAX_NUMBER),
        sentences=_whole_number("sentences", sentences),
    )


def sample_key(image_id: int) -> str:
    """Return the WebDataset key of an image, the name of its files without the extension."""
    return f"{image_id:012d}"


def tar_spans(file: Path) -> list[tuple[str, int, int]]:
    """List the files of a tar in order: name, offset of the first data byte, length.

    Raises:
        tarfile.TarError: the tar is cut short or damaged.
    """
    try:
        with tarfile.open(file, "r:") as tar:
            return [(member.name, member.offset_data, member.size) for member in tar]
    except (ValueError, OverflowError) as error:  # sizes that no file can have
        raise tarfile.TarError(f"damaged header: {error}") from None


# Cached by content: at its start a run reads the same index for the vocabulary, for training, and
# for each split to be scored.
@lru_cache(maxsize=8)
def _parse(text: bytes, base: str, file: str) -> ShardIndex:
    file = hide_secret(file)
    try:
        tree = parse_strict_json(text)
    except ValueError as error:
        remedy = "is it the address of a packed directory?" if "://" in file else "pack again"
        raise DamagedIndex(f"{file}: not valid JSON ({error}); {remedy}") from None

    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        raise InputError(f"{file}: not an index of {FORMAT}; `coupalign pack` writes one")
    version = tree.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise InputError(
            f"{file}: format_version {quoted(version)}, this tool reads "
            f"{FORMAT_VERSION}; it was written by {quoted(tree.get('tool', 'an unknown tool'))}: "
            "pack again, or use that version"
        )

    try:
        return _from_json(tree, base, hashlib.sha256(text).hexdigest())
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        reason = f"no field {error}" if isinstance(error, KeyError) else str(error)
        raise DamagedIndex(f"{file}: damaged index ({reason[:300]}); pack again") from None


def _from_json(tree: Mapping[str, Any], base: str, fingerprint: str) -> ShardIndex:
    shards = tuple(
        Shard(
            url=_text("url", shard["url"], _FILE_NAME),
            samples=_whole_number("nsamples", shard["nsamples"]),
            bytes=_whole_number("filesize", shard["filesize"]),
            sha256=_text("sha256", shard["sha256"], _SHA256),
        )
        for shard in tree["shardlist"]
    )
    images = tuple(image_from_json(record) for record in tree["images"])
    _check_spans(shards, images)
    _check_counts(tree["counts"], shards, images)

    vocabulary = tree["vocabulary"]
    vocabulary_sha256 = tree.get("vocabulary_sha256") or None
    return ShardIndex(
        location=base,
        name=_label("name", tree["name"]),
        shards=shards,
        images=images,
        counts=tree["counts"],
        vocabulary=None if vocabulary is None else _text("vocabulary", vocabulary, _FILE_NAME),
        fingerprint=fingerprint,
        tool=_label("tool", tree["tool"]),
        source_fingerprint=_label("source_fingerprint", tree["source_fingerprint"]),
        vocabulary_sha256=(
            None
            if vocabulary_sha256 is None
            else _text("vocabulary_sha256", vocabulary_sha256, _SHA256)
        ),
    )


def _check_spans(shards: tuple[Shard, ...], images: tuple[ImageEntry, ...]) -> None:
    """Check that the files of the images follow each other in their shards."""
    shard, end = 0, 0
    for image in images:
        if image.shard >= len(shards):
            raise ValueError(f"image {image.image_id} is outside shard {image.shard}")
        if image.shard < shard:
            raise ValueError(f"image {image.image_id} is not in the order of the shards")
        if image.shard > shard:
            shard, end = image.shard, 0

        for offset, length in (image.jpg, image.json):
            if offset + length > shards[shard].bytes:
                raise ValueError(f"image {image.image_id} is outside shard {shard}")
            if offset < end:
                raise ValueError(f"image {image.image_id} overlaps the file before it")
            end = offset + length


def _check_counts(counts: Any, shards: tuple[Shard, ...], images: tuple[ImageEntry, ...]) -> None:
    """Check what the index says twice, and that no name is used twice."""
    in_shard = Counter(image.shard for image in images)
    for number, shard in enumerate(shards):
        if shard.samples != in_shard[number]:
            raise ValueError(
                f"{shard.url}: {shard.samples} samples according to `shardlist`, "
                f"{in_shard[number]} to `images`"
            )
    for what, values in (
        ("url", [shard.url for shard in shards]),
        ("image id", [image.image_id for image in images]),
    ):
        if len(set(values)) < len(values):
            repeated = Counter(values).most_common(1)[0][0]
            raise ValueError(f"{what} {quoted(repeated)} is there twice")

    counted = count_entries(images)
    if counts != counted:
        raise ValueError("`counts` disagrees with the list of images")
    for splits in counts.values():
        for values in splits.values():
            # True equals 1, and 1.0 as well.
            if any(type(values[key]) is not int for key in COUNTED):
                raise ValueError("`counts` holds something else than whole numbers")
    if sum(ref.sentences for image in images for ref in image.refs) > MAX_SENTENCES:
        raise ValueError(f"more than {MAX_SENTENCES:,} sentences, the limit")


def _base_and_file(location: str) -> tuple[str, str]:
    """Return the directory and the index file that `location` means; it may be either."""
    base = location.rstrip("/") or "/"
    if base.endswith(f"/{INDEX_NAME}") or base == INDEX_NAME:
        base = base.removesuffix(INDEX_NAME).rstrip("/") or "."
    return base, f"{base}/{INDEX_NAME}"


def _span(pair: Iterable[int]) -> Span:
    offset, length = pair
    if not _is_whole_number(offset, MAX_NUMBER) or not _is_whole_number(length, MAX_FILE_BYTES):
        raise ValueError(f"[{quoted(offset)}, {quoted(length)}] is not an offset and a length")
    return offset, length


def _whole_number(name: str, value: Any, least: int = 0) -> int:
    if not _is_whole_number(value, MAX_NUMBER, least):
        raise ValueError(f"{name} {quoted(value)} is not a whole number in its range")
    return value


def _is_whole_number(value: Any, most: int, least: int = 0) -> bool:
    return type(value) is int and least <= value <= most


def _text(name: str, value: Any, pattern: re.Pattern[str]) -> str:
    """Return a text of a foreign index, which becomes a part of a path, a name or a message."""
    if type(value) is not str or not pattern.fullmatch(value):
        kind = {_SHA256: "a SHA-256", _FILE_NAME: "a plain file name"}.get(pattern, "a plain name")
        raise ValueError(f"{name} {quoted(value)} is not {kind}")
    return value


def _label(name: str, value: Any) -> str:
    """Return a text of a foreign index that is only shown and compared."""
    if type(value) is not str or len(value) > 200 or not value.isprintable():
        raise ValueError(f"{name} {quoted(value)} is not a short text")
    return value
