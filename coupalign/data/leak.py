"""The leak guard: no photograph may be trained on and scored, in whatever mixture of sets, and every score says whether one was.

RefCOCO, RefCOCO+ and G-Ref are drawn from the same COCO photographs, cut into train and test in different ways: training on one
set's train split shows a model the test photographs of another. A COCO photograph is known by its number in any shard set; one of
another collection by its number and the length of its file.

    <run>/trained_on.json     what a run was trained on; a copy lies in every checkpoint
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from coupalign.config.schema import DataConfig
from coupalign.data.index import ImageEntry, RefEntry, ShardIndex
from coupalign.data.table import SampleTable, wanted
from coupalign.errors import InputError
from coupalign.files import write_json

COCO = ("refcoco", "refcoco+", "refcocog")
TRAINED_ON = "trained_on.json"

Photo = tuple[str, int, int]  # collection, number, bytes of the file (0 in COCO)


@dataclass(frozen=True)
class TrainedOn:
    """What a model has seen.

    Attributes:
        photos: of the training samples, and of what its start was trained on.
        mix: "clean" or "leaky", where the configuration says so.
        weights: a sentence for each pretrained encoder that has seen COCO's objects.
    """

    photos: frozenset[Photo]
    mix: str | None = None
    weights: tuple[str, ...] = ()

    def words(self, scored: Iterable[Photo]) -> str:
        """How far a score on these photographs is to be trusted."""
        scored = set(scored)
        shared = len(scored & self.photos)
        words = (
            f"LEAKY: {shared:,} of {len(scored):,} scored photographs were trained on"
            if shared
            else "none: no scored photograph was trained on"
        )
        return "; ".join([words, *self.weights])

    def after(self, starts: Iterable[Path], weights: Iterable[str] = ()) -> TrainedOn:
        """Of a model that took encoders from these files: what the runs beside whose weights a trained_on.json lies had seen, too.

        Args:
            weights: a sentence for each file that may have seen the test images, as in the attribute.
        """
        known = [self, *filter(None, (read_trained_on(file.parent) for file in starts))]
        mix = "leaky" if any(one.mix == "leaky" for one in known) else self.mix
        told = dict.fromkeys([*(line for one in known for line in one.weights), *weights])
        return TrainedOn(frozenset().union(*(one.photos for one in known)), mix, tuple(told))

    def write(self, folder: Path) -> None:
        """Write <folder>/trained_on.json."""
        collections: dict[str, list[list[int]]] = defaultdict(list)
        for collection, *rest in sorted(self.photos):
            collections[collection].append(rest)
        write_json(
            folder / TRAINED_ON,
            {"mix": self.mix, "weights": list(self.weights), "photos": collections},
        )


def read_trained_on(folder: Path) -> TrainedOn | None:
    """What `TrainedOn.write` wrote; None where there is no such file.

    Raises:
        InputError: the file is damaged.
    """
    file = folder / TRAINED_ON
    if not file.is_file():
        return None
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        photos = frozenset(
            (name, number, size)
            for name, pairs in value["photos"].items()
            for number, size in pairs
        )
        return TrainedOn(photos, value["mix"], tuple(value["weights"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{file}: damaged ({type(error).__name__}: {error}); copy it from another checkpoint of the run"
        ) from None


def guard(
    config: DataConfig,
    table: SampleTable,
    train: Sequence[ShardIndex],
    evaluate: Sequence[ShardIndex],
) -> tuple[SampleTable, list[str]]:
    """Hold the training samples against everything that may be reported.

    Held out is what `data.evaluate` names, and every split but train of each set (a data set and its partition) that is trained on.

    Args:
        table: the training samples; `train` and `evaluate` are the indexes of data.train and data.evaluate, one a source.

    Returns:
        the samples to train on, and lines to print. With `mix: clean` the samples on held-out photographs are dropped.

    Raises:
        InputError: photographs are both, and `data.mix` does not say what to do.
    """
    held: dict[str, set[Photo]] = defaultdict(set)
    for source, index in zip(config.evaluate, evaluate, strict=True):
        _collect(held, index, lambda ref, source=source: wanted(source, ref.set, ref.split))
    for source, index in zip(config.train, train, strict=True):
        sets = {
            ref.set
            for image in index.images
            for ref in image.refs
            if wanted(source, ref.set, ref.split)
        }
        _collect(held, index, lambda ref, sets=sets: ref.set in sets and ref.split != "train")
    own = _photos_of(table)
    leaks = {name: len(photos & set(own)) for name, photos in held.items() if photos & set(own)}
    if not leaks:
        return table, []
    told = "; ".join(
        f"{count:,} of {len(held[name]):,} photographs of {name}"
        for name, count in sorted(leaks.items())
    )
    everything = set().union(*held.values())
    if config.mix == "leaky":
        return table, [
            f"LEAKY, as data.mix says: the training samples show {told}. Every score of this run says so"
        ]
    if config.mix is None:
        raise InputError(
            f"data.train shows photographs that are to be scored: {told}. Set data.mix=clean to leave them out, or "
            "data.mix=leaky to compare with papers that did not; every score then says so"
        )
    kept = np.array([photo not in everything for photo in own])
    if not kept.any():
        raise InputError(
            f"data.mix=clean leaves nothing to train on: all {len(table):,} samples show {told}"
        )
    lost = len({photo for photo in own if photo in everything})
    return table.take(np.flatnonzero(kept)), [
        f"clean mix: {int((~kept).sum()):,} of {len(table):,} training samples on {lost:,} "
        f"photographs were left out, since they show {told}"
    ]


def trained_on(table: SampleTable, mix: str | None, weights: Sequence[str] = ()) -> TrainedOn:
    """What training on these samples shows a model."""
    return TrainedOn(frozenset(_photos_of(table)), mix, tuple(weights))


def scored_photos(table: SampleTable) -> set[Photo]:
    """The photographs of some samples."""
    return set(_photos_of(table))


@dataclass(frozen=True)
class Overlaps:
    """How many photographs any two splits share. `sizes` by "set split"; `shared` by pairs of those, where there are any."""

    sizes: Mapping[str, int]
    shared: Mapping[tuple[str, str], int]

    def table(self) -> str:
        """The photographs of each split, and a line for each train split and each split that it leaks into."""
        trains = [name for name in self.sizes if name.endswith(" train")]
        lines = [
            f"{'trained on':<28}{'scored on':<28}{'photographs of both':>22}{'share of the scored':>22}"
        ]
        for train in trains:
            for other, size in self.sizes.items():
                if other not in trains and (both := self.shared.get((train, other))):
                    lines.append(f"{train:<28}{other:<28}{both:>22,}{both / size:>22.1%}")
        if len(lines) == 1:
            lines = ["no photograph of a train split is in another split"]
        return "\n".join(
            [
                "",
                *(f"{name:<28}{size:>10,} photographs" for name, size in self.sizes.items()),
                "",
                *lines,
            ]
        )

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "photographs": dict(self.sizes),
            "shared": [[a, b, count] for (a, b), count in self.shared.items()],
        }


def overlaps(indexes: Sequence[ShardIndex]) -> Overlaps:
    """Count the photographs that any two splits of some shard sets share."""
    splits: dict[str, set[Photo]] = defaultdict(set)
    for index in indexes:
        _collect(splits, index, lambda _: True)
    names = sorted(splits)
    shared = {
        (a, b): len(splits[a] & splits[b])
        for a in names
        for b in names
        if a != b and splits[a] & splits[b]
    }
    return Overlaps({name: len(splits[name]) for name in names}, shared)


def _collect(
    into: dict[str, set[Photo]], index: ShardIndex, chosen: Callable[[RefEntry], bool]
) -> None:
    """Add the photographs of the chosen refs, by "set split"."""
    for image in index.images:
        for ref in image.refs:
            if chosen(ref):
                into[f"{ref.set} {ref.split}"].add(_photo(image, ref))


def _photos_of(table: SampleTable) -> list[Photo]:
    """The photograph of each sample."""
    images = (table.indexes[index].images[image] for index, image in zip(table.index, table.image))
    return [_photo(image, image.refs[ref]) for image, ref in zip(images, table.ref)]


def _photo(image: ImageEntry, ref: RefEntry) -> Photo:
    dataset = ref.set.partition("/")[0]
    return (
        ("coco", image.image_id, 0) if dataset in COCO else (dataset, image.image_id, image.jpg[1])
    )
