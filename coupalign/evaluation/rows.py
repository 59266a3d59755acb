"""Everything known of each scored sample, as a table in memory and as the CSV file of a scoring.

    scores/val-ris-v1.csv                every sentence of every ref (rule "each")
    scores/val-ris-v1-first.csv          the other sentence rules
    scores/val-ris-v1-concatenated.csv

The columns, and one line of the file (wrapped here):

    sample_id,intersection,union,iou,boundary_intersection,boundary_union,
        image_id,area,pixels,same_class,sentence
    refcoco/unc/1/5,1200,1500,0.800000,310,620,
        9,1400,307200,2,the man left

`intersection` to `boundary_union` are counted at the protocol's own resolution. `area` (of the
truth) and `pixels` (of the image) are at the original one. `same_class` is the number of other
objects of the category in the image, -1 if the shard does not know it. `sentence` is the text that
the model read.

A spreadsheet runs a cell that begins with =, +, - or @ as a formula. So an apostrophe is written
before such a text, and before one with apostrophes in front of it. Reading takes it away.
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from coupalign.errors import InputError, quoted
from coupalign.evaluation.metrics import IouRule, ious
from coupalign.files import whole_file

COLUMNS = (
    "sample_id",
    "intersection",
    "union",
    "iou",
    "boundary_intersection",
    "boundary_union",
    "image_id",
    "area",
    "pixels",
    "same_class",
    "sentence",
)

# What makes a formula of a cell: these characters (and their wide forms) at its start.
_FORMULA = re.compile(r"'*[=+\-@\t\r\n＝＋－＠]")

# Integers of a row: number, I, U, bI, bU, image id, area, pixels, same class.
ROW_WIDTH = 9


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Scored samples, one per index of every field.

    Attributes:
        names: "<dataset>/<split_by>/<ref_id>/<sent_id>".
        sentences: the text that the model read.
        counts: int64 [n, 5] = (number, I, U, bI, bU), see `metrics`.
        image_ids, area, pixels, same_class: int64 [n].
    """

    names: tuple[str, ...]
    sentences: tuple[str, ...]
    counts: np.ndarray
    image_ids: np.ndarray
    area: np.ndarray
    pixels: np.ndarray
    same_class: np.ndarray

    @classmethod
    def from_integers(
        cls, integers: np.ndarray, names_and_sentences: Sequence[tuple[str, str]]
    ) -> Rows:
        """Build from the rows int64 [n, 9] of an `Evaluation`.

        Args:
            names_and_sentences: of every sample, by its number.
        """
        assert integers.shape[1:] == (ROW_WIDTH,), integers.shape
        texts = [names_and_sentences[number] for number in integers[:, 0]]
        image_ids, area, pixels, same_class = integers[:, 5:].T
        return cls(
            names=tuple(name for name, _ in texts),
            sentences=tuple(sentence for _, sentence in texts),
            counts=integers[:, :5],
            image_ids=image_ids,
            area=area,
            pixels=pixels,
            same_class=same_class,
        )

    def __len__(self) -> int:
        return len(self.names)

    def take(self, indexes: np.ndarray) -> Rows:
        """Select the rows at some indexes [k], in their order."""
        return Rows(
            names=tuple(self.names[index] for index in indexes),
            sentences=tuple(self.sentences[index] for index in indexes),
            counts=self.counts[indexes],
            image_ids=self.image_ids[indexes],
            area=self.area[indexes],
            pixels=self.pixels[indexes],
            same_class=self.same_class[indexes],
        )


def rows_path(run: Path, name: str, protocol: str, rule: str = "each") -> Path:
    """Return where a run keeps the rows of the evaluation set `name`."""
    suffix = "" if rule == "each" else f"-{rule}"
    return run / "scores" / f"{name}-{protocol}{suffix}.csv"


def write_rows(path: Path, rows: Rows, iou_rule: IouRule = "one") -> None:
    """Write rows as CSV. The file appears whole or not at all."""
    integers = np.column_stack(
        [rows.counts[:, 1:], rows.image_ids, rows.area, rows.pixels, rows.same_class]
    )
    samples = zip(
        rows.names, rows.sentences, ious(rows.counts, iou_rule), integers.tolist(), strict=True
    )

    with whole_file(Path(path), "w") as file:
        # Only \r\n in the terminator makes the writer quote a text with a lone carriage return.
        table = csv.writer(file, lineterminator="\r\n")
        table.writerow(COLUMNS)
        for name, sentence, iou, (intersection, union, *others) in samples:
            cells = (intersection, union, f"{iou:.6f}", *others)
            table.writerow((_to_cell(name), *cells, _to_cell(sentence)))


def read_rows(path: Path) -> Rows:
    """Read what `write_rows` wrote; samples are numbered from 0 in the order of the file.

    Raises:
        InputError: the file is missing, or is not such a file; names file and line.
    """
    # The joined sentences of a ref may be longer than the usual limit.
    limit = csv.field_size_limit(sys.maxsize)
    try:
        with open(path, encoding="utf-8", newline="") as file:
            reader = csv.reader(file, strict=True)
            # A text may itself have several lines.
            lines = [(line, reader.line_num) for line in reader]
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    finally:
        csv.field_size_limit(limit)
    if not lines or tuple(lines[0][0]) != COLUMNS:
        raise InputError(
            f"{path}: line 1: expected the columns {','.join(COLUMNS)}. "
            "A file of an earlier version has fewer: score again with `coupalign eval`"
        )

    if len(lines) == 1:
        raise InputError(f"{path}: holds no sample. Score again with `coupalign eval`")

    integers, texts = [], []
    for number, (line, last_line) in enumerate(lines[1:]):
        try:
            # The IoU is computed from the counts again.
            name, intersection, union, _iou, *others, sentence = line
            row = [number, *map(int, (intersection, union, *others))]
            _check_integers(row)
        except ValueError as error:
            raise InputError(
                f"{path}: line {last_line}: {error}; expected {','.join(COLUMNS)}, found "
                f"{quoted(','.join(line))}. Score again with `coupalign eval`"
            ) from None
        integers.append(row)
        texts.append((_from_cell(name), _from_cell(sentence)))

    table = np.asarray(integers, dtype=np.int64).reshape(-1, ROW_WIDTH)
    return Rows.from_integers(table, texts)


def _to_cell(text: str) -> str:
    """Return a text as a cell that no spreadsheet runs, with \\u… for half of a character."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return f"'{text}" if _FORMULA.match(text) else text


def _from_cell(cell: str) -> str:
    """Return the text of a cell that `_to_cell` made."""
    is_escaped = cell.startswith("'") and _FORMULA.match(cell)
    return cell[1:] if is_escaped else cell


def _check_integers(row: Sequence[int]) -> None:
    """Raise ValueError if the integers of a row cannot be counts of one sample."""
    if len(row) != ROW_WIDTH:
        raise ValueError("too few or too many columns")
    _, inside, union, band_inside, band_union, image_id, area, pixels, _ = row
    if not (0 <= inside <= union and 0 <= band_inside <= band_union and 0 <= area <= pixels):
        raise ValueError("a part is larger than the whole")
    if max(union, band_union, pixels, abs(row[-1])) >= 2**53 or abs(image_id) >= 2**63:
        raise ValueError("a number is too large")
