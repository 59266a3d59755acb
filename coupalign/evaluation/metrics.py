"""Scores from integers: oIoU, mIoU, P@X and bIoU of rows of counted pixels, and the `Score` that carries its protocol.

A row is one (image, sentence) sample: (number, I, U, bI, bU), its number in the loader's table, the pixels in the
intersection and in the union of prediction and truth, and the same of their boundary bands (`protocols.boundary`). Rows stay
int64 until the last division, so a score does not depend on the order or on the machine that counted. The formulas are those
of the field: oIoU = sum(I) / sum(U), mIoU = mean(I / U), P@X = share of samples with I / U >= X, bIoU = mean(bI / bU), the
Boundary IoU of Cheng et al., CVPR 2021.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

TENTHS = (5, 6, 7, 8, 9)
METRICS = ("oIoU", "mIoU", *(f"P@0.{tenth}" for tenth in TENTHS), "bIoU")
Empty = Literal["one", "zero"]

_CHUNK = 100  # resamples drawn at a time: bounds the memory at 100 x clusters integers


def ious(rows: np.ndarray, empty: Empty = "one") -> np.ndarray:
    """I / U of each row, float64 [n].

    Args:
        rows: int64 [n, 3 or more] = (number, intersection, union, …).
        empty: what an empty union counts as, where truth and prediction are both empty: "one", or "zero" (LAVT's rule).
    """
    return _ratios(*_checked(rows)[:, 1:3].T, empty)


def boundary_ious(rows: np.ndarray, empty: Empty = "one") -> np.ndarray:
    """bI / bU of each row int64 [n, 5 or more], float64 [n]; a band is empty only where its mask is."""
    return _ratios(*_checked(rows)[:, 3:5].T, empty)


def hits(rows: np.ndarray, empty: Empty = "one") -> np.ndarray:
    """Bool [n, 5]: whether I / U >= 0.5, 0.6 … 0.9, decided on integers (0.7 is not a binary fraction; 7/10 is exact)."""
    inside, union = _checked(rows)[:, 1:3].T
    reached = inside[:, None] * 10 >= np.asarray(TENTHS) * union[:, None]
    return np.where(union[:, None] > 0, reached, empty == "one")


def summarize(
    rows: np.ndarray,
    bootstrap: int = 1000,
    seed: int = 0,
    clusters: np.ndarray | None = None,
    empty: Empty = "one",
) -> dict[str, Any]:
    """All metrics of some rows, with 95 % percentile bootstrap intervals.

    Args:
        rows: int64 [n, 5], n >= 1.
        bootstrap: resamples; 0 leaves the intervals out.
        clusters: [n] image id of each row. Sentences about one image are not independent, so whole images are drawn
            with replacement; without it every row is its own image, and the intervals come out too narrow.

    Returns:
        the `METRICS` by name, in 0 … 1, "samples", "images" and "intervals" {name: (low, high)}.
    """
    assert len(rows), "a score of no samples"
    tallies = _tallies(rows, np.arange(len(rows)) if clusters is None else clusters, empty)
    result: dict[str, Any] = dict(
        zip(METRICS, _scores(tallies.sum(axis=0, keepdims=True), empty)[0].tolist())
    )
    result |= {"samples": len(rows), "images": len(tallies), "intervals": {}}
    if bootstrap:
        resampled = _scores(_resample(tallies, bootstrap, seed), empty)  # [bootstrap, metrics]
        low, high = np.percentile(resampled, [2.5, 97.5], axis=0)
        result["intervals"] = {name: (float(a), float(b)) for name, a, b in zip(METRICS, low, high)}
    return result


def paired_intervals(
    rows: np.ndarray,
    others: np.ndarray,
    bootstrap: int = 1000,
    seed: int = 0,
    clusters: np.ndarray | None = None,
    empty: Empty = "one",
) -> dict[str, tuple[float, float]]:
    """95 % percentile bootstrap intervals of (metric of `others`) - (metric of `rows`), by metric name.

    Row k of both is the same sample; every resample draws the same whole images for both.

    Args:
        rows, others: int64 [n, 5], n >= 1.
        bootstrap, clusters: as in `summarize`; bootstrap >= 1.
    """
    assert len(rows) == len(others) > 0 and bootstrap
    images = np.arange(len(rows)) if clusters is None else clusters
    # the draws depend on the seed and on the number of images only: they are the same for both
    before, after = (
        _scores(_resample(_tallies(part, images, empty), bootstrap, seed), empty)
        for part in (rows, others)
    )
    low, high = np.percentile(after - before, [2.5, 97.5], axis=0)
    return {name: (float(a), float(b)) for name, a, b in zip(METRICS, low, high)}


def deduplicate(rows: np.ndarray, slack: float = 0.0) -> np.ndarray:
    """One row a sample, sorted by number; further columns are carried along.

    Ranks repeat a few samples to stay in step. A repeat must agree with the first.

    Args:
        rows: int64 [n, 5 or more].
        slack: share of the union by which intersection and union of a repeat may differ: rounding on a GPU depends on
            the neighbors in the batch. One pixel can move a whole stretch of a boundary band, so with any slack the bands are
            not compared. 0 asks for equality.

    Raises:
        AssertionError: a sample was counted twice with different results; names the sample.
    """
    rows = rows[np.argsort(rows[:, 0], kind="stable")]
    first = np.diff(rows[:, 0], prepend=-1) != 0
    kept = rows[first]
    original = kept[np.cumsum(first) - 1]
    off = np.abs(rows - original)
    off[:, 1:3] -= np.minimum(off[:, 1:3], (slack * original[:, 2:3]).astype(np.int64))
    if slack:
        off[:, 3:5] = 0
    wrong = off.any(axis=1)
    if wrong.any():
        place = int(np.argmax(wrong))
        raise AssertionError(
            f"sample {rows[place, 0]} was scored twice with different results: "
            f"{original[place, 1:].tolist()} and {rows[place, 1:].tolist()}"
        )
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
        """A flat JSON object: metrics in 0 … 1 under their names, the protocol and its conditions beside them."""
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
        """The inverse of `to_json`."""
        blind = value.get("language_blind")
        return cls(
            protocol=value["protocol"],
            metrics={name: value[name] for name in METRICS},
            samples=value["samples"],
            images=value["images"],
            intervals={name: (low, high) for name, (low, high) in value["intervals"].items()},
            conditions=value["conditions"],
            fingerprint=value["data_fingerprint"],
            leak=value["leak"],
            language_blind=None if blind is None else cls.from_json(blind),
            sentences=value["sentences"],
        )

    def facts(self) -> dict[str, str]:
        """The protocol in words, by heading: what `table` and the report print under the numbers."""
        return {
            "protocol": self.protocol,
            **self.conditions,
            "samples": f"{self.samples:,} (image, sentence) samples on {self.images:,} images",
            "data": self.fingerprint[:16] or "no fingerprint",
            "leak": self.leak,
        }

    def table(self) -> str:
        """The score in percent as text, always with the protocol below it."""
        blind = self.language_blind
        lines = [
            f"{'':<8}{'score %':>9}{'95 % interval':>18}"
            + ("" if blind is None else f"{'language-blind':>17}")
        ]
        for name, value in self.metrics.items():
            pair = self.intervals.get(name)
            interval = "" if pair is None else f"{100 * pair[0]:.2f} … {100 * pair[1]:.2f}"
            other = "" if blind is None else f"{100 * blind.metrics[name]:17.2f}"
            lines.append(f"{name:<8}{100 * value:9.2f}{interval:>18}{other}")
        facts = self.facts()
        width = max(map(len, facts)) + 2
        return "\n".join(
            [*lines, "", *(f"{name:<{width}}{words}" for name, words in facts.items())]
        )


def side_by_side(scores: Mapping[tuple[str, str], Score]) -> str:
    """Scores of one split by (protocol, sentence rule) as one table in percent, a column each, with their conditions below."""
    cells = [
        ["protocol", *(protocol for protocol, _ in scores)],
        ["sentences", *(rule for _, rule in scores)],
        *(
            [name, *(f"{100 * score.metrics[name]:.2f}" for score in scores.values())]
            for name in METRICS
        ),
        ["samples", *(f"{score.samples:,}" for score in scores.values())],
    ]
    if any(score.language_blind for score in scores.values()):
        blind = [score.language_blind for score in scores.values()]
        cells.append(
            [
                "oIoU, shuffled",
                *("" if one is None else f"{100 * one.metrics['oIoU']:.2f}" for one in blind),
            ]
        )
    wide = max(len(cell) for line in cells for cell in line[1:]) + 2
    lines = [f"{line[0]:<16}" + "".join(f"{cell:>{wide}}" for cell in line[1:]) for line in cells]
    return "\n".join([*lines, "", *_shared_facts(scores)])


def _shared_facts(scores: Mapping[tuple[str, str], Score]) -> list[str]:
    """A line a condition; where the scores differ in it, a line for each wording with the columns it belongs to."""
    lines = []
    for heading in dict.fromkeys(
        heading for score in scores.values() for heading in score.facts() if heading != "protocol"
    ):
        wordings: dict[str, list[tuple[str, str]]] = {}
        for key, score in scores.items():
            if (words := score.facts().get(heading)) is not None:
                wordings.setdefault(words, []).append(key)
        lines += [
            f"{heading:<12}{words}{_whose(keys, list(scores))}" for words, keys in wordings.items()
        ]
    return lines


def _whose(keys: list[tuple[str, str]], columns: list[tuple[str, str]]) -> str:
    """Some of the columns in few words: their protocols or their rules alone, where that says which they are."""
    if keys == columns:
        return ""
    for place in (0, 1):
        named = dict.fromkeys(key[place] for key in keys)
        if keys == [key for key in columns if key[place] in named]:
            return f"  [{', '.join(named)}]"
    return f"  [{', '.join(map(' '.join, keys))}]"


def _checked(rows: np.ndarray) -> np.ndarray:
    assert rows.dtype == np.int64 and rows.ndim == 2 and rows.shape[1] >= 3, (
        f"not int64 [n, 3 or more]: {rows.dtype} {rows.shape}"
    )
    for first, what in zip(
        range(1, rows.shape[1] - 1, 2), ("intersection", "boundary intersection")
    ):
        inside, union = rows[:, first : first + 2].T
        bad = np.flatnonzero((inside < 0) | (inside > union))
        assert not len(bad), (
            f"sample {rows[bad[0], 0]}: {what} {inside[bad[0]]} of union {union[bad[0]]}"
        )
    return rows


def _ratios(inside: np.ndarray, union: np.ndarray, empty: Empty) -> np.ndarray:
    return np.where(union > 0, inside / np.maximum(union, 1), 1.0 if empty == "one" else 0.0)


def _tallies(rows: np.ndarray, clusters: np.ndarray, empty: Empty) -> np.ndarray:
    """Sums over each image, float64 [images, 10] = (samples, I, U, IoU, five hits, bIoU); integers are exact up to 2^53."""
    assert len(clusters) == len(rows), "one cluster id a row"
    columns = np.column_stack(
        [
            np.ones(len(rows)),
            rows[:, 1:3],
            ious(rows, empty),
            hits(rows, empty),
            boundary_ious(rows, empty),
        ]
    )
    _, group = np.unique(clusters, return_inverse=True)
    sums = np.zeros((group.max() + 1, columns.shape[1]))
    np.add.at(sums, group, columns)
    return sums


def _resample(tallies: np.ndarray, times: int, seed: int) -> np.ndarray:
    """Totals of `times` draws of as many images with replacement, [images, k] -> [times, k]."""
    random, images = np.random.default_rng(seed), len(tallies)
    totals = []
    for start in range(0, times, _CHUNK):
        many = min(_CHUNK, times - start)
        drawn = random.integers(images, size=(many, images)) + images * np.arange(many)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=many * images).reshape(many, images)
        totals.append(counts @ tallies)
    return np.concatenate(totals)


def _scores(totals: np.ndarray, empty: Empty) -> np.ndarray:
    """`METRICS` of each line of totals, [k, 10] -> [k, 8]."""
    samples, inside, union = totals[:, 0], totals[:, 1], totals[:, 2]
    return np.column_stack([_ratios(inside, union, empty), totals[:, 3:] / samples[:, None]])
