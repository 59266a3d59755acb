"""`coupalign bench step` on a model of a few thousand weights."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from coupalign.cli.parser import main
from coupalign.config.load import read_config
from coupalign.costs.traffic import step_traffic
from coupalign.model.build import build_model

TINY = """
name: tiny
precision: fp32
data: {image_size: 32, max_tokens: 8, workers: 0}
model:
  image: {kind: small, widths: [8, 16, 16, 24]}
  text: {kind: small, width: 16, heads: 2}
  decoder: {width: 16}
  proposals: {count: 4, layers: 1, heads: 2, ffn: 32}
train: {global_batch: 4, max_micro_batch: 2}
engine: {kind: ddp}
"""
SHORT = ["--steps", "3", "--warmup", "1"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("bench") / "tiny.yaml"
    file.write_text(TINY)
    return file


@pytest.fixture(scope="module")
def out(config: Path) -> Path:
    """The result of a benchmark on random data, next to its table and its trace."""
    out = config.parent / "results" / "step.json"
    trace = out.with_name("trace.json")
    outputs = ["--profile", str(trace), "--out", str(out)]

    printed = io.StringIO()
    with redirect_stdout(printed):
        assert main(["bench", "step", str(config), "--random-data", *outputs, *SHORT]) == 0

    out.with_name("table.txt").write_text(printed.getvalue())
    return out


@pytest.fixture
def result(out: Path) -> dict[str, Any]:
    return json.loads(out.read_text())


def test_result_names_batches_ranks_and_engine(result: dict[str, Any]) -> None:
    assert result["micro_batch"] == 2
    assert result["global_batch"] == 4
    assert result["ranks"] == 1
    assert result["engine"] == "ddp"


def test_every_part_of_a_step_is_timed(out: Path, result: dict[str, Any]) -> None:
    model_parts = ["image", "text", "wpa", "decoder", "proposals", "sma", "head"]
    other_parts = ["losses", "backward", "optimizer", "loss means"]
    milliseconds = result["milliseconds"]
    assert list(milliseconds) == ["step", "data", "copy", *model_parts, *other_parts]
    assert all(value > 0 for value in milliseconds.values()), milliseconds

    median, low, high = result["samples_per_second"]
    assert low <= median <= high
    assert "samples/s (median of 3 steps" in out.with_name("table.txt").read_text()


def test_utilization_is_counted_flops_over_the_measured_peak(
    config: Path, out: Path, result: dict[str, Any]
) -> None:
    micro_batches = 2
    costs = step_traffic(read_config(config), 2)
    assert result["flop"] == micro_batches * sum(cost.flops for cost in costs.values())

    seconds = result["global_batch"] / result["samples_per_second"][0]
    achieved = result["flop"] / seconds
    assert result["utilization"] == pytest.approx(achieved / result["matmul_flop_per_s"])

    table = out.with_name("table.txt").read_text()
    assert f"MFU {result['utilization']:.1%} of the" in table


def test_memory_is_divided_by_kind(config: Path, result: dict[str, Any]) -> None:
    held = result["gigabytes"]
    assert list(held) == ["weights", "optimizer", "average", "other", "a step's", "peak"]
    assert sum(list(held.values())[:5]) == pytest.approx(held["peak"])

    model = build_model(read_config(config).model, 30522, 32)
    tensors = (*model.parameters(), *model.buffers())
    weights = sum(x.numel() * x.element_size() for x in tensors) / 1e9
    moments = 2 * sum(p.numel() * 4 for p in model.parameters()) / 1e9
    assert held["weights"] == pytest.approx(weights, rel=1e-6)
    assert held["optimizer"] == pytest.approx(moments, rel=0.02)
    assert held["average"] == 0


def test_profiler_counts_operators_and_writes_a_trace(out: Path, result: dict[str, Any]) -> None:
    assert result["calls"]["operators"] > 100

    events = json.loads(out.with_name("trace.json").read_text())["traceEvents"]
    assert any(event.get("name") == "aten::addmm" for event in events)


def test_real_data_beside_another_batch_and_against_an_earlier_result(
    config: Path, out: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lavt = ["model.kind=lavt", "model.decoder.width=8"]
    data = f"data.train=[{{index: {shards}, split: train}}]"
    comparisons = ["--against", str(out), "--beside", "train.global_batch=2"]
    capsys.readouterr()

    status = main(["bench", "step", str(config), data, *lavt, *comparisons, *SHORT, "--json"])

    assert status == 0
    *table, line = capsys.readouterr().out.splitlines()
    result, before = json.loads(line), json.loads(out.read_text())
    assert result["milliseconds"]["data"] > 0
    assert result["milliseconds"]["decoder"] > 0
    assert "proposals" not in result["milliseconds"]

    # Compared with the configuration that took turns.
    beside = result["beside"]
    median, low, high = beside["ratio"]
    assert beside["overrides"] == "train.global_batch=2"
    assert low <= median <= high
    sentence = "times the samples/s of the same with train.global_batch=2"
    assert any(sentence in line for line in table)

    # Compared with the earlier result.
    ratio = result["samples_per_second"][0] / before["samples_per_second"][0]
    assert result["against"]["samples/s"] == pytest.approx(ratio)
    assert f"ratios to {out}" in table
    assert "ms proposals" not in result["against"]


@pytest.mark.parametrize(
    "earlier, message",
    [
        ("{", "cannot be read as a result"),
        ("{}", "not a result of coupalign bench"),
        ('{"bench": "loader", "machine": {"device": "x"}}', "of bench loader"),
        ('{"bench": "step", "machine": {"device": "a PDP-11"}}', "measured on a PDP-11"),
    ],
)
def test_result_that_cannot_be_compared_is_refused_before_timing(
    config: Path,
    tmp_path: Path,
    earlier: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "before.json"
    file.write_text(earlier)

    status = main(["bench", "step", str(config), "--random-data", "--against", str(file)])

    assert status == 2
    assert message in capsys.readouterr().err


def test_wrong_use_is_an_error(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "step"]) == 2
    assert "need a configuration" in capsys.readouterr().err

    assert main(["bench", "step", str(config), "--steps", "0"]) == 2

    assert main(["bench", "step", str(config)]) == 2
    assert "vocabulary" in capsys.readouterr().err
