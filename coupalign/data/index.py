"""The index of a shard set: what is where, in how many bytes, and how to prove it (shards/README.md is the specification).

`index.json` is at the same time a `wids` shard index. It is written last, so a directory with an index is a finished one.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from coupalign.data.masks import area, check_segmentation
from coupalign.data.refer import counts_table
from coupalign.errors import InputError
from coupalign.files import sha256_of, whole_file

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


@dataclass(frozen=True)
class VerifyReport:
    directory: Path
    name: str
    shards: int
    samples: int
    bytes: int
    counts: dict[str, dict[str, dict[str, int]]]
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems

    def table(self) -> str:
        verdict = "whole" if self.ok else f"{len(self.problems)} problems"
        shown = [f"  {problem}" for problem in self.problems[:20]]
        if len(self.problems) > len(shown):
            shown.append(f"  … and {len(self.problems) - len(shown)} more")
        size = f"{self.shards} shards, {self.samples:,} images, {self.bytes / 1e6:,.1f} MB"
        return "\n".join(
            [f"{self.directory}: {self.name}, {size}: {verdict}", counts_table(self.counts), *shown]
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "directory": str(self.directory),
            "name": self.name,
            "ok": self.ok,
            "shards": self.shards,
            "samples": self.samples,
            "bytes": self.bytes,
            "counts": self.counts,
            "problems": list(self.problems),
        }


def verify(directory: Path | str, workers: int = 2) -> VerifyReport:
    """Prove a shard set whole: sizes, sha256, every sample at its offset, parsed and decoded, and the counts.

    Args:
        workers: threads, one shard each at a time.

    Raises:
        InputError: the index itself is missing, damaged or of another version. Everything else is a problem in the report.
    """
    directory = Path(directory)
    index = read_index(directory)
    members: list[list[ImageEntry]] = [[] for _ in index.shards]
    for image in index.images:
        members[image.shard].append(image)
    with ThreadPoolExecutor(max(1, workers)) as pool:
        found = pool.map(_check_shard, [directory] * len(members), index.shards, members)
        problems = [problem for of_shard in found for problem in of_shard]
    if index.vocabulary is not None:
        file = directory / index.vocabulary
        if not file.is_file():
            problems.append(f"{index.vocabulary}: missing")
        elif sha256_of(file) != index.vocabulary_sha256:
            problems.append(
                f"{index.vocabulary}: its sha256 is not the one in the index: the file was changed"
            )
    if count_entries(index.images) != index.counts:
        problems.append(f"{INDEX_NAME}: `counts` do not follow from its list of images")
    total = sum(shard.bytes for shard in index.shards)
    return VerifyReport(
        directory,
        index.name,
        len(index.shards),
        len(index.images),
        total,
        index.counts,
        tuple(problems),
    )


def count_entries(images: Iterable[ImageEntry]) -> dict[str, dict[str, dict[str, int]]]:
    """`counts` as they follow from the entries (as `refer.count`, which counts the annotation files)."""
    counts: dict[str, dict[str, dict[str, int]]] = {}
    for image in images:
        seen = set()
        for ref in image.refs:
            here = counts.setdefault(ref.set, {}).setdefault(
                ref.split, {"images": 0, "refs": 0, "sentences": 0}
            )
            here["images"] += (ref.set, ref.split) not in seen
            here["refs"] += 1
            here["sentences"] += ref.sentences
            seen.add((ref.set, ref.split))
    return counts


def check_jpeg(data: bytes, height: int, width: int) -> None:
    """Decode all of it.

    Raises:
        ValueError: not a JPEG, cut short, or not of the size that the annotations are for.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"the JPEG does not decode ({error}): cut short or damaged") from None
    if image.format not in ("JPEG", "MPO"):
        raise ValueError(f"a {image.format} file, not a JPEG")
    if image.size != (width, height):
        raise ValueError(
            f"the picture is {image.size[0]} x {image.size[1]}, its annotations are for {width} x {height}"
        )


def sample_key(image_id: int) -> str:
    """The WebDataset key of an image."""
    return f"{image_id:012d}"


def tar_spans(file: Path) -> list[tuple[str, int, int]]:
    """(name, offset of the first data byte, length) of each file in a tar, in order; tarfile.TarError where it is cut short."""
    with tarfile.open(file, "r:") as tar:
        return [(member.name, member.offset_data, member.size) for member in tar]


def _check_shard(directory: Path, shard: Shard, images: Sequence[ImageEntry]) -> list[str]:
    file = directory / shard.url
    if not file.is_file():
        return [f"{shard.url}: missing"]
    problems = []
    if (size := file.stat().st_size) != shard.bytes:
        what = "truncated" if size < shard.bytes else "changed"
        problems.append(f"{shard.url}: {size:,} bytes, the index says {shard.bytes:,}: {what}")
    elif (digest := sha256_of(file)) != shard.sha256:
        problems.append(
            f"{shard.url}: sha256 {digest[:12]}…, the index says {shard.sha256[:12]}…: its bytes were changed"
        )
    if len(images) != shard.samples:
        problems.append(
            f"{shard.url}: {shard.samples} samples by `shardlist`, {len(images)} by `images`"
        )
    expected = [
        (f"{sample_key(image.image_id)}.{kind}", *span)
        for image in images
        for kind, span in (("jpg", image.jpg), ("json", image.json))
    ]
    try:
        if tar_spans(file) != expected:
            problems.append(f"{shard.url}: the files in the tar are not those of the index")
    except (tarfile.TarError, OSError) as error:
        problems.append(f"{shard.url}: not a whole tar ({error})")
    with open(file, "rb") as stream:
        for image in images:
            try:
                _check_sample(_read_span(stream, image.jpg), _read_span(stream, image.json), image)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                problems.append(
                    f"{shard.url}: sample {sample_key(image.image_id)}: {type(error).__name__}: {error}"
                )
    return problems


def _check_sample(jpg: bytes, text: bytes, image: ImageEntry) -> None:
    record = json.loads(text)
    if record["image_id"] != image.image_id:
        raise ValueError(f"its json is of image {record['image_id']}")
    refs = tuple(
        RefEntry(
            f"{ref['dataset']}/{ref['split_by']}",
            ref["split"],
            ref["ref_id"],
            len(ref["sentences"]),
        )
        for ref in record["refs"]
    )
    if refs != image.refs:
        raise ValueError("its refs are not those of the index")
    height, width = record["height"], record["width"]
    for ref in record["refs"]:
        check_segmentation(ref["rle"], height, width)
        if area(ref["rle"]) != ref["area"]:
            raise ValueError(
                f"ref {ref['ref_id']}: a mask of {area(ref['rle'])} pixels, `area` says {ref['area']}"
            )
    check_jpeg(jpg, height, width)


def _read_span(stream: io.BufferedReader, span: tuple[int, int]) -> bytes:
    stream.seek(span[0])
    data = stream.read(span[1])
    if len(data) != span[1]:
        raise ValueError("lies beyond the end of the file")
    return data


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
