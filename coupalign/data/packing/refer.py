"""RefCOCO, RefCOCO+, G-Ref and RefShapes annotations in the layout of lichengunc/refer -> Referral records.

    <root>/refcoco/instances.json, refs(unc).p, refs(google).p        one folder a data set; `.json` in place of `.p` works too
    <root>/images/mscoco/images/train2014/COCO_train2014_%012d.jpg    or any other of IMAGE_FOLDERS

The `.p` files are pickles of Python 2. They need no global at all, so none is ever looked up.
"""

from __future__ import annotations

import json
import pickle
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coupalign.data.masks import check_segmentation
from coupalign.errors import InputError

IMAGE_FOLDERS = (  # below the root, tried in this order
    "images/mscoco/images/train2014",  # refer, LAVT, LISA
    "images/train2014",  # CRIS, ReLA, SimREC
    "images/mscoco/images/train2017",
    "images/train2017",
    "train2014",
    "train2017",
)

# (images, refs, sentences) of a full download; None: not published. Sources: tensorflow/datasets `ref_coco` README (images and
# refs), OneRef's merge script (sentences); lichengunc/refer's notebook gives the totals.
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
    "refcocog/google": {"train": (24698, 44822, 85474), "val": (4650, 5000, 9536)},
}


@dataclass(frozen=True)
class Sentence:
    sent_id: int
    raw: str  # as typed
    cleaned: str  # `sent` of the file: lower case, punctuation split off or removed


@dataclass(frozen=True)
class Referral:
    """One object and the sentences that name it. `ref_id` is unique within (dataset, split_by) only."""

    dataset: str
    split_by: str
    split: str
    ref_id: int
    ann_id: int
    image_id: int
    category: str
    file_name: str  # of the image, from instances.json (a ref's own `file_name` is no image)
    height: int  # of the image, pixels
    width: int
    crowd: bool
    same_class: int  # other objects of its category on the image, from all of instances.json, crowds not counted
    segmentation: list | dict
    sentences: tuple[Sentence, ...]


@dataclass(frozen=True)
class FoundImage:
    path: Path
    bytes: int
    mtime_ns: int


def read_set(
    root: Path, dataset: str, split_by: str, folder: str | None = None, skip_missing: bool = False
) -> tuple[list[Referral], list[str]]:
    """Read `<root>/<folder or dataset>/{instances.json, refs(<split_by>).p}`.

    Returns:
        The referrals, sorted by ref_id, and one line for each ref left out because its annotation or image record is missing
        (never any without `skip_missing`).

    Raises:
        InputError: a file is missing, unreadable or holds a global; a ref is malformed, given twice or without its annotation.
            The message names the file, the ref_id and the ann_id.
    """
    place = Path(root) / (folder or dataset)
    file = find_refs(place, split_by)
    refs = read_refs(file)
    instances = place / "instances.json"
    known = _read_instances(instances, {ref.get("ann_id") for ref in refs if isinstance(ref, dict)})
    referrals: dict[int, Referral] = {}
    missing: list[str] = []
    for ref in refs:
        try:
            gap = _gap(ref, known)
            if gap is None:
                referral = _referral(ref, dataset, split_by, known)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            reason = f"has no {error}" if isinstance(error, KeyError) else str(error)
            raise InputError(f"{file}: ref {_name(ref)}: {reason}") from None
        if gap is not None:
            line = f"{file}: ref {_name(ref)}: {gap} is not in {instances.name}"
            if not skip_missing:
                raise InputError(
                    f"{line}; take {instances.name} and the refs from the same download, or set `missing: skip`"
                )
            missing.append(line)
            continue
        if referral.ref_id in referrals:
            raise InputError(f"{file}: ref_id {referral.ref_id} is given twice")
        referrals[referral.ref_id] = referral
    return [referrals[ref_id] for ref_id in sorted(referrals)], missing


def find_refs(place: Path, split_by: str) -> Path:
    """`refs(<split_by>).p`, or the `.json` of that name.

    Raises:
        InputError: neither is there; names what is.
    """
    for ending in (".p", ".json"):
        if (file := place / f"refs({split_by}){ending}").is_file():
            return file
    if not place.is_dir():
        raise InputError(
            f"{place}: no such folder; `root` of the recipe must hold one folder a data set"
        )
    there = ", ".join(sorted(file.name for file in place.glob("refs(*"))) or "none"
    raise InputError(
        f"{place}: neither refs({split_by}).p nor refs({split_by}).json is here; refs files found: {there}"
    )


