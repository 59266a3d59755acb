"""Curves: what is read from the journal, and that a chart stays within its borders and tells the truth."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from coupalign.report.charts import line_chart, read_curves


def test_curves_survive_torn_lines_and_numbers_that_are_none(tmp_path: Path):
    journal = tmp_path / "metrics.jsonl"
    rows = [
        {"step": 20, "time": 0, "metrics": {"a": 2, "b": "NaN"}},
        {"step": 10, "time": 0, "metrics": {"a": 1}},
    ]
    journal.write_text(
        "\n".join(map(json.dumps, rows)) + '\nbroken\n{"step": 30, "time": 0, "metrics": {"a"'
    )
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
        np.linspace(1, 0, 5000).tolist(),
    ],
)
def test_a_chart_is_svg_within_its_borders(values: list[float]):
    chart = line_chart(
        {"a < b": list(enumerate(values)), "empty": []}, "loss & more", marks=len(values) < 100
    )
    root = ElementTree.fromstring(chart)
    width, height = (float(value) for value in root.attrib["viewBox"].split()[2:])
    corners = re.findall(r"([-\d.]+),([-\d.]+)", root.find("polyline").attrib["points"])
    assert 1 <= len(corners) <= 200
    assert all(0 <= float(x) <= width and 0 <= float(y) <= height for x, y in corners)
    for label in root.findall("text"):
        assert 0 <= float(label.attrib["x"]) < width and 0 < float(label.attrib["y"]) <= height
    assert "nan" not in chart and "inf" not in chart


def test_a_falling_curve_falls_and_a_higher_value_is_drawn_higher():
    root = ElementTree.fromstring(line_chart({"loss": [(0, 3.0), (10, 2.0), (20, 0.5)]}, "loss"))
    points = [
        tuple(map(float, corner.split(",")))
        for corner in root.find("polyline").attrib["points"].split()
    ]
    assert [x for x, _ in points] == sorted(x for x, _ in points)
    assert [y for _, y in points] == sorted(y for _, y in points)


def test_no_curves_no_chart():
    assert line_chart({"loss": []}, "loss") == ""
