"""`coupalign bench eval` on generated scenes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coupalign.cli.parser import main
from tests.unit.bench.test_step import TINY


@pytest.fixture
def config(shards: Path, tmp_path: Path) -> Path:
    source = f"[{{index: {shards}, split: train}}]"
    file = tmp_path / "tiny.yaml"
    file.write_text(
        TINY.replace("data: {", f"data: {{evaluate: {source}, train: {source}, ")
        + "evaluate: {batch: 2}\n"
    )
    return file


def test_parts_add_up_to_a_batch(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "eval.json"
    command = ["bench", "eval", str(config), "--steps", "3", "--warmup", "1", "--out", str(out)]

    assert main(command) == 0

    result = json.loads(out.read_text())
    milliseconds = result["milliseconds"]
    assert list(milliseconds) == ["batch", "data", "model", "counting"]
    assert all(value > 0 for value in milliseconds.values())

    batch, *parts = milliseconds.values()
    assert max(parts) <= batch <= 3 * sum(parts)

    calls = result["calls"]
    assert 0 < calls["operators of counting"] < calls["operators"]
    assert calls["numbers read back"] <= 1 / 6, "one: the seed of the DataLoader"

    median, low, high = result["samples_per_second"]
    assert low <= median <= high
    assert median == pytest.approx(2 / (batch / 1e3))
    assert "median of 3 batches" in capsys.readouterr().out

    # A second run is compared with the first.
    assert main([*command, "--against", str(out), "--json"]) == 0
    second = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert second["against"]["samples/s"] > 0


def test_too_few_samples_are_an_error(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "eval", str(config), "--steps", "100000"]) == 2
    assert "samples to score" in capsys.readouterr().err
