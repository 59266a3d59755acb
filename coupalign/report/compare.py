"""Two scored runs on the same samples: by how much every metric differs, how sure that is, and which samples make the difference.

A run is a run directory, or the id or the name of a run on an MLflow server; what is read is its file of rows
(`evaluation.facts`), which `coupalign eval` and every evaluation of a training write.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from coupalign.errors import InputError
from coupalign.evaluation.metrics import (
    METRICS,
    EmptyUnion,
    reaches_thresholds,
    ious,
    paired_intervals,
    summarize,
)
from coupalign.evaluation.protocols import find_protocol
from coupalign.evaluation.rows import Rows, read_rows, rows_path

TRACKING_URI = "sqlite:///runs/mlflow.db"
_SHOWN = 5  # samples most won, and most lost


@dataclass(frozen=True)
class Difference:
    """One metric of both runs, 0 … 1, and the 95 % interval of b - a."""

    a: float
    b: float
    low: float
    high: float


@dataclass(frozen=True)
class Example:
    """A sample with the IoU of both runs."""

    name: str
    sentence: str
    a: float
    b: float


@dataclass(frozen=True)
class Comparison:
    """What B does better or worse than A, sample by sample.

    Attributes:
        metrics: by name.
        only_a, only_b: samples that reach IoU 0.5 in one run alone.
        p_value: of McNemar's exact test on these; it takes the samples for independent.
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
        """All of it as text; metrics in percent."""
        lines = [
            f"{self.samples:,} (image, sentence) samples on {self.images:,} images",
            "",
            f"{'':<8}{'A %':>8}{'B %':>8}{'B - A':>8}   95 % interval",
        ]
        for name, one in self.metrics.items():
            lines.append(
                f"{name:<8}{100 * one.a:8.2f}{100 * one.b:8.2f}{100 * (one.b - one.a):+8.2f}   "
                f"{100 * one.low:+.2f} … {100 * one.high:+.2f}"
            )
        lines += [
            "",
            f"P@0.5: reached by A alone {self.only_a:,}, by B alone {self.only_b:,}; McNemar's exact test: "
            f"p = {self.p_value:.3g}",
            f"IoU: higher in B {self.won:,}, lower {self.lost:,}, equal {self.tied:,}",
        ]
        for title, examples in (
            ("most won by B", self.most_won),
            ("most lost by B", self.most_lost),
        ):
            shown = [
                f"  {one.a:.3f} -> {one.b:.3f}  {one.name}  {one.sentence}" for one in examples
            ]
            lines += ["", title, *shown] if shown else []
        return "\n".join(lines)


def compare(
    a: str, b: str, split: str = "val", protocol: str = "ris-v1", tracking_uri: str | None = None
) -> Comparison:
    """Compare two runs under one protocol, every sentence a sample.

    Args:
        a, b: run directories, or ids or names of MLflow runs.
        tracking_uri: where MLflow runs are looked up; none: MLFLOW_TRACKING_URI, else runs/mlflow.db.

    Raises:
        InputError: a run or its file of rows is not there, or the runs were not scored on the same samples.
    """
    rows = [open_rows(run, split, protocol, tracking_uri) for run in (a, b)]
    first, second = pair_rows(*rows, a, b)
    return compare_rows(first, second, find_protocol(protocol).empty)


def open_rows(run: str, split: str, protocol: str, tracking_uri: str | None = None) -> Rows:
    """The rows of a run directory, or of an MLflow run.

    Raises:
        InputError: there are none; says what is there.
    """
    folder, wanted = Path(run), rows_path(Path(), split, protocol)
    if folder.is_dir():
        if (folder / wanted).is_file():
            return read_rows(folder / wanted)
        there = (
            ", ".join(sorted(file.name for file in (folder / "scores").glob("*.csv"))) or "nothing"
        )
        raise InputError(
            f"{folder}: no {wanted}; its scores/ holds {there}; make it with `coupalign eval {run} --split {split} "
            f"--protocol {protocol}`"
        )
    if "/" in run:
        raise InputError(f"{run}: no such run directory, and no MLflow run is called that")
    from coupalign.tracking.mlflow import fetch_artifact

    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or TRACKING_URI
    with tempfile.TemporaryDirectory() as place:
        return read_rows(fetch_artifact(uri, run, wanted.as_posix(), Path(place)))


