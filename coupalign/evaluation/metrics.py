"""Metrics computed from pixel counts, and the `Score` that carries its protocol.

A row is one sample, that is one (image, sentence) pair. Its columns are (number, I, U, bI, bU):

    number   position of the sample in the loader's table
    I, U     pixels in the intersection and in the union of prediction and truth
    bI, bU   the same of their boundary bands, see `protocols.boundary`

Counts stay int64 until the last division, so a score depends neither on the order of the rows nor
on the machine that counted. The formulas are those of the field:

    oIoU     sum(I) / sum(U); 0 if no sample has any pixel
    mIoU     mean(I / U)
    P@X      share of samples with I / U >= X, see `IouRule`
    bIoU     mean(bI / bU), the Boundary IoU of Cheng et al., CVPR 2021
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np
from tabulate import tabulate

from coupalign.errors import quoted

T = TypeVar("T")

THRESHOLD_TENTHS = (5, 6, 7, 8, 9)
METRICS = ("oIoU", "mIoU", *(f"P@0.{tenth}" for tenth in THRESHOLD_TENTHS), "bIoU")
IouRule = Literal["one", "zero", "strict"]
"""The IoU of a sample whose truth and prediction are both empty, and what P@X counts.

    one      an empty union has IoU 1;   P@X counts IoU >= X
    zero     an empty union has IoU 0;   P@X counts IoU >= X    (LAVT)
    strict   an empty union has IoU 0;   P@X counts IoU >  X    (CRIS)
