"""Compare two scored runs on the same samples.

Reports by how much every metric differs, how sure that is, and which samples make the difference.
A run is a run directory, or the id or name of a run on an MLflow server. What is read is its file
of rows (`evaluation.rows`), which `coupalign eval` and every evaluation during training write.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from coupalign.errors import InputError, quoted
from coupalign.evaluation.metrics import (
    METRICS,
    IouRule,
    ious,
    paired_intervals,
    reaches_thresholds,
    summarize,
)
from coupalign.evaluation.protocols import find_protocol
from coupalign.evaluation.rows import Rows, read_rows, rows_path

TRACKING_URI = "sqlite:///runs/mlflow.db"
_MAX_EXAMPLES = 5  # of samples most won, and of samples most lost


@dataclass(frozen=True)
class Difference:
    """One metric of both runs, 0 … 1, and the 95 % interval of b - a."""

    a: float
    b: float
    low: float
    high: float


@dataclass(frozen=True)
class Example:
    """A sample with its IoU in both runs."""

    name: str
    sentence: str
    a: float
    b: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What run B does better or worse than run A, sample by sample.

    Attributes:
        metrics: by name.
        only_a, only_b: samples that reach IoU 0.5 in one run alone.
        p_value: of McNemar's exact test on these, which assumes that samples are independent.
        won, lost, tied: samples whose IoU is higher, lower, equal in B.
        most_won, most_lost: those with the largest difference of IoU, the largest first.
    """

    samples: int
    images: int
    metrics: Mapping[str, Difference]
    only_a: int
    only_b: int
    p_value: float
    won: int
    lost: int
    tied: int
    most_won: tuple[Example, ...]
    most_lost: tuple[Example, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def table(self) -> str:
        """Format everything as text; metrics in percent."""
        rows = []
        for name, metric in self.metrics.items():
            a, b = f"{100 * metric.a:.2f}", f"{100 * metric.b:.2f}"
            difference = f"{100 * (metric.b - metric.a):+.2f}"
            interval = f"{100 * metric.low:+.2f} … {100 * metric.high:+.2f}"
            rows.append([name, a, b, difference, interval])
        metrics = tabulate(
            rows,
            ["", "A %", "B %", "B - A", "95 % interval"],
            tablefmt="plain",
            disable_numparse=True,
            colalign=("left", "right", "right", "right", "left"),
        )

        lines = [
            f"{self.samples:,} (image, sentence) samples on {self.images:,} images",
            "",
            metrics,
            "",
            f"P@0.5: reached by A alone {self.only_a:,}, by B alone {self.only_b:,}; "
            f"McNemar's exact test: p = {self.p_value:.3g}",
            f"IoU: higher in B {self.won:,}, lower {self.lost:,}, equal {self.tied:,}",
        ]
        lines += _example_lines("most won by B", self.most_won)
        lines += _example_lines("most lost by B", self.most_lost)
        return "\n".join(lines)


def compare(
    a: str,
    b: str,
    split: str = "val",
    protocol: str = "ris-v1",
    tracking_uri: str | None = None,
) -> Comparison:
    """Compare two runs under one protocol, with the samples that its authors score.

    Args:
        a, b: run directories, or ids or names of MLflow runs.
        tracking_uri: where MLflow runs are looked up. Default: MLFLOW_TRACKING_URI, else
            runs/mlflow.db.

    Raises:
        InputError: a run or its file of rows is missing, or the runs were not scored on the same
            samples.
    """
    rows_a, rows_b = (load_rows(run, split, protocol, tracking_uri=tracking_uri) for run in (a, b))
    rows_a, rows_b = align_rows(rows_a, rows_b, name_a=a, name_b=b)
    return compare_rows(rows_a, rows_b, find_protocol(protocol).iou_rule)


def load_rows(run: str, split: str, protocol: str, *, tracking_uri: str | None = None) -> Rows:
    """Read the rows of a run directory or of an MLflow run.

    Raises:
        InputError: there are none; says what there is.
    """
    folder = Path(run)
    file = rows_path(Path(), split, protocol, find_protocol(protocol).sentences)
    if folder.is_dir():
        if (folder / file).is_file():
            return read_rows(folder / file)
        names = sorted(path.name for path in (folder / "scores").glob("*.csv"))
        raise InputError(
            f"{folder}: no {file}; its scores/ holds {', '.join(names) or 'nothing'}; make it with "
            f"`coupalign eval {run} --split {split} --protocol {protocol}`"
        )

    if "/" in run:
        raise InputError(f"{run}: no such run directory, and an MLflow run cannot have that name")
    from coupalign.tracking.mlflow import fetch_artifact

    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or TRACKING_URI
    with tempfile.TemporaryDirectory() as target:
        return read_rows(fetch_artifact(uri, run, file.as_posix(), Path(target)))


def align_rows(a: Rows, b: Rows, *, name_a: str = "A", name_b: str = "B") -> tuple[Rows, Rows]:
    """Bring `b` into the order of `a`.

    Raises:
        InputError: they have different samples or different truths; names the first that differs.
    """
    # The same samples: the order may differ.
    names_a, names_b = set(a.names), set(b.names)
    for rows, names, run in ((a, names_a, name_a), (b, names_b, name_b)):
        if len(names) < len(rows):
            [(name, times)] = Counter(rows.names).most_common(1)
            raise InputError(
                f"{run}: its rows list {quoted(name)} {times} times; score it again with "
                "`coupalign eval`"
            )
    only_a = [name for name in a.names if name not in names_b]
    only_b = [name for name in b.names if name not in names_a]
    if only_a or only_b:
        example = f"{only_a[0]}, only in {name_a}" if only_a else f"{only_b[0]}, only in {name_b}"
        raise InputError(
            f"{name_a} and {name_b} were not scored on the same samples: {len(a):,} and {len(b):,} "
            f"samples, {len(only_a):,} and {len(only_b):,} of them in one run alone, the first is "
            f"{example}. Score both on the same split without a limit"
        )

    indexes = {name: index for index, name in enumerate(b.names)}
    b = b.take(np.asarray([indexes[name] for name in a.names], dtype=np.int64))
    # The same truths: other polygons or other images have another area or size.
    for field in ("image_ids", "pixels", "area"):
        in_a, in_b = getattr(a, field), getattr(b, field)
        different = np.flatnonzero(in_a != in_b)
        if len(different):
            first = different[0]
            raise InputError(
                f"{name_a} and {name_b} were scored against different truths: "
                f"{len(different):,} samples differ in {field}, the first is {a.names[first]}, "
                f"{in_a[first]:,} and {in_b[first]:,}. Score both from the same shards"
            )
    return a, b


def compare_rows(
    a: Rows,
    b: Rows,
    iou_rule: IouRule = "one",
    *,
    bootstrap: int = 1000,
    seed: int = 0,
) -> Comparison:
    """Compare rows of the same samples in the same order, at least one."""
    assert a.names == b.names and len(a)
    values_a, values_b = (
        summarize(rows.counts, bootstrap=0, clusters=rows.image_ids, iou_rule=iou_rule)
        for rows in (a, b)
    )
    intervals = paired_intervals(
        a.counts, b.counts, bootstrap, seed=seed, clusters=a.image_ids, iou_rule=iou_rule
    )
    metrics = {}
    for name in METRICS:
        low, high = intervals[name]
        metrics[name] = Difference(values_a[name], values_b[name], low, high)

    # Samples that are right (P@0.5) in one run alone.
    right_a, right_b = (reaches_thresholds(rows.counts, iou_rule)[:, 0] for rows in (a, b))
    only_a = int((right_a & ~right_b).sum())
    only_b = int((right_b & ~right_a).sum())

    # Equal fractions give equal doubles, so a tie is exact.
    iou_a, iou_b = ious(a.counts, iou_rule), ious(b.counts, iou_rule)
    change = iou_b - iou_a
    order = np.argsort(change, kind="stable")

    def examples(indexes: np.ndarray) -> tuple[Example, ...]:
        chosen = []
        for index in indexes:
            values = float(iou_a[index]), float(iou_b[index])
            chosen.append(Example(a.names[index], a.sentences[index], *values))
        return tuple(chosen)

    best, worst = order[::-1][:_MAX_EXAMPLES], order[:_MAX_EXAMPLES]
    return Comparison(
        samples=len(a),
        images=values_a["images"],
        metrics=metrics,
        only_a=only_a,
        only_b=only_b,
        p_value=mcnemar_p_value(only_a, only_b),
        won=int((change > 0).sum()),
        lost=int((change < 0).sum()),
        tied=int((change == 0).sum()),
        most_won=examples(best[change[best] > 0]),
        most_lost=examples(worst[change[worst] < 0]),
    )


def mcnemar_p_value(b: int, c: int) -> float:
    """Compute the two-sided p value of McNemar's exact test.

    Under the hypothesis that the runs are equally good, each of the b + c samples is a fair coin.
    So p is twice the binomial probability of at most min(b, c) heads, at most 1 (McNemar,
    Psychometrika 12, 1947, in its exact form).

    Args:
        b, c: samples that only one of two runs gets right.
    """
    flips = b + c
    tail = 0
    coefficient = 1  # flips over heads
    for heads in range(min(b, c) + 1):
        tail += coefficient
        coefficient = coefficient * (flips - heads) // (heads + 1)
    return min(1.0, 2 * tail / 2**flips)


def _example_lines(title: str, examples: tuple[Example, ...]) -> list[str]:
    if not examples:
        return []
    lines = ["", title]
    for example in examples:
        change = f"{example.a:.3f} -> {example.b:.3f}"
        lines.append(f"  {change}  {_on_one_line(example.name)}  {_on_one_line(example.sentence)}")
    return lines


def _on_one_line(text: str) -> str:
    """Escape what would move the cursor of a terminal or change its colors."""
    letters = [
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    ]
    return "".join(letters)
