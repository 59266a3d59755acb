"""A configuration that trains on a tiny RefShapes in seconds, and launchers to start it with."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from coupalign.cli.parser import main
from tests.e2e.scored_run import CHANGES, scores_of

ROOT = Path(__file__).parents[2]
TINY = """
precision: fp32
data:
  train: [{{index: {shards}, split: train}}]
  evaluate: [{{index: {shards}, split: val}}]
  image_size: 64
  max_tokens: 12
  workers: 0
  augment: {{flip: 0.5, color_jitter: 0.2}}
model:
  image: {{kind: small, widths: [8, 16, 16, 24]}}
  text: {{kind: small, width: 16, heads: 2, dropout: 0.1}}
  decoder: {{width: 16}}
  proposals: {{count: 4, layers: 1, heads: 2, ffn: 32, dropout: 0.1}}
optim: {{lr: 1.0e-3, lr_image: 1.0e-3, lr_text: 1.0e-3, clip_norm: 1.0}}
schedule: {{kind: cosine, warmup_steps: 2}}
train:
  global_batch: 8
  max_micro_batch: 2
  steps: 14
  ema: {{decay: 0.9}}
  log_every: 1
  evaluate_every: 7
  save_every: 3
evaluate: {{batch: 8, bootstrap: 50, pictures: 1}}
tracking: {{kind: none}}
"""


@pytest.fixture(scope="session")
def config(shards: Path) -> Path:
    """Fourteen steps with dropout, augmentation, accumulation, clipping and a moving average."""
    file = shards.parent / "tiny.yaml"
    file.write_text(TINY.format(shards=shards))
    return file


@pytest.fixture(scope="session")
def scored_run(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps, scored after every second one, with three different scores."""
    run = tmp_path_factory.mktemp("scored") / "run"
    assert main(["train", str(config), f"run_dir={run}", *CHANGES]) == 0

    # Otherwise the tests of the best checkpoint would prove nothing.
    scores = scores_of(run)
    assert sorted(scores) == [2, 4, 6]
    assert len(set(scores.values())) == 3 and min(scores.values()) > 0
    return run


@pytest.fixture
def run(scored_run: Path, tmp_path: Path) -> Path:
    """A copy of the scored run, to change."""
    return shutil.copytree(scored_run, tmp_path / "run", symlinks=True)


def launch(ranks: int, *arguments: str | Path, launcher: str = "torchrun") -> subprocess.Popen[str]:
    """Start a verb on several ranks through a real launcher, or by itself on one rank."""
    words = [str(argument) for argument in arguments]
    if ranks == 1:
        command = [sys.executable, "-m", "coupalign", *words]
    else:
        command = [str(ROOT / "launch" / f"{launcher}.sh"), *words]

    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "NPROC": str(ranks),
        "PYTHON": sys.executable,
    }
    return subprocess.Popen(
        command,
        env=environment,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], status: int = 0) -> str:
    """Wait for the end, assert the exit status, and return the output."""
    output, _ = process.communicate(timeout=280)
    assert process.returncode == status, output[-4000:]
    return output
