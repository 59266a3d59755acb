"""`coupalign bench step` on a model of a few thousand weights: what is counted is exact, what is timed is there and adds up."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch

from coupalign.bench.machine import processor
from coupalign.cli.parser import main
from coupalign.config.load import read_config
from coupalign.costs.traffic import step_traffic
from coupalign.costs.utilization import matmul_peak
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
    """The result of a bench on random data, which has left its table and its trace beside it."""
    out = config.parent / "results" / "step.json"
    printed = io.StringIO()
    with redirect_stdout(printed):
        words = [
            "--random-data",
            "--profile",
            str(out.with_name("trace.json")),
            "--out",
            str(out),
            *SHORT,
        ]
        assert main(["bench", "step", str(config), *words]) == 0
    out.with_name("table.txt").write_text(printed.getvalue())
    return out


def test_a_step_by_part(config: Path, out: Path) -> None:
    table, value = out.with_name("table.txt").read_text(), json.loads(out.read_text())
    assert (value["micro_batch"], value["global_batch"], value["ranks"], value["engine"]) == (
        2,
        4,
        1,
        "ddp",
    )
    assert list(value["milliseconds"]) == [
        "step",
        "data",
        "copy",
        "image",
        "text",
        "wpa",
        "decoder",
        "proposals",
        "sma",
        "head",
        "losses",
        "backward",
        "optimizer",
        "loss means",
    ]
    assert all(one > 0 for one in value["milliseconds"].values()), value["milliseconds"]
    costs = step_traffic(read_config(config), 2)
    assert value["flop"] == 2 * sum(cost.flops for cost in costs.values())
    seconds = value["global_batch"] / value["samples_per_second"][0]
    assert value["utilization"] == pytest.approx(
        value["flop"] / seconds / value["matmul_flop_per_s"]
    )
    held = value["gigabytes"]
    model = build_model(read_config(config).model, 30522, 32)
    weights = (
        sum(x.numel() * x.element_size() for x in (*model.parameters(), *model.buffers())) / 1e9
    )
    moments = 2 * sum(p.numel() * 4 for p in model.parameters()) / 1e9
    assert list(held) == ["weights", "optimizer", "average", "other", "a step's", "peak"]
    assert sum(list(held.values())[:5]) == pytest.approx(held["peak"])
    assert held["weights"] == pytest.approx(weights, rel=1e-6) and held[
        "optimizer"
    ] == pytest.approx(moments, rel=0.02)
    assert held["average"] == 0
    median, low, high = value["samples_per_second"]
    assert low <= median <= high and value["calls"]["operators"] > 100
    assert "samples/s (median of 3 steps" in table and "% of the" in table
    events = json.loads(out.with_name("trace.json").read_text())["traceEvents"]
    assert any(event.get("name") == "aten::addmm" for event in events)


def test_real_data_and_another_method_against_an_earlier_result(
    config: Path, out: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = f"data.train=[{{index: {shards}, split: train}}]"
    capsys.readouterr()
    words = [
        str(config),
        data,
        "model.kind=lavt",
        "model.decoder.width=8",
        "--against",
        str(out),
        "--beside",
        "train.global_batch=2",
    ]
    assert main(["bench", "step", *words, *SHORT, "--json"]) == 0
    *table, line = capsys.readouterr().out.splitlines()
    value, before = json.loads(line), json.loads(out.read_text())
    assert (
        value["milliseconds"]["data"] > 0
        and value["milliseconds"]["decoder"] > 0
        and "proposals" not in value["milliseconds"]
    )
    beside = value["beside"]
    assert (
        beside["overrides"] == "train.global_batch=2"
        and beside["ratio"][1] <= beside["ratio"][0] <= beside["ratio"][2]
    )
    assert any(
        "times the samples/s of the same with train.global_batch=2" in line for line in table
    )
    assert value["against"]["samples/s"] == pytest.approx(
        value["samples_per_second"][0] / before["samples_per_second"][0]
    )
    assert f"ratios to {out}" in table and "ms proposals" not in value["against"]


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", "not a result"),
        ('{"bench": "loader", "machine": {"device": "x"}}', "of bench loader"),
        ('{"bench": "step", "machine": {"device": "a PDP-11"}}', "measured on a PDP-11"),
    ],
)
def test_what_cannot_be_compared_is_said_before_anything_is_timed(
    config: Path, tmp_path: Path, text: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "before.json").write_text(text)
    assert (
        main(
            [
                "bench",
                "step",
                str(config),
                "--random-data",
                "--against",
                str(tmp_path / "before.json"),
            ]
        )
        == 2
    )
    assert words in capsys.readouterr().err


def test_wrong_use_is_an_error(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "step"]) == 2 and "need a configuration" in capsys.readouterr().err
    assert main(["bench", "step", str(config), "--steps", "0"]) == 2
    assert main(["bench", "step", str(config)]) == 2 and "vocabulary" in capsys.readouterr().err


def test_processors_of_one_brand_are_told_apart() -> None:
    old = "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 1\nmodel name\t: AMD EPYC\nflags\t\t: fpu avx2\n\nprocessor\t: 1\nmodel\t\t: 1\n"
    new = old.replace("model\t\t: 1", "model\t\t: 17").replace("avx2", "avx2 avx512_bf16")
    assert processor(old).startswith("AMD EPYC (family 25, model 1, ") and "bf16" not in processor(
        old
    )
    assert processor(new).startswith(
        "AMD EPYC (family 25, model 17, "
    ) and ", bf16), " in processor(new)
    assert ", bf16), " in processor(
        "processor\t: 0\nFeatures\t: fp asimd bf16\n"
    )  # ARM gives no name
    assert processor("").endswith(" cores")  # and without /proc


def test_the_peak_is_that_of_matrix_products() -> None:
    assert 1e9 < matmul_peak(torch.float32, torch.device("cpu")) < 1e15
