"""`coupalign bench eval` on generated scenes: the parts make up a batch; too few samples are an error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coupalign.cli.parser import main
from tests.unit.bench.test_step import TINY


@pytest.fixture
def config(shards: Path, tmp_path: Path) -> Path:
    file = tmp_path / "tiny.yaml"
    data = f"data: {{evaluate: [{{index: {shards}, split: train}}], train: [{{index: {shards}, split: train}}], "
    file.write_text(TINY.replace("data: {", data) + "evaluate: {batch: 2}\n")
    return file


def test_the_parts_make_up_a_batch(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "bench",
        "eval",
        str(config),
        "--steps",
        "3",
        "--warmup",
        "1",
        "--out",
        str(tmp_path / "eval.json"),
    ]
    assert main(words) == 0
    value = json.loads((tmp_path / "eval.json").read_text())
    parts = value["milliseconds"]
    assert list(parts) == ["batch", "data", "model", "counting"] and all(
        one > 0 for one in parts.values()
    )
    assert (
        max(parts["data"], parts["model"], parts["counting"])
        <= parts["batch"]
        <= 3 * sum(list(parts.values())[1:])
    )
    calls = value["calls"]
    assert (
        0 < calls["operators of counting"] < calls["operators"]
        and calls["numbers read back"] <= 1 / 6
    ), "one, the DataLoader's seed"
    median, low, high = value["samples_per_second"]
    assert low <= median <= high and median == pytest.approx(2 / (parts["batch"] / 1e3))
    assert "median of 3 batches" in capsys.readouterr().out
    assert main([*words, "--against", str(tmp_path / "eval.json"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["against"]["samples/s"] > 0


def test_too_few_samples_are_an_error(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "eval", str(config), "--steps", "100000"]) == 2
    assert "samples to score" in capsys.readouterr().err
