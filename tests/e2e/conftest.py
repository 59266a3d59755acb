"""A configuration that trains on a tiny RefShapes in seconds, and real launchers to start it with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
train: {{global_batch: 8, max_micro_batch: 2, steps: 14, ema: {{decay: 0.9}}, log_every: 1, evaluate_every: 7, save_every: 3}}
evaluate: {{batch: 8, bootstrap: 50, pictures: 1}}
tracking: {{kind: none}}
"""


@pytest.fixture(scope="session")
def config(shards: Path) -> Path:
    file = shards.parent / "tiny.yaml"
    file.write_text(TINY.format(shards=shards))
    return file


def launch(ranks: int, *arguments: str | Path, launcher: str = "torchrun") -> subprocess.Popen[str]:
    """Start a verb on several ranks through a real launcher, or by itself for one rank."""
    words = [str(word) for word in arguments]
    root = Path(__file__).parents[2]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "NPROC": str(ranks),
        "PYTHON": sys.executable,
    }
    command = (
        [sys.executable, "-m", "coupalign", *words]
        if ranks == 1
        else [str(root / "launch" / f"{launcher}.sh"), *words]
    )
    return subprocess.Popen(
        command,
        env=environment,
        cwd=root,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], status: int = 0) -> str:
    """Wait for the end; the output."""
    output, _ = process.communicate(timeout=280)
    assert process.returncode == status, output[-4000:]
    return output
