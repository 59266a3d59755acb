"""The page of a run: scores with their protocol, curves, pictures, configuration, in one HTML file that needs nothing else.

Read from the run directory:

    score.json, scores/*.json     what was scored
    metrics.jsonl                 the curves
    pictures/<split>/             best, median, worst and random samples
    config.yaml                   the configuration

No script, no network, no file beside it: pictures are embedded, curves are drawn as SVG.
"""
from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from coupalign.errors import InputError
from coupalign.evaluation.metrics import Score
from coupalign.evaluation.pictures import read_pictures
from coupalign.evaluation.protocols import PROTOCOLS
from coupalign.files import whole_file
from coupalign.tracking.base import JOURNAL, read_rows

Points = list[tuple[float, float]]

_COLORS = ("#2563a8", "#c2571a", "#2f8a4c", "#8a4fa3", "#a8862a", "#4b5563")
_LOSSES = ("train/loss", "train/mask", "train/dice", "train/contrast")
_SCORES = ("oIoU", "mIoU", "P@0.5", "P@0.7", "P@0.9")
_GROUPS = {"best": "Best", "median": "Around the median", "worst": "Worst", "random": "Drawn at random"}
_EMBEDDED_WIDTH = 1100     # pixels; wider pictures are reduced
_PNG_PIXELS = 200_000      # larger pictures are embedded as JPEG


def report_run(run: Path) -> Path:
    """Write <run>/report.html from what lies in a run directory; returns its path.

    Raises:
        InputError: there is no score in the directory.
    """
    scores = read_scores(run)
    pictures = {folder.name: folder for folder in sorted((run / "pictures").glob("*/"))}
    config = run / "config.yaml"
    text = config.read_text(encoding="utf-8") if config.is_file() else None
    return write_report(run / "report.html", run.resolve().name, scores, read_curves(run / JOURNAL), pictures, text)


def write_report(path: Path, title: str, scores: Mapping[str, Score], curves: Mapping[str, Points],
                 pictures: Mapping[str, Path], config: str | None = None) -> Path:
    """Write the page.

    Args:
        scores: by split.
        curves: (step, value) points by metric name, see `read_curves`.
        pictures: folders of `keep_pictures` by split.
        config: YAML text, shown as it stands.
    """
    body = [_header(title, scores), *(_score_section(name, score) for name, score in scores.items()), _curve_section(curves),
            *(_picture_section(split, folder) for split, folder in pictures.items()), _config_section(config)]
    with whole_file(path, "w") as file:
        file.write(_PAGE.format(title=escape(title), style=_STYLE, body="\n".join(filter(None, body))))
    return path


# ---------------------------------------------------------------------------------------------------- what is read


def read_scores(run: Path) -> dict[str, Score]:
    """The scores of a run by "<split>" or, under another protocol than the first, "<split> (<protocol>)"; ris-v1 comes first.

    A score of `coupalign eval` (scores/<split>-<protocol>.json) stands for the one taken in training (scores/<split>.json).

    Raises:
        InputError: there is none, or a file is damaged.
    """
    files = sorted((run / "scores").glob("*.json"), key=lambda file: (len(file.stem), file.stem))
    found: dict[tuple[str, str], Score] = {}
    for file in files or [file for file in [run / "score.json"] if file.is_file()]:
        value = _read_json(file)
        try:
            score = Score.from_json(value)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{file}: not a score of this version ({error!r}); run `coupalign eval` again") from None
        split = value.get("split") or file.stem.removesuffix(f"-{score.protocol}")
        found[str(split), score.protocol] = score
    if not found:
        raise InputError(f"{run}: no scores here; run `coupalign eval {run}` first")
    order = list(PROTOCOLS)
    ranked = sorted(found.items(), key=lambda item: order.index(item[0][1]) if item[0][1] in order else len(order))
    first = ranked[0][0][1]
    return {split if protocol == first else f"{split} ({protocol})": score for (split, protocol), score in ranked}


def read_curves(journal: Path) -> dict[str, Points]:
    """Finite (step, value) points by metric name, sorted by step, from metrics.jsonl; empty where there is none."""
    curves: dict[str, dict[float, float]] = {}
    for row, _ in read_rows(journal):
        for name, value in row.metrics.items():
            if math.isfinite(value):
                curves.setdefault(name, {})[row.step] = value
    return {name: sorted(points.items()) for name, points in curves.items()}


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{file}: an object is expected, found {type(value).__name__}")
    return value