def pair_rows(a: Rows, b: Rows, name_a: str = "A", name_b: str = "B") -> tuple[Rows, Rows]:
    """Both in the order of `a`.

    Raises:
        InputError: not the same samples, or not the same truths; names the first that differs.
    """
    places = {name: place for place, name in enumerate(b.names)}
    known = set(a.names)
    only_a, only_b = (
        [name for name in a.names if name not in places],
        [name for name in b.names if name not in known],
    )
    if only_a or only_b:
        owner, first = (name_a, only_a[0]) if only_a else (name_b, only_b[0])
        raise InputError(
            f"{name_a} and {name_b} were not scored on the same samples: {len(a):,} and {len(b):,}, {len(only_a):,} and "
            f"{len(only_b):,} of them in one alone; the first, {first}, only in {owner}. Score both on the same split "
            "without a limit"
        )
    b = b.take(np.asarray([places[name] for name in a.names], dtype=np.int64))
    for what in ("image_ids", "pixels", "area"):
        mine, other = getattr(a, what), getattr(b, what)
        if len(wrong := np.flatnonzero(mine != other)):
            first = wrong[0]
            raise InputError(
                f"{name_a} and {name_b} were scored against other truths: {len(wrong):,} samples differ in {what}, the first "
                f"is {a.names[first]}, {mine[first]:,} and {other[first]:,}. Score both from the same shards"
            )
    return a, b


def compare_rows(
    a: Rows, b: Rows, empty: EmptyUnion = "one", bootstrap: int = 1000, seed: int = 0
) -> Comparison:
    """Compare rows of the same samples in the same order, at least one."""
    assert a.names == b.names and len(a)
    values, others = (
        summarize(rows.counts, bootstrap=0, clusters=rows.image_ids, empty=empty) for rows in (a, b)
    )
    intervals = paired_intervals(a.counts, b.counts, bootstrap, seed, a.image_ids, empty)
    metrics = {name: Difference(values[name], others[name], *intervals[name]) for name in METRICS}
    right_a, right_b = (
        reaches_thresholds(a.counts, empty)[:, 0],
        reaches_thresholds(b.counts, empty)[:, 0],
    )
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    iou_a, iou_b = ious(a.counts, empty), ious(b.counts, empty)
    change = iou_b - iou_a  # equal fractions give equal doubles, so a tie is exact
    order = np.argsort(change, kind="stable")

    def examples(places: np.ndarray) -> tuple[Example, ...]:
        return tuple(
            Example(a.names[p], a.sentences[p], float(iou_a[p]), float(iou_b[p])) for p in places
        )

    return Comparison(
        len(a),
        values["images"],
        metrics,
        only_a,
        only_b,
        mcnemar(only_a, only_b),
        int((change > 0).sum()),
        int((change < 0).sum()),
        int((change == 0).sum()),
        examples([p for p in order[::-1][:_SHOWN] if change[p] > 0]),
        examples([p for p in order[:_SHOWN] if change[p] < 0]),
    )


def mcnemar(b: int, c: int) -> float:
    """The two-sided p value of McNemar's exact test: b and c are the samples that only one of two runs gets right.

    Under the hypothesis that the runs are equally good each of these b + c samples is a fair coin, so p is twice the binomial
    probability of at most min(b, c) heads, at most 1 (McNemar, Psychometrika 12, 1947, in its exact form).
    """
    flips, ways, heads = b + c, 0, 1
    for few in range(min(b, c) + 1):
        ways += heads
        heads = heads * (flips - few) // (few + 1)
    return min(1.0, 2 * ways / 2**flips)
