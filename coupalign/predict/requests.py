"""What a model is to be asked: (image, sentence) pairs from a CSV or JSONL file, or one sentence about all images of a folder."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from coupalign.errors import InputError

ENDINGS = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


class Request(NamedTuple):
    """An image and a sentence.

    `place` says for messages where they were asked for, `given` is the image as it was named there, `name` begins the names of its
    files.
    """

    place: str
    given: str
    image: Path
    sentence: str
    name: str


def read_requests(path: Path) -> list[Request]:
    """Read (image, sentence) pairs from a .csv or .jsonl file; the n-th is named <image stem>-<n>, counted from 1.

    Raises:
        InputError: names the file and the line: a column, an image or a sentence is missing.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    match path.suffix.lower():
        case ".csv":
            rows = _csv_rows(path, text)
        case ".jsonl" | ".ndjson":
            rows = _json_rows(path, text)
        case other:
            raise InputError(
                f"{path}: pairs are read from .csv or .jsonl, not from {other or 'a file without ending'}"
            )
    pairs = [_pair(path, line, row, number) for number, (line, row) in enumerate(rows, 1)]
    if not pairs:
        raise InputError(f"{path}: holds no pairs")
    return pairs


def folder_requests(folder: Path, sentence: str) -> list[Request]:
    """One sentence about every image of a folder, in the order of their names; its folders and hidden files are left alone.

    An image is named by its stem, or by its whole file name where others have the same stem.

    Raises:
        InputError: the folder has no images, or the sentence no words.
    """
    tidy(sentence)
    images = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in ENDINGS and not path.name.startswith(".") and path.is_file()
    )
    if not images:
        raise InputError(f"{folder}: holds no images ({', '.join(ENDINGS)})")
    same = Counter(image.stem for image in images)
    return [
        Request(
            str(image),
            image.name,
            image,
            sentence,
            image.stem if same[image.stem] == 1 else image.name,
        )
        for image in images
    ]


def tidy(sentence: str) -> str:
    """One line without the punctuation at its end, which the sentences of the data sets do not have."""
    words = " ".join(sentence.split()).rstrip(" .!?,;:")
    if not words:
        raise InputError(f"sentence {sentence!r}: holds no words; say which object is meant")
    return words


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    columns = reader.fieldnames or ()
    if missing := [name for name in ("image", "sentence") if name not in columns]:
        raise InputError(
            f"{path}: line 1: no column {' and '.join(missing)}; the columns are {','.join(columns)}"
        )
    for row in reader:
        if None in row:
            raise InputError(
                f"{path}: line {reader.line_num}: more fields than columns; a sentence with a comma needs quotes"
            )
        yield reader.line_num, row


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}: line {number}: not valid JSON: {error}") from None
        if not isinstance(row, dict):
            raise InputError(
                f"{path}: line {number}: an object with image and sentence is expected, found {line.strip()[:40]}"
            )
        yield number, row


def _pair(path: Path, line: int, row: dict[str, Any], number: int) -> Request:
    place = f"{path}: line {line}"
    for name in ("image", "sentence"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise InputError(f"{place}: the {name} is missing")
    image = path.parent / row["image"].strip()
    if not image.is_file():
        raise InputError(f"{place}: no such image: {image}")
    try:
        tidy(row["sentence"])
    except InputError as error:
        raise InputError(f"{place}: {error}") from None
    return Request(place, row["image"].strip(), image, row["sentence"], f"{image.stem}-{number}")
