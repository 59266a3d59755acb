"""Read what the refs need of an instances.json: images, annotations and categories by their ids."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coupalign.data.packing.fields import field, read_flag, read_number, read_text
from coupalign.errors import InputError, quoted
from coupalign.files import parse_strict_json

WHAT = "the COCO instances file from the same download as the refs"


@dataclass(frozen=True)
class Instances:
    """What the refs need of an instances.json.

    Attributes:
        file: where it was read.
        images: all records.
        annotations: the records that a ref names.
        categories: their names.
        objects: how many objects there are per (image, category), over all annotations. Crowds are
            not objects.
        crowds_only: categories of which every annotation is a crowd, and there are several. Then
            `iscrowd` says nothing: CVAT sets it for every mask that was painted.
    """

    file: Path
    images: dict[int, dict[str, Any]]
    annotations: dict[int, dict[str, Any]]
    categories: dict[int, str]
    objects: Counter[tuple[int, int]]
    crowds_only: frozenset[int]


def read_instances(file: Path, ann_ids: set[int]) -> Instances:
    """Read an instances.json.

    Args:
        ann_ids: the annotations that the refs name. A full file has far more.

    Raises:
        InputError: the file is missing, is not JSON, has an id twice, or a record is malformed.
    """
    try:
        tree = parse_strict_json(file.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{file}: no such file; expected {WHAT}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be read as {WHAT} ({error})") from None

    try:
        return _read_tree(file, tree, ann_ids)
    except ValueError as error:
        raise InputError(f"{file}: {error}") from None


def _read_tree(file: Path, tree: Any, ann_ids: set[int]) -> Instances:
    if type(tree) is not dict:
        raise ValueError(f"not a COCO instances file: it holds {quoted(tree)}, not an object")

    annotations: dict[int, dict[str, Any]] = {}
    objects: Counter[tuple[int, int]] = Counter()
    objects_of_category: Counter[int] = Counter()
    crowds_of_category: Counter[int] = Counter()
    for ann_id, place, annotation in _numbered(tree, "annotations"):
        if ann_id in ann_ids:
            annotations[ann_id] = annotation
        try:
            image_id = read_number(field(annotation, "image_id"), "image_id")
            category_id = read_number(field(annotation, "category_id"), "category_id")
            is_crowd = read_flag(annotation.get("iscrowd"), "iscrowd")
        except ValueError as error:
            raise ValueError(f"{place} (id {ann_id}): {error}") from None

        if is_crowd:
            crowds_of_category[category_id] += 1
        else:
            objects[image_id, category_id] += 1
            objects_of_category[category_id] += 1

    images = {image_id: image for image_id, _, image in _numbered(tree, "images")}
    categories: dict[int, str] = {}
    for category_id, place, category in _numbered(tree, "categories"):
        try:
            categories[category_id] = read_text(field(category, "name"), "name")
        except ValueError as error:
            raise ValueError(f"{place} (id {category_id}): {error}") from None

    crowds_only = frozenset(
        category_id
        for category_id, crowds in crowds_of_category.items()
        if crowds > 1 and not objects_of_category[category_id]
    )
    return Instances(file, images, annotations, categories, objects, crowds_only)


def _numbered(tree: Mapping[str, Any], name: str) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """List the records of a table as (id, place for messages, record). No id may occur twice."""
    records = tree.get(name)
    if type(records) is not list:
        raise ValueError(
            f"not a COCO instances file: `{name}` is {quoted(records)}, not a list of records"
        )

    seen: set[int] = set()
    for number, record in enumerate(records):
        place = f"{name}[{number}]"
        if type(record) is not dict:
            raise ValueError(f"{place} is {quoted(record)}, not an object")
        try:
            record_id = read_number(field(record, "id"), "id")
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None

        if record_id in seen:
            raise ValueError(
                f"{place}: id {record_id} is used twice; ids must be unique, so that a ref names "
                "one record: export or merge the files again with new ids"
            )
        seen.add(record_id)
        yield record_id, place, record
