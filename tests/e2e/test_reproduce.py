"""A table from nothing, as a user does it: data, runs, scores, table, page, MLflow."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from coupalign.cli.parser import main

ROOT = Path(__file__).parents[2]
TABLE = """
title: A table of two
source: nobody
columns: [val oIoU, val bIoU]
rows:
  - {method: somebody's, paper: {val oIoU: 12.34}}
  - {method: ours, paper: {val oIoU: 50.0}, shapes: [model.proposals.count=3]}
"""
QUICK = [
    "train.steps=4",
    "schedule.warmup_steps=0",
    "evaluate.limit=12",
    "evaluate.pictures=1",
    "evaluate.bootstrap=20",
]


def test_a_table_from_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("configs", "slurm", "shards"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "own.yaml").write_text(TABLE)
    words = ["reproduce", "own.yaml", "--data", "refshapes", "--scale", "tiny", *QUICK]
    assert main(words) == 0
    shown = capfd.readouterr().out
    assert (
        "somebody's  paper" in shown
        and "ours        paper" in shown
        and "leak: none: no scored photograph was trained on" in shown
    )
    assert (
        "protocol ris-v1" in shown
        and "published only, not in this harness" in shown
        and "ours are of RefShapes" in shown
    )
    out, run = (
        tmp_path / "runs" / "reproduce-own-tiny",
        tmp_path / "runs" / "refshapes_tiny-count-3-s0",
    )
    assert {file.name for file in out.iterdir()} >= {
        "table.txt",
        "table.md",
        "table.json",
        "index.html",
        "failures-ours.png",
    }
    page = (out / "index.html").read_text(encoding="utf-8")
    assert (
        "12.34" in page
        and "data:image/" in page
        and 'href="../refshapes_tiny-count-3-s0/report.html"' in page
    )
    assert (run / "report.html").is_file() and (run / "trained_on.json").is_file()
    assert (next((run / "checkpoints").glob("step-*")) / "trained_on.json").is_file(), (
        "the checkpoint knows it, too"
    )
    with sqlite3.connect(tmp_path / "runs" / "mlflow.db") as connection:
        names = {name for (name,) in connection.execute("SELECT name FROM runs")}
        tags = dict(
            connection.execute(
                "SELECT t.key, t.value FROM tags t JOIN runs r ON t.run_uuid = r.run_uuid "
                "WHERE r.name = 'refshapes_tiny-count-3-s0'"
            ).fetchall()
        )
    assert names == {"refshapes_tiny-count-3-s0", "reproduce-own-tiny"} and (
        tags["method"],
        tags["leak"],
    ) == ("coupalign", "none found")
    assert list((tmp_path / "runs").rglob("mlartifacts/**/table.md")), "the table is an artifact"
