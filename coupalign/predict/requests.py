"""Read what to predict: (image, sentence) pairs from a CSV or JSONL file, or a folder of images."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from coupalign.errors import InputError

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


class Request(NamedTuple):
    """An image and a sentence.

    Attributes:
        source: where the request was read, for messages.
        given: the image as it was named there.
        name: starts the names of the output files.
    """

    source: str
    given: str
    image: Path
    sentence: str
    name: str


def read_requests(path: Path) -> list[Request]:
    """Read (image, sentence) pairs from a .csv or .jsonl file.

    The n-th pair, counted from 1, is named <image stem>-<n>.

    Raises:
        InputError: a column, an image or a sentence is missing. The message names file and line.
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
        case suffix:
            kind = suffix or "a file without suffix"
            raise InputError(f"{path}: pairs are read from .csv or .jsonl, not from {kind}")

    requests = [_request(path, line, row, number) for number, (line, row) in enumerate(rows, 1)]
    if not requests:
        raise InputError(f"{path}: holds no pairs")
    return requests


def folder_requests(folder: Path, sentence: str) -> list[Request]:
    """Pair one sentence with every image of a folder, sorted by name.

    Skips subfolders and hidden files.

    A request is named by its image's stem, or by the whole file name if several share the stem.

    Raises:
        InputError: the folder has no images, or the sentence has no words.
    """
    normalize_sentence(sentence)
    images = sorted(path for path in folder.iterdir() if _is_image(path))
    if not images:
        raise InputError(f"{folder}: holds no images ({', '.join(SUFFIXES)})")

    stems = Counter(image.stem for image in images)
    requests = []
    for image in images:
        name = image.stem if stems[image.stem] == 1 else image.name
        request = Request(
            source=str(image), given=image.name, image=image, sentence=sentence, name=name
        )
        requests.append(request)
    return requests


def normalize_sentence(sentence: str) -> str:
    """Join a sentence into one line without final punctuation, like the data sets' sentences.

    Raises:
        InputError: nothing is left.
    """
    text = " ".join(sentence.split()).rstrip(" .!?,;:")
    if not text:
        raise InputError(f"sentence {sentence!r}: holds no words; say which object is meant")
    return text


def _is_image(path: Path) -> bool:
    hidden = path.name.startswith(".")
    return path.suffix.lower() in SUFFIXES and not hidden and path.is_file()


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    columns = reader.fieldnames or ()
    missing = [name for name in ("image", "sentence") if name not in columns]
    if missing:
        raise InputError(
            f"{path}: line 1: no column {' and '.join(missing)}; "
            f"the columns are {','.join(columns)}"
        )

    for row in reader:
        if None in row:
            raise InputError(
                f"{path}: line {reader.line_num}: more fields than columns; "
                "a sentence with a comma needs quotes"
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
                f"{path}: line {number}: an object with image and sentence is expected, "
                f"found {line.strip()[:40]}"
            )
        yield number, row


def _request(path: Path, line: int, row: dict[str, Any], number: int) -> Request:
    """Check one row of a file of pairs."""
    source = f"{path}: line {line}"
    for name in ("image", "sentence"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise InputError(f"{source}: the {name} is missing")

    given = row["image"].strip()
    image = path.parent / given
    if not image.is_file():
        raise InputError(f"{source}: no such image: {image}")

    try:
        normalize_sentence(row["sentence"])
    except InputError as error:
        raise InputError(f"{source}: {error}") from None

    return Request(
        source=source,
        given=given,
        image=image,
        sentence=row["sentence"],
        name=f"{image.stem}-{number}",
    )
