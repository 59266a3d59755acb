"""Runs that break at chosen places, and what is left of them.

The places are in fault/sitecustomize.py.
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

TIMED = ("train/samples_per_second", "data/wait_share", "train/peak_memory_gb", "ranks/", "save/")
HOOK = Path(__file__).parent / "fault"
# Where a rank is killed: an audit event and what its first argument matches. `later` is the longest
# delay after it, in seconds.
PLACES: dict[str, dict[str, Any]] = {
    "between batches": {"event": "coupalign.doing", "match": "reading data", "most": 8},
    "anywhere in a step": {
        "event": "coupalign.doing",
        "match": "forward, backward, update",
        "most": 8,
        "later": 0.06,
    },
    "during a save": {
        "event": "coupalign.doing",
        "match": "saving a checkpoint",
        "most": 2,
        "later": 0.06,
    },
    "while a checkpoint is described": {
        "event": "open",
        "match": r"\.step-\d+\.partial/\.(state|manifest)",
        "most": 2,
        "rank": 0,
    },
    "between save and rename": {
        "event": "os.rename",
        "match": r"\.step-\d+\.partial$",
        "most": 2,
        "rank": 0,
    },
    "between rename and publish": {"event": "open", "match": "/checkpoints$", "most": 2, "rank": 0},
    "while an old checkpoint is removed": {
        "event": "shutil.rmtree",
        "match": r"/step-\d+$",
        "most": 1,
        "rank": 0,
    },
    "during an evaluation": {
        "event": "coupalign.doing",
        "match": "scoring val: batch",
        "most": 3,
        "later": 0.03,
    },
    "while scores are written": {"event": "os.rename", "match": r"scores/\.", "most": 2, "rank": 0},
    "during an MLflow flush": {
        "event": "os.rename",
        "match": r"\.tracking\.json",
        "most": 6,
        "rank": 0,
    },
    "while it resumes": {"event": "coupalign.doing", "match": "checking|loading", "most": 1},
}


def random_faults(count: int, ranks: int, seed: int) -> list[dict[str, Any]]:
    """`count` kills: every place in turn, at a random rank, repetition and delay."""
    choose = random.Random(seed)
    names = [list(PLACES)[place % len(PLACES)] for place in range(count)]
    choose.shuffle(names)
    return [kill(name, choose, ranks) for name in names]


def kill(name: str, choose: random.Random, ranks: int) -> dict[str, Any]:
    place = PLACES[name]
    return {
        "name": name,
        "rank": place.get("rank", choose.randrange(ranks)),
        "event": place["event"],
        "match": place["match"],
        "count": choose.randint(1, place["most"]),
        "after_s": choose.uniform(0, place.get("later", 0.0)),
        "do": "kill",
    }


OUTPUT = "output.txt"


def start(
    folder: Path,
    faults: list[dict[str, Any]],
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


def broken(
    folder: Path,
    faults: list[dict[str, Any]],
    *words: str | Path,
    ranks: int = 2,
    restarts: int = 0,
    status: int | None = 0,
    seconds: float = 900,
) -> str:
    """`start`, and wait for the end; what was printed."""
    process = start(folder, faults, *words, ranks=ranks, restarts=restarts)
    try:
        process.wait(seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    output = (folder / OUTPUT).read_text(errors="replace")
    assert status is None or process.returncode == status, output[-6000:]
    return output


def happened(folder: Path) -> list[dict[str, Any]]:
    """The faults that took place."""
    log = folder / "faults.json.log"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def remains(run: Path) -> dict[str, Any]:
    """Collect what no fault may change: final weights, rows of the scores, every metric."""
    metrics: dict[tuple[int, str], float] = {}
    for row, _ in read_journal(run / "metrics.jsonl"):
        for name, value in row.metrics.items():
            if not name.startswith(TIMED):
                assert (row.step, name) not in metrics, (
                    f"{name} of step {row.step} was written twice"
                )
                metrics[row.step, name] = value
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    files = [
        newest / "weights.safetensors",
        newest / "ema.safetensors",
        *sorted((run / "scores").glob("*.csv")),
    ]
    return {"metrics": metrics, "newest": newest.name} | {
        file.name: file.read_bytes() for file in files
    }


def tracked(database: Path, run_name: str) -> dict[tuple[int, str], list[float]]:
    """Read MLflow's values by (step, metric): one each, if nothing was sent twice."""
    with sqlite3.connect(database) as connection:
        rows = connection.execute(
            "SELECT m.step, m.key, m.value FROM metrics m "
            "JOIN runs r ON m.run_uuid = r.run_uuid WHERE r.name = ?",
            (run_name,),
        ).fetchall()
        runs = connection.execute(
            "SELECT count(*) FROM runs WHERE name = ?", (run_name,)
        ).fetchone()[0]
    assert runs == 1, f"{runs} MLflow runs are called {run_name}"
    found: dict[tuple[int, str], list[float]] = {}
    for step, key, value in rows:
        if not key.startswith(TIMED):
            found.setdefault((step, key), []).append(value)
    return found