"""

# Bounds the memory of the bootstrap: this many resamples x images integers at a time.
_RESAMPLES_AT_ONCE = 100


def ious(rows: np.ndarray, iou_rule: IouRule = "one") -> np.ndarray:
    """Compute I / U of each row, float64 [n].

    Args:
        rows: int64 [n, 3 or more] = (number, intersection, union, …).
    """
    rows = _check_rows(rows)
    return _ratio(rows[:, 1], rows[:, 2], iou_rule)


def boundary_ious(rows: np.ndarray, iou_rule: IouRule = "one") -> np.ndarray:
    """Compute bI / bU of each row int64 [n, 5 or more], float64 [n].

    A band is empty only where its mask is.
    """
    rows = _check_rows(rows)
    return _ratio(rows[:, 3], rows[:, 4], iou_rule)


def reaches_thresholds(rows: np.ndarray, iou_rule: IouRule = "one") -> np.ndarray:
    """Whether I / U >= 0.5, 0.6 … 0.9, or > under the rule "strict"; bool [n, 5].

    Decided on integers, because 0.7 is not a binary fraction but 7/10 is exact. CRIS compares
    I / (U + 1e-6) > X, which is the same: 10 I exceeds a whole number by at least 1, if it does.
    """
    rows = _check_rows(rows)
    intersection, union = rows[:, 1:2], rows[:, 2:3]
    tenths = np.asarray(THRESHOLD_TENTHS)
    if iou_rule == "strict":
        return intersection * 10 > tenths * union
    return np.where(union > 0, intersection * 10 >= tenths * union, iou_rule == "one")


def summarize(
    rows: np.ndarray,
    bootstrap: int = 1000,
    seed: int = 0,
    clusters: np.ndarray | None = None,
    iou_rule: IouRule = "one",
) -> dict[str, Any]:
    """Compute all metrics of some rows, with 95 % percentile bootstrap intervals.

    Args:
        rows: int64 [n, 5], n >= 1.
        bootstrap: number of resamples. 0 leaves the intervals out.
        clusters: [n] image id of each row. Sentences about one image are not independent, so whole
            images are drawn with replacement. Without it every row counts as its own image, and
            the intervals come out too narrow.

    Returns:
        The `METRICS` by name, 0 … 1, "samples", "images" and "intervals" {name: (low, high)}.
    """
    assert len(rows), "a score of no samples"
    if clusters is None:
        clusters = np.arange(len(rows))

    # The bootstrap draws whole images, so the rows of each image are added up once.
    sums = _sums_by_image(rows, clusters, iou_rule)

    totals = sums.sum(axis=0, keepdims=True)
    values = _metrics_of(totals)[0].tolist()
    result: dict[str, Any] = dict(zip(METRICS, values))
    result |= {"samples": len(rows), "images": len(sums), "intervals": {}}

    if bootstrap:
        resampled = _metrics_of(_bootstrap_totals(sums, bootstrap, seed))
        result["intervals"] = _percentile_intervals(resampled)
    return result


def paired_intervals(
    rows_a: np.ndarray,
    rows_b: np.ndarray,
    bootstrap: int = 1000,
    seed: int = 0,
    clusters: np.ndarray | None = None,
    iou_rule: IouRule = "one",
) -> dict[str, tuple[float, float]]:
    """Compute 95 % percentile bootstrap intervals of (metric of b) - (metric of a), by name.

    Row k of both is the same sample. Every resample draws the same whole images for both.

    Args:
        rows_a, rows_b: int64 [n, 5], n >= 1.
        bootstrap, clusters: as in `summarize`, but bootstrap >= 1.
    """
    assert len(rows_a) == len(rows_b) > 0 and bootstrap
    if clusters is None:
        clusters = np.arange(len(rows_a))

    def resample(rows: np.ndarray) -> np.ndarray:
        # The draws depend only on the seed and the number of images, so both runs get the same.
        sums = _sums_by_image(rows, clusters, iou_rule)
        return _metrics_of(_bootstrap_totals(sums, bootstrap, seed))

    return _percentile_intervals(resample(rows_b) - resample(rows_a))


@dataclass(frozen=True, kw_only=True)
class Score:
    """A result together with everything you need to know to compare it.

    Attributes:
        protocol: "ris-v1", "lavt", "cris" or "coupalign-author".
        metrics: the `METRICS` by name, 0 … 1.
        samples, images: how many (image, sentence) samples were scored, and on how many images.
        intervals: 95 % bootstrap intervals by metric name.
        conditions: text by heading, printed with the score: input, truth, threshold, sets, …
        fingerprint: of the data, hex.
        leak: whether training images were among the scored ones.
        language_blind: score of the same model on the same samples with shuffled sentences.
        sentences: which sentences of a ref are samples: "each", "first" or "concatenated".
    """

    protocol: str
    metrics: Mapping[str, float]
    samples: int
    images: int
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    conditions: Mapping[str, str] = field(default_factory=dict)
    fingerprint: str = ""
    leak: str = "not checked"
    language_blind: Score | None = None
    sentences: str = "each"

    def to_json(self) -> dict[str, Any]:
        """Return a flat JSON object: metrics by name, then the protocol and its conditions."""
        value: dict[str, Any] = dict(self.metrics)
        if self.language_blind is not None:
            value["language_blind_oIoU"] = self.language_blind.metrics["oIoU"]

        value |= {
            "protocol": self.protocol,
            "sentences": self.sentences,
            "samples": self.samples,
            "images": self.images,
            "intervals": {name: list(pair) for name, pair in self.intervals.items()},
            "conditions": dict(self.conditions),
            "data_fingerprint": self.fingerprint,
            "leak": self.leak,
        }
        if self.language_blind is not None:
            value["language_blind"] = self.language_blind.to_json()
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Score:
        """Read what `to_json` returned.

        Raises:
            KeyError: a field is missing.
            ValueError: a field is not what `to_json` writes; names it.
        """
        intervals = {}
        for name, pair in _field(value, "intervals", dict).items():
            if name not in METRICS or not isinstance(pair, list) or len(pair) != 2:
                raise ValueError(f"intervals: {quoted(name)}: {quoted(pair)} is no interval")
            low, high = (_share(bound, f"intervals: {name}") for bound in pair)
            intervals[name] = (low, high)

        conditions = _field(value, "conditions", dict)
        for heading, text in conditions.items():
            if not isinstance(text, str):
                raise ValueError(f"conditions: {quoted(heading)}: {quoted(text)} is no text")

        blind = None
        if value.get("language_blind") is not None:
            blind = cls.from_json({**_field(value, "language_blind", dict), "language_blind": None})
        return cls(
            protocol=_field(value, "protocol", str),
            metrics={name: _share(value[name], name) for name in METRICS},
            samples=_field(value, "samples", int),
            images=_field(value, "images", int),
            intervals=intervals,
            conditions=conditions,
            fingerprint=_field(value, "data_fingerprint", str),
            leak=_field(value, "leak", str),
            language_blind=blind,
            sentences=_field(value, "sentences", str),
        )

    def facts(self) -> dict[str, str]:
        """Describe the protocol by heading, as printed below the numbers."""
        return {
            "protocol": self.protocol,
            **self.conditions,
            "samples": f"{self.samples:,} (image, sentence) samples on {self.images:,} images",
            "data": self.fingerprint[:16] or "no fingerprint",
            "leak": self.leak,
        }

    def table(self) -> str:
        """Format the score in percent as text, always with the protocol below it."""
        blind = self.language_blind
        headers = ["", "score %", "95 % interval"]
        if blind is not None:
            headers.append("language-blind")

        rows = []
        for name, value in self.metrics.items():
            row = [name, _percent(value), ""]
            if name in self.intervals:
                row[-1] = " … ".join(map(_percent, self.intervals[name]))
            if blind is not None:
                row.append(_percent(blind.metrics[name]))
            rows.append(row)

        numbers = _format_columns(rows, headers)
        facts = _format_facts(self.facts().items())
        return f"{numbers}\n\n{facts}"


def _field(value: Mapping[str, Any], name: str, kind: type[T]) -> T:
    """Return a field of a JSON object, which must be of a type."""
    found = value[name]
    if not isinstance(found, kind) or isinstance(found, bool):
        raise ValueError(f"{name}: expected {kind.__name__}, found {quoted(found)}")
    return found


def _share(value: Any, name: str) -> float:
    """Return a number of a JSON file that must be from 0 to 1."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a number from 0 to 1, found {quoted(value)}")
    return float(value)


