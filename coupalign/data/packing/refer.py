"""Read RefCOCO, RefCOCO+, G-Ref and RefShapes annotations in the layout of lichengunc/refer.

    <root>/refcoco/instances.json      COCO annotations; one folder per data set
    <root>/refcoco/refs(unc).p         the refs of one partition, as a pickle …
    <root>/refcoco/refs(unc).json      … or as JSON

The `.p` files are pickles of Python 2. They contain plain data only, so the reader refuses to look
up any global.
"""

from __future__ import annotations

import json
import pickle
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coupalign.data.masks import check_segmentation
from coupalign.errors import InputError
from coupalign.files import read_json

# The field names of Sentence and Referral are part of the source fingerprint of a shard set.


@dataclass(frozen=True)
class Sentence:
    sent_id: int
    raw: str  # as typed
    cleaned: str  # `sent` in the file: lower case, punctuation split off or removed


@dataclass(frozen=True, kw_only=True)
class Referral:
    """An object and the sentences that refer to it.

    `ref_id` is unique within (dataset, split_by) only.
    """

    dataset: str
    split_by: str
    split: str
    ref_id: int
    ann_id: int
    image_id: int
    category: str
    file_name: str  # of the image, from instances.json (a ref's own `file_name` is not an image)
    height: int  # of the image, pixels
    width: int
    crowd: bool
    same_class: int  # other objects of its category in the image, without crowds
    segmentation: list | dict
    sentences: tuple[Sentence, ...]


def read_annotation_set(
    root: Path, dataset: str, split_by: str, folder: str | None = None, skip_missing: bool = False
) -> tuple[list[Referral], list[str]]:
    """Read `refs(<split_by>)` and `instances.json` in the folder `<root>/<folder or dataset>`.

    Returns:
        The referrals, sorted by ref_id, and one line for each ref that was skipped because its
        annotation or image record is missing (only with `skip_missing`).

    Raises:
        InputError: a file is missing or unreadable, or its pickle asks for a global; a ref is
            malformed, listed twice or without its annotation. The message names the file, the
            ref_id and the ann_id.
    """
    directory = Path(root) / (folder or dataset)
    refs_file = find_refs_file(directory, split_by)
    refs = read_refs_file(refs_file)
    ann_ids = {ref.get("ann_id") for ref in refs if isinstance(ref, dict)}
    instances = _read_instances(directory / "instances.json", ann_ids)

    referrals: dict[int, Referral] = {}
    skipped: list[str] = []
    for ref in refs:
        # Any error in here is a mistake in the files: say in which ref.
        try:
            missing = _missing_record(ref, instances)
            referral = None if missing else _match(ref, dataset, split_by, instances)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            reason = f"no field {error}" if isinstance(error, KeyError) else str(error)
            raise InputError(f"{refs_file}: {_identify(ref)}: {reason}") from None

        if referral is None:
            skipped.append(f"{refs_file}: {_identify(ref)}: {missing} is not in instances.json")
            if not skip_missing:
                raise InputError(
                    f"{skipped[-1]}; use instances.json and the refs from the same download, "
                    "or set `missing: skip`"
                )
        elif referral.ref_id in referrals:
            raise InputError(f"{refs_file}: ref_id {referral.ref_id} is listed twice")
        else:
            referrals[referral.ref_id] = referral
    return [referrals[ref_id] for ref_id in sorted(referrals)], skipped


# --------------------------------------------------------------------------------------- Reading


def find_refs_file(directory: Path, split_by: str) -> Path:
    """Return the path of `refs(<split_by>).p`, or of the `.json` with that name.

    Raises:
        InputError: neither file exists; the message lists the refs files that do.
    """
    for suffix in (".p", ".json"):
        file = directory / f"refs({split_by}){suffix}"
        if file.is_file():
            return file

    if not directory.is_dir():
        raise InputError(
            f"{directory}: no such folder; `root` in the recipe must contain one folder per "
            "data set"
        )
    existing = ", ".join(sorted(file.name for file in directory.glob("refs(*"))) or "none"
    raise InputError(
        f"{directory}: found neither refs({split_by}).p nor refs({split_by}).json; "
        f"refs files in this folder: {existing}"
    )


def read_refs_file(file: Path) -> list[dict[str, Any]]:
    """Read the list of refs in a `.p` or `.json` file, as it is.

    Raises:
        InputError: the file is unreadable, not a list, or a pickle that asks for a global. The
            message names the global, which is never looked up.
    """
    try:
        if file.suffix == ".json":
            refs = json.loads(file.read_text(encoding="utf-8"))
        else:
            with open(file, "rb") as stream:
                refs = _PlainDataUnpickler(stream, encoding="latin1").load()
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    except Exception as error:  # a broken pickle can raise nearly anything
        raise InputError(
            f"{file}: not a readable refs file ({type(error).__name__}: {error}); download it again"
        ) from None

    if not isinstance(refs, list):
        raise InputError(f"{file}: contains a {type(refs).__name__}, not a list of refs")
    return refs


