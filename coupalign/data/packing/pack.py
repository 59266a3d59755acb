"""Pack annotations and photographs into WebDataset tars with an index.

The contents of each tar are decided before anything is written. So the bytes do not depend on the
number of processes, or on how often the work was interrupted. `output` describes the directory.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from coupalign.data.index import ShardIndex, read_index, write_index
from coupalign.data.packing import output
from coupalign.data.packing.counts import (
    Counts,
    count_refs,
    counts_table,
    differences_from_published,
)
from coupalign.data.packing.doubts import find_doubts
from coupalign.data.packing.images import Turning
from coupalign.data.packing.layout import (
    TOOL,
    NothingToPack,
    PackingLayout,
    Sources,
    describe_missing,
    lay_out,
    read_sources,
)
from coupalign.data.packing.recipe import Recipe
from coupalign.data.packing.write import WrittenShard, write_shards
from coupalign.errors import MAX_LISTED, InputError, first_of
from coupalign.files import sha256_of


@dataclass(frozen=True, kw_only=True)
class PackReport:
    name: str
    out: Path | None  # None: a dry run
    state: str  # "packed", "already packed" or "dry run"
    counts: Counts
    images: int
    shards: int
    bytes: int  # of the tars; in a dry run, of the image files
    seconds: float
    reused: int = 0  # shards kept from an interrupted run
    missing_images: tuple[str, ...] = ()
    missing_annotations: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def table(self) -> str:
        where = f" in {self.out}" if self.out else ""
        size = f"{self.images:,} images, {self.shards} shards, {self.bytes / 1e6:,.1f} MB"
        lines = [
            f"{self.name}: {self.state}{where}: {size}, {self.seconds:.1f} s",
            counts_table(self.counts),
        ]
        if self.reused:
            lines.append(f"reused {self.reused} finished shards of an interrupted run")
        lines += [f"warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        plain = vars(self) | {"out": None if self.out is None else str(self.out)}
        for name in ("missing_images", "missing_annotations", "warnings"):
            plain[name] = list(plain[name])
        return plain


def pack(
    recipe: Recipe,
    out: Path | str,
    workers: int = 1,
    overwrite: bool = False,
    progress: bool = True,
) -> PackReport:
    """Write the shard set of `recipe` into the directory `out`.

    The same input gives the same bytes, for any number of workers. If the process is killed, start
    it again: it keeps the shards that are finished and ends with the same bytes. If `out` already
    contains this set, it is left as it is.

    Args:
        workers: number of processes; with 1, this process does the work.
        overwrite: replace a finished set in `out`.

    Raises:
        InputError: images or annotations are missing (unless the recipe has `missing: skip`), an
            image does not decode, `out` contains another finished set, or files with the names of
            ours that this tool did not write, or it cannot be written.
        RunError: the disk is full or failed, or a process was killed. Finished shards are kept.
    """
    started, out = time.monotonic(), Path(out)

    # Fail before anything is written.
    sources = read_sources(recipe, skip_missing=recipe.missing == "skip")
    if sources.missing_images and recipe.missing == "fail":
        raise InputError(
            f"{describe_missing(recipe, sources)}; set `images:` in the recipe, or `missing: skip`"
        )
    layout = lay_out(recipe, sources)

    state = "already packed"
    written: list[WrittenShard] = []
    # A finished set is left alone, also where nothing can be written.
    if overwrite or not output.has_finished_set(out, layout) or output.has_leftovers(out):
        with output.writable(out):
            if overwrite or not output.has_finished_set(out, layout):
                output.prepare(out, layout, with_vocabulary=recipe.vocabulary_size is not None)
                written = _write_set(recipe, layout, out, workers=workers, progress=progress)
                state = "packed"
            output.remove_leftovers(out)

    index = read_index(out)
    report = _report(recipe, sources, layout, started=started)
    return replace(
        report,
        out=out,
        state=state,
        reused=sum(result.reused for result in written),
        shards=len(index.shards),
        bytes=sum(shard.bytes for shard in index.shards),
        warnings=(
            *report.warnings,
            *_describe_turnings(written),
            *_describe_copies(index),
            *_describe_age(index),
        ),
    )


def _describe_age(index: ShardIndex) -> list[str]:
    """Say what the index of a set that an early version packed lacks."""
    unhashed = sum(image.photo is None for image in index.images)
    if not unhashed:
        return []
    return [
        f"an early version packed this set: {unhashed:,} photographs have no hashes, so scores on "
        "it cannot rule out leaks. Pack again with --overwrite to add them; only the index changes"
    ]


def _describe_copies(index: ShardIndex) -> list[str]:
    """Warn of photographs that are packed several times: the files differ in their names only."""
    image_ids: dict[str, list[int]] = {}
    for image in index.images:
        if image.photo is not None:
            image_ids.setdefault(image.photo.sha256, []).append(image.image_id)

    groups = [ids for ids in image_ids.values() if len(ids) > 1]
    if not groups:
        return []
    listed = "; ".join(str(ids[:MAX_LISTED]) for ids in groups[:MAX_LISTED])
    return [
        f"{len(groups):,} photographs are packed under several image ids, with the same bytes: "
        f"{listed}"
    ]


def inspect(recipe: Recipe) -> PackReport:
    """Report the counts and everything that is missing, without writing anything.

    Raises:
        InputError: an annotation file is missing or malformed.
    """
    started = time.monotonic()
    sources = read_sources(recipe, skip_missing=True)

    # Count what the files contain, whether or not the photographs exist.
    counts = count_refs(sources.referrals)
    try:
        layout = lay_out(recipe, sources)
    except NothingToPack:
        layout = PackingLayout(shards=(), counts=counts, fingerprint="")
    return replace(_report(recipe, sources, layout, started=started), counts=counts)


def _write_set(
    recipe: Recipe, layout: PackingLayout, out: Path, *, workers: int, progress: bool
) -> list[WrittenShard]:
    """Write vocabulary, shards and index; return the shards."""
    vocabulary = _write_vocabulary(recipe, layout, out)
    written = write_shards(layout, out, workers, progress)

    # The index is last: a directory that has one is finished.
    index = ShardIndex(
        location=str(out),
        name=recipe.name,
        shards=tuple(result.shard for result in written),
        images=tuple(image for result in written for image in result.images),
        counts=layout.counts,
        vocabulary=vocabulary,
        fingerprint="",  # that of the index file itself, which does not exist yet
        tool=TOOL,
        source_fingerprint=layout.fingerprint,
        vocabulary_sha256=sha256_of(out / vocabulary) if vocabulary else None,
    )
    write_index(index)
    return written


def _describe_turnings(written: Sequence[WrittenShard]) -> Iterator[str]:
    """Warn of the photographs with an EXIF orientation, one line per kind of `Turning`."""
    names: dict[Turning, list[str]] = {}
    for shard in written:
        for name, turning in shard.turnings.items():
            names.setdefault(turning, []).append(name)

    consequences: dict[Turning, str] = {
        "turned": "were turned as a viewer shows them; if the masks of one were drawn on its "
        "stored pixels, remove the orientation from its file and pack again",
        "as stored": "stay as stored, because their annotations have the size of the stored pixels",
        "unknown": "have EXIF data that cannot be read and stay as stored",
    }
    for turning, consequence in consequences.items():
        if turning in names:
            found = names[turning]
            yield (
                f"photographs with an EXIF orientation: {len(found):,} {consequence} "
                f"({first_of(found)})"
            )


def _write_vocabulary(recipe: Recipe, layout: PackingLayout, out: Path) -> str | None:
    """Train the vocabulary that the recipe asks for and return its file name."""
    if recipe.vocabulary_size is None:
        return None

    from coupalign.data.packing.vocabulary import train_vocabulary

    train_vocabulary(layout.sentences, out / output.VOCABULARY, recipe.vocabulary_size)
    return output.VOCABULARY


def _report(
    recipe: Recipe, sources: Sources, layout: PackingLayout, *, started: float
) -> PackReport:
    """Build the report of a dry run; `pack` replaces what it knows better."""
    warnings = differences_from_published(layout.counts or count_refs(sources.referrals))
    if sources.missing_annotations:
        count = len(sources.missing_annotations)
        listed = "; ".join(sources.missing_annotations[:MAX_LISTED])
        warnings.append(
            f"{count} refs are left out because they have no target, or their annotation or image "
            f"is not listed: {listed}"
        )
    if sources.missing_images:
        warnings.append(describe_missing(recipe, sources))
    warnings += find_doubts(sources.referrals)

    samples = [sample for shard in layout.shards for sample in shard.samples]
    return PackReport(
        name=recipe.name,
        out=None,
        state="dry run",
        counts=layout.counts,
        images=len(samples),
        shards=len(layout.shards),
        bytes=sum(sample.image.bytes for sample in samples),
        seconds=time.monotonic() - started,
        missing_images=tuple(sources.missing_images.values()),
        missing_annotations=sources.missing_annotations,
        warnings=tuple(warnings),
    )