# A column of a comparison: protocol and sentence rule.
Column = tuple[str, str]


def side_by_side(scores: Mapping[Column, Score]) -> str:
    """Format the scores of one split as one table in percent, with their conditions below.

    Args:
        scores: by (protocol, sentence rule), one column each.
    """
    columns = scores.values()
    rows = [["sentences", *(rule for _, rule in scores)]]
    for name in METRICS:
        rows.append([name, *(_percent(score.metrics[name]) for score in columns)])
    rows.append(["samples", *(f"{score.samples:,}" for score in columns)])

    if any(score.language_blind for score in columns):
        row = ["oIoU, shuffled"]
        for score in columns:
            blind = score.language_blind
            row.append("" if blind is None else _percent(blind.metrics["oIoU"]))
        rows.append(row)

    numbers = _format_columns(rows, ["protocol", *(protocol for protocol, _ in scores)])
    facts = _format_facts(_shared_facts(scores))
    return f"{numbers}\n\n{facts}"


def _format_columns(rows: list[list[str]], headers: list[str]) -> str:
    """Align a column of names on the left and columns of numbers on the right."""
    return tabulate(
        rows,
        headers,
        tablefmt="plain",
        disable_numparse=True,
        colalign=("left", *["right"] * (len(headers) - 1)),
    )


def _format_facts(facts: Iterable[tuple[str, str]]) -> str:
    return tabulate(list(facts), tablefmt="plain", disable_numparse=True)


