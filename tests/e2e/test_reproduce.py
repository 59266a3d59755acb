"""A table from nothing, as a user makes it: data, runs, scores, table, page, MLflow."""

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
RUN = "refshapes_tiny-count-3-s0"
TAGS = """
SELECT t.key, t.value FROM tags t JOIN runs r ON t.run_uuid = r.run_uuid WHERE r.name = ?
"""


def test_reproduce_makes_data_runs_table_and_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("configs", "slurm", "shards"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "own.yaml").write_text(TABLE)

    arguments = ["reproduce", "own.yaml", "--data", "refshapes", "--scale", "tiny", *QUICK]
    assert main(arguments) == 0

    # What is printed.
    shown = capfd.readouterr().out
    assert "somebody's  paper" in shown
    assert "ours        paper" in shown
    assert "leak: none: no scored photograph was trained on" in shown
    assert "protocol ris-v1" in shown
    assert "published only, not in this harness" in shown
    assert "ours are of RefShapes" in shown

    # The folder of the table.
    out, run = tmp_path / "runs" / "reproduce-own-tiny", tmp_path / "runs" / RUN
    expected = {"table.txt", "table.md", "table.json", "index.html", "failures-ours.png"}
    assert {file.name for file in out.iterdir()} >= expected
    page = (out / "index.html").read_text(encoding="utf-8")
    assert "12.34" in page
    assert "data:image/" in page
    assert f'href="../{RUN}/report.html"' in page

    # The run and its checkpoint.
    assert (run / "report.html").is_file()
    assert (run / "trained_on.json").is_file()
    assert (next((run / "checkpoints").glob("step-*")) / "trained_on.json").is_file()

    # MLflow.
    with sqlite3.connect(tmp_path / "runs" / "mlflow.db") as connection:
        names = {name for (name,) in connection.execute("SELECT name FROM runs")}
        tags = dict(connection.execute(TAGS, [RUN]).fetchall())
    assert names == {RUN, "reproduce-own-tiny"}
    assert (tags["method"], tags["leak"]) == ("coupalign", "none found")
    assert list((tmp_path / "runs").rglob("mlartifacts/**/table.md")), "the table is an artifact"