# ------------------------------------------------------------------------------------------------------- sections


def _header(title: str, scores: Mapping[str, Score]) -> str:
    split, score = next(iter(scores.items()))
    numbers = [("oIoU", score.metrics["oIoU"]), ("mIoU", score.metrics["mIoU"]), ("P@0.5", score.metrics["P@0.5"])]
    if score.language_blind is not None:
        numbers.append(("oIoU with shuffled sentences", score.language_blind.metrics["oIoU"]))
    tiles = "".join(f'<div class="tile"><b>{_percent(value)}</b><span>{escape(name)}</span></div>' for name, value in numbers)
    words = f"{split}, protocol {score.protocol}, {score.samples:,} samples, in percent"
    return f'<header><h1>{escape(title)}</h1><div class="tiles">{tiles}</div><p class="quiet">{escape(words)}</p></header>'


def _score_section(name: str, score: Score) -> str:
    blind = score.language_blind
    head = "<th></th><th>score</th><th>95 % interval</th>" + ("" if blind is None else "<th>language-blind</th>")
    lines = []
    for metric, value in score.metrics.items():
        pair = score.intervals.get(metric)
        interval = "" if pair is None else f"{_percent(pair[0])} … {_percent(pair[1])}"
        other = "" if blind is None else f"<td>{_percent(blind.metrics[metric])}</td>"
        lines.append(f"<tr><th>{escape(metric)}</th><td><b>{_percent(value)}</b></td><td>{interval}</td>{other}</tr>")
    note = "" if blind is None else ('<p class="quiet">Language-blind: the same model on the same samples with the sentences '
                                     'shuffled among them. The difference is what the model gets from reading.</p>')
    facts = "".join(f"<dt>{escape(head)}</dt><dd>{escape(words)}</dd>" for head, words in score.facts().items())
    table = f"<table><tr>{head}</tr>{''.join(lines)}</table>"
    columns = f'<div class="columns"><div>{table}{note}</div><dl>{facts}</dl></div>'
    return f"<section><h2>Score: {escape(name)}</h2>{columns}</section>"


def _curve_section(curves: Mapping[str, Points]) -> str:
    losses = {name.removeprefix("train/"): curves[name] for name in _LOSSES if name in curves}
    charts = [line_chart(losses, "Training loss by step")] if losses else []
    splits = dict.fromkeys(name.split("/")[1] for name in curves if name.startswith("eval/") and name.count("/") == 2)
    for split in splits:
        shown = {metric: [(step, 100 * value) for step, value in curves[f"eval/{split}/{metric}"]]
                 for metric in _SCORES if f"eval/{split}/{metric}" in curves}
        charts.append(line_chart(shown, f"Score on {split} by step, %", marks=True))
    return f'<section><h2>Curves</h2><div class="charts">{"".join(charts)}</div></section>' if charts else ""


def _picture_section(split: str, folder: Path) -> str:
    groups = read_pictures(folder)
    parts = []
    for group in [*filter(groups.__contains__, _GROUPS), *(set(groups) - set(_GROUPS))]:
        cards = "".join(
            f'<figure><img alt="" src="{_embedded(folder / entry["file"])}"><figcaption><q>{escape(entry["sentence"])}</q>'
            f'<span>IoU {_percent(entry["iou"])}</span><small>{escape(entry["name"])}</small></figcaption></figure>'
            for entry in groups[group])
        parts.append(f'<h3>{escape(_GROUPS.get(group, group))}</h3><div class="grid">{cards}</div>')
    note = "Image, truth, prediction, difference. Best and worst are those of the samples that the first rank scored."
    return f'<section><h2>Predictions: {escape(split)}</h2><p class="quiet">{note}</p>{"".join(parts)}</section>' if parts else ""


def _config_section(text: str | None) -> str:
    if text is None:
        return ""
    return f"<section><h2>Configuration</h2><details><summary>config.yaml</summary><pre>{escape(text)}</pre></details></section>"


# --------------------------------------------------------------------------------------------------------- drawing