def read_refs(file: Path) -> list[dict[str, Any]]:
    """The raw list of refs in a `.p` or `.json` file.

    Raises:
        InputError: not a list, not readable, or a pickle that asks for a global (which is named and never looked up).
    """
    try:
        if file.suffix == ".json":
            refs = json.loads(file.read_text(encoding="utf-8"))
        else:
            with open(file, "rb") as stream:
                refs = _NoGlobals(stream, encoding="latin1").load()
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    except Exception as error:  # a broken pickle raises nearly anything
        raise InputError(
            f"{file}: not a readable refs file ({type(error).__name__}: {error}); download it again"
        ) from None
    if not isinstance(refs, list):
        raise InputError(f"{file}: holds a {type(refs).__name__}, not a list of refs")
    return refs


def find_images(
    root: Path, referrals: Iterable[Referral], folder: Path | None = None
) -> tuple[dict[int, FoundImage], dict[int, str]]:
    """Where the image of each referral lies: in `folder`, or in the first of IMAGE_FOLDERS below `root` that has it.

    An image is looked for by its name in instances.json, then as `%012d.jpg`.

    Returns:
        Images found by image_id, and the expected names of those missing by image_id.
    """
    places = [Path(folder)] if folder else [Path(root) / name for name in IMAGE_FOLDERS]
    listings = [
        (place, {entry.name for entry in place.iterdir()}) for place in places if place.is_dir()
    ]
    names = {referral.image_id: referral.file_name for referral in referrals}
    found: dict[int, FoundImage] = {}
    for image_id, name in sorted(names.items()):
        for place, listing in listings:
            here = next(
                (
                    place / n
                    for n in (name, f"{image_id:012d}.jpg")
                    if n in listing and (place / n).is_file()
                ),
                None,
            )
            if here is not None:
                found[image_id] = FoundImage(here, here.stat().st_size, here.stat().st_mtime_ns)
                break
    return found, {
        image_id: name for image_id, name in sorted(names.items()) if image_id not in found
    }


def count_refs(referrals: Iterable[Referral]) -> dict[str, dict[str, dict[str, int]]]:
    """`{"refcoco/unc": {"train": {"images": …, "refs": …, "sentences": …}}}`, splits in the customary order."""
    groups: dict[str, dict[str, list[Referral]]] = {}
    for referral in referrals:
        groups.setdefault(f"{referral.dataset}/{referral.split_by}", {}).setdefault(
            referral.split, []
        ).append(referral)
    return {
        name: {
            split: {
                "images": len({r.image_id for r in splits[split]}),
                "refs": len(splits[split]),
                "sentences": sum(len(r.sentences) for r in splits[split]),
            }
            for split in sorted(splits, key=split_order)
        }
        for name, splits in sorted(groups.items())
    }


def split_order(split: str) -> tuple[int, str]:
    """A key that sorts train, val, testA, testB, test, then the rest by name."""
    known = ("train", "val", "testA", "testB", "test")
    return (known.index(split) if split in known else len(known), split)


def differences(counts: Mapping[str, Mapping[str, Mapping[str, int]]]) -> list[str]:
    """A line with both numbers for each split whose counts are not the published ones; sets nobody published are passed over."""
    lines = []
    for name, splits in counts.items():
        for split, published in PUBLISHED.get(name, {}).items():
            here = [splits.get(split, {}).get(what, 0) for what in ("images", "refs", "sentences")]
            if any(
                expected is not None and got != expected for got, expected in zip(here, published)
            ):
                counted = f"{here[0]:,} images, {here[1]:,} refs, {here[2]:,} sentences"
                lines.append(f"{name} {split}: {counted}; published: {_triple(published)}")
    return lines


