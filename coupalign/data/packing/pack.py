"""Annotations and photographs -> WebDataset tars and their index. The only user of webdataset.

What lands in which tar is decided before anything is written, so the bytes do not depend on the number of processes or on
how often the work was interrupted. The output directory while it is written:

    .pack.json                what is being written, and which files here are ours
    shard-000000.tar          finished
    .shard-000000.tar.json    its receipt: the plan it was written by, its sha256, its part of the index
    vocab.txt
    index.json                last; then the dot files go
"""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from coupalign.data.index import (
    FORMAT,
    INDEX_NAME,
    ImageEntry,
    RefEntry,
    Shard,
    ShardIndex,
    image_entry,
    image_record,
    read_index,
    sample_key,
    tar_spans,
    write_index,
)
from coupalign.data.masks import area, rle_from_segmentation
from coupalign.data.packing import refer
from coupalign.data.packing.layout import (
    TOOL,
    NothingLeft,
    PackingLayout,
    Sample,
    ShardPlan,
    Sources,
    describe_missing,
    lay_out,
    read_sources,
)
from coupalign.data.packing.recipe import Recipe
from coupalign.data.packing.verify import check_jpeg
from coupalign.errors import InputError
from coupalign.files import sha256_of, whole_file, write_json

VOCABULARY = "vocab.txt"
JOURNAL = ".pack.json"
_OURS = re.compile(r"shard-\d{6}\.tar|vocab\.txt|index\.json")
_RECEIPT = r"\.shard-\d{6}\.tar\.json"
_LEFTOVER = re.compile(rf"{_RECEIPT}|\.({_OURS.pattern}|{_RECEIPT}|\.pack\.json)\.\d+\.partial")


@dataclass(frozen=True)
class PackReport:
    name: str
    out: Path | None  # none: a dry run
    state: str  # "packed", "already packed", "dry run"
    counts: dict[str, dict[str, dict[str, int]]]
    images: int
    shards: int
    bytes: int  # of the tars; of the image files found, in a dry run
    seconds: float
    reused: int = 0  # shards kept from an interrupted run
    missing_images: tuple[str, ...] = ()
    missing_annotations: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def table(self) -> str:
        size = f"{self.images:,} images, {self.shards} shards, {self.bytes / 1e6:,.1f} MB, {self.seconds:.1f} s"
        lines = [
            f"{self.name}: {self.state}{f' in {self.out}' if self.out else ''}: {size}",
            refer.counts_table(self.counts),
        ]
        if self.reused:
            lines.append(f"{self.reused} shards of an interrupted run were right and kept")
        return "\n".join([*lines, *(f"warning: {line}" for line in self.warnings)])

    def to_json(self) -> dict[str, Any]:
        plain = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in vars(self).items()
        }
        return {**plain, "out": None if self.out is None else str(self.out)}


def pack(
    recipe: Recipe,
    out: Path | str,
    workers: int = 1,
    overwrite: bool = False,
    progress: bool = True,
) -> PackReport:
    """Write the shard set of `recipe` into `out`; the same input gives the same bytes, for any number of workers.

    Killed and started again, it keeps the shards that are proved right and ends with the same bytes. A directory that holds
    this very set already is left as it is.

    Args:
        workers: processes; 1 works in this one.
        overwrite: replace a finished set in `out`.

    Raises:
        InputError: images or annotations are missing (unless the recipe says `missing: skip`), an image does not decode, `out`
            holds another finished set, or files of these names that this tool did not write.
    """
    started, out = time.monotonic(), Path(out)
    sources = read_sources(recipe, skip_missing=recipe.missing == "skip")
    if sources.missing_images and recipe.missing == "fail":
        raise InputError(
            f"{describe_missing(recipe, sources)}; set `images:` in the recipe, or `missing: skip`"
        )
    plan = lay_out(recipe, sources)
    with _claim(out):
        state, reused = "already packed", 0
        if overwrite or not _is_finished(out, plan):
            _begin(out, plan, recipe.vocabulary_size is not None)
            vocabulary = _train_vocabulary(recipe, plan, out)
            shards, images, reused = _write_shards(plan, out, workers, progress)
            write_index(
                ShardIndex(
                    str(out),
                    recipe.name,
                    shards,
                    images,
                    plan.counts,
                    vocabulary,
                    "",
                    TOOL,
                    plan.fingerprint,
                    sha256_of(out / vocabulary) if vocabulary else None,
                )
            )
            state = "packed"
        _sweep(out)
    index = read_index(out)
    return replace(
        _report(recipe, sources, plan, started),
        out=out,
        state=state,
        reused=reused,
        shards=len(index.shards),
        bytes=sum(shard.bytes for shard in index.shards),
    )