class _PlainDataUnpickler(pickle.Unpickler):
    """Load lists, dicts, texts and numbers only.

    A pickle that names a global is not a refs file, and looking the global up could run any code.
    """

    def find_class(self, module: str, name: str) -> Any:
        raise InputError(
            f"the pickle asks for the global {module}.{name}; refs files contain plain lists and "
            "dicts only, so this one is damaged or malicious; it was not loaded"
        )

    def persistent_load(self, pid: Any) -> Any:
        raise InputError(f"the pickle asks for the external object {pid!r}; it was not loaded")


@dataclass(frozen=True)
class _Instances:
    """What the refs need of an instances.json."""

    images: dict[int, dict]
    annotations: dict[int, dict]  # those that a ref names
    categories: dict[int, str]
    objects: Counter[tuple[int, int]]  # per (image, category), over all annotations, no crowds


def _read_instances(file: Path, ann_ids: set[Any]) -> _Instances:
    tree = read_json(file, "the COCO instances file from the same download as the refs")
    try:
        # A full file has far more annotations than the refs need: count all, keep those.
        annotations: dict[int, dict] = {}
        objects: Counter[tuple[int, int]] = Counter()
        for annotation in tree["annotations"]:
            if annotation["id"] in ann_ids:
                annotations[annotation["id"]] = annotation
            if not annotation.get("iscrowd", 0):
                objects[annotation["image_id"], annotation["category_id"]] += 1

        images = {image["id"]: image for image in tree["images"]}
        categories = {category["id"]: category["name"] for category in tree["categories"]}
        return _Instances(images, annotations, categories, objects)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{file}: not a COCO instances file ({type(error).__name__}: {error})"
        ) from None


# -------------------------------------------------------------------------------------- Matching


def _missing_record(ref: Mapping[str, Any], instances: _Instances) -> str | None:
    """Name the annotation or image of a ref that instances.json does not have."""
    if ref["ann_id"] not in instances.annotations:
        return f"annotation ann_id {ref['ann_id']}"
    if ref["image_id"] not in instances.images:
        return f"image_id {ref['image_id']}"
    return None


def _match(ref: Mapping[str, Any], dataset: str, split_by: str, instances: _Instances) -> Referral:
    """Join a ref with its annotation and its image, and check that they fit together."""
    image = instances.images[ref["image_id"]]
    annotation = instances.annotations[ref["ann_id"]]
    category_id = annotation["category_id"]

    # A mask of another image, or one that pycocotools would misread, must not be packed.
    if annotation["image_id"] != ref["image_id"]:
        raise ValueError(
            f"its annotation is on image {annotation['image_id']}, the ref on {ref['image_id']}"
        )
    if category_id not in instances.categories:
        raise ValueError(f"category_id {category_id} is not in instances.json")
    check_segmentation(annotation["segmentation"], image["height"], image["width"])

    sentences = tuple(_read_sentence(record) for record in ref["sentences"])
    if not sentences:
        raise ValueError("it has no sentences")

    # Crowds are not among the counted objects; any other object is, and does not count itself.
    crowd = bool(annotation.get("iscrowd", 0))
    objects_of_class = instances.objects[ref["image_id"], category_id]
    same_class = objects_of_class if crowd else objects_of_class - 1
    return Referral(
        dataset=dataset,
        split_by=split_by,
        split=str(ref["split"]),
        ref_id=int(ref["ref_id"]),
        ann_id=int(ref["ann_id"]),
        image_id=int(ref["image_id"]),
        category=instances.categories[category_id],
        file_name=Path(image["file_name"]).name,
        height=int(image["height"]),
        width=int(image["width"]),
        crowd=crowd,
        same_class=same_class,
        segmentation=annotation["segmentation"],
        sentences=sentences,
    )


def _read_sentence(record: Mapping[str, Any]) -> Sentence:
    cleaned = record["sent"]
    raw = record.get("raw", cleaned)
    return Sentence(int(record["sent_id"]), _repair_encoding(raw), _repair_encoding(cleaned))


def _repair_encoding(text: str) -> str:
    """Undo the reading of UTF-8 bytes as latin1, as happens to texts that Python 2 pickled.

    Other texts are not valid UTF-8 when encoded as latin1 and stay as they are.
    """
    try:
        return text.encode("latin1").decode("utf-8")
    except UnicodeError:
        return text


def _identify(ref: Any) -> str:
    """Name a ref for an error message by its ids, as far as it has any."""
    if not isinstance(ref, Mapping):
        return f"ref {ref!r:.60}"
    ids = f"ann_id {ref.get('ann_id')}, image_id {ref.get('image_id')}"
    return f"ref_id {ref.get('ref_id')} ({ids})"
