"""Verify a packed shard set: sizes, digests, every sample, counts."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coupalign.data.index import (
    DamagedIndex,
    ImageEntry,
    Shard,
    ShardIndex,
    check_bytes,
    read_index,
    sample_key,
    tar_spans,
)
from coupalign.data.packing.counts import Counts, counts_table
from coupalign.data.photos import PhotoMark, bits_between, mark_photo
from coupalign.data.pictures import (
    JPEG_FORMATS,
    load_pixels,
    open_picture,
    refuse_missing_pixels,
)
from coupalign.data.records import check_ref, read_record
from coupalign.files import parse_strict_json, sha256_of

MAX_BITS_OF_A_DECODER = 16
MAX_LISTED = 20  # problems in the printed table; the JSON has all of them


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    directory: Path
    name: str
    shards: int
    samples: int
    bytes: int
    counts: Counts
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems

    def table(self) -> str:
        verdict = "whole" if self.ok else f"{len(self.problems)} problems"
        size = f"{self.shards} shards, {self.samples:,} images, {self.bytes / 1e6:,.1f} MB"
        lines = [f"{self.directory}: {self.name}, {size}: {verdict}", counts_table(self.counts)]

        lines += [f"  {problem}" for problem in self.problems[:MAX_LISTED]]
        if len(self.problems) > MAX_LISTED:
            lines.append(f"  … and {len(self.problems) - MAX_LISTED} more")
        return "\n".join(lines)

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
    """Check sizes and SHA-256, read and decode every sample at its offset, and recount the refs.

    Args:
        workers: threads; each checks one shard at a time.

    Raises:
        InputError: the index itself is missing or of another version. Everything else is a
            problem in the report.
    """
    directory = Path(directory)
    try:
        index = read_index(directory)
    except DamagedIndex as error:
        return VerifyReport(
            directory=directory,
            name="unknown",
            shards=0,
            samples=0,
            bytes=0,
            counts={},
            problems=(str(error),),
        )

    entries: list[list[ImageEntry]] = [[] for _ in index.shards]
    for image in index.images:
        entries[image.shard].append(image)

    def check(shard: Shard, images: Sequence[ImageEntry]) -> list[str]:
        return [f"{shard.url}: {problem}" for problem in _check_shard(directory, shard, images)]

    # Digests and decoding release the interpreter lock, so threads are enough.
    problems: list[str] = []
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for shard_problems in pool.map(check, index.shards, entries):
            problems += shard_problems
    problems += _check_vocabulary(directory, index)

    return VerifyReport(
        directory=directory,
        name=index.name,
        shards=len(index.shards),
        samples=len(index.images),
        bytes=sum(shard.bytes for shard in index.shards),
        counts=index.counts,
        problems=tuple(problems),
    )


def check_jpeg(data: bytes, height: int, width: int) -> None:
    """Decode a JPEG to its end.

    Raises:
        ValueError: it is not a JPEG, is cut short, or does not have its annotated size.
    """
    image = open_picture(io.BytesIO(data))
    if image.format not in JPEG_FORMATS:
        raise ValueError(f"the file is a {image.format}, not a JPEG")
    if image.size != (width, height):
        raise ValueError(
            f"the picture is {image.size[0]} x {image.size[1]}, "
            f"but its annotations are for {width} x {height}"
        )

    try:
        load_pixels(image)
        refuse_missing_pixels(data)
    except ValueError as error:
        raise ValueError(f"the JPEG does not decode: {error}") from None


def _check_vocabulary(directory: Path, index: ShardIndex) -> Iterator[str]:
    if index.vocabulary is None:
        return
    file = directory / index.vocabulary
    if not file.is_file():
        yield f"{index.vocabulary}: missing"
    elif sha256_of(file) != index.vocabulary_sha256:
        yield f"{index.vocabulary}: changed: its sha256 is not the one in the index"


def _check_shard(directory: Path, shard: Shard, images: Sequence[ImageEntry]) -> Iterator[str]:
    """Yield the problems of one tar; `images` are its entries in the index."""
    file = directory / shard.url
    if not file.is_file():
        yield "missing"
        return

    # The file as a whole; a wrong size makes the digest pointless.
    size = file.stat().st_size
    if size != shard.bytes:
        change = "truncated" if size < shard.bytes else "changed"
        yield f"{size:,} bytes, the index says {shard.bytes:,}: {change}"
    elif (digest := sha256_of(file)) != shard.sha256:
        yield f"sha256 {digest[:12]}…, the index says {shard.sha256[:12]}…: changed"

    # The members of the tar, by their headers.
    try:
        if tar_spans(file) != _expected_spans(images):
            yield "the files in the tar are not those of the index"
    except (tarfile.TarError, OSError) as error:
        yield f"not a complete tar ({error})"

    # Each sample, at the offsets of the index, as a loader reads it.
    with open(file, "rb") as stream:
        for image in images:
            try:
                _check_sample(_read_span(stream, image.jpg), _read_span(stream, image.json), image)
            except ValueError as error:
                yield f"sample {sample_key(image.image_id)}: {error}"


def _expected_spans(images: Sequence[ImageEntry]) -> list[tuple[str, int, int]]:
    """Return (name, offset, length) of each file that the index lists, in order."""
    spans = []
    for image in images:
        key = sample_key(image.image_id)
        spans.append((f"{key}.jpg", *image.jpg))
        spans.append((f"{key}.json", *image.json))
    return spans


def _check_sample(jpg: bytes, text: bytes, image: ImageEntry) -> None:
    parse_strict_json(text)
    record = read_record(text, image)
    height, width = record["height"], record["width"]
    for ref, entry in zip(record["refs"], image.refs):
        try:
            check_ref(ref, entry, height, width)
        except ValueError as error:
            raise ValueError(f"{entry.set}/{entry.ref_id}: {error}") from None
    check_jpeg(jpg, height, width)
    if image.photo is not None:
        _check_mark(image.photo, mark_photo(jpg, record["file_name"]))

    # Last, because the others say what is wrong.
    check_bytes(image, jpg=jpg, text=text)


def _check_mark(indexed: PhotoMark, found: PhotoMark) -> None:
    """Compare what the index says about a photograph with what it is.

    Raises:
        ValueError: the leak guard would take it for another photograph.
    """
    if (indexed.sha256, indexed.number) != (found.sha256, found.number):
        raise ValueError("its photograph is not the one that the index describes")

    # Another version of a decoder may hash differently in a few bits.
    bits = bits_between(indexed.look, found.look)
    if bits > MAX_BITS_OF_A_DECODER:
        raise ValueError(f"the index describes another picture ({bits} of 256 bits differ)")


def _read_span(stream: io.BufferedReader, span: tuple[int, int]) -> bytes:
    offset, length = span
    stream.seek(offset)
    data = stream.read(length)
    if len(data) != length:
        raise ValueError("its bytes are beyond the end of the file")
    return data
