"""Write the shards of a set. The only user of webdataset."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from coupalign.data.index import (
    ImageEntry,
    RefEntry,
    Shard,
    image_from_json,
    image_to_json,
    sample_key,
    tar_spans,
)
from coupalign.data.masks import area, rle_from_segmentation
from coupalign.data.packing.images import Turning, read_photograph
from coupalign.data.packing.layout import PackingLayout, Sample, ShardLayout
from coupalign.data.packing.output import receipt_path
from coupalign.data.packing.refer import Referral
from coupalign.data.photos import PhotoMark, mark_photo
from coupalign.errors import InputError, RunError
from coupalign.files import parse_strict_json, sha256_of, whole_file, write_json


@dataclass(frozen=True)
class WrittenShard:
    shard: Shard
    images: tuple[ImageEntry, ...]  # in the order of the tar
    reused: bool  # finished by an earlier run that was interrupted
    turnings: dict[str, Turning]  # of the photographs with an EXIF orientation, by file name


def write_shards(
    layout: PackingLayout, out: Path, workers: int, progress: bool
) -> list[WrittenShard]:
    """Write all shards and return them in the order of the layout.

    Raises:
        InputError: an image does not decode or does not have its annotated size.
    """
    written: dict[int, WrittenShard] = {}
    images = sum(len(shard.samples) for shard in layout.shards)
    processes = min(workers, len(layout.shards))
    with tqdm(total=images, unit="image", disable=not progress) as bar:
        for number, result in _write_in_any_order(layout, out, processes):
            written[number] = result
            bar.update(result.shard.samples)
    return [written[number] for number in range(len(layout.shards))]


def _write_in_any_order(
    layout: PackingLayout, out: Path, processes: int
) -> Iterator[tuple[int, WrittenShard]]:
    if processes <= 1:
        for number, shard in enumerate(layout.shards):
            yield number, _write_shard(number, shard, out)
        return

    # A plain fork would break if this process has threads. The fork server imports webdataset once;
    # importing it in each worker would take seconds.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "webdataset"])
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_exit_with_parent) as pool:
        jobs = {
            pool.submit(_write_shard, number, shard, out): number
            for number, shard in enumerate(layout.shards)
        }
        try:
            for job in as_completed(jobs):
                yield jobs[job], job.result()
        except BrokenProcessPool:
            raise RunError(
                f"{out}: a process of pack was killed, perhaps because memory ran out. Start the "
                "same command again: it keeps the finished shards; --workers 1 needs least memory"
            ) from None
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _exit_with_parent() -> None:
    """End this worker when its parent is killed; it would wait for work forever otherwise."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _write_shard(number: int, layout: ShardLayout, out: Path) -> WrittenShard:
    """Write one tar and its receipt, unless a receipt proves that the tar is finished."""
    file = out / layout.url
    receipt = receipt_path(out, layout.url)
    fingerprint = layout.fingerprint()
    finished = _read_finished(file, receipt, fingerprint)
    if finished is not None:
        return finished

    from webdataset import TarWriter  # not at the top: it imports torch

    turnings: dict[str, Turning] = {}
    marks: list[PhotoMark] = []
    crcs: list[tuple[int, int]] = []
    # Owner, mode and time are fixed, so that the same input gives the same bytes.
    with whole_file(file) as stream:
        with TarWriter(
            stream, encoder=False, mtime=0, user="coupalign", group="coupalign", mode=0o444
        ) as tar:
            for sample in layout.samples:
                key = sample_key(sample.image_id)
                jpg, turning = _read_jpeg(sample)
                if turning is not None:
                    turnings[sample.image.path.name] = turning
                marks.append(mark_photo(jpg, sample.referrals[0].file_name))
                record = _sample_json(sample)
                crcs.append((zlib.crc32(jpg), zlib.crc32(record)))
                tar.write({"__key__": key, "jpg": jpg, "json": record})
        stream.flush()

        partial = Path(stream.name)
        spans = [(offset, length) for _, offset, length in tar_spans(partial)]
        shard = Shard(
            url=layout.url,
            samples=len(layout.samples),
            bytes=partial.stat().st_size,
            sha256=sha256_of(partial),
        )

    images = tuple(
        _image_entry(sample, number, mark=mark, crc=crc, jpg=jpg, text=text)
        for sample, mark, crc, jpg, text in zip(
            layout.samples, marks, crcs, spans[::2], spans[1::2], strict=True
        )
    )
    proof = {
        "plan": fingerprint,
        "shard": vars(shard),
        "images": [image_to_json(image) for image in images],
        "turnings": turnings,
    }
    write_json(receipt, {**proof, "digest": _digest_of(proof)})
    return WrittenShard(shard, images, reused=False, turnings=turnings)


