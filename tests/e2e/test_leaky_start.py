"""A run that starts from the encoder of another run has seen what that run was trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coupalign.cli.parser import main


def test_scores_know_what_the_initial_weights_were_trained_on(
    config: Path, shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    changes = [
        "data.workers=0",
        "data.image_size=32",
        "train.steps=1",
        "train.evaluate_every=10",
        "train.ema=null",
        "evaluate.bootstrap=10",
        "model.image={kind: timm, name: resnet18}",
    ]
    first, second = tmp_path / "first", tmp_path / "second"
    on_test_a = [f"data.train=[{{index: {shards}, split: testA}}]", "data.leaks=allow"]
    assert main(["train", str(config), f"run_dir={first}", *changes, *on_test_a]) == 0
    start = next((first / "checkpoints").glob("step-*")) / "weights.safetensors"
    capfd.readouterr()

    weights = f"model.image.weights={start}"
    assert main(["train", str(config), f"run_dir={second}", *changes, weights]) == 0

    assert "every score counts them as trained on" in capfd.readouterr().out
    expected = {
        "testA": "LEAKY: 3 of 3 scored photographs were trained on",
        "testB": "none: no scored photograph was trained on",
    }
    for split, leak in expected.items():
        assert main(["eval", str(second), "--split", split, "--json"]) == 0
        assert json.loads(capfd.readouterr().out.splitlines()[-1])[split]["leak"] == leak
