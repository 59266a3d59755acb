"""The leak guard: no photograph may be both trained on and scored, and every score says if one was.

RefCOCO, RefCOCO+ and G-Ref are drawn from the same COCO photographs, cut into train and test in
different ways. So the train split of one set shows a model the test photographs of another.

A photograph is recognized by what it shows, under any name and number: see `photos`. Where the
hashes for that are missing, the guard says that it does not know.

    <run>/trained_on.json     the photographs a run was trained on; every checkpoint has a copy
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from coupalign.config.schema import DataConfig
from coupalign.data.index import ImageEntry, RefEntry, ShardIndex
from coupalign.data.photos import (
    COCO,
    PhotoMark,
    Photos,
    compare,
    distinct_photos,
    matching_pairs,
)
from coupalign.data.table import SampleTable, matches_source
from coupalign.errors import InputError, quoted
from coupalign.files import read_json, write_json

TRAINED_ON = "trained_on.json"
_FORMAT = 2  # of that file; 1 has no hashes
_MAX_BYTES = 1 << 30  # of that file: nine million photographs

_PACK_AGAIN = "Pack the shards again with --overwrite, which adds the hashes"

# data.leaks -> its name in trained_on.json, which is that of an earlier version.
MIX = {"refuse": None, "exclude": "clean", "allow": "leaky"}


@dataclass(frozen=True)
class TrainedOn:
    """What a model has seen.

    Attributes:
        photos: those of the training samples, and those that its initial weights were trained on.
        mix: what was done about leaks: "clean" (excluded), "leaky" (allowed) or None (refused).
        weights: a sentence for each pretrained encoder that has seen COCO's objects.
        unlisted: files with initial weights of another run whose list of photographs is lost.
    """

    photos: Photos
    mix: str | None = None
    weights: tuple[str, ...] = ()
    unlisted: tuple[str, ...] = ()

    @classmethod
    def from_table(cls, table: SampleTable, leaks: str) -> TrainedOn:
        """Collect the photographs of the training samples; `leaks` is data.leaks."""
        return cls(photos_of(table), MIX[leaks])

    def leak_message(self, scored: Photos) -> str:
        """Say how many of the scored photographs the model has seen; printed with every score.

        It begins with "LEAKY:", with "none:", or with "unknown:" where hashes are missing.
        """
        found = compare(scored, self.photos)
        seen, unknown = int(found.seen.sum()), int(found.unknown.sum())

        if seen:
            at_least = "at least " if unknown else ""
            message = f"LEAKY: {at_least}{seen:,} of {len(scored):,} scored photographs were"
            message = f"{message} trained on"
        elif unknown:
            message = f"unknown: {unknown:,} of {len(scored):,} scored photographs may have been"
            message = f"{message} trained on. {_why_unknown(scored, self.photos)}"
        elif self.unlisted:
            message = (
                f"unknown: the initial weights {', '.join(self.unlisted)} come from a run, whose "
                f"{TRAINED_ON} was not next to them. Copy both and train again"
            )
        else:
            message = "none: no scored photograph was trained on"
        if found.renumbered:
            message += (
                f" ({found.renumbered:,} have the COCO number of one that was, but show "
                "something else)"
            )
        return "; ".join([message, *self.weights])

    def including(
        self, starts: Iterable[Path], weights: Iterable[str] = (), ours: Iterable[Path] = ()
    ) -> TrainedOn:
        """Add what the initial weights of this model have seen.

        Args:
            starts: the weight files. Next to one that a run of ours wrote is a trained_on.json.
            weights: a sentence for each file that may have seen the test images.
            ours: those of `starts` that a run of ours wrote, by their tensors.
        """
        photos, mix = self.photos, self.mix
        unlisted, ours = list(self.unlisted), set(ours)
        sentences = list(self.weights)
        for file in starts:
            earlier = read_trained_on(file.parent)
            if earlier is None and file in ours:
                unlisted.append(str(file))
            if earlier is not None:
                unlisted += earlier.unlisted
                photos = Photos.join([photos, earlier.photos])
                sentences += earlier.weights
                if earlier.mix == "leaky":
                    mix = "leaky"

        without_repeats = dict.fromkeys([*sentences, *weights])
        return TrainedOn(photos, mix, tuple(without_repeats), tuple(dict.fromkeys(unlisted)))

    def write(self, folder: Path) -> None:
        """Write <folder>/trained_on.json."""
        record = {
            "format": _FORMAT,
            "mix": self.mix,
            "weights": list(self.weights),
            "unlisted": list(self.unlisted),
            "photos": self.photos.to_json(),
        }
        write_json(folder / TRAINED_ON, record)


def read_trained_on(folder: Path) -> TrainedOn | None:
    """Read <folder>/trained_on.json. Returns None if there is no such file.

    Raises:
        InputError: the file is damaged.
    """
    file = folder / TRAINED_ON
    if not file.is_file():
        return None

    remedy = "Copy it from another checkpoint of the run"
    if file.stat().st_size > _MAX_BYTES:
        raise InputError(f"{file}: more than {_MAX_BYTES:,} bytes, the limit. {remedy}")
    record = read_json(file, "the photographs of a training run; each checkpoint has a copy")
    try:
        match record.get("format", 1):
            case 1:
                photos = _read_format_1(record["photos"])
            case 2:
                photos = Photos.from_json(record["photos"])
            case other:
                raise ValueError(f"format {quoted(other)}, this version reads 1 and 2")

        mix, weights, unlisted = record["mix"], record["weights"], record.get("unlisted", [])
        if mix not in MIX.values() or not all(type(text) is str for text in [*weights, *unlisted]):
            raise ValueError("`mix`, `weights` or `unlisted` is not what this tool writes")
        return TrainedOn(photos, mix, tuple(weights), tuple(unlisted))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise InputError(
            f"{file}: damaged ({type(error).__name__}: {str(error)[:200]}). {remedy}"
        ) from None


def _read_format_1(collections: Mapping[str, Sequence[tuple[int, int]]]) -> Photos:
    """Read {collection: [[image id, length], …]}, where "coco" is COCO with its numbers."""
    described = []
    for collection, identities in collections.items():
        dataset = COCO[0] if collection == "coco" else collection
        described += [(None, dataset, int(number), int(size)) for number, size in identities]
    photos, _ = distinct_photos(described)
    return photos


def apply_leak_policy(
    config: DataConfig,
    table: SampleTable,
    train: Sequence[ShardIndex],
    evaluate: Sequence[ShardIndex],
) -> tuple[SampleTable, list[str]]:
    """Look for training samples on held-out photographs, and do what `data.leaks` says.

    Held out is everything that may be reported: what `data.evaluate` names, and every split except
    train of each set (a data set and its partition) that is trained on.

    Args:
        table: the training samples.
        train: the index of each source in data.train.
        evaluate: the index of each source in data.evaluate.

    Returns:
        the samples to train on, and lines to print. `leaks: exclude` leaves out the samples on
        held-out photographs, `leaks: allow` keeps them.

    Raises:
        InputError: there are such samples and `leaks: refuse`, or excluding them leaves no sample.
    """
    held_out = _held_out_photos(config, train, evaluate)
    photos, which = _photos_of_samples(table)

    # Find the photographs that are both trained on and held out, by split.
    forbidden = np.zeros(len(photos), bool)
    shared, unknown = [], []
    for name, split in sorted(held_out.items()):
        found = compare(split, photos)
        forbidden |= found.used
        if found.seen.any():
            shared.append(f"{found.seen.sum():,} of {len(split):,} photographs of {name}")
        if found.unknown.any():
            why = _why_unknown(split, photos)
            unknown.append(f"{found.unknown.sum():,} of {len(split):,} of {name}: {why}")

    lines = []
    if unknown:
        lines.append(
            "leaks unknown: these held-out photographs may be among those to train on: "
            + "; ".join(unknown)
        )
    if not shared:
        return table, lines
    overlap = "; ".join(shared)

    if config.leaks == "refuse":
        raise InputError(
            f"data.train shows photographs that are to be scored: {overlap}. Set "
            "data.leaks=exclude to leave them out. Or set data.leaks=allow to compare with papers "
            "that train on them; every score then says so. `coupalign verify --leaks` names some"
        )
    if config.leaks == "allow":
        lines.append(
            f"LEAKY, because data.leaks=allow: the training samples show {overlap}. "
            "Every score of this run says so"
        )
        return table, lines

    # Leave out every sample on a held-out photograph.
    kept = ~forbidden[which]
    if not kept.any():
        raise InputError(
            f"data.leaks=exclude leaves nothing to train on: all {len(table):,} samples show "
            f"{overlap}. Name other sources in data.train or data.evaluate"
        )
    lines.append(
        f"data.leaks=exclude: {int((~kept).sum()):,} of {len(table):,} training samples on "
        f"{int(forbidden.sum()):,} photographs were left out, because they show {overlap}"
    )
    return table.take(np.flatnonzero(kept)), lines


def photos_of(table: SampleTable) -> Photos:
    """Return the photographs of some samples, each once."""
    photos, _ = _photos_of_samples(table)
    return photos


@dataclass(frozen=True)
class Overlaps:
    """How many photographs any two splits share.

    Attributes:
        sizes: the photographs of each split, by "set split".
        shared: for a pair of splits, the photographs of the second that are also in the first.
            Pairs that share none are left out.
        unhashed: the photographs of each split that have no hashes. What they share is unknown.
        examples: two image ids of a pair, one of each split, that show the same.
    """

    sizes: Mapping[str, int]
    shared: Mapping[tuple[str, str], int]
    unhashed: Mapping[str, int] = field(default_factory=dict)
    examples: Mapping[tuple[str, str], tuple[int, int]] = field(default_factory=dict)

    def table(self) -> str:
        """Tabulate the photographs of each split, then which train split leaks into which split."""
        sizes = [(name, f"{size:,} photographs") for name, size in self.sizes.items()]

        leaks = []
        for (trained, scored), count in self.shared.items():
            if trained.endswith(" train") and not scored.endswith(" train"):
                share = f"{count / self.sizes[scored]:.1%}"
                one, other = self.examples.get((trained, scored), ("", ""))
                leaks.append((trained, scored, f"{count:,}", share, f"{one} = {other}"))

        if leaks:
            below = tabulate(
                leaks,
                headers=(
                    "trained on",
                    "scored on",
                    "photographs of both",
                    "share of the scored",
                    "for example, image ids",
                ),
                tablefmt="plain",
                disable_numparse=True,
                colalign=("left", "left", "right", "right", "left"),
            )
        elif self.unhashed:
            below = "no photograph of a train split is known to be in another split"
        else:
            below = "no photograph of a train split is in another split"
        if self.unhashed:
            below += f"\n{self._unknown()}"
        above = tabulate(sizes, tablefmt="plain", disable_numparse=True, colalign=("left", "right"))
        return f"\n{above}\n\n{below}"

    def _unknown(self) -> str:
        splits = [f"{count:,} of {name}" for name, count in self.unhashed.items()]
        return (
            f"unknown: an early version packed photographs without hashes ({'; '.join(splits)}). "
            f"They may be in other splits under other names. {_PACK_AGAIN}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the same, for `--json`."""
        return {
            "photographs": dict(self.sizes),
            "shared": [[one, other, count] for (one, other), count in self.shared.items()],
            "unknown": dict(self.unhashed),
        }


