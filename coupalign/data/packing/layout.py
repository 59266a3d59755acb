"""Decide the contents of every shard before `pack` writes anything."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coupalign.data.index import FORMAT_VERSION
from coupalign.data.packing.counts import Counts, count_refs
from coupalign.data.packing.images import (
    IMAGE_FOLDERS,
    ImageFile,
    find_images,
    is_coco_name,
)
from coupalign.data.packing.recipe import Recipe
from coupalign.data.packing.refer import Referral, read_annotation_set
from coupalign.errors import InputError, first_of, quoted
from coupalign.version import __version__

TOOL = f"coupalign {__version__}"


@dataclass(frozen=True)
class Sources:
    """Everything that the recipe names, found or missing."""

    referrals: tuple[Referral, ...]
    images: dict[int, ImageFile]  # by image_id
    missing_images: dict[int, str]  # expected file names by image_id
    missing_annotations: tuple[str, ...]  # one line per ref


@dataclass(frozen=True)
class Sample:
    """An image with its refs."""

    image_id: int
    image: ImageFile
    referrals: tuple[Referral, ...]  # sorted by data set, partition and ref_id


@dataclass(frozen=True)
class ShardLayout:
    """The samples of one tar."""

    url: str
    samples: tuple[Sample, ...]

    def fingerprint(self) -> str:
        """Digest everything that decides the bytes of the tar, and the state of the image files."""
        samples = (
            [str(s.image.path), s.image.bytes, s.image.mtime_ns, _plain_refs(s)]
            for s in self.samples
        )
        return _digest([TOOL, FORMAT_VERSION, *samples])


@dataclass(frozen=True)
class PackingLayout:
    """All shards of a set."""

    shards: tuple[ShardLayout, ...]
    counts: Counts
    fingerprint: str  # of the source: refs, image names and sizes, the recipe's settings
    # Cleaned sentences for the vocabulary: of the train splits, or all if there is none.
    sentences: tuple[str, ...] = field(default=(), repr=False)


class NothingToPack(InputError):
    """No ref of the recipe has its image."""


def read_sources(recipe: Recipe, skip_missing: bool) -> Sources:
    """Read the annotation files and look for the photographs.

    Raises:
        InputError: an annotation file is missing or malformed, an annotation is missing and
            `skip_missing` is false, two sets give one image_id to different pictures, or one
            picture has two ids.
    """
    referrals: list[Referral] = []
    missing_annotations: list[str] = []
    for annotation_set in recipe.sets:
        found, missing = read_annotation_set(
            recipe.root,
            annotation_set.dataset,
            annotation_set.split_by,
            folder=annotation_set.folder,
            skip_missing=skip_missing,
        )
        referrals += found
        missing_annotations += missing

    _refuse_shared_ids(recipe, referrals)
    try:
        images, missing_images = find_images(recipe.root, referrals, recipe.images)
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read: {error.strerror}") from None
    _refuse_shared_files(images)
    return Sources(
        referrals=tuple(referrals),
        images=images,
        missing_images=missing_images,
        missing_annotations=tuple(missing_annotations),
    )


def lay_out(recipe: Recipe, sources: Sources) -> PackingLayout:
    """Group the refs by image, sort the images by id and distribute them over tars.

    Refs without an image are left out.

    Raises:
        InputError: the data sets disagree on the size of an image, or there is nothing to pack.
    """
    samples = _group_by_image(recipe, sources)
    packed = [referral for sample in samples for referral in sample.referrals]

    # The vocabulary must not see the sentences of the other splits.
    training = [referral for referral in packed if referral.split == "train"] or packed

    settings = [recipe.name, recipe.shard_mb, recipe.max_images, recipe.vocabulary_size]
    contents = ([sample.image.bytes, _plain_refs(sample)] for sample in samples)
    return PackingLayout(
        shards=_cut_into_shards(samples, recipe),
        counts=count_refs(packed),
        fingerprint=_digest([FORMAT_VERSION, settings, *contents]),
        sentences=tuple(s.cleaned for referral in training for s in referral.sentences),
    )


def describe_missing(recipe: Recipe, sources: Sources) -> str:
    """Say how many images are missing, which ones come first, and where they were looked for."""
    names = list(sources.missing_images.values())
    total = len(names) + len(sources.images)
    refs = sum(referral.image_id in sources.missing_images for referral in sources.referrals)

    searched = recipe.images or f"{recipe.root}/{{{', '.join(IMAGE_FOLDERS)}}}"
    return (
        f"{len(names):,} of {total:,} images are missing ({refs:,} refs need them): "
        f"{first_of(names)}; looked in {searched}, those of COCO also as %012d.jpg"
    )


def _refuse_shared_ids(recipe: Recipe, referrals: Sequence[Referral]) -> None:
    """Refuse sets that number their pictures alike: refs of one would get a picture of another."""
    owners: dict[int, Referral] = {}
    for referral in referrals:
        owner = owners.setdefault(referral.image_id, referral)
        if not _is_same_picture(owner, referral):
            raise InputError(
                f"{recipe.root}: image_id {referral.image_id} is {quoted(owner.file_name)} in "
                f"{owner.dataset}/{owner.split_by} and {quoted(referral.file_name)} in "
                f"{referral.dataset}/{referral.split_by}; give different pictures different ids "
                "in the instances.json files, or pack the sets into two directories"
            )


def _is_same_picture(first: Referral, second: Referral) -> bool:
    """Whether two refs with the same image_id are on the same picture, judged by its name."""
    if first.file_name == second.file_name:
        return True

    # COCO's 2014 and 2017 names of the same picture differ.
    return all(is_coco_name(ref.file_name, ref.image_id) for ref in (first, second))


def _refuse_shared_files(images: Mapping[int, ImageFile]) -> None:
    owners: dict[Path, int] = {}
    for image_id, image in images.items():
        owner = owners.setdefault(image.path, image_id)
        if owner != image_id:
            raise InputError(
                f"{image.path}: is the picture of image_id {owner} and of image_id {image_id}; the "
                "refs of one of them belong to another picture: give each picture a name of its "
                "own, and correct `file_name` in instances.json"
            )


def _group_by_image(recipe: Recipe, sources: Sources) -> list[Sample]:
    refs_of_image: dict[int, list[Referral]] = {}
    for referral in sources.referrals:
        if referral.image_id in sources.images:
            refs_of_image.setdefault(referral.image_id, []).append(referral)
    if not refs_of_image:
        raise NothingToPack(f"{recipe.root}: nothing to pack: no ref has its image")

    # Sort everything, so that the order of refs in the files does not matter.
    samples = []
    for image_id, refs in sorted(refs_of_image.items()):
        sizes = {(ref.width, ref.height) for ref in refs}
        if len(sizes) > 1:
            raise InputError(
                f"{recipe.root}: the instances.json files give image_id {image_id} different "
                f"sizes: {sorted(sizes)}"
            )
        refs.sort(key=lambda ref: (ref.dataset, ref.split_by, ref.ref_id))
        samples.append(Sample(image_id, sources.images[image_id], tuple(refs)))
    return samples


def _cut_into_shards(samples: Sequence[Sample], recipe: Recipe) -> tuple[ShardLayout, ...]:
    groups: list[list[Sample]] = []
    free_bytes = free_images = 0.0
    for sample in samples:
        if not groups or sample.image.bytes > free_bytes or free_images < 1:
            groups.append([])
            free_bytes = recipe.shard_mb * 1e6
            free_images = recipe.max_images or float("inf")
        groups[-1].append(sample)
        free_bytes -= sample.image.bytes
        free_images -= 1

    return tuple(
        ShardLayout(f"shard-{number:06d}.tar", tuple(group)) for number, group in enumerate(groups)
    )


def _plain_refs(sample: Sample) -> list[dict[str, Any]]:
    """Return the refs of a sample as JSON values; the field names are part of the fingerprints."""
    plain = []
    for referral in sample.referrals:
        fields = {**vars(referral), "sentences": [vars(s) for s in referral.sentences]}
        # What is only compared decides no byte.
        del fields["stated_area"], fields["stated_box"]
        plain.append(fields)
    return plain


def _digest(values: Iterable[Any]) -> str:
    """SHA-256 of the values as JSON lines, one at a time: all of a real set at once is large."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(json.dumps(value, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()