def line_chart(series: Mapping[str, Points], title: str, marks: bool = False, width: int = 520, height: int = 280) -> str:
    """An SVG of lines over steps, each (step, value) series in its color, with its last value in the legend.

    Long series are shown as the means of up to 200 stretches of steps; `marks` puts a dot on each point.
    """
    lines = {name: _thinned(points) for name, points in series.items() if points}
    everything = [point for points in lines.values() for point in points]
    if not everything:
        return ""
    left, right, top, bottom = 46, 26, 34, 48 if len(lines) < 5 else 64
    xs, ys = _ticks(0, max(x for x, _ in everything)), _ticks(min(0, *(y for _, y in everything)), max(y for _, y in everything))

    def place(x: float, y: float) -> tuple[float, float]:
        return (left + (x - xs[0]) / (xs[-1] - xs[0]) * (width - left - right),
                height - bottom - (y - ys[0]) / (ys[-1] - ys[0]) * (height - top - bottom))

    parts = [f'<text class="name" x="{left}" y="18">{escape(title)}</text>', *_axes(xs, ys, place)]
    for color, points in zip(_cycle(_COLORS), lines.values()):
        corners = [place(x, y) for x, y in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.8" stroke-linejoin="round"/>')
        if marks or len(corners) == 1:
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" fill="{color}"/>' for x, y in corners]
    parts += _legend({name: points[-1][1] for name, points in series.items() if points}, left, height - bottom + 34)
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'


def _axes(xs: Sequence[float], ys: Sequence[float], place: Callable[[float, float], tuple[float, float]]) -> Iterator[str]:
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
    stretches = [points[start:start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in stretches]


def _ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers, evenly spaced, from at most `low` to at least `high`: steps of 1, 2 or 5 times a power of ten."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / about))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= span / about)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(place * step, 12) for place in range(first, max(last, first + 1) + 1)]


def _embedded(file: Path) -> str:
    """A picture as a data URL: reduced where it is wide, JPEG where it is large."""
    with Image.open(file) as opened:
        picture = opened.convert("RGB")
    if picture.width > _EMBEDDED_WIDTH:
        picture = picture.resize((_EMBEDDED_WIDTH, max(1, round(picture.height * _EMBEDDED_WIDTH / picture.width))))
    kind = "png" if picture.width * picture.height <= _PNG_PIXELS else "jpeg"
    stream = io.BytesIO()
    picture.save(stream, kind, **({"quality": 88} if kind == "jpeg" else {}))
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"


_STYLE = """
:root { color-scheme: light }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1120px; padding: 32px 24px 64px; background: #fff; color: #1c2733;
       font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif }
h1 { margin: 0 0 16px; font-size: 28px } h2 { margin: 40px 0 12px; font-size: 20px } h3 { margin: 20px 0 8px; font-size: 15px }
.quiet { margin: 8px 0; color: #5c6b7a; font-size: 13px }
.tiles { display: flex; flex-wrap: wrap; gap: 12px }
.tile { min-width: 130px; padding: 12px 18px; border: 1px solid #dde3ea; border-radius: 8px; background: #f7f9fb }
.tile b { display: block; font-size: 26px; font-variant-numeric: tabular-nums } .tile span { color: #5c6b7a; font-size: 13px }
.columns { display: grid; grid-template-columns: minmax(300px, 5fr) 6fr; gap: 32px; align-items: start }
@media (max-width: 760px) { .columns { grid-template-columns: 1fr } }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: 5px 8px; border-bottom: 1px solid #e6ebf0; text-align: right; font-weight: normal; white-space: nowrap }
tr:first-child th { color: #5c6b7a; font-size: 13px } th:first-child { text-align: left } td b { font-weight: 650 }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 3px 16px; margin: 0; font-size: 13px }
dt { color: #5c6b7a } dd { margin: 0; overflow-wrap: anywhere }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 16px }
svg { width: 100%; border: 1px solid #dde3ea; border-radius: 8px } svg text { font-size: 11px; fill: #44525f }
svg .name { font-size: 13px; font-weight: 600; fill: #1c2733 } svg .rule { stroke: #e6ebf0 }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(460px, 1fr)); gap: 16px }
figure { margin: 0; overflow: hidden; border: 1px solid #dde3ea; border-radius: 8px }
figure img { display: block; width: 100% }
figcaption { display: grid; grid-template-columns: 1fr max-content; gap: 2px 12px; padding: 8px 12px 10px }
figcaption q { overflow-wrap: anywhere } figcaption span { font-variant-numeric: tabular-nums }
figcaption small { grid-column: 1 / 3; color: #5c6b7a; font-size: 12px }
pre { overflow-x: auto; padding: 12px 16px; border-radius: 8px; background: #f7f9fb; font-size: 12.5px; line-height: 1.45 }
summary { cursor: pointer }
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}: coupalign report</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
