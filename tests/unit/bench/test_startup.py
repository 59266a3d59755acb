"""`coupalign bench startup`: the phases of a real training, in order."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coupalign.bench.startup import StartupBench, bench_startup
from coupalign.errors import InputError
from tests.unit.bench.test_step import TINY

PHASES = [
    "python itself",
    "imports",
    "joining the job",
    "opening the data",
    "building the model",
    "building the engine",
    "first step: reading data",
    "first step: forward, backward, update",
]


def test_phases_and_imports_until_the_first_step_are_timed(shards: Path, tmp_path: Path) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(TINY)

    result = bench_startup(file, [f"data.train=[{{index: {shards}, split: train}}]"])

    assert list(result.phases) == PHASES
    assert all(seconds > 0 for seconds in result.phases.values())
    assert result.help > 0
    assert not list(tmp_path.glob("run*")), "the run directory was temporary"

    assert {"torch", "coupalign"} <= set(result.imports)
    assert "timm" not in result.imports
    assert result.imports["torch"] > result.imports["pydantic"]

    table = result.table()
    assert "not imports" in table
    assert f"{sum(result.phases.values()):.2f} s" in table
    assert StartupBench.from_json(json.loads(json.dumps(result.to_json()))) == result


def test_error_of_a_training_that_cannot_start_is_shown(tmp_path: Path) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(TINY)

    message = "ended with status 2:(.|\n)*data.tokenizer and data.train are both empty"
    with pytest.raises(InputError, match=message):
        bench_startup(file, [])
