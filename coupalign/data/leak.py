"""The leak guard: no photograph may be both trained on and scored, and every score says if one was.

RefCOCO, RefCOCO+ and G-Ref are drawn from the same COCO photographs, cut into train and test in
different ways. So the train split of one set shows a model the test photographs of another.

A COCO photograph is identified by its COCO image id, in any shard set. A photograph of another
collection is identified by its image id and the length of its file.

    <run>/trained_on.json     the photographs a run was trained on; every checkpoint has a copy
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from coupalign.config.schema import DataConfig
from coupalign.data.index import ImageEntry, RefEntry, ShardIndex
from coupalign.data.table import SampleTable, matches_source
from coupalign.errors import InputError
from coupalign.files import read_json, write_json

COCO = ("refcoco", "refcoco+", "refcocog")
TRAINED_ON = "trained_on.json"

Photo = tuple[str, int, int]  # collection, image id, bytes of the file (0 in COCO)

# data.leaks -> its name in trained_on.json, which is that of an earlier version.
MIX = {"refuse": None, "exclude": "clean", "allow": "leaky"}


@dataclass(frozen=True)
class TrainedOn:
    """What a model has seen.

    Attributes:
        photos: those of the training samples, and those that its initial weights were trained on.
        mix: what was done about leaks: "clean" (excluded), "leaky" (allowed) or None (refused).
        weights: a sentence for each pretrained encoder that has seen COCO's objects.
    """

    photos: frozenset[Photo]
    mix: str | None = None
    weights: tuple[str, ...] = ()

    @classmethod
    def from_table(cls, table: SampleTable, leaks: str) -> TrainedOn:
        """Collect the photographs of the training samples; `leaks` is data.leaks."""
        return cls(frozenset(photos_of(table)), MIX[leaks])

    def leak_message(self, scored: Iterable[Photo]) -> str:
        """Say how many of the scored photographs the model has seen; printed with every score."""
        scored = set(scored)
        shared = len(scored & self.photos)

        if shared:
            message = f"LEAKY: {shared:,} of {len(scored):,} scored photographs were trained on"
        else:
            message = "none: no scored photograph was trained on"
        return "; ".join([message, *self.weights])

    def including(self, starts: Iterable[Path], weights: Iterable[str] = ()) -> TrainedOn:
        """Add what the initial weights of this model have seen.

        Args:
            starts: the weight files. Next to one that a run of ours wrote is a trained_on.json.
            weights: a sentence for each file that may have seen the test images.
        """
        photos, mix = self.photos, self.mix
        sentences = list(self.weights)
        for file in starts:
            earlier = read_trained_on(file.parent)
            if earlier is not None:
                photos |= earlier.photos
                sentences += earlier.weights
                if earlier.mix == "leaky":
                    mix = "leaky"

        without_repeats = dict.fromkeys([*sentences, *weights])
        return TrainedOn(photos, mix, tuple(without_repeats))

    def write(self, folder: Path) -> None:
        """Write <folder>/trained_on.json."""
        collections: dict[str, list[list[int]]] = defaultdict(list)
        for collection, *identity in sorted(self.photos):
            collections[collection].append(identity)

        record = {"mix": self.mix, "weights": list(self.weights), "photos": collections}
        write_json(folder / TRAINED_ON, record)


def read_trained_on(folder: Path) -> TrainedOn | None:
    """Read <folder>/trained_on.json. Returns None if there is no such file.

    Raises:
        InputError: the file is damaged.
    """
    file = folder / TRAINED_ON
    if not file.is_file():
        return None

    record = read_json(file, "the photographs of a training run; each checkpoint has a copy")
    try:
        photos = frozenset(
            (collection, image_id, size)
            for collection, identities in record["photos"].items()
            for image_id, size in identities
        )
        return TrainedOn(photos, record["mix"], tuple(record["weights"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{file}: damaged ({type(error).__name__}: {error}). "
            "Copy it from another checkpoint of the run"
        ) from None


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
    photos = _photo_of_each_sample(table)

    # Count the photographs that are both trained on and held out, by split.
    trained = set(photos)
    shared = {name: len(split & trained) for name, split in held_out.items() if split & trained}
    if not shared:
        return table, []
    overlap = "; ".join(
        f"{count:,} of {len(held_out[name]):,} photographs of {name}"
        for name, count in sorted(shared.items())
    )

    if config.leaks == "refuse":
        raise InputError(
            f"data.train shows photographs that are to be scored: {overlap}. Set "
            "data.leaks=exclude to leave them out. Or set data.leaks=allow to compare with papers "
            "that train on them; every score then says so"
        )
    if config.leaks == "allow":
        return table, [
            f"LEAKY, because data.leaks=allow: the training samples show {overlap}. "
            "Every score of this run says so"
        ]

    # Leave out every sample on a held-out photograph.
    forbidden = set().union(*held_out.values())
    kept = np.array([photo not in forbidden for photo in photos])
    if not kept.any():
        raise InputError(
            f"data.leaks=exclude leaves nothing to train on: all {len(table):,} samples show "
            f"{overlap}. Name other sources in data.train or data.evaluate"
        )
    return table.take(np.flatnonzero(kept)), [
        f"data.leaks=exclude: {int((~kept).sum()):,} of {len(table):,} training samples on "
        f"{len(trained & forbidden):,} photographs were left out, because they show {overlap}"
    ]


def photos_of(table: SampleTable) -> set[Photo]:
    """Return the photographs of some samples."""
    return set(_photo_of_each_sample(table))


@dataclass(frozen=True)
class Overlaps:
    """How many photographs any two splits share.

    Attributes:
        sizes: the photographs of each split, by "set split".
        shared: the photographs in both splits of a pair. Pairs that share none are left out.
    """

    sizes: Mapping[str, int]
    shared: Mapping[tuple[str, str], int]

    def table(self) -> str:
        """Tabulate the photographs of each split, then which train split leaks into which split."""
        sizes = [(name, f"{size:,} photographs") for name, size in self.sizes.items()]

        leaks = []
        for (trained, scored), count in self.shared.items():
            if trained.endswith(" train") and not scored.endswith(" train"):
                share = f"{count / self.sizes[scored]:.1%}"
                leaks.append((trained, scored, f"{count:,}", share))

        if not leaks:
            below = "no photograph of a train split is in another split"
        else:
            below = tabulate(
                leaks,
                headers=("trained on", "scored on", "photographs of both", "share of the scored"),
                tablefmt="plain",
                disable_numparse=True,
                colalign=("left", "left", "right", "right"),
            )
        above = tabulate(sizes, tablefmt="plain", disable_numparse=True, colalign=("left", "right"))
        return f"\n{above}\n\n{below}"

    def to_json(self) -> dict[str, Any]:
        """Return the same, for `--json`."""
        return {
            "photographs": dict(self.sizes),
            "shared": [[one, other, count] for (one, other), count in self.shared.items()],
        }


def count_overlaps(indexes: Sequence[ShardIndex]) -> Overlaps:
    """Count the photographs that any two splits of some shard sets share."""
    splits: dict[str, set[Photo]] = defaultdict(set)
    for index in indexes:
        for image in index.images:
            for ref in image.refs:
                splits[_split_name(ref)].add(_photo(image, ref))

    names = sorted(splits)
    shared: dict[tuple[str, str], int] = {}
    for one in names:
        for other in names:
            count = len(splits[one] & splits[other])
            if one != other and count:
                shared[one, other] = count
    return Overlaps({name: len(splits[name]) for name in names}, shared)


def _held_out_photos(
    config: DataConfig, train: Sequence[ShardIndex], evaluate: Sequence[ShardIndex]
) -> dict[str, set[Photo]]:
    """Collect the photographs that may be reported, by "set split"."""
    held_out: dict[str, set[Photo]] = defaultdict(set)

    # What data.evaluate names.
    for source, index in zip(config.evaluate, evaluate, strict=True):
        for image in index.images:
            for ref in image.refs:
                if matches_source(source, ref.set, ref.split):
                    held_out[_split_name(ref)].add(_photo(image, ref))

    # Every split except train of each set that is trained on.
    for source, index in zip(config.train, train, strict=True):
        sets = set()
        for image in index.images:
            sets |= {ref.set for ref in image.refs if matches_source(source, ref.set, ref.split)}

        for image in index.images:
            for ref in image.refs:
                if ref.set in sets and ref.split != "train":
                    held_out[_split_name(ref)].add(_photo(image, ref))

    return held_out


def _photo_of_each_sample(table: SampleTable) -> list[Photo]:
    photos = []
    for index, image_no, ref_no in zip(table.index, table.image, table.ref):
        image = table.indexes[index].images[image_no]
        photos.append(_photo(image, image.refs[ref_no]))
    return photos


def _split_name(ref: RefEntry) -> str:
    return f"{ref.set} {ref.split}"


def _photo(image: ImageEntry, ref: RefEntry) -> Photo:
    """Identify a photograph across shard sets."""
    dataset = ref.set.partition("/")[0]
    if dataset in COCO:
        return ("coco", image.image_id, 0)
    return (dataset, image.image_id, image.jpg[1])