def count_overlaps(indexes: Sequence[ShardIndex]) -> Overlaps:
    """Count the photographs that any two splits of some shard sets share."""
    # All photographs, each once, and the splits that each is in.
    images = [image for index in indexes for image in index.images]
    photos, which = distinct_photos([_describe(image) for image in images])
    names = sorted({_split_name(ref) for image in images for ref in image.refs})
    number_of = {name: number for number, name in enumerate(names)}
    member = np.zeros((len(photos), len(names)), bool)
    image_ids = np.zeros(member.shape, np.int64)
    for row, image in zip(which, images):
        for ref in image.refs:
            split = number_of[_split_name(ref)]
            member[row, split] = True
            image_ids[row, split] = image.image_id

    # For each photograph, the splits in which it is seen, and in which row.
    seen = member.copy()
    seen_as = np.where(member, np.arange(len(photos))[:, None], -1)
    for rows, columns in matching_pairs(photos, photos):
        for split in range(len(names)):
            hits = member[columns, split]
            seen[rows[hits], split] = True
            seen_as[rows[hits], split] = columns[hits]

    shared: dict[tuple[str, str], int] = {}
    examples: dict[tuple[str, str], tuple[int, int]] = {}
    for one_no, one in enumerate(names):
        for other_no, other in enumerate(names):
            both = np.flatnonzero(member[:, other_no] & seen[:, one_no])
            if one != other and len(both):
                shared[one, other] = len(both)
                seen_in_one = seen_as[both[0], one_no]
                examples[one, other] = (
                    int(image_ids[seen_in_one, one_no]),
                    int(image_ids[both[0], other_no]),
                )

    unhashed = (member & ~photos.hashed[:, None]).sum(0)
    return Overlaps(
        sizes={name: int(size) for name, size in zip(names, member.sum(0))},
        shared=shared,
        unhashed={name: int(count) for name, count in zip(names, unhashed) if count},
        examples=examples,
    )


