"""The verbs that only look: each runs, prints, and ends with a JSON object if asked to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from coupalign.cli.parser import main


def run_verb(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict]:
    """Run a verb with --json; return its exit status and its last line, parsed."""
    capsys.readouterr()
    status = main([*map(str, arguments), "--json"])
    return status, json.loads(capsys.readouterr().out.splitlines()[-1])


def test_doctor_reports_the_installation(capsys: pytest.CaptureFixture[str]) -> None:
    status, report = run_verb(capsys, "doctor")

    assert status == 0
    path = "fused kernels on" if torch.cuda.is_available() else "plain PyTorch ("
    assert report["alignment attention"].startswith(f"auto takes {path}")
    assert {"torch", "deepspeed", "gpu", "bf16", "apex"} <= report.keys()


def test_describe_names_the_parts(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, report = run_verb(capsys, "describe", config)

    assert status == 0
    assert "wpa" in json.dumps(report)


def test_bench_traffic_counts_bytes_by_part(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, report = run_verb(capsys, "bench", "traffic", config, "--batch", 4)

    assert (status, report["batch"]) == (0, 4)
    assert report["parts"]["wpa"]["bytes"] > 0


def test_config_prints_overrides_and_the_deepspeed_dictionary(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, whole = run_verb(capsys, "config", config, "seed=3")
    assert (status, whole["seed"]) == (0, 3)

    with_deepspeed = ("config", config, "engine.kind=deepspeed", "--deepspeed", "--ranks", "2")
    status, derived = run_verb(capsys, *with_deepspeed)
    assert (status, derived["train_batch_size"]) == (0, 8)
    assert derived["gradient_accumulation_steps"] == 2

    # The dictionary of a run that does not use DeepSpeed does not exist.
    assert main(["config", str(config), "--deepspeed"]) == 2


def test_verify_finds_a_flipped_byte(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(shards, tmp_path / "shards")
    assert run_verb(capsys, "verify", copy)[0] == 0

    shard = sorted(copy.glob("*.tar"))[0]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    capsys.readouterr()

    assert main(["verify", str(copy)]) == 1
    assert shard.name in capsys.readouterr().out


def test_track_sends_what_is_left(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    changes = [f"run_dir={run}", "train.steps=1", "data.evaluate=[]", "tracking.kind=mlflow"]
    assert main(["train", str(config), *changes]) == 0

    status, result = run_verb(capsys, "track", run)

    assert (status, result["rows_left"], result["error"]) == (0, 0, None)
