"""Read RefCOCO, RefCOCO+, G-Ref and RefShapes annotations in the layout of lichengunc/refer.

    <root>/refcoco/instances.json      COCO annotations; one folder per data set
    <root>/refcoco/refs(unc).p         the refs of one partition, as a pickle …
    <root>/refcoco/refs(unc).json      … or as JSON

The `.p` files are pickles of Python 2. They contain plain data only, so the reader refuses to look
up any global.

Files of other makers are read too: gRefCOCO's refs with several objects, sentences as plain texts,
ids as texts.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coupalign.data.masks import check_segmentation, check_size
from coupalign.data.packing.fields import (
    field,
    read_box,
    read_flag,
    read_number,
    read_positive,
    read_text,
)
from coupalign.data.packing.instances import Instances, read_instances
from coupalign.data.records import UNKNOWN
from coupalign.errors import InputError, quoted
from coupalign.files import parse_strict_json

NO_TARGET = -1  # in gRefCOCO's lists of ann_ids

# Files and options are named after splits.
_SPLIT = re.compile(r"[\w+-][\w.+-]{0,99}")

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
    ann_id: int | tuple[int, ...]  # several: the ref is about all of these objects
    image_id: int
    category: str  # several objects of different categories: their names, joined with commas
    file_name: str  # of the image, from instances.json (a ref's own `file_name` is not an image)
    height: int  # of the image, pixels
    width: int
    crowd: bool
    same_class: int  # other objects of its category in the image, without crowds; or UNKNOWN
    segmentation: list | dict
    sentences: tuple[Sentence, ...]
    # What the annotation says about its mask; None: nothing, or there are several annotations.
    stated_area: float | None = None
    stated_box: tuple[float, float, float, float] | None = None


class NoTarget(ValueError):
    """A ref is about no object, as some of gRefCOCO are."""


def read_annotation_set(
    root: Path, dataset: str, split_by: str, folder: str | None = None, skip_missing: bool = False
) -> tuple[list[Referral], list[str]]:
    """Read `refs(<split_by>)` and `instances.json` in the folder `<root>/<folder or dataset>`.

    Returns:
        The referrals, sorted by ref_id, and one line for each ref that was skipped because it has
        no target, or its annotation or image record is missing (only with `skip_missing`).

    Raises:
        InputError: a file is missing or unreadable, or its pickle asks for a global; a ref is
            malformed, listed twice or without its annotation. The message names the file, the
            ref_id and the ann_id.
    """
    directory = Path(root) / (folder or dataset)
    refs_file = find_refs_file(directory, split_by)
    refs = read_refs_file(refs_file)
    instances = read_instances(directory / "instances.json", _named_annotations(refs))

    referrals: dict[int, Referral] = {}
    skipped: list[str] = []
    for ref in refs:
        # Any error in here is a mistake in the files: say in which ref.
        missing = remedy = referral = None
        try:
            missing = _missing_record(ref, instances)
            remedy = "use instances.json and the refs from the same download"
            if not missing:
                referral = _match(ref, dataset, split_by, instances)
        except NoTarget as error:
            missing, remedy = str(error), "a ref without an object cannot be packed: remove it"
        except ValueError as error:
            raise InputError(f"{refs_file}: {_identify(ref)}: {error}") from None

        if referral is None:
            skipped.append(f"{refs_file}: {_identify(ref)}: {missing}")
            if not skip_missing:
                raise InputError(f"{skipped[-1]}; {remedy}, or set `missing: skip`")
        elif referral.ref_id in referrals:
            raise InputError(f"{refs_file}: ref_id {referral.ref_id} is listed twice")
        else:
            referrals[referral.ref_id] = referral
    return [referrals[ref_id] for ref_id in sorted(referrals)], skipped


# --------------------------------------------------------------------------------------- Reading


def find_refs_file(directory: Path, split_by: str) -> Path:
    """Return the path of `refs(<split_by>).p`, or of the `.json` with that name.

    Raises:
        InputError: neither file exists, and the message lists the refs files that do; or both do.
    """
    candidates = [directory / f"refs({split_by}){suffix}" for suffix in (".p", ".json")]
    found = [file for file in candidates if file.is_file()]
    if len(found) > 1:
        raise InputError(
            f"{directory}: has both {found[0].name} and {found[1].name}, which may differ; "
            "rename or remove the one that is not to be packed"
        )
    if found:
        return found[0]

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


def read_refs_file(file: Path) -> list[Any]:
    """Read the list of refs in a `.p` or `.json` file, as it is.

    Raises:
        InputError: the file is unreadable, not a list, or a pickle that asks for a global. The
            message names the global, which is never looked up.
    """
    try:
        data = file.read_bytes()
        refs = parse_strict_json(data) if file.suffix == ".json" else _read_pickle(data)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    except Exception as error:  # a broken pickle can raise nearly anything
        reason = str(error).partition("\n")[0][:200]
        raise InputError(
            f"{file}: not a readable refs file ({type(error).__name__}: {reason}); "
            "download it again"
        ) from None

    if not isinstance(refs, list):
        raise InputError(f"{file}: contains a {type(refs).__name__}, not a list of refs")
    if not refs:
        raise InputError(f"{file}: the list of refs is empty")
    return refs


def _read_pickle(data: bytes) -> Any:
    return _PlainDataUnpickler(io.BytesIO(data), encoding="latin1").load()


class _PlainDataUnpickler(pickle._Unpickler):
    """Load lists, dicts with plain keys, texts and numbers only.

    A pickle that names a global is not a refs file, and looking the global up could run any code.

    The base is the unpickler that is written in Python. The one in C is twice as fast, but an
    object with a high number makes it fill the memory, and a deeply nested key ends the process.
    """

    dispatch = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        raise InputError(
            f"the pickle asks for the global {quoted(f'{module}.{name}')}; refs files contain "
            "plain lists and dicts only, so this one is damaged or malicious; it was not loaded"
        )

    def get_extension(self, code: int) -> Any:
        raise InputError(f"the pickle asks for the extension {code}; it was not loaded")

    def persistent_load(self, pid: Any) -> Any:
        raise InputError(f"the pickle asks for the external object {quoted(pid)}; not loaded")

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append(_dict_of(items))

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.stack[-1].update(_dict_of([key, value]))

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self.stack[-1].update(_dict_of(items))

    def load_frozenset(self) -> None:
        raise InputError("the pickle holds a set; refs files contain lists and dicts only")

    dispatch[pickle.DICT[0]] = load_dict
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.FROZENSET[0]] = dispatch[pickle.ADDITEMS[0]] = load_frozenset


def _dict_of(items: Sequence[Any]) -> dict[str | int, Any]:
    """Make a dict of keys and values in turn. A key that is nested cannot be hashed safely."""
    for key in items[::2]:
        if type(key) not in (str, int):
            raise InputError(f"the pickle has a dict with the key {quoted(key)}, which is no text")
    return dict(zip(items[::2], items[1::2], strict=True))


# ---------------------------------------------------------------------------------- Fields of refs


def _named_annotations(refs: Sequence[Any]) -> set[int]:
    """List the annotations that the refs name, as far as they can be read."""
    named: set[int] = set()
    for ref in refs:
        try:
            named.update(_read_ann_ids(ref))
        except ValueError:
            continue  # `_match` says what is wrong with it
    return named


def _read_ann_ids(ref: Any) -> tuple[int, ...]:
    """Read the annotations of a ref: one number, or gRefCOCO's list.

    Raises:
        NoTarget: it has none.
        ValueError: they are something else.
    """
    if not isinstance(ref, Mapping):
        raise ValueError("it is not an object with fields")

    value = field(ref, "ann_id")
    values = value if isinstance(value, list) else [value]
    if value in (NO_TARGET, "-1", [], [NO_TARGET], ["-1"]):
        raise NoTarget("it has no target")

    ann_ids = (read_number(each, "ann_id") for each in values)
    return tuple(dict.fromkeys(ann_ids))


def _missing_record(ref: Any, instances: Instances) -> str | None:
    """Name the annotation or image of a ref that instances.json does not have."""
    for ann_id in _read_ann_ids(ref):
        if ann_id not in instances.annotations:
            return f"annotation ann_id {ann_id} is not in instances.json"
    image_id = read_number(field(ref, "image_id"), "image_id")
    if image_id not in instances.images:
        return f"image_id {image_id} is not in instances.json"
    return None


# -------------------------------------------------------------------------------------- Matching


def _match(ref: Mapping[str, Any], dataset: str, split_by: str, instances: Instances) -> Referral:
    """Join a ref with its annotations and its image, and check that they fit together."""
    ann_ids = _read_ann_ids(ref)
    image_id = read_number(field(ref, "image_id"), "image_id")
    annotations = [instances.annotations[ann_id] for ann_id in ann_ids]

    image = instances.images[image_id]
    height = read_number(field(image, "height"), "height")
    width = read_number(field(image, "width"), "width")
    check_size(height, width)

    # A mask of another image, or one that pycocotools would misread, must not be packed.
    parts: list[Any] = []
    category_ids: list[int] = []
    for ann_id, annotation in zip(ann_ids, annotations):
        on_image = read_number(annotation["image_id"], "image_id")
        if on_image != image_id:
            raise ValueError(
                f"its annotation {ann_id} is on image {on_image}, the ref on {image_id}"
            )
        category_id = read_number(annotation["category_id"], "category_id")
        if category_id not in instances.categories:
            raise ValueError(f"category_id {category_id} is not in instances.json")
        category_ids.append(category_id)

        segmentation = field(annotation, "segmentation")
        check_segmentation(segmentation, height, width)
        parts += segmentation if isinstance(segmentation, list) else [segmentation]

    split = read_text(field(ref, "split"), "split")
    if not _SPLIT.fullmatch(split):
        raise ValueError(f"`split` is {quoted(split)}; letters, digits, _ . + - can name a split")

    is_crowd = [read_flag(annotation.get("iscrowd"), "iscrowd") for annotation in annotations]
    one = len(annotations) == 1
    categories = dict.fromkeys(instances.categories[number] for number in category_ids)
    return Referral(
        dataset=dataset,
        split_by=split_by,
        split=split,
        ref_id=read_number(field(ref, "ref_id"), "ref_id"),
        ann_id=ann_ids[0] if one else ann_ids,
        image_id=image_id,
        category=", ".join(categories),
        file_name=_read_file_name(image),
        height=height,
        width=width,
        crowd=all(is_crowd),
        same_class=_count_others(image_id, category_ids, is_crowd, instances),
        segmentation=annotations[0]["segmentation"] if one else parts,
        sentences=_read_sentences(ref),
        stated_area=read_positive(annotations[0].get("area")) if one else None,
        stated_box=read_box(annotations[0].get("bbox")) if one else None,
    )


def _count_others(
    image_id: int, category_ids: Sequence[int], is_crowd: Sequence[bool], instances: Instances
) -> int:
    """Count the objects of the same categories on the image that the ref is not about."""
    if not instances.crowds_only.isdisjoint(category_ids):
        return UNKNOWN

    # Crowds are not among the counted objects; any other object is, and does not count itself.
    counted = sum(instances.objects[image_id, category_id] for category_id in set(category_ids))
    return counted - sum(not crowd for crowd in is_crowd)


def _read_file_name(image: Mapping[str, Any]) -> str:
    """Read the path of a picture, relative to the folder of the pictures, with slashes.

    A path that leads elsewhere says nothing about this machine: only its name is kept.
    """
    text = read_text(field(image, "file_name"), "file_name").replace("\\", "/")
    parts = [part for part in text.split("/") if part not in ("", ".")]
    if not parts or "\0" in text:
        raise ValueError(f"`file_name` is {quoted(text)}, which names no file")

    leads_elsewhere = text.startswith("/") or ".." in parts or ":" in parts[0]
    return parts[-1] if leads_elsewhere else "/".join(parts)


def _read_sentences(ref: Mapping[str, Any]) -> tuple[Sentence, ...]:
    records = field(ref, "sentences")
    if not isinstance(records, list):
        raise ValueError(f"`sentences` is {quoted(records)}, not a list")
    if not records:
        raise ValueError("it has no sentences")

    sentences = tuple(_read_sentence(record, number) for number, record in enumerate(records))
    sent_ids = [sentence.sent_id for sentence in sentences]
    if len(set(sent_ids)) < len(sent_ids):
        repeated = next(sent_id for sent_id in sent_ids if sent_ids.count(sent_id) > 1)
        raise ValueError(f"sent_id {repeated} is listed twice")
    return sentences


def _read_sentence(record: Any, number: int) -> Sentence:
    """Read a sentence: an object, or a plain text, which gets its number in the ref as its id."""
    if isinstance(record, str):
        text = _repair_encoding(read_text(record, "sentences"))
        return Sentence(number, raw=text, cleaned=text)
    if not isinstance(record, Mapping):
        raise ValueError(
            f"a sentence is {quoted(record)}; expected a text, or an object with sent and sent_id"
        )

    cleaned = read_text(field(record, "sent"), "sent")
    raw = read_text(record.get("raw", cleaned), "raw")
    sent_id = read_number(field(record, "sent_id"), "sent_id")
    return Sentence(sent_id, _repair_encoding(raw), _repair_encoding(cleaned))


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
        return f"ref {quoted(ref)}"
    ids = f"ann_id {quoted(ref.get('ann_id'))}, image_id {quoted(ref.get('image_id'))}"
    return f"ref_id {quoted(ref.get('ref_id'))} ({ids})"