def _read_finished(file: Path, receipt: Path, fingerprint: str) -> WrittenShard | None:
    """Return the finished shard that the receipt proves; None if it does not prove any.

    A receipt that is damaged, or was written by an earlier version, proves nothing.
    """
    if not receipt.is_file() or not file.is_file():
        return None
    try:
        proof = parse_strict_json(receipt.read_bytes())
        if proof.pop("digest") != _digest_of(proof):
            return None
        if proof["plan"] != fingerprint or proof["shard"]["sha256"] != sha256_of(file):
            return None
        images = tuple(image_from_json(image) for image in proof["images"])
        shard = Shard(**proof["shard"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None

    if any(image.photo is None or image.crc is None for image in images):
        return None
    return WrittenShard(shard, images, reused=True, turnings=proof["turnings"])


def _digest_of(proof: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(proof, sort_keys=True).encode()).hexdigest()


def _image_entry(
    sample: Sample,
    shard_number: int,
    *,
    mark: PhotoMark,
    crc: tuple[int, int],
    jpg: tuple[int, int],
    text: tuple[int, int],
) -> ImageEntry:
    refs = tuple(
        RefEntry(
            set=f"{referral.dataset}/{referral.split_by}",
            split=referral.split,
            ref_id=referral.ref_id,
            sentences=len(referral.sentences),
        )
        for referral in sample.referrals
    )
    return ImageEntry(
        image_id=sample.image_id,
        shard=shard_number,
        jpg=jpg,
        json=text,
        refs=refs,
        photo=mark,
        crc=crc,
    )


def _read_jpeg(sample: Sample) -> tuple[bytes, Turning | None]:
    path, referral = sample.image.path, sample.referrals[0]
    try:
        data = path.read_bytes()
        if len(data) != sample.image.bytes:
            raise ValueError("the file changed while it was being packed")
        return read_photograph(data, referral.height, referral.width)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: {error}; fetch the image again, or remove it and set `missing: skip` in "
            "the recipe"
        ) from None


def _sample_json(sample: Sample) -> bytes:
    referral = sample.referrals[0]
    record = {
        "image_id": sample.image_id,
        "file_name": referral.file_name,
        "height": referral.height,
        "width": referral.width,
        "refs": [_ref_record(referral) for referral in sample.referrals],
    }
    return json.dumps(record, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()


def _ref_record(referral: Referral) -> dict[str, Any]:
    rle = rle_from_segmentation(referral.segmentation, referral.height, referral.width)
    sentences = [
        {"sent_id": sentence.sent_id, "raw": sentence.raw, "sent": sentence.cleaned}
        for sentence in referral.sentences
    ]
    return {
        "dataset": referral.dataset,
        "split_by": referral.split_by,
        "split": referral.split,
        "ref_id": referral.ref_id,
        "ann_id": referral.ann_id,
        "category": referral.category,
        "crowd": referral.crowd,
        "same_class": referral.same_class,
        "area": area(rle),
        "rle": rle,
        "sentences": sentences,
    }
