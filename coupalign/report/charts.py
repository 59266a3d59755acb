"""The curves of a run: points from the journal, drawn as SVG."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import cycle
from pathlib import Path

from coupalign.tracking.journal import read_journal

Points = list[tuple[float, float]]

_COLORS = ("#2563a8", "#c2571a", "#2f8a4c", "#8a4fa3", "#a8862a", "#4b5563")
_LOSSES = ("train/loss", "train/mask", "train/dice", "train/contrast")
_SCORES = ("oIoU", "mIoU", "P@0.5", "P@0.7", "P@0.9")
_LEGEND_COLUMNS = 4
_LARGEST = 1e30


def read_curves(journal: Path) -> dict[str, Points]:
    """Read the finite (step, value) points of each metric, sorted by step, from metrics.jsonl.

    Empty if there is no such file.
    """
    curves: dict[str, dict[float, float]] = {}
    for row, _ in read_journal(journal):
        for name, value in row.metrics.items():
            # A number that no loss or score can have would leave no room for the others.
            if abs(value) < _LARGEST:
                curves.setdefault(name, {})[row.step] = value
    return {name: sorted(points.items()) for name, points in curves.items()}


def curve_section(curves: Mapping[str, Points]) -> str:
    """Draw the losses of training and the scores of each split; empty if there are none."""
    charts = []
    losses = {name.removeprefix("train/"): curves[name] for name in _LOSSES if name in curves}
    if losses:
        charts.append(line_chart(losses, "Training loss by step"))

    for split in _scored_splits(curves):
        scores = {}
        for metric in _SCORES:
            name = f"eval/{split}/{metric}"
            if name in curves:
                scores[metric] = [(step, 100 * value) for step, value in curves[name]]
        charts.append(line_chart(scores, f"Score on {split} by step, %", marks=True))

    if not charts:
        return ""
    return f'<section><h2>Curves</h2><div class="charts">{"".join(charts)}</div></section>'


def line_chart(
    series: Mapping[str, Points],
    title: str,
    *,
    marks: bool = False,
    width: int = 520,
    height: int = 280,
) -> str:
    """Draw (step, value) series as an SVG of lines, with the last value of each in the legend.

    Args:
        marks: put a dot on each point.

    A series of more than 200 points is shown as the means of up to 200 stretches of steps.
    """
    series = {name: points for name, points in series.items() if points}
    if not series:
        return ""
    lines = [_thin(points) for points in series.values()]
    plot = _Plot.around(lines, width, height)

    # Title and axes below, then the lines, then the legend.
    parts = [f'<text class="name" x="{plot.left}" y="18">{escape(title)}</text>']
    parts += _axes(plot)
    for color, points in zip(cycle(_COLORS), lines):
        corners = [plot.to_pixels(x, y) for x, y in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{color}" '
            'stroke-width="1.8" stroke-linejoin="round"/>'
        )
        if marks or len(corners) == 1:
            for x, y in corners:
                parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" fill="{color}"/>')

    last_values = {name: points[-1][1] for name, points in series.items()}
    parts += _legend(last_values, plot.left, height - plot.bottom + 34)
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg>"
    )


@dataclass(frozen=True, kw_only=True)
class _Plot:
    """The axes of a chart: its size, its margins and the ticks in data units."""

    width: int
    height: int
    left: int = 46
    right: int = 26
    top: int = 34
    bottom: int
    x_ticks: Sequence[float]
    y_ticks: Sequence[float]

    @classmethod
    def around(cls, lines: Sequence[Points], width: int, height: int) -> _Plot:
        """Choose axes that hold all points and zero."""
        xs = [x for points in lines for x, _ in points]
        ys = [y for points in lines for _, y in points]
        return cls(
            width=width,
            height=height,
            # A legend of more than one row needs more room.
            bottom=48 if len(lines) <= _LEGEND_COLUMNS else 64,
            x_ticks=_ticks(0, max(xs)),
            y_ticks=_ticks(min(0, *ys), max(ys)),
        )

    def to_pixels(self, x: float, y: float) -> tuple[float, float]:
        xs, ys = self.x_ticks, self.y_ticks
        x_share = (x - xs[0]) / (xs[-1] - xs[0])
        y_share = (y - ys[0]) / (ys[-1] - ys[0])

        # SVG counts y from the top.
        across = self.left + x_share * (self.width - self.left - self.right)
        down = self.height - self.bottom - y_share * (self.height - self.top - self.bottom)
        return across, down


def _scored_splits(curves: Mapping[str, Points]) -> list[str]:
    """Splits with a metric eval/<split>/<metric>, in the order of the curves."""
    splits = []
    for name in curves:
        first, *rest = name.split("/")
        if first == "eval" and len(rest) == 2 and rest[0] not in splits:
            splits.append(rest[0])
    return splits


def _axes(plot: _Plot) -> Iterator[str]:
    """Draw a rule and a label per tick on the left, and a label per tick at the bottom."""
    for y in plot.y_ticks:
        x1, down = plot.to_pixels(plot.x_ticks[0], y)
        x2, _ = plot.to_pixels(plot.x_ticks[-1], y)
        yield f'<line class="rule" x1="{x1:.1f}" x2="{x2:.1f}" y1="{down:.1f}" y2="{down:.1f}"/>'
        yield f'<text x="{x1 - 6:.1f}" y="{down + 4:.1f}" text-anchor="end">{y:g}</text>'

    for x in plot.x_ticks:
        across, down = plot.to_pixels(x, plot.y_ticks[0])
        yield f'<text x="{across:.1f}" y="{down + 16:.1f}" text-anchor="middle">{x:,g}</text>'


def _legend(last_values: Mapping[str, float], left: float, top: float) -> Iterator[str]:
    for index, (color, name) in enumerate(zip(cycle(_COLORS), last_values)):
        row, column = divmod(index, _LEGEND_COLUMNS)
        x, y = left + 116 * column, top + 16 * row
        yield f'<rect x="{x}" y="{y - 8}" width="10" height="10" rx="2" fill="{color}"/>'
        yield f'<text x="{x + 15}" y="{y + 1}">{escape(name)} {last_values[name]:.4g}</text>'


def _thin(points: Points, limit: int = 200) -> Points:
    """Average equal numbers of neighboring points, so that at most `limit` are left."""
    size = math.ceil(len(points) / limit)
    means = []
    for start in range(0, len(points), size):
        xs, ys = zip(*points[start : start + size])
        count = len(xs)
        means.append((sum(xs) / count, sum(ys) / count))
    return means


def _ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Choose round, evenly spaced numbers from at most `low` to at least `high`.

    They are 1, 2 or 5 times a power of ten apart.
    """
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / about))
    for factor in (1, 2, 5, 10):
        spacing = factor * power
        if spacing >= span / about:
            break

    # Border values are ticks themselves, even if they are a rounding error off.
    first = math.floor(low / spacing + 1e-9)
    last = max(first + 1, math.ceil(high / spacing - 1e-9))
    return [round(index * spacing, 12) for index in range(first, last + 1)]
