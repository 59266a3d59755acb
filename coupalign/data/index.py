"""The index of a shard set: where each image is, how many bytes it has, and how to check them.

shards/README.md specifies the file, `index.json`. It is a `wids` shard index at the same time.
`coupalign pack` writes it last, so a directory that has an index is finished.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from coupalign.errors import InputError
from coupalign.files import whole_file

INDEX_NAME = "index.json"
FORMAT = "coupalign-shards"
FORMAT_VERSION = 1

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


def read_index(location: str | Path, text: bytes | None = None) -> ShardIndex:
    """Read the index of a shard set.

    Args:
        location: the shard directory or its index.json. If `text` is given, the URL of either.
        text: the bytes of the index, if they were fetched from a remote place.

    Raises:
        InputError: there is no index, or it is damaged, or another tool or format version wrote it.
    """
    base, file = _base_and_file(str(location))
    if text is None:
        try:
            text = Path(file).read_bytes()
        except FileNotFoundError:
            raise InputError(
                f"{file}: no such file; is {base} a packed (and finished) shard directory?"
            ) from None
        except OSError as error:
            raise InputError(f"{file}: cannot be read: {error}") from None
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
    return {
        "id": image.image_id,
        "shard": image.shard,
        "jpg": list(image.jpg),
        "json": list(image.json),
        "refs": [[ref.set, ref.split, ref.ref_id, ref.sentences] for ref in image.refs],
    }


def image_from_json(record: Mapping[str, Any]) -> ImageEntry:
    """Read an image as the index holds it.

    Raises:
        KeyError, TypeError, ValueError: the record is damaged.
    """
    refs = tuple(
        RefEntry(str(name), str(split), int(ref_id), int(sentences))
        for name, split, ref_id, sentences in record["refs"]
    )
    return ImageEntry(
        image_id=int(record["id"]),
        shard=int(record["shard"]),
        jpg=_span(record["jpg"]),
        json=_span(record["json"]),
        refs=refs,
    )


def sample_key(image_id: int) -> str:
    """Return the WebDataset key of an image, the name of its files without the extension."""
    return f"{image_id:012d}"


def tar_spans(file: Path) -> list[tuple[str, int, int]]:
    """List the files of a tar in order: name, offset of the first data byte, length.

    Raises:
        tarfile.TarError: the tar is cut short.
    """
    with tarfile.open(file, "r:") as tar:
        return [(member.name, member.offset_data, member.size) for member in tar]


# Cached by content: at its start a run reads the same index for the vocabulary, for training, and
# for each split to be scored.
@lru_cache(maxsize=8)
def _parse(text: bytes, base: str, file: str) -> ShardIndex:
    try:
        tree = json.loads(text)
    except ValueError as error:
        raise InputError(f"{file}: not valid JSON ({error}); pack again") from None

    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        raise InputError(f"{file}: not an index of {FORMAT}; `coupalign pack` writes one")
    if tree.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{file}: format_version {tree.get('format_version')}, this tool reads "
            f"{FORMAT_VERSION}; it was written by {tree.get('tool', 'an unknown tool')}: "
            "pack again, or use that version"
        )

    try:
        return _from_json(tree, base, hashlib.sha256(text).hexdigest())
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise InputError(
            f"{file}: damaged index ({type(error).__name__}: {error}); pack again"
        ) from None


def _from_json(tree: Mapping[str, Any], base: str, fingerprint: str) -> ShardIndex:
    shards = tuple(
        Shard(
            url=_plain_name(shard["url"]),
            samples=int(shard["nsamples"]),
            bytes=int(shard["filesize"]),
            sha256=str(shard["sha256"]),
        )
        for shard in tree["shardlist"]
    )

    images = tuple(image_from_json(record) for record in tree["images"])
    for image in images:
        shard = shards[image.shard] if image.shard >= 0 else None
        if shard is None or max(sum(image.jpg), sum(image.json)) > shard.bytes:
            raise ValueError(f"image {image.image_id} is outside shard {image.shard}")

    vocabulary = tree["vocabulary"]
    return ShardIndex(
        location=base,
        name=str(tree["name"]),
        shards=shards,
        images=images,
        counts=tree["counts"],
        vocabulary=None if vocabulary is None else _plain_name(vocabulary),
        fingerprint=fingerprint,
        tool=str(tree["tool"]),
        source_fingerprint=str(tree["source_fingerprint"]),
        vocabulary_sha256=tree.get("vocabulary_sha256"),
    )


def _base_and_file(location: str) -> tuple[str, str]:
    """Return the directory and the index file that `location` means; it may be either."""
    base = location.rstrip("/") or "/"
    if base.endswith(f"/{INDEX_NAME}") or base == INDEX_NAME:
        base = base.removesuffix(INDEX_NAME).rstrip("/") or "."
    return base, f"{base}/{INDEX_NAME}"


def _span(pair: Iterable[int]) -> Span:
    offset, length = pair
    if offset < 0 or length < 0:
        raise ValueError(f"[{offset}, {length}] is not an offset and a length")
    return int(offset), int(length)


def _plain_name(name: str) -> str:
    """Refuse a file name that leads out of the directory of the index: it may come from anyone."""
    if not name or "/" in name or "\\" in name or name.startswith("."):
        raise ValueError(f"{name!r} is not a plain file name")
    return name