def counts_table(counts: Mapping[str, Mapping[str, Mapping[str, int]]]) -> str:
    """The counts as a table, with the published ones beside them where there are any."""
    rows = [("set", "split", "images", "refs", "sentences", "published")]
    for name, splits in counts.items():
        for split, here in splits.items():
            published = PUBLISHED.get(name, {}).get(split)
            rows.append(
                (
                    name,
                    split,
                    f"{here['images']:,}",
                    f"{here['refs']:,}",
                    f"{here['sentences']:,}",
                    _triple(published) if published else "-",
                )
            )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    )


# -------------------------------------------------------------------------------------------------- the small print


class _NoGlobals(pickle.Unpickler):
    """Plain data only: a pickle that names a global is not a refs file, and looking it up could run anything."""

    def find_class(self, module: str, name: str) -> Any:
        raise InputError(
            f"the pickle asks for the global {module}.{name}; refs files hold plain lists and dicts only, so this "
            "one was damaged or made to run code; it was not loaded"
        )

    def persistent_load(self, pid: Any) -> Any:
        raise InputError(f"the pickle asks for the outside object {pid!r}; it was not loaded")


@dataclass(frozen=True)
class _Instances:
    images: dict[int, dict]
    annotations: dict[int, dict]  # those that refs speak of
    categories: dict[int, str]
    objects: Counter[tuple[int, int]]  # by image and category, crowds not counted


def _read_instances(file: Path, wanted: set[Any]) -> _Instances:
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
        return _Instances(
            images={image["id"]: image for image in tree["images"]},
            annotations={
                found["id"]: found for found in tree["annotations"] if found["id"] in wanted
            },
            categories={category["id"]: category["name"] for category in tree["categories"]},
            objects=Counter(
                (found["image_id"], found["category_id"])
                for found in tree["annotations"]
                if not found.get("iscrowd", 0)
            ),
        )
    except FileNotFoundError:
        raise InputError(
            f"{file}: no such file; it comes with the refs files of the same download"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{file}: not a COCO instances file ({type(error).__name__}: {error})"
        ) from None


def _gap(ref: Mapping[str, Any], known: _Instances) -> str | None:
    if ref["ann_id"] not in known.annotations:
        return f"annotation ann_id {ref['ann_id']}"
    if ref["image_id"] not in known.images:
        return f"image_id {ref['image_id']}"
    return None


def _referral(ref: Mapping[str, Any], dataset: str, split_by: str, known: _Instances) -> Referral:
    image, found = known.images[ref["image_id"]], known.annotations[ref["ann_id"]]
    if found["image_id"] != ref["image_id"]:
        raise ValueError(
            f"its annotation is on image {found['image_id']}, the ref on {ref['image_id']}"
        )
    if found["category_id"] not in known.categories:
        raise ValueError(f"category_id {found['category_id']} is not in instances.json")
    check_segmentation(found["segmentation"], image["height"], image["width"])
    sentences = tuple(
        Sentence(int(s["sent_id"]), _repair(s.get("raw", s["sent"])), _repair(s["sent"]))
        for s in ref["sentences"]
    )
    if not sentences:
        raise ValueError("it has no sentences")
    crowd = bool(found.get("iscrowd", 0))
    return Referral(
        dataset=dataset,
        split_by=split_by,
        split=str(ref["split"]),
        ref_id=int(ref["ref_id"]),
        ann_id=int(ref["ann_id"]),
        image_id=int(ref["image_id"]),
        category=known.categories[found["category_id"]],
        file_name=Path(image["file_name"]).name,
        height=int(image["height"]),
        width=int(image["width"]),
        crowd=crowd,
        same_class=known.objects[ref["image_id"], found["category_id"]] - (not crowd),
        segmentation=found["segmentation"],
        sentences=sentences,
    )


def _repair(text: str) -> str:
    """Python 2 wrote UTF-8 bytes, which latin1 read one by one; texts that were never that stay as they are."""
    try:
        return text.encode("latin1").decode("utf-8")
    except UnicodeError:
        return text


def _triple(published: tuple[int, int, int | None]) -> str:
    return " / ".join("?" if number is None else f"{number:,}" for number in published)


def _name(ref: Any) -> str:
    if not isinstance(ref, Mapping):
        return f"{ref!r:.60}"
    return (
        f"ref_id {ref.get('ref_id')} (ann_id {ref.get('ann_id')}, image_id {ref.get('image_id')})"
    )
