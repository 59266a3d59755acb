"""The index of a shard set: what is where, in how many bytes, and how to prove it (shards/README.md is the specification).

`index.json` is at the same time a `wids` shard index. It is written last, so a directory with an index is a finished one.
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


@dataclass(frozen=True)
class Shard:
    url: str  # file name beside the index
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class RefEntry:
    set: str  # "refcoco/unc"
    split: str
    ref_id: int
    sentences: int


@dataclass(frozen=True)
class ImageEntry:
    """Where one sample lies: (first byte of the file's data inside the tar, length)."""

    image_id: int
    shard: int
    jpg: tuple[int, int]
    json: tuple[int, int]
    refs: tuple[RefEntry, ...]


@dataclass(frozen=True)
class ShardIndex:
    location: str  # directory or URL prefix, no trailing slash
    name: str
    shards: tuple[Shard, ...]
    images: tuple[ImageEntry, ...]  # sorted by shard, then by place in the tar
    counts: dict[str, dict[str, dict[str, int]]]
    vocabulary: str | None  # file name beside the index
    fingerprint: str  # sha256 of the index file: equal fingerprints, equal data
    tool: str
    source_fingerprint: str = ""
    vocabulary_sha256: str | None = None

    def address(self, shard: int) -> str:
        """Path or URL of a shard."""
        return f"{self.location}/{self.shards[shard].url}"

    @property
    def vocabulary_address(self) -> str | None:
        """Path or URL of the vocabulary, where the set has one."""
        return f"{self.location}/{self.vocabulary}" if self.vocabulary else None


def read_index(location: str | Path, text: bytes | None = None) -> ShardIndex:
    """Read the index of a shard set.

    Args:
        location: shard directory or its index.json; a URL of either where `text` is given.
        text: the bytes of the index, already fetched from a remote place.

    Raises:
        InputError: there is none, it is damaged, of another tool, or of another format version (names both).
    """
    base, file = _split(str(location))
    if text is None:
        try:
            text = Path(file).read_bytes()
        except FileNotFoundError:
            raise InputError(
                f"{file}: no such file; is {base} a packed (and finished) shard directory?"
            ) from None
        except OSError as error:
            raise InputError(f"{file}: cannot be read: {error}") from None
    return _read(text, base, file)


@lru_cache(
    maxsize=8
)  # by content: a start reads the same index for the vocabulary, for training and for each split to be scored
def _read(text: bytes, base: str, file: str) -> ShardIndex:
    try:
        tree = json.loads(text)
    except ValueError as error:
        raise InputError(f"{file}: not valid JSON ({error}); pack again") from None
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        raise InputError(f"{file}: not an index of {FORMAT}; `coupalign pack` writes one")
    if tree.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{file}: format_version {tree.get('format_version')}, this tool reads {FORMAT_VERSION}; "
            f"it was written by {tree.get('tool', 'an unknown tool')}: pack again, or use that version"
        )
    try:
        return _parse(tree, base, hashlib.sha256(text).hexdigest())
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise InputError(
            f"{file}: damaged index ({type(error).__name__}: {error}); pack again"
        ) from None


def write_index(index: ShardIndex) -> None:
    """Write `<location>/index.json` atomically, one line an image. `fingerprint` is not stored: it is the file's own."""
    head = {
        "wids_version": 1,
        "name": index.name,
        "shardlist": [
            {"url": s.url, "nsamples": s.samples, "filesize": s.bytes, "sha256": s.sha256}
            for s in index.shards
        ],
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "tool": index.tool,
        "source_fingerprint": index.source_fingerprint,
        "vocabulary": index.vocabulary,
        "vocabulary_sha256": index.vocabulary_sha256,
        "counts": index.counts,
    }
    lines = [
        json.dumps(image_record(image), ensure_ascii=False, separators=(",", ":"))
        for image in index.images
    ]
    with whole_file(Path(index.location) / INDEX_NAME, "w") as file:
        file.write(json.dumps(head, ensure_ascii=False, indent=1)[:-2] + ',\n "images": [\n')
        file.write(",\n".join(lines) + "\n]}\n")


def image_record(image: ImageEntry) -> dict[str, Any]:
    """An image as the index holds it; `image_entry` is the inverse."""
    return {
        "id": image.image_id,
        "shard": image.shard,
        "jpg": list(image.jpg),
        "json": list(image.json),
        "refs": [[ref.set, ref.split, ref.ref_id, ref.sentences] for ref in image.refs],
    }


def image_entry(record: Mapping[str, Any]) -> ImageEntry:
    """Raises KeyError, TypeError or ValueError where the record is damaged."""
    refs = tuple(
        RefEntry(str(name), str(split), int(ref_id), int(n))
        for name, split, ref_id, n in record["refs"]
    )
    return ImageEntry(
        int(record["id"]), int(record["shard"]), _span(record["jpg"]), _span(record["json"]), refs
    )


# ------------------------------------------------------------------------------------------------------- verification


def sample_key(image_id: int) -> str:
    """The WebDataset key of an image."""
    return f"{image_id:012d}"


def tar_spans(file: Path) -> list[tuple[str, int, int]]:
    """(name, offset of the first data byte, length) of each file in a tar, in order; tarfile.TarError where it is cut short."""
    with tarfile.open(file, "r:") as tar:
        return [(member.name, member.offset_data, member.size) for member in tar]


# -------------------------------------------------------------------------------------------------- the small print


def _span(pair: Iterable[int]) -> tuple[int, int]:
    offset, length = pair
    if offset < 0 or length < 0:
        raise ValueError(f"[{offset}, {length}] is no place in a file")
    return int(offset), int(length)


def _split(location: str) -> tuple[str, str]:
    base = location.rstrip("/") or "/"
    if base.endswith(f"/{INDEX_NAME}") or base == INDEX_NAME:
        base = base[: -len(INDEX_NAME)].rstrip("/") or "."
    return base, f"{base}/{INDEX_NAME}"


def _parse(tree: Mapping[str, Any], base: str, fingerprint: str) -> ShardIndex:
    shards = tuple(
        Shard(_plain_name(s["url"]), int(s["nsamples"]), int(s["filesize"]), str(s["sha256"]))
        for s in tree["shardlist"]
    )
    images = tuple(image_entry(record) for record in tree["images"])
    for image in images:
        shard = shards[image.shard] if image.shard >= 0 else None
        if shard is None or max(sum(image.jpg), sum(image.json)) > shard.bytes:
            raise ValueError(f"image {image.image_id} lies outside shard {image.shard}")
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


def _plain_name(name: str) -> str:
    """A file beside the index and nowhere else, whoever wrote the index."""
    if not name or "/" in name or "\\" in name or name.startswith("."):
        raise ValueError(f"{name!r} is not a plain file name")
    return name
