"""Our scores next to the published numbers: mean over seeds, difference, notes and files."""

from __future__ import annotations

import json
import re
from pathlib import Path

from coupalign.config.load import read_config
from coupalign.files import write_json
from coupalign.reproduce import collect, plan_runs, publish, read_table
from coupalign.reproduce.table import markdown_table, text_table
from tests.unit.reproduce.conftest import constant_score, write_scores


def test_table_shows_mean_deviation_and_difference_over_seeds() -> None:
    table = read_table("table1")
    planned = plan_runs(table, None, 3)
    runs_by_method = {row.method: runs for row, runs in planned}

    # CoupAlign has the scores of three seeds …
    runs = runs_by_method["CoupAlign"]
    names = [run.directory.name for run in runs]
    assert names == ["refcoco_resnet101-s0", "refcoco_resnet101-s1", "refcoco_resnet101-s2"]
    for run, value in zip(runs, (0.68, 0.69, 0.70)):
        write_scores(run, value, blind=0.2)

    # … and LAVT only what training leaves, which does not count.
    trained_only = runs_by_method["LAVT"][0]
    write_json(trained_only.directory / "scores" / "val.json", constant_score(0.9).to_json())

    results = collect(planned, table)

    text = text_table(table, results, comparable=True)
    assert re.search(r"ours +69\.00 ± 1\.00", text)
    assert re.search(r"difference +\+0\.07 ", text)
    assert re.search(r"blind +20\.00", text)
    assert "LSCM: published only, not in this harness" in text
    assert "not there yet: refcoco_lavt_resnet101-s0" in text
    assert "leak: none" in text
    assert "seeds: 3" in text

    markdown = markdown_table(table, results, comparable=True)
    assert "| CoupAlign | paper | 68.93 |" in markdown
    assert "|  | ours | 69.00 ± 1.00 |" in markdown

    # Numbers that cannot be compared have no difference, only the note that it means nothing.
    text = text_table(table, results, comparable=False)
    assert "difference" not in text.replace("a difference would", "")


def test_publish_writes_the_table_as_json_and_as_a_page(checkout: Path) -> None:
    table = read_table("table3")
    planned = plan_runs(table, "tiny", 1)
    for _, runs in planned:
        write_scores(runs[0], 0.4)
    config = read_config("configs/refshapes_tiny.yaml", ["tracking.kind=none"])
    results = collect(planned, table)
    folder = checkout / "runs" / "out"

    files = publish(
        "reproduce-table3-tiny",
        table,
        results,
        folder=folder,
        config=config,
        comparable=False,
    )

    rows = json.loads((folder / "table.json").read_text())
    assert [row["ours"]["val mIoU"]["mean"] for row in rows] == [40.0] * 6
    assert files[-1].name == "index.html"
    page = (folder / "index.html").read_text()
    assert "N = 100" in page
    assert "75.49" in page
    assert "40.00" in page
