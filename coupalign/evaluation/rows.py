"""What is known of every scored sample, as a table in memory and as the file of rows that a scoring leaves behind.

    scores/val-ris-v1.csv                every sentence of every ref (rule "each")
    scores/val-ris-v1-first.csv          the other sentence rules
    scores/val-ris-v1-concatenated.csv

    sample_id,intersection,union,iou,boundary_intersection,boundary_union,image_id,area,pixels,same_class,sentence
    refcoco/unc/1/5,1200,1500,0.800000,310,620,9,1400,307200,2,the man left

`intersection` to `boundary_union` are counted at the protocol's own resolution. `area` (of the truth) and `pixels` (of the
image) are at the original one. `same_class` is the number of other objects of the category in the image, -1 where the shard
does not know it. `sentence` is the text that was read.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from coupalign.errors import InputError
from coupalign.evaluation.metrics import EmptyUnion, ious
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
WIDTH = 9  # integers of a row: number, I, U, bI, bU, image id, area, pixels, same class


@dataclass(frozen=True)
class Rows:
    """Scored samples, one a place in every field.

    Attributes:
        names, sentences: "<dataset>/<split_by>/<ref_id>/<sent_id>", and the text that was read.
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
    def of(cls, rows: np.ndarray, words: Sequence[tuple[str, str]]) -> Rows:
        """Rows int64 [n, 9] of an `Evaluation`, with the (name, sentence) of each sample number."""
        assert rows.shape[1:] == (WIDTH,), rows.shape
        named = [words[number] for number in rows[:, 0]]
        return cls(
            tuple(name for name, _ in named),
            tuple(sentence for _, sentence in named),
            rows[:, :5],
            *rows[:, 5:].T,
        )

    def __len__(self) -> int:
        return len(self.names)

    def take(self, places: np.ndarray) -> Rows:
        """The rows at some places [k], in their order."""
        return Rows(
            tuple(self.names[p] for p in places),
            tuple(self.sentences[p] for p in places),
            self.counts[places],
            self.image_ids[places],
            self.area[places],
            self.pixels[places],
            self.same_class[places],
        )


def rows_path(run: Path, split: str, protocol: str, rule: str = "each") -> Path:
    """Where a run keeps the rows of a split."""
    return run / "scores" / f"{split}-{protocol}{'' if rule == 'each' else f'-{rule}'}.csv"


def write_rows(path: Path, rows: Rows, empty: EmptyUnion = "one") -> None:
    """Write rows as CSV: whole or not at all."""
    with whole_file(Path(path), "w") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(COLUMNS)
        facts = zip(
            rows.image_ids.tolist(),
            rows.area.tolist(),
            rows.pixels.tolist(),
            rows.same_class.tolist(),
            rows.sentences,
        )
        for name, (_, *counts), iou, fact in zip(
            rows.names, rows.counts.tolist(), ious(rows.counts, empty), facts, strict=True
        ):
            table.writerow((name, *counts[:2], f"{iou:.6f}", *counts[2:], *fact))


def read_rows(path: Path) -> Rows:
    """Read what `write_rows` wrote; the samples are numbered from 0 in the order of the file.

    Raises:
        InputError: no such file, or not such a file; names file and line.
    """
    try:
        with open(path, encoding="utf-8", newline="") as file:
            lines = list(csv.reader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    if not lines or tuple(lines[0]) != COLUMNS:
        raise InputError(
            f"{path}: line 1: expected the columns {','.join(COLUMNS)}; a file of an earlier version has fewer: score "
            "again with `coupalign eval`"
        )
    integers, words = [], []
    for number, line in enumerate(lines[1:]):
        try:
            name, inside, union, _, *rest, sentence = line
            band_inside, band_union, image, area, pixels, same_class = map(int, rest)
            integers.append(
                (
                    number,
                    int(inside),
                    int(union),
                    band_inside,
                    band_union,
                    image,
                    area,
                    pixels,
                    same_class,
                )
            )
        except ValueError:
            raise InputError(
                f"{path}: line {number + 2}: expected {','.join(COLUMNS)}, found {','.join(line)!r}"
            ) from None
        words.append((name, sentence))
    return Rows.of(np.asarray(integers, dtype=np.int64).reshape(-1, WIDTH), words)
