"""`coupalign bench startup`: the phases of a real start, in their order."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coupalign.bench.startup import StartBench, bench_startup
from coupalign.errors import InputError
from tests.unit.bench.test_step import TINY


def test_what_passes_before_the_first_step(shards: Path, tmp_path: Path) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(TINY)
    found = bench_startup(file, [f"data.train=[{{index: {shards}, split: train}}]"])
    assert list(found.phases) == [
        "python itself",
        "imports",
        "joining the job",
        "opening the data",
        "building the model",
        "building the engine",
        "first step: reading data",
        "first step: forward, backward, update",
    ]
    assert all(seconds > 0 for seconds in (*found.phases.values(), found.help)) and not list(
        Path(tmp_path).glob("run*")
    )
    assert {"torch", "coupalign"} <= set(found.imports) and "timm" not in found.imports
    assert found.imports["torch"] > found.imports["pydantic"] and "no import" in found.table()
    assert f"{sum(found.phases.values()):8.2f} s" in found.table()
    assert StartBench.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_a_training_that_cannot_start_says_why(tmp_path: Path) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(TINY)
    with pytest.raises(
        InputError, match="ended with status 2:(.|\n)*data.tokenizer and data.train are both empty"
    ):
        bench_startup(file, [])