def _why_unknown(scored: Photos, trained: Photos) -> str:
    """Say which photographs have no hashes, and what to do."""
    without = []
    if not scored.hashed.all():
        without.append("the scored shards")
    if not trained.hashed.all():
        without.append("the shards of the training")
    return (
        f"An early version packed {' and '.join(without)} without hashes of the photographs. "
        f"{_PACK_AGAIN}; `coupalign verify --leaks` then compares them"
    )


def _held_out_photos(
    config: DataConfig, train: Sequence[ShardIndex], evaluate: Sequence[ShardIndex]
) -> dict[str, Photos]:
    """Collect the photographs that may be reported, by "set split"."""
    held_out: dict[str, list[ImageEntry]] = defaultdict(list)

    # What data.evaluate names.
    for source, index in zip(config.evaluate, evaluate, strict=True):
        for image in index.images:
            for ref in image.refs:
                if matches_source(source, ref.set, ref.split):
                    held_out[_split_name(ref)].append(image)

    # Every split except train of each set that is trained on.
    for source, index in zip(config.train, train, strict=True):
        sets = set()
        for image in index.images:
            sets |= {ref.set for ref in image.refs if matches_source(source, ref.set, ref.split)}

        for image in index.images:
            for ref in image.refs:
                if ref.set in sets and ref.split != "train":
                    held_out[_split_name(ref)].append(image)

    photos = {}
    for name, images in held_out.items():
        photos[name], _ = distinct_photos([_describe(image) for image in images])
    return photos


def _photos_of_samples(table: SampleTable) -> tuple[Photos, np.ndarray]:
    """Return the photographs of some samples, and which of them each sample shows; int64 [n]."""
    pairs = np.stack([table.index, table.image], 1)
    images, image_of_sample = np.unique(pairs, axis=0, return_inverse=True)
    described = [_describe(table.indexes[index].images[image]) for index, image in images]
    photos, photo_of_image = distinct_photos(described)
    return photos, photo_of_image[image_of_sample.reshape(-1)]


def _split_name(ref: RefEntry) -> str:
    return f"{ref.set} {ref.split}"


def _describe(image: ImageEntry) -> tuple[PhotoMark | None, str, int, int]:
    """Return what `distinct_photos` needs to know of an image."""
    datasets = [ref.set.partition("/")[0] for ref in image.refs] or [""]
    in_coco = [dataset for dataset in datasets if dataset in COCO]
    return image.photo, (in_coco or datasets)[0], image.image_id, image.jpg[1]
