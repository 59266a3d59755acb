"""Read what to predict: (image, sentence) pairs from a CSV or JSONL file, or a folder of images."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from coupalign.data.pictures import open_header
from coupalign.errors import InputError, quoted
from coupalign.files import parse_strict_json

# Endings of picture files. Those of OTHER_SUFFIXES are named as unreadable, not left out.
SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg"),
    *(".png", ".tif", ".tiff", ".webp"),
)
OTHER_SUFFIXES = (
    *(".heic", ".heif", ".hif", ".jp2", ".jxl", ".psd", ".svg", ".tga", ".ico", ".eps"),
    *(".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".rw2"),
)

# Bytes of a name's beginning, so that the names of the output files stay below the 255 that most
# file systems allow.
MAX_NAME = 200

# Final punctuation of a sentence as people type it. The tokens of a data set's own sentences have
# spaces before their punctuation, which is kept, as in evaluation.
_FINAL_PUNCTUATION = re.compile(r"(?<=\w)[.!?,;:]+\s*\Z")


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
    match path.suffix.lower():
        case ".csv":
            rows = _csv_rows(path, _read_text(path))
        case ".jsonl" | ".ndjson":
            rows = _json_rows(path, _read_text(path))
        case suffix:
            kind = suffix or "a file without suffix"
            raise InputError(f"{path}: pairs are read from .csv or .jsonl, not from {kind}")

    requests = [_request(path, line, row, number) for number, (line, row) in enumerate(rows, 1)]
    if not requests:
        raise InputError(f"{path}: holds no pairs")
    return requests


class FolderRequests(NamedTuple):
    """What a folder holds.

    Attributes:
        requests: one per image, sorted by name.
        left_out: names of what is no image: other files and subfolders, sorted.
    """

    requests: list[Request]
    left_out: list[str]


def folder_requests(folder: Path, sentence: str) -> FolderRequests:
    """Pair one sentence with every image of a folder.

    An image is a file with the name or the content of one. Hidden files are ignored.

    A request is named by its image's stem, or by the whole file name if that is the stem of others.

    Raises:
        InputError: the folder cannot be read or has no images, or the sentence has no words.
    """
    normalize_sentence(sentence)
    try:
        paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise InputError(f"{folder}: cannot be read: {error.strerror}") from None

    images = [path for path in paths if _is_image(path)]
    if not images:
        raise InputError(f"{folder}: holds no images ({', '.join(SUFFIXES)})")

    # A stem may also be the name of another file, as of x.jpg and x.jpg.png.
    names = Counter(image.stem for image in images) + Counter(image.name for image in images)
    requests = []
    for image in images:
        name = image.stem if names[image.stem] == 1 else image.name
        request = Request(
            source=str(image),
            given=image.name,
            image=image,
            sentence=sentence,
            name=short_name(name),
        )
        requests.append(request)

    chosen = set(images)
    left_out = [path.name + "/" * path.is_dir() for path in paths if path not in chosen]
    return FolderRequests(requests, left_out)


def normalize_sentence(sentence: str) -> str:
    """Remove the final punctuation that people type, as the makers of the data sets did.

    Nothing else changes: the tokenizer ignores upper case and the width of spaces.

    Raises:
        InputError: it has no words, or a character that is no character.
    """
    try:
        sentence.encode()
    except UnicodeEncodeError:
        raise InputError(
            f"sentence {quoted(sentence)}: holds half a character (a lone surrogate); "
            "write it in UTF-8"
        ) from None

    if not any(character.isalnum() for character in sentence):
        raise InputError(f"sentence {quoted(sentence)}: holds no words; say which object is meant")
    return _FINAL_PUNCTUATION.sub("", sentence).strip()


def short_name(name: str, ending: str = "") -> str:
    """Return a name for output files: `name` and `ending`, in at most MAX_NAME bytes.

    The rest of a longer name becomes a digest, so that different names stay different.
    """
    encoded = os.fsencode(name)
    if len(encoded) + len(ending) <= MAX_NAME:
        return name + ending

    digest = hashlib.sha256(encoded).hexdigest()[:16]
    kept = encoded[: MAX_NAME - len(ending) - len(digest) - 1]
    # The cut may have split a character.
    return kept.decode(errors="ignore") + f"~{digest}{ending}"


def _is_image(path: Path) -> bool:
    """Whether a file is meant to be an image, by its name or by its first bytes."""
    if path.is_dir():
        return False
    if path.suffix.lower() in SUFFIXES + OTHER_SUFFIXES:
        return True

    try:
        with open_header(path):
            return True
    except (OSError, ValueError):
        return False


def _read_text(path: Path) -> str:
    try:
        # Line feeds and carriage returns stay as they are, for the number of a line.
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text in UTF-8: {error}") from None

    before, nul, _ = text.partition("\0")
    if nul:
        line = before.count("\n") + 1
        raise InputError(f"{path}: line {line}: holds a NUL; it is not a text file in UTF-8")
    return text


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    columns: list[str] | None = None
    start = 1
    while True:
        try:
            row = next(lines, None)
        except csv.Error as error:
            raise InputError(
                f"{path}: line {start}: not valid CSV ({error}). Is a quote never closed? "
                'A quote inside a quoted sentence is written twice: ""'
            ) from None
        if row is None:
            if columns is None:
                _check_columns(path, start, [])
            return

        line, start = start, lines.line_num + 1
        if any("\n" in field or "\r" in field for field in row):
            raise InputError(
                f"{path}: line {line}: one field goes to line {lines.line_num}. "
                "Is a quote never closed?"
            )
        if not row:
            continue  # an empty line
        if columns is None:
            columns = _check_columns(path, line, row)
        elif len(row) > len(columns):
            raise InputError(
                f"{path}: line {line}: more fields than columns; "
                "a sentence with a comma needs quotes"
            )
        else:
            yield line, dict(zip(columns, row))


def _check_columns(path: Path, line: int, columns: list[str]) -> list[str]:
    for name in ("image", "sentence"):
        if columns.count(name) > 1:
            raise InputError(f"{path}: line {line}: two columns are called {name}; remove one")

    missing = [name for name in ("image", "sentence") if name not in columns]
    if missing:
        raise InputError(
            f"{path}: line {line}: no column {' and '.join(missing)}; "
            f"the columns are {','.join(columns)[:200]}"
        )
    return columns


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue

        try:
            row = parse_strict_json(line)
        except ValueError as error:
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
    if not _is_file(image):
        raise InputError(f"{source}: no such image: {quoted(given)} in {path.parent}")

    try:
        normalize_sentence(row["sentence"])
    except InputError as error:
        raise InputError(f"{source}: {error}") from None

    return Request(
        source=source,
        given=given,
        image=image,
        sentence=row["sentence"],
        name=short_name(image.stem, f"-{number}"),
    )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        # The name is too long, or no name at all: a NUL, or half a character.
        return False
