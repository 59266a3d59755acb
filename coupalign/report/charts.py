"""The curves of a run: points from the journal, drawn as SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path

from coupalign.tracking.journal import read_journal

Points = list[tuple[float, float]]

_COLORS = ("#2563a8", "#c2571a", "#2f8a4c", "#8a4fa3", "#a8862a", "#4b5563")
_LOSSES = ("train/loss", "train/mask", "train/dice", "train/contrast")
_SCORES = ("oIoU", "mIoU", "P@0.5", "P@0.7", "P@0.9")


def read_curves(journal: Path) -> dict[str, Points]:
    """Finite (step, value) points by metric name, sorted by step, from metrics.jsonl; empty where there is none."""
    curves: dict[str, dict[float, float]] = {}
    for row, _ in read_journal(journal):
        for name, value in row.metrics.items():
            if math.isfinite(value):
                curves.setdefault(name, {})[row.step] = value
    return {name: sorted(points.items()) for name, points in curves.items()}


def curve_section(curves: Mapping[str, Points]) -> str:
    """The losses of training, and the scores of each split."""
    losses = {name.removeprefix("train/"): curves[name] for name in _LOSSES if name in curves}
    charts = [line_chart(losses, "Training loss by step")] if losses else []
    splits = dict.fromkeys(
        name.split("/")[1] for name in curves if name.startswith("eval/") and name.count("/") == 2
    )
    for split in splits:
        shown = {
            metric: [(step, 100 * value) for step, value in curves[f"eval/{split}/{metric}"]]
            for metric in _SCORES
            if f"eval/{split}/{metric}" in curves
        }
        charts.append(line_chart(shown, f"Score on {split} by step, %", marks=True))
    return (
        f'<section><h2>Curves</h2><div class="charts">{"".join(charts)}</div></section>'
        if charts
        else ""
    )


def line_chart(
    series: Mapping[str, Points],
    title: str,
    marks: bool = False,
    width: int = 520,
    height: int = 280,
) -> str:
    """An SVG of lines over steps, each (step, value) series in its color, with its last value in the legend.

    Long series are shown as the means of up to 200 stretches of steps; `marks` puts a dot on each point.
    """
    lines = {name: _thinned(points) for name, points in series.items() if points}
    everything = [point for points in lines.values() for point in points]
    if not everything:
        return ""
    left, right, top, bottom = 46, 26, 34, 48 if len(lines) < 5 else 64
    xs, ys = (
        _ticks(0, max(x for x, _ in everything)),
        _ticks(min(0, *(y for _, y in everything)), max(y for _, y in everything)),
    )

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            left + (x - xs[0]) / (xs[-1] - xs[0]) * (width - left - right),
            height - bottom - (y - ys[0]) / (ys[-1] - ys[0]) * (height - top - bottom),
        )

    parts = [f'<text class="name" x="{left}" y="18">{escape(title)}</text>', *_axes(xs, ys, place)]
    for color, points in zip(_cycle(_COLORS), lines.values()):
        corners = [place(x, y) for x, y in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.8" stroke-linejoin="round"/>'
        )
        if marks or len(corners) == 1:
            parts += [
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" fill="{color}"/>' for x, y in corners
            ]
    parts += _legend(
        {name: points[-1][1] for name, points in series.items() if points},
        left,
        height - bottom + 34,
    )
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'


def _axes(
    xs: Sequence[float], ys: Sequence[float], place: Callable[[float, float], tuple[float, float]]
) -> Iterator[str]:
    for y in ys:
        (x0, height), (x1, _) = place(xs[0], y), place(xs[-1], y)
        yield f'<line class="rule" x1="{x0:.1f}" x2="{x1:.1f}" y1="{height:.1f}" y2="{height:.1f}"/>'
        yield f'<text x="{x0 - 6:.1f}" y="{height + 4:.1f}" text-anchor="end">{y:g}</text>'
    for x in xs:
        across, height = place(x, ys[0])
        yield f'<text x="{across:.1f}" y="{height + 16:.1f}" text-anchor="middle">{x:,g}</text>'


def _legend(last: Mapping[str, float], left: float, top: float) -> Iterator[str]:
    for place, (color, (name, value)) in enumerate(zip(_cycle(_COLORS), last.items())):
        x, y = left + 116 * (place % 4), top + 16 * (place // 4)
        yield f'<rect x="{x}" y="{y - 8}" width="10" height="10" rx="2" fill="{color}"/>'
        yield f'<text x="{x + 15}" y="{y + 1}">{escape(name)} {value:.4g}</text>'


def _cycle(colors: Sequence[str]) -> Iterator[str]:
    while True:
        yield from colors


def _thinned(points: Points, most: int = 200) -> Points:
    """Means of equal numbers of neighboring points, at most `most` of them."""
    size = -(-len(points) // most)
    stretches = [points[start : start + size] for start in range(0, len(points), size)]
    return [
        (sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part))
        for part in stretches
    ]


def _ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers, evenly spaced, from at most `low` to at least `high`: steps of 1, 2 or 5 times a power of ten."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / about))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= span / about)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(place * step, 12) for place in range(first, max(last, first + 1) + 1)]