def _shared_facts(scores: Mapping[Column, Score]) -> list[tuple[str, str]]:
    """One (heading, text) per condition; where scores differ, one per text with its columns."""
    columns = list(scores)
    facts = {column: score.facts() for column, score in scores.items()}
    headings = dict.fromkeys(heading for fact in facts.values() for heading in fact)
    headings.pop("protocol", None)

    lines = []
    for heading in headings:
        columns_of: dict[str, list[Column]] = {}
        for column in columns:
            if heading in facts[column]:
                columns_of.setdefault(facts[column][heading], []).append(column)
        for text, members in columns_of.items():
            lines.append((heading, text + _name_columns(members, columns)))
    return lines


def _name_columns(members: list[Column], columns: list[Column]) -> str:
    """Name some columns, by protocol or sentence rule alone where that is enough."""
    if members == columns:
        return ""

    for part in (0, 1):
        names = dict.fromkeys(member[part] for member in members)
        if members == [column for column in columns if column[part] in names]:
            return f"  [{', '.join(names)}]"
    return f"  [{', '.join(map(' '.join, members))}]"


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"


def _check_rows(rows: np.ndarray) -> np.ndarray:
    assert rows.dtype == np.int64 and rows.ndim == 2 and rows.shape[1] >= 3, (
        f"not int64 [n, 3 or more]: {rows.dtype} {rows.shape}"
    )
    pairs = [("intersection", 1)]
    if rows.shape[1] >= 5:
        pairs.append(("boundary intersection", 3))

    for what, column in pairs:
        intersection, union = rows[:, column], rows[:, column + 1]
        bad = np.flatnonzero((intersection < 0) | (intersection > union))
        if len(bad):
            first = bad[0]
            raise AssertionError(
                f"sample {rows[first, 0]}: {what} {intersection[first]} of union {union[first]}"
            )
    return rows


def _ratio(intersection: np.ndarray, union: np.ndarray, iou_rule: IouRule) -> np.ndarray:
    of_empty = 1.0 if iou_rule == "one" else 0.0
    return np.where(union > 0, intersection / np.maximum(union, 1), of_empty)


def _sums_by_image(rows: np.ndarray, clusters: np.ndarray, iou_rule: IouRule) -> np.ndarray:
    """Add up the rows of each image.

    Returns:
        float64 [images, 10] = (samples, I, U, IoU, five thresholds reached, bIoU). Integers are
        exact up to 2^53.
    """
    assert len(clusters) == len(rows), "one cluster id per row"
    columns = np.column_stack(
        [
            np.ones(len(rows)),
            rows[:, 1:3],
            ious(rows, iou_rule),
            reaches_thresholds(rows, iou_rule),
            boundary_ious(rows, iou_rule),
        ]
    )

    _, image = np.unique(clusters, return_inverse=True)
    sums = np.zeros((image.max() + 1, columns.shape[1]))
    np.add.at(sums, image, columns)
    return sums


def _bootstrap_totals(sums: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Draw all images with replacement `resamples` times, [images, k] -> totals [resamples, k]."""
    random = np.random.default_rng(seed)
    images = len(sums)

    totals = []
    for start in range(0, resamples, _RESAMPLES_AT_ONCE):
        size = min(_RESAMPLES_AT_ONCE, resamples - start)
        drawn = random.integers(images, size=(size, images))
        # Offset each resample's images, so that one bincount counts all of them.
        drawn += images * np.arange(size)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=size * images).reshape(size, images)
        totals.append(counts @ sums)
    return np.concatenate(totals)


def _metrics_of(totals: np.ndarray) -> np.ndarray:
    """Compute `METRICS` of each line of totals, [k, 10] -> [k, 8]."""
    samples, intersection, union = totals[:, 0], totals[:, 1], totals[:, 2]
    # Without any pixel there is nothing that a model could have got right.
    overall = _ratio(intersection, union, "zero")
    means = totals[:, 3:] / samples[:, None]
    return np.column_stack([overall, means])


def _percentile_intervals(resampled: np.ndarray) -> dict[str, tuple[float, float]]:
    """95 % intervals by metric name of [resamples, metrics]."""
    low, high = np.percentile(resampled, [2.5, 97.5], axis=0)
    return dict(zip(METRICS, zip(low.tolist(), high.tolist())))
