"""Scores from integers: oIoU, mIoU and P@X of (number, intersection, union) rows, and the `Score` that carries its protocol.

A row is one (image, sentence) sample: its number in the loader's table, and the pixels in the intersection and in the
union of prediction and truth. Rows stay int64 until the last division, so a score does not depend on the order or on
the machine that counted. The formulas are those of the field: oIoU = sum(I) / sum(U), mIoU = mean(I / U) and
P@X = share of samples with I / U >= X.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

TENTHS = (5, 6, 7, 8, 9)
METRICS = ("oIoU", "mIoU", *(f"P@0.{tenth}" for tenth in TENTHS))
Empty = Literal["one", "zero"]

_CHUNK = 100  # resamples drawn at a time: bounds the memory at 100 x clusters integers


def ious(rows: np.ndarray, empty: Empty = "one") -> np.ndarray:
    """I / U of each row, float64 [n].

    Args:
        rows: int64 [n, 3] = (number, intersection, union).
        empty: what an empty union counts as, where truth and prediction are both empty: "one", or "zero" (LAVT's rule).
    """
    _, inside, union = _checked(rows).T
    nothing = 1.0 if empty == "one" else 0.0
    return np.where(union > 0, inside / np.maximum(union, 1), nothing)


def hits(rows: np.ndarray, empty: Empty = "one") -> np.ndarray:
    """Bool [n, 5]: whether I / U >= 0.5, 0.6 … 0.9, decided on integers (0.7 is not a binary fraction; 7/10 is exact)."""
    _, inside, union = _checked(rows).T
    reached = inside[:, None] * 10 >= np.asarray(TENTHS) * union[:, None]
    return np.where(union[:, None] > 0, reached, empty == "one")


def summarize(rows: np.ndarray, bootstrap: int = 1000, seed: int = 0, clusters: np.ndarray | None = None,
              empty: Empty = "one") -> dict[str, Any]:
    """All metrics of some rows, with 95 % percentile bootstrap intervals.

    Args:
        rows: int64 [n, 3], n >= 1.
        bootstrap: resamples; 0 leaves the intervals out.
        clusters: [n] image id of each row. Sentences about one image are not independent, so whole images are drawn
            with replacement; without it every row is its own image, and the intervals come out too narrow.

    Returns:
        the `METRICS` by name, in 0 … 1, "samples", "images" and "intervals" {name: (low, high)}.
    """
    assert len(rows), "a score of no samples"
    tallies = _tallies(rows, np.arange(len(rows)) if clusters is None else clusters, empty)
    result: dict[str, Any] = dict(zip(METRICS, _scores(tallies.sum(axis=0, keepdims=True), empty)[0].tolist()))
    result |= {"samples": len(rows), "images": len(tallies), "intervals": {}}
    if bootstrap:
        resampled = _scores(_resample(tallies, bootstrap, seed), empty)  # [bootstrap, metrics]
        low, high = np.percentile(resampled, [2.5, 97.5], axis=0)
        result["intervals"] = {name: (float(a), float(b)) for name, a, b in zip(METRICS, low, high)}
    return result


def deduplicate(rows: np.ndarray, slack: float = 0.0) -> np.ndarray:
    """One row a sample, sorted by number; further columns are carried along.

    Ranks repeat a few samples to stay in step. A repeat must agree with the first.

    Args:
        slack: share of the union by which intersection and union of a repeat may differ: rounding on a GPU depends on
            the neighbors in the batch. 0 asks for equality.

    Raises:
        AssertionError: a sample was counted twice with different results; names the sample.
    """
    rows = rows[np.argsort(rows[:, 0], kind="stable")]
    first = np.diff(rows[:, 0], prepend=-1) != 0
    kept = rows[first]
    original = kept[np.cumsum(first) - 1]
    off = np.abs(rows - original)
    off[:, 1:3] -= np.minimum(off[:, 1:3], (slack * original[:, 2:3]).astype(np.int64))
    wrong = off.any(axis=1)
    if wrong.any():
        place = int(np.argmax(wrong))
        raise AssertionError(f"sample {rows[place, 0]} was scored twice with different results: "
                             f"{original[place, 1:].tolist()} and {rows[place, 1:].tolist()}")
    return kept


@dataclass(frozen=True)
class Score:
    """A result together with everything that must be known to compare it.

    Attributes:
        protocol: "ris-v1", "lavt" or "cris".
        metrics: the `METRICS` by name, 0 … 1.
        intervals: 95 % bootstrap intervals by metric name.
        samples, images: how many (image, sentence) samples were scored, on how many images.
        conditions: in words, printed as they stand: input, truth, prediction, threshold, sentences, sets, …
        fingerprint: of the data, hex.
        leak: whether training images were among the scored ones.
        language_blind: the same model on the same samples with the sentences shuffled among them.
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

    def to_json(self) -> dict[str, Any]:
        """A flat JSON object: metrics in 0 … 1 under their names, the protocol and its conditions beside them."""
        value: dict[str, Any] = dict(self.metrics)
        if self.language_blind is not None:
            value["language_blind_oIoU"] = self.language_blind.metrics["oIoU"]
        value |= {"protocol": self.protocol, "samples": self.samples, "images": self.images,
                  "intervals": {name: list(pair) for name, pair in self.intervals.items()},
                  "conditions": dict(self.conditions), "data_fingerprint": self.fingerprint, "leak": self.leak}
        if self.language_blind is not None:
            value["language_blind"] = self.language_blind.to_json()
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Score:
        """The inverse of `to_json`."""
        blind = value.get("language_blind")
        return cls(protocol=value["protocol"], metrics={name: value[name] for name in METRICS}, samples=value["samples"],
                   images=value["images"], intervals={name: (low, high) for name, (low, high) in value["intervals"].items()},
                   conditions=value["conditions"], fingerprint=value["data_fingerprint"], leak=value["leak"],
                   language_blind=None if blind is None else cls.from_json(blind))

    def facts(self) -> dict[str, str]:
        """The protocol in words, by heading: what `table` and the report print under the numbers."""
        return {"protocol": self.protocol, **self.conditions,
                "samples": f"{self.samples:,} (image, sentence) samples on {self.images:,} images",
                "data": self.fingerprint[:16] or "no fingerprint", "leak": self.leak}

    def table(self) -> str:
        """The score in percent as text, always with the protocol below it."""
        blind = self.language_blind
        lines = [f"{'':<8}{'score %':>9}{'95 % interval':>18}" + ("" if blind is None else f"{'language-blind':>17}")]
        for name, value in self.metrics.items():
            pair = self.intervals.get(name)
            interval = "" if pair is None else f"{100 * pair[0]:.2f} … {100 * pair[1]:.2f}"
            other = "" if blind is None else f"{100 * blind.metrics[name]:17.2f}"
            lines.append(f"{name:<8}{100 * value:9.2f}{interval:>18}{other}")
        facts = self.facts()
        width = max(map(len, facts)) + 2
        return "\n".join([*lines, "", *(f"{name:<{width}}{words}" for name, words in facts.items())])


def _checked(rows: np.ndarray) -> np.ndarray:
    assert rows.dtype == np.int64 and rows.ndim == 2 and rows.shape[1] == 3, f"not int64 [n, 3]: {rows.dtype} {rows.shape}"
    bad = rows[(rows[:, 1] < 0) | (rows[:, 1] > rows[:, 2])]
    assert not len(bad), f"sample {bad[0, 0]}: intersection {bad[0, 1]} of union {bad[0, 2]}"
    return rows


def _tallies(rows: np.ndarray, clusters: np.ndarray, empty: Empty) -> np.ndarray:
    """Sums over each image, float64 [images, 9] = (samples, I, U, IoU, five hits); integers are exact up to 2^53."""
    assert len(clusters) == len(rows), "one cluster id a row"
    columns = np.column_stack([np.ones(len(rows)), rows[:, 1:], ious(rows, empty), hits(rows, empty)])
    _, group = np.unique(clusters, return_inverse=True)
    sums = np.zeros((group.max() + 1, columns.shape[1]))
    np.add.at(sums, group, columns)
    return sums


def _resample(tallies: np.ndarray, times: int, seed: int) -> np.ndarray:
    """Totals of `times` draws of as many images with replacement, [times, 9]."""
    random, images = np.random.default_rng(seed), len(tallies)
    totals = []
    for start in range(0, times, _CHUNK):
        many = min(_CHUNK, times - start)
        drawn = random.integers(images, size=(many, images)) + images * np.arange(many)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=many * images).reshape(many, images)
        totals.append(counts @ tallies)
    return np.concatenate(totals)


def _scores(totals: np.ndarray, empty: Empty) -> np.ndarray:
    """`METRICS` of each line of totals, [k, 9] -> [k, 7]."""
    samples, inside, union = totals[:, 0], totals[:, 1], totals[:, 2]
    nothing = 1.0 if empty == "one" else 0.0
    overall = np.where(union > 0, inside / np.maximum(union, 1), nothing)
    return np.column_stack([overall, totals[:, 3:] / samples[:, None]])
