"""The verbs that only look: each runs, prints, and ends with one JSON object where it is asked to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from coupalign.cli.parser import main


def said(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, dict]:
    """Exit status and the last line as JSON."""
    capsys.readouterr()
    status = main([*map(str, words), "--json"])
    return status, json.loads(capsys.readouterr().out.splitlines()[-1])


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    status, found = said(capsys, "doctor")
    assert status == 0
    path = "fused kernels on" if torch.cuda.is_available() else "plain PyTorch ("
    assert found["alignment attention"].startswith(f"auto takes {path}")
    assert {"torch", "deepspeed", "gpu", "bf16", "apex"} <= found.keys()


def test_describe(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, found = said(capsys, "describe", config)
    assert status == 0 and "wpa" in json.dumps(found)


def test_the_traffic_of_a_step(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, found = said(capsys, "bench", "traffic", config, "--batch", 4)
    assert (status, found["batch"]) == (0, 4) and found["parts"]["wpa"]["bytes"] > 0


def test_config_and_its_deepspeed_dictionary(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said(capsys, "config", config, "seed=3")[1]["seed"] == 3
    status, found = said(
        capsys, "config", config, "engine.kind=deepspeed", "--deepspeed", "--ranks", "2"
    )
    assert (status, found["train_batch_size"], found["gradient_accumulation_steps"]) == (0, 8, 2)
    assert main(["config", str(config), "--deepspeed"]) == 2


def test_verify_says_no_to_a_flipped_byte(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(shards, tmp_path / "shards")
    assert said(capsys, "verify", copy)[0] == 0
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
    assert (
        main(
            [
                "train",
                str(config),
                f"run_dir={run}",
                "train.steps=1",
                "data.evaluate=[]",
                "tracking.kind=mlflow",
            ]
        )
        == 0
    )
    status, sent = said(capsys, "track", run)
    assert (status, sent["rows_left"], sent["error"]) == (0, 0, None)
