"""Count images, refs and sentences per split, and compare the numbers with the published ones."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from tabulate import tabulate

if TYPE_CHECKING:
    from coupalign.data.index import ImageEntry
    from coupalign.data.packing.refer import Referral

Counts = dict[str, dict[str, dict[str, int]]]  # counts["refcoco/unc"]["train"]["refs"]

COUNTED = ("images", "refs", "sentences")
SPLITS = ("train", "val", "testA", "testB", "test")  # in the order in which they are shown

# (images, refs, sentences) of a full download; None: not published. Sources: the README of
# tensorflow/datasets `ref_coco` (images and refs) and OneRef's merge script (sentences). The
# notebook of lichengunc/refer gives the totals.
PUBLISHED: dict[str, dict[str, tuple[int, int, int | None]]] = {
    "refcoco/unc": {
        "train": (16994, 42404, 120624),
        "val": (1500, 3811, 10834),
        "testA": (750, 1975, 5657),
        "testB": (750, 1810, 5095),
    },
    "refcoco/google": {
        "train": (19213, 40000, None),
        "val": (4559, 5000, None),
        "test": (4527, 5000, None),
    },
    "refcoco+/unc": {
        "train": (16992, 42278, 120191),
        "val": (1500, 3805, 10758),
        "testA": (750, 1975, 5726),
        "testB": (750, 1798, 4889),
    },
    "refcocog/umd": {
        "train": (21899, 42226, 80512),
        "val": (1300, 2573, 4896),
        "test": (2600, 5023, 9602),
    },
    "refcocog/google": {
        "train": (24698, 44822, 85474),
        "val": (4650, 5000, 9536),
    },
}


def count_refs(referrals: Iterable[Referral]) -> Counts:
    """Count the refs of annotation files: `{"refcoco/unc": {"train": {"images": …, …}}}`."""
    return _count(
        (f"{ref.dataset}/{ref.split_by}", ref.split, ref.image_id, len(ref.sentences))
        for ref in referrals
    )


def count_entries(images: Iterable[ImageEntry]) -> Counts:
    """Count the refs of a shard index, in the form of `count_refs`."""
    return _count(
        (ref.set, ref.split, position, ref.sentences)
        for position, image in enumerate(images)
        for ref in image.refs
    )


def _count(refs: Iterable[tuple[str, str, int, int]]) -> Counts:
    """Count refs given as (set name, split, image, number of sentences); splits are sorted."""
    images: defaultdict[tuple[str, str], set[int]] = defaultdict(set)
    ref_counts: Counter[tuple[str, str]] = Counter()
    sentence_counts: Counter[tuple[str, str]] = Counter()
    for name, split, image, sentences in refs:
        images[name, split].add(image)
        ref_counts[name, split] += 1
        sentence_counts[name, split] += sentences

    counts: Counts = {}
    for name, split in sorted(images, key=lambda key: (key[0], split_order(key[1]))):
        counts.setdefault(name, {})[split] = {
            "images": len(images[name, split]),
            "refs": ref_counts[name, split],
            "sentences": sentence_counts[name, split],
        }
    return counts


def split_order(split: str) -> tuple[int, str]:
    """Return a key that sorts train, val, testA, testB, test, then any other split by name."""
    rank = SPLITS.index(split) if split in SPLITS else len(SPLITS)
    return rank, split


def differences_from_published(counts: Mapping[str, Mapping[str, Mapping[str, int]]]) -> list[str]:
    """Return one line for each split whose counts differ from the published ones.

    Each line has both numbers. Sets without published counts are not checked.
    """
    lines = []
    for name, splits in counts.items():
        for split, published in PUBLISHED.get(name, {}).items():
            ours = [splits.get(split, {}).get(kind, 0) for kind in COUNTED]
            pairs = zip(ours, published)
            if any(expected is not None and number != expected for number, expected in pairs):
                counted = f"{ours[0]:,} images, {ours[1]:,} refs, {ours[2]:,} sentences"
                lines.append(f"{name} {split}: {counted}; published: {_published(published)}")
    return lines


def counts_table(counts: Mapping[str, Mapping[str, Mapping[str, int]]]) -> str:
    """Format the counts as a table, with the published ones in the last column."""
    rows = []
    for name, splits in counts.items():
        for split, numbers in splits.items():
            published = PUBLISHED.get(name, {}).get(split)
            shown = [f"{numbers[kind]:,}" for kind in COUNTED]
            rows.append((name, split, *shown, _published(published) if published else "-"))

    return tabulate(
        rows,
        headers=("set", "split", *COUNTED, "published"),
        tablefmt="plain",
        disable_numparse=True,
        colalign=("left", "left", "right", "right", "right", "right"),
    )


def _published(numbers: tuple[int, int, int | None]) -> str:
    return " / ".join("?" if number is None else f"{number:,}" for number in numbers)