def inspect(recipe: Recipe) -> PackReport:
    """Read the annotations only and report counts and everything that is missing; write nothing.

    Raises:
        InputError: an annotation file is missing or malformed.
    """
    started = time.monotonic()
    sources = read_sources(recipe, skip_missing=True)
    counts = refer.count_refs(
        sources.referrals
    )  # of the files, whether or not the photographs are there
    try:
        plan = lay_out(recipe, sources)
    except NothingLeft:
        plan = PackingLayout((), counts, "")
    return replace(_report(recipe, sources, plan, started), counts=counts)


# ------------------------------------------------------------------------------------------------------- writing


def _write_shards(
    plan: PackingLayout, out: Path, workers: int, progress: bool
) -> tuple[tuple[Shard, ...], tuple[ImageEntry, ...], int]:
    """All shards and the entries of their images, in the order of the plan, and how many were there already."""
    done: dict[int, tuple[Shard, tuple[ImageEntry, ...], bool]] = {}
    with tqdm(
        total=sum(len(shard.samples) for shard in plan.shards), unit="image", disable=not progress
    ) as bar:
        for number, result in _each_shard(plan, out, min(workers, len(plan.shards))):
            done[number] = result
            bar.update(result[0].samples)
    parts = [done[number] for number in range(len(plan.shards))]
    return (
        tuple(shard for shard, _, _ in parts),
        tuple(image for _, images, _ in parts for image in images),
        sum(reused for _, _, reused in parts),
    )


def _each_shard(
    plan: PackingLayout, out: Path, workers: int
) -> Iterator[tuple[int, tuple[Shard, tuple[ImageEntry, ...], bool]]]:
    if workers <= 1:
        for number, shard in enumerate(plan.shards):
            yield number, _write_shard(number, shard, out)
        return
    context = multiprocessing.get_context(
        "forkserver"
    )  # this process may have threads, which a fork would break
    context.set_forkserver_preload(
        [__name__, "webdataset"]
    )  # once, not in each process: it takes seconds
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent) as pool:
        jobs = {
            pool.submit(_write_shard, number, shard, out): number
            for number, shard in enumerate(plan.shards)
        }
        try:
            for job in as_completed(jobs):
                yield jobs[job], job.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _end_with_parent() -> None:
    """Without this the processes of a killed parent would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _write_shard(
    number: int, plan: ShardPlan, out: Path
) -> tuple[Shard, tuple[ImageEntry, ...], bool]:
    """Write one tar and its receipt, unless a receipt proves that it is there. Returns True at the end in that case."""
    receipt, file, fingerprint = out / f".{plan.url}.json", out / plan.url, plan.fingerprint()
    if (kept := _proved(receipt, file, fingerprint)) is not None:
        return *kept, True
    from webdataset import TarWriter  # here, as it imports torch

    with whole_file(file) as stream:
        with TarWriter(
            stream, encoder=False, mtime=0, user="coupalign", group="coupalign", mode=0o444
        ) as tar:
            for sample in plan.samples:
                tar.write(
                    {
                        "__key__": sample_key(sample.image_id),
                        "jpg": _read_jpeg(sample),
                        "json": _sample_json(sample),
                    }
                )
        stream.flush()
        partial = Path(stream.name)
        spans = tar_spans(partial)
        shard = Shard(plan.url, len(plan.samples), partial.stat().st_size, sha256_of(partial))
    images = tuple(
        ImageEntry(
            sample.image_id,
            number,
            jpg[1:],
            text[1:],
            tuple(
                RefEntry(f"{r.dataset}/{r.split_by}", r.split, r.ref_id, len(r.sentences))
                for r in sample.referrals
            ),
        )
        for sample, jpg, text in zip(plan.samples, spans[::2], spans[1::2], strict=True)
    )
    write_json(
        receipt,
        {
            "plan": fingerprint,
            "shard": vars(shard),
            "images": [image_record(image) for image in images],
        },
    )
    return shard, images, False


def _proved(
    receipt: Path, file: Path, fingerprint: str
) -> tuple[Shard, tuple[ImageEntry, ...]] | None:
    if not receipt.is_file() or not file.is_file():
        return None
    record = json.loads(receipt.read_text(encoding="utf-8"))
    if record["plan"] != fingerprint or record["shard"]["sha256"] != sha256_of(file):
        return None
    return Shard(**record["shard"]), tuple(image_entry(image) for image in record["images"])


def _read_jpeg(sample: Sample) -> bytes:
    path, first = sample.image.path, sample.referrals[0]
    try:
        data = path.read_bytes()
        if len(data) != sample.image.bytes:
            raise ValueError("it changed while it was packed")
        check_jpeg(data, first.height, first.width)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: {error}; fetch the image again, or remove it and set `missing: skip` in the recipe"
        ) from None
    return data


def _sample_json(sample: Sample) -> bytes:
    first = sample.referrals[0]
    record = {
        "image_id": sample.image_id,
        "file_name": first.file_name,
        "height": first.height,
        "width": first.width,
        "refs": [_ref_record(referral) for referral in sample.referrals],
    }
    return json.dumps(record, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()


def _ref_record(referral: refer.Referral) -> dict[str, Any]:
    rle = rle_from_segmentation(referral.segmentation, referral.height, referral.width)
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
        "sentences": [
            {"sent_id": s.sent_id, "raw": s.raw, "sent": s.cleaned} for s in referral.sentences
        ],
    }


def _train_vocabulary(recipe: Recipe, plan: PackingLayout, out: Path) -> str | None:
    if recipe.vocabulary_size is None:
        return None
    from coupalign.data.packing.vocabulary import train_vocabulary

    train_vocabulary(plan.sentences, out / VOCABULARY, recipe.vocabulary_size)
    return VOCABULARY


# -------------------------------------------------------------------------------------------- the output directory


@contextmanager
def _claim(out: Path) -> Iterator[None]:
    """Hold `out` alone: two processes that pack into one directory would remove each other's files."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"{out}: is a file; give a directory for the shards") from None
    handle = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise InputError(
            f"{out}: another process is packing into this directory; wait for it to end"
        ) from None
    except OSError:
        pass  # a file system without locks
    try:
        yield
    finally:
        os.close(handle)


