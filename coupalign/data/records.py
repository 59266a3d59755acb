"""The record of an image in a shard: one JSON object, see shards/README.md, and its checks.

Whoever reads a record checks what it uses: a disk, a network or another writer may have changed it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from coupalign.data import masks
from coupalign.data.index import ImageEntry, RefEntry
from coupalign.errors import quoted

UNKNOWN = -1  # `same_class` of shards that lack it


def read_record(text: bytes, image: ImageEntry) -> dict[str, Any]:
    """Parse the record of an image and check what concerns the image as a whole.

    Raises:
        ValueError: it is not JSON, or not the record that the index describes.
    """
    try:
        record = json.loads(text)
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None
    if type(record) is not dict:
        raise ValueError(f"the record is {quoted(record)}, not an object")

    image_id = _field(record, "image_id", int)
    if image_id != image.image_id:
        raise ValueError(f"the record is of image {quoted(image_id)}")
    _field(record, "file_name", str)
    refs = _field(record, "refs", list)
    if len(refs) != len(image.refs):
        raise ValueError(f"the record has {len(refs)} refs, the index says {len(image.refs)}")

    masks.check_size(record.get("height"), record.get("width"))
    return record


def check_ref(ref: Any, entry: RefEntry, height: int, width: int) -> None:
    """Check a ref of a record: the types and ranges of its fields, and its mask.

    Args:
        entry: what the index says about it.
        height, width: of its image.

    Raises:
        ValueError: a field is missing or wrong. The message names it.
    """
    if type(ref) is not dict:
        raise ValueError(f"the ref is {quoted(ref)}, not an object")

    # It is the ref that the index describes.
    set_name = f"{_field(ref, 'dataset', str)}/{_field(ref, 'split_by', str)}"
    split, ref_id = _field(ref, "split", str), _field(ref, "ref_id", int)
    if (set_name, split, ref_id) != (entry.set, entry.split, entry.ref_id):
        raise ValueError(
            f"the record is of ref {quoted(ref_id)} in {quoted(set_name)}, split {quoted(split)}; "
            f"the index says ref {entry.ref_id} in {entry.set}, split {entry.split}"
        )

    # Its plain fields.
    _field(ref, "category", str)
    _field(ref, "crowd", bool)
    same_class = ref.get("same_class", UNKNOWN)
    if type(same_class) is not int or same_class < UNKNOWN:
        raise ValueError(f"`same_class` is {quoted(same_class)}, not a number of objects")

    # Its sentences.
    sentences = _field(ref, "sentences", list)
    if len(sentences) != entry.sentences:
        raise ValueError(f"{len(sentences)} sentences, the index says {entry.sentences}")
    for sentence in sentences:
        if type(sentence) is not dict:
            raise ValueError(f"a sentence is {quoted(sentence)}, not an object")
        _field(sentence, "sent_id", int)
        _field(sentence, "raw", str)
        _field(sentence, "sent", str)

    # Its mask.
    rle = _field(ref, "rle", dict)
    if rle.get("size") != [height, width]:
        raise ValueError(
            f"run lengths are of size {quoted(rle.get('size'))}, the image is [{height}, {width}]"
        )
    area, pixels = _field(ref, "area", int), masks.area(rle)
    if area != pixels:
        raise ValueError(f"a mask of {pixels} pixels, `area` says {quoted(area)}")


def _field(record: Mapping[str, Any], name: str, kind: type) -> Any:
    """Return a field, which must have exactly this type."""
    if name not in record:
        raise ValueError(f"it has no field {name!r}")
    value = record[name]
    if type(value) is not kind:
        raise ValueError(f"`{name}` is {quoted(value)}, not {_WORDS[kind]}")
    return value


_WORDS = {int: "a whole number", str: "a text", bool: "true or false", list: "a list"}
_WORDS[dict] = "an object"
