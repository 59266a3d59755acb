"""Curves: what is read from the journal, and that a chart stays within its borders."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from coupalign.report.charts import curve_section, line_chart, read_curves


def test_read_curves_skips_torn_lines_and_non_finite_values(tmp_path: Path):
    rows = [
        {"step": 20, "time": 0, "metrics": {"a": 2, "b": "NaN"}},
        {"step": 10, "time": 0, "metrics": {"a": 1, "b": 1e308}},
    ]
    lines = [*map(json.dumps, rows), "broken", '{"step": 30, "time": 0, "metrics": {"a"']
    journal = tmp_path / "metrics.jsonl"
    journal.write_text("\n".join(lines))

    assert read_curves(journal) == {"a": [(10, 1.0), (20, 2.0)]}
    assert read_curves(tmp_path / "none.jsonl") == {}


@pytest.mark.parametrize(
    "values",
    [
        [0.5],
        [0.0, 0.0],
        [3, 2, 1],
        [-1, 5],
        [1e-9, 2e-9],
        [1e6, 3e7],
        [-9e29, 9e29],
        np.linspace(1, 0, 5000).tolist(),
    ],
)
def test_chart_is_svg_within_its_borders(values: list[float]):
    series = {"a < b": list(enumerate(values)), "empty": []}

    chart = line_chart(series, "loss & more", marks=len(values) < 100)

    root = ElementTree.fromstring(chart)
    width, height = (float(value) for value in root.attrib["viewBox"].split()[2:])
    corners = re.findall(r"([-\d.]+),([-\d.]+)", root.find("polyline").attrib["points"])
    assert 1 <= len(corners) <= 200
    for x, y in corners:
        assert 0 <= float(x) <= width
        assert 0 <= float(y) <= height
    for label in root.findall("text"):
        assert 0 <= float(label.attrib["x"]) < width
        assert 0 < float(label.attrib["y"]) <= height
    assert "nan" not in chart
    assert "inf" not in chart


def test_chart_draws_higher_values_higher():
    chart = line_chart({"loss": [(0, 3.0), (10, 2.0), (20, 0.5)]}, "loss")

    corners = ElementTree.fromstring(chart).find("polyline").attrib["points"].split()
    xs, ys = zip(*(map(float, corner.split(",")) for corner in corners))
    assert list(xs) == sorted(xs)
    assert list(ys) == sorted(ys)  # SVG counts y from the top


def test_series_without_points_has_no_chart():
    assert line_chart({"loss": []}, "loss") == ""


def test_curve_section_charts_losses_and_scores_of_each_split():
    points = [(10, 0.5), (20, 0.6)]
    curves = {"train/loss": points, "eval/val/oIoU": points, "eval/testA/mIoU": points}

    section = curve_section(curves)

    for title in ("Training loss by step", "Score on val by step", "Score on testA by step"):
        assert title in section
    assert curve_section({"train/lr": points}) == ""
