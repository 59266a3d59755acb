"""Prove a directory of shards whole: sizes, digests, every sample, counts."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from coupalign.data.index import (
    INDEX_NAME,
    ImageEntry,
    RefEntry,
    Shard,
    read_index,
    sample_key,
    tar_spans,
)
from coupalign.data.masks import area, check_segmentation
from coupalign.data.packing.refer import counts_table
from coupalign.files import sha256_of


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
