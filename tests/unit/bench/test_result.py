"""Results as JSON, and the ratios of two of them; test_step.py has what cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coupalign.bench.loader import LoaderBench
from coupalign.bench.result import format_rows, ratios, read_result
from coupalign.bench.step import StepBench

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


def test_earlier_result_without_a_newer_field_is_read() -> None:
    value = LoaderBench(
        machine={"device": "x"},
        config="tiny",
        image_size=32,
        global_batch=4,
        steps=3,
        samples_per_second={"loader": (2.0, 1.0, 3.0)},
        ratios={},
        kilobytes=1,
        megapixels=1,
        gigabytes={"start": 1, "end": 1},
    ).to_json()
    del value["soak"]

    assert LoaderBench.from_json(value).figures() == {"samples/s loader": 2.0}


@pytest.mark.parametrize(
    "file", sorted(BENCHMARKS.glob("*/step.json")), ids=lambda f: f.parent.name
)
def test_stored_results_can_still_be_compared(file: Path) -> None:
    stored = json.loads(file.read_text())

    value = read_result(file, stored["machine"], "step")

    # Older files lack the newest fields.
    result = StepBench.from_json(value)
    written = json.loads(json.dumps(result.to_json()))
    stored.pop("against", None)
    assert {key: written[key] for key in stored} == stored
    assert "samples/s" in result.figures()


def test_ratio_needs_a_figure_in_both() -> None:
    now = {"both": 3.0, "now": 1.0, "was 0": 1.0}
    before = {"both": 2.0, "before": 1.0, "was 0": 0.0}

    assert ratios(now, before) == {"both": 1.5}


def test_rows_align_the_first_column_left_and_the_others_right() -> None:
    table = format_rows([("a", "1"), ("long", "23")], headers=("part", "ms"))

    assert table.splitlines() == ["part      ms", "a          1", "long      23"]
