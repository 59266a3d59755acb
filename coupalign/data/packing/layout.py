"""What `pack` will write, decided before it writes: which refs and photographs there are, and which tar each lands in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from coupalign.data.index import FORMAT_VERSION
from coupalign.data.packing import refer
from coupalign.data.packing.recipe import Recipe
from coupalign.errors import InputError
from coupalign.version import __version__

TOOL = f"coupalign {__version__}"


@dataclass(frozen=True)
class Sources:
    """All that the recipe names, found or missing."""

    referrals: tuple[refer.Referral, ...]
    images: dict[int, refer.FoundImage]  # by image_id
    missing_images: dict[int, str]  # expected file names by image_id
    missing_annotations: tuple[str, ...]  # a line a ref


@dataclass(frozen=True)
class Sample:
    image_id: int
    image: refer.FoundImage
    referrals: tuple[refer.Referral, ...]  # sorted by data set, partition, ref_id


@dataclass(frozen=True)
class ShardPlan:
    url: str
    samples: tuple[Sample, ...]

    def fingerprint(self) -> str:
        """Of all that decides the tar's bytes, and of the image files as they lie there now."""
        files = (
            [str(s.image.path), s.image.bytes, s.image.mtime_ns, _contents(s)] for s in self.samples
        )
        return _digest([TOOL, FORMAT_VERSION, *files])


@dataclass(frozen=True)
class PackingLayout:
    shards: tuple[ShardPlan, ...]
    counts: dict[str, dict[str, dict[str, int]]]
    fingerprint: str  # of the source: refs, image names and sizes, the recipe's dials
    sentences: tuple[str, ...] = field(
        default=(), repr=False
    )  # cleaned, of the train splits, or of all where there is none


class NothingLeft(InputError):
    """No ref of the recipe has its image."""


def read_sources(recipe: Recipe, skip_missing: bool) -> Sources:
    """Read the annotation files and look for the photographs.

    Raises:
        InputError: an annotation file is missing or malformed; an annotation is missing, unless `skip_missing`.
    """
    referrals: list[refer.Referral] = []
    gaps: list[str] = []
    for part in recipe.sets:
        found, missing = refer.read_set(
            recipe.root, part.dataset, part.split_by, part.folder, skip_missing
        )
        referrals += found
        gaps += missing
    images, missing_images = refer.find_images(recipe.root, referrals, recipe.images)
    return Sources(tuple(referrals), images, missing_images, tuple(gaps))


def lay_out(recipe: Recipe, sources: Sources) -> PackingLayout:
    """Group the refs by image, sort the images by id and cut them into tars. Refs without an image are left out.

    Raises:
        InputError: the data sets disagree on the size of an image, or nothing is left.
    """
    kept: dict[int, list[refer.Referral]] = {}
    for referral in sources.referrals:
        if referral.image_id in sources.images:
            kept.setdefault(referral.image_id, []).append(referral)
    if not kept:
        raise NothingLeft(f"{recipe.root}: nothing to pack: no ref has its image")
    samples = []
    for image_id in sorted(kept):
        refs = tuple(sorted(kept[image_id], key=lambda r: (r.dataset, r.split_by, r.ref_id)))
        if len(sizes := {(r.width, r.height) for r in refs}) > 1:
            raise InputError(
                f"{recipe.root}: the instances.json files give image_id {image_id} different sizes: {sorted(sizes)}"
            )
        samples.append(Sample(image_id, sources.images[image_id], refs))
    used = [referral for sample in samples for referral in sample.referrals]
    trained = [r for r in used if r.split == "train"] or used
    dials = [recipe.name, recipe.shard_mb, recipe.max_images, recipe.vocabulary_size]
    fingerprint = _digest(
        [FORMAT_VERSION, dials, *([s.image.bytes, _contents(s)] for s in samples)]
    )
    return PackingLayout(
        _cut(samples, recipe),
        refer.count_refs(used),
        fingerprint,
        tuple(s.cleaned for r in trained for s in r.sentences),
    )


def describe_missing(recipe: Recipe, sources: Sources) -> str:
    """How many, the first five, and where they were looked for."""
    names = list(sources.missing_images.values())
    refs = sum(referral.image_id in sources.missing_images for referral in sources.referrals)
    places = (
        str(recipe.images)
        if recipe.images
        else f"{recipe.root}/{{{', '.join(refer.IMAGE_FOLDERS)}}}"
    )
    return (
        f"{len(names):,} of {len(names) + len(sources.images):,} images are missing ({refs:,} refs need them): "
        f"{', '.join(names[:5])}{', …' if len(names) > 5 else ''}; looked in {places}, also for names like %012d.jpg"
    )


def _cut(samples: Sequence[Sample], recipe: Recipe) -> tuple[ShardPlan, ...]:
    groups: list[list[Sample]] = []
    room = places = 0.0
    for sample in samples:
        if not groups or sample.image.bytes > room or places < 1:
            groups.append([])
            room, places = recipe.shard_mb * 1e6, recipe.max_images or float("inf")
        groups[-1].append(sample)
        room, places = room - sample.image.bytes, places - 1
    return tuple(
        ShardPlan(f"shard-{number:06d}.tar", tuple(group)) for number, group in enumerate(groups)
    )


def _contents(sample: Sample) -> list[dict[str, Any]]:
    return [
        {**vars(referral), "sentences": [vars(sentence) for sentence in referral.sentences]}
        for referral in sample.referrals
    ]


def _digest(values: Sequence[Any]) -> str:
    """SHA-256 of JSON lines; line by line, as the whole of a real set is large."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(json.dumps(value, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()
