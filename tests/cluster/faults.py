"""Runs that break at chosen moments, and what is left of them.

fault/sitecustomize.py makes the faults happen.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
from pathlib import Path
from typing import Any

from coupalign.tracking import read_journal
from tests.cluster.conftest import ROOT, clean_environment

Fault = dict[str, Any]

# Metrics that a clock or the memory decides.
TIMED = ("train/samples_per_second", "data/wait_share", "train/peak_memory_gb", "ranks/", "save/")
HOOK = Path(__file__).parent / "fault"
# Where a rank is killed: an audit event, and a pattern for its first argument. The kill comes at
# one of the first `max_count` such events, and up to `max_delay_s` after it.
MOMENTS: dict[str, dict[str, Any]] = {
    "between batches": {
        "event": "coupalign.doing",
        "match": "reading data",
        "max_count": 8,
    },
    "anywhere in a step": {
        "event": "coupalign.doing",
        "match": "forward, backward, update",
        "max_count": 8,
        "max_delay_s": 0.06,
    },
    "during a save": {
        "event": "coupalign.doing",
        "match": "saving a checkpoint",
        "max_count": 2,
        "max_delay_s": 0.06,
    },
    "while a checkpoint is described": {
        "event": "open",
        "match": r"\.step-\d+\.[^/]+\.partial/\.(state|manifest)",
        "max_count": 2,
        "rank": 0,
    },
    "between save and rename": {
        "event": "os.rename",
        "match": r"\.step-\d+\.[^/]+\.partial$",
        "max_count": 2,
        "rank": 0,
    },
    "between rename and publish": {
        "event": "open",
        "match": "/checkpoints$",
        "max_count": 2,
        "rank": 0,
    },
    "while an old checkpoint is removed": {
        "event": "os.rename",
        "match": r"/step-\d+$",
        "max_count": 1,
        "max_delay_s": 0.02,
        "rank": 0,
    },
    "during an evaluation": {
        "event": "coupalign.doing",
        "match": "scoring val: batch",
        "max_count": 3,
        "max_delay_s": 0.03,
    },
    "while scores are written": {
        "event": "os.rename",
        "match": r"scores/\.",
        "max_count": 2,
        "rank": 0,
    },
    "during an MLflow flush": {
        "event": "os.rename",
        "match": r"\.tracking\.json",
        "max_count": 6,
        "rank": 0,
    },
    "while it resumes": {
        "event": "coupalign.doing",
        "match": "checking|loading",
        "max_count": 1,
    },
}
# What a run prints, in its folder.
OUTPUT = "output.txt"


def random_faults(count: int, ranks: int, seed: int) -> list[Fault]:
    """Draw kills: every moment in turn, with a random rank, repetition and delay."""
    choose = random.Random(seed)
    names = [list(MOMENTS)[number % len(MOMENTS)] for number in range(count)]
    choose.shuffle(names)
    return [_draw_kill(name, choose, ranks) for name in names]


def _draw_kill(name: str, choose: random.Random, ranks: int) -> Fault:
    moment = MOMENTS[name]
    any_rank = choose.randrange(ranks)
    return {
        "name": name,
        "rank": moment.get("rank", any_rank),
        "event": moment["event"],
        "match": moment["match"],
        "count": choose.randint(1, moment["max_count"]),
        "after_s": choose.uniform(0, moment.get("max_delay_s", 0.0)),
        "do": "kill",
    }


def start(
    folder: Path,
    faults: list[Fault],
    *words: str | Path,
    ranks: int = 2,
    restarts: int = 0,
) -> subprocess.Popen[bytes]:
    """Start a verb on several ranks through the launcher, with one fault at each start.

    It prints to <folder>/output.txt.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plan = folder / "faults.json"
    plan.write_text(json.dumps(faults))
    changes = {
        "FAULTS": str(plan),
        "PYTHONPATH": f"{HOOK}:{ROOT}",
        "NPROC": str(ranks),
        "OMP_NUM_THREADS": "1",
        "TORCHRUN_ARGS": f"--max-restarts {restarts} --monitor-interval 0.2",
    }

    with open(folder / OUTPUT, "wb") as output:
        return subprocess.Popen(
            [str(ROOT / "launch" / "torchrun.sh"), *map(str, words)],
            cwd=ROOT,
            env=clean_environment(**changes),
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def run_with_faults(
    folder: Path,
    faults: list[Fault],
    *words: str | Path,
    ranks: int = 2,
    restarts: int = 0,
    status: int = 0,
) -> str:
    """Do what `start` does, wait for the end, assert its status, and return the output."""
    process = start(folder, faults, *words, ranks=ranks, restarts=restarts)
    try:
        process.wait(900)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)

    output = (folder / OUTPUT).read_text(errors="replace")
    assert process.returncode == status, output[-6000:]
    return output


def happened(folder: Path) -> list[Fault]:
    """Return the faults that took place."""
    log = folder / "faults.json.log"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def remains(run: Path) -> dict[str, Any]:
    """Collect what no fault may change: final weights, rows of the scores, every metric."""
    metrics: dict[tuple[int, str], float] = {}
    for row, _ in read_journal(run / "metrics.jsonl"):
        for name, value in row.metrics.items():
            if name.startswith(TIMED):
                continue
            key = row.step, name
            assert key not in metrics, f"{name} of step {row.step} was written twice"
            metrics[key] = value

    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    weights = [newest / "weights.safetensors", newest / "ema.safetensors"]
    files = [*weights, *sorted((run / "scores").glob("*.csv"))]
    contents = {file.name: file.read_bytes() for file in files}
    return {"metrics": metrics, "newest": newest.name} | contents


METRICS_OF_RUN = """
SELECT m.step, m.key, m.value FROM metrics m JOIN runs r ON m.run_uuid = r.run_uuid
WHERE r.name = ?
"""


def tracked(database: Path, run_name: str) -> dict[tuple[int, str], list[float]]:
    """Read MLflow's values by (step, metric): one each, if nothing was sent twice."""
    with sqlite3.connect(database) as connection:
        points = connection.execute(METRICS_OF_RUN, [run_name]).fetchall()
        count = "SELECT count(*) FROM runs WHERE name = ?"
        [runs] = connection.execute(count, [run_name]).fetchone()
    assert runs == 1, f"{runs} MLflow runs are called {run_name}"

    values: dict[tuple[int, str], list[float]] = {}
    for step, key, value in points:
        if not key.startswith(TIMED):
            values.setdefault((step, key), []).append(value)
    return values