def _is_finished(out: Path, plan: PackingLayout) -> bool:
    """True where `out` holds the set of `plan`, whole by its file sizes."""
    if not (out / INDEX_NAME).exists():
        return False
    index = read_index(out)
    if index.source_fingerprint != plan.fingerprint:
        raise InputError(
            f"{out}: holds the finished set {index.name!r}, packed from other sources, with another recipe or by another "
            f"version ({index.tool}); choose another directory, or overwrite it (--overwrite)"
        )
    for shard in index.shards:
        file = out / shard.url
        if not file.is_file() or file.stat().st_size != shard.bytes:
            raise InputError(
                f"{out}: is packed, but {shard.url} is missing or truncated; pack again with --overwrite"
            )
    return True


def _begin(out: Path, plan: PackingLayout, vocabulary: bool) -> None:
    """Note which files are ours, then remove those of an older set that this one does not replace."""
    wanted = {
        INDEX_NAME,
        *(shard.url for shard in plan.shards),
        *([VOCABULARY] if vocabulary else []),
    }
    owned = _owned(out)
    if foreign := sorted(name for name in wanted - owned if (out / name).exists()):
        raise InputError(
            f"{out}: holds {foreign[0]} ({len(foreign)} such files), which this tool did not write; "
            "choose an empty directory"
        )
    write_json(out / JOURNAL, {"format": FORMAT, "tool": TOOL, "owned": sorted(owned | wanted)})
    (out / INDEX_NAME).unlink(missing_ok=True)
    for name in owned - wanted:
        (out / name).unlink(missing_ok=True)
    receipts = {f".{shard.url}.json" for shard in plan.shards}
    for file in _leftovers(out):
        if file.name not in receipts:
            file.unlink()


def _owned(out: Path) -> set[str]:
    """Names of files that this tool wrote here, by the journal of an unfinished run and by a finished index."""
    owned: set[str] = set()
    for name in (JOURNAL, INDEX_NAME):
        try:
            tree = json.loads((out / name).read_bytes())
        except (OSError, ValueError):
            continue
        if isinstance(tree, dict) and tree.get("format") == FORMAT:
            owned |= {name, VOCABULARY} if name == INDEX_NAME else set()
            owned |= {
                *tree.get("owned", ()),
                *(shard["url"] for shard in tree.get("shardlist", ())),
            }
    return {name for name in owned if _OURS.fullmatch(name)}


def _sweep(out: Path) -> None:
    """Remove what only an unfinished run needs; the journal last, as it says that the rest is ours."""
    for file in _leftovers(out):
        file.unlink()
    (out / JOURNAL).unlink(missing_ok=True)


def _leftovers(out: Path) -> list[Path]:
    return [file for file in sorted(out.iterdir()) if _LEFTOVER.fullmatch(file.name)]


# ------------------------------------------------------------------------------------------------------ reporting


def _report(recipe: Recipe, sources: Sources, plan: PackingLayout, started: float) -> PackReport:
    warnings = refer.differences(plan.counts or refer.count_refs(sources.referrals))
    if sources.missing_annotations:
        first = "; ".join(sources.missing_annotations[:5])
        warnings.append(
            f"{len(sources.missing_annotations)} refs are left out, their annotation or image is not listed: {first}"
        )
    if sources.missing_images:
        warnings.append(describe_missing(recipe, sources))
    samples = [sample for shard in plan.shards for sample in shard.samples]
    return PackReport(
        recipe.name,
        None,
        "dry run",
        plan.counts,
        len(samples),
        len(plan.shards),
        sum(s.image.bytes for s in samples),
        time.monotonic() - started,
        0,
        tuple(sources.missing_images.values()),
        sources.missing_annotations,
        tuple(warnings),
    )
