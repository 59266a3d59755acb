"""A checkout to plan runs in, a launcher that only notes its calls, and scores written by hand."""

from __future__ import annotations

import stat
import sys
from pathlib import Path

import pytest

from coupalign.evaluation.metrics import METRICS, Score
from coupalign.files import write_json
from coupalign.reproduce.runs import PlannedRun

ROOT = Path(__file__).parents[3]

# FAKE=sleep waits to be stopped; FAKE_STATUS=3 fails with that status.
LAUNCHER = """#!{python}
import os, pathlib, signal, sys, time

with pathlib.Path("calls.txt").open("a") as calls:
    calls.write(" ".join(sys.argv[1:]) + "\\n")
if os.environ.get("FAKE") == "sleep":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    pathlib.Path("asleep").touch()
    time.sleep(60)
if os.environ.get("FAKE_STATUS"):
    print("coupalign: error: data/shards/x/index.json: no such file", file=sys.stderr, flush=True)
    print("something later", file=sys.stderr, flush=True)
    sys.exit(int(os.environ["FAKE_STATUS"]))
"""


@pytest.fixture(autouse=True)
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The checkout's configurations in a folder where runs may be written."""
    for name in ("configs", "slurm", "shards"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WEIGHTS", "/weights")
    return tmp_path


@pytest.fixture
def launcher(checkout: Path) -> Path:
    """A stand-in for torchrun or deepspeed. It appends its arguments to calls.txt."""
    file = checkout / "launcher"
    file.write_text(LAUNCHER.replace("{python}", sys.executable))
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return file


def constant_score(value: float, **changes: object) -> Score:
    """A score whose metrics all have the same value."""
    metrics = dict.fromkeys(METRICS, value)
    return Score(protocol="ris-v1", metrics=metrics, samples=10, images=5, **changes)


def write_scores(run: PlannedRun, *values: float, blind: float | None = None) -> None:
    """Write scores as `coupalign eval` does, one value per split of the run."""
    leak = "none: no scored photograph was trained on"
    blind_score = None
    if blind is not None:
        blind_score = constant_score(blind, leak=leak)

    for split, value in zip(run.splits, values):
        score = constant_score(value, leak=leak, language_blind=blind_score)
        write_json(run.directory / "scores" / f"{split}-ris-v1.json", score.to_json())
