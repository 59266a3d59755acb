"""Tables: the shipped ones hold the supplement's numbers, runs are planned, made, resumed and collected, and stand beside the paper's."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from coupalign.config.load import read_config
from coupalign.errors import InputError
from coupalign.evaluation.metrics import METRICS, Score
from coupalign.files import write_json
from coupalign.reproduce import collect, plan_runs, read_table, run_all, submit
from coupalign.reproduce.runs import PlannedRun
from coupalign.reproduce.spec import TABLES
from coupalign.reproduce.table import markdown_table, text_table

ROOT = Path(__file__).parents[3]
NAMES = sorted(file.stem for file in (ROOT / TABLES).glob("*.yaml"))


@pytest.fixture(autouse=True)
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout's configurations, in a folder where runs may be made."""
    for name in ("configs", "slurm", "shards"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WEIGHTS", "/weights")
    return tmp_path


@pytest.mark.parametrize("name", NAMES)
def test_every_row_has_valid_configurations(name: str) -> None:
    for row in read_table(name).rows:
        assert row.paper or row.config or row.shapes is not None, row.method
        if row.config:
            read_config(Path("configs") / row.config)
        if row.shapes is not None:
            for scale in ("refshapes", "refshapes_tiny"):
                read_config(Path("configs") / f"{scale}.yaml", row.shapes)


def test_the_tables_are_those_of_the_supplement() -> None:
    """Each row's numbers, in the order of the columns, against the supplement's text as it was typed off a second time."""
    expected = {
        "table1": {
            "LSCM": "61.47 73.95 69.58 62.59 49.61 20.63",
            "CMPC": "61.36 71.27 64.44 55.03 39.28 12.89",
            "EFN": "62.76 73.95 69.58 62.59 49.61 20.63",
            "LAVT": "68.1 80.55 75.25 67.27 55.05 25.37",
            "CoupAlign": "68.93 81.26 76.54 69.69 57.07 27.44",
        },
        "table2": {
            "LTS": "65.43 75.16 69.51 60.74 45.17 14.41",
            "VLT": "65.65 76.2",
            "CoupAlign": "68.16 81.02 76.35 69.53 56.91 25.95",
        },
        "table3": {
            "N = 0": "73.85 84.86 80.85 74.62 62.29 29.25",
            "N = 20": "74.77 85.46 81.81 76.22 64.83 30.91",
            "N = 50": "74.98 85.67 81.76 76.2 64.86 31.88",
            "N = 100": "75.49 86.4 83.41 77.59 65.94 32.4",
            "N = 150": "74.12 85.33 81.71 75.86 64.74 31.3",
            "N = 200": "74.38 84.91 81.05 75.36 64.23 31.67",
        },
    }
    for name, rows in expected.items():
        table = read_table(name)
        found = {
            row.method: " ".join(
                f"{row.paper[column]:g}" for column in table.columns if column in row.paper
            )
            for row in table.rows
        }
        assert found == rows
        assert [column.split()[1] for column in table.columns] == [
            "mIoU" if name == "table3" else "oIoU",
            *METRICS[2:7],
        ]


def test_the_configuration_of_a_row_says_the_number_of_its_table() -> None:
    """Headers quote the paper; they must quote the row that they belong to."""
    for name in ("table1", "table2", "table3", "main"):
        for row in read_table(name).rows:
            if row.config and row.paper:
                head = (Path("configs") / row.config).read_text(encoding="utf-8").split("name:")[0]
                first = next(iter(row.paper.values()))
                assert f"{first:.2f}" in head or row.config == "refcoco_swin_b.yaml", (
                    row.config,
                    first,
                )


def test_a_table_that_is_not_there_lists_those_that_are() -> None:
    with pytest.raises(InputError, match="table4.yaml: no such table.*table1, table2, table3"):
        read_table("table4")
    Path("own.yaml").write_text("title: x\nsource: y\ncolumns: [val oIoUU]\nrows: []\n")
    with pytest.raises(InputError, match="column 'val oIoUU'"):
        read_table("own.yaml")
    with pytest.raises(InputError, match="add --data refshapes"):
        plan_runs(read_table("methods"), None, 1)


def given(run, *scores: float, blind: float | None = None) -> None:
    """Scores of a run as `coupalign eval` leaves them, one of each metric."""

    def score(value: float, other: Score | None = None) -> Score:
        return Score(
            protocol="ris-v1",
            metrics=dict.fromkeys(METRICS, value),
            samples=10,
            images=5,
            leak="none: no scored photograph was trained on",
            language_blind=other,
        )

    for split, value in zip(run.splits, scores):
        made = score(value, None if blind is None else score(blind))
        write_json(run.directory / "scores" / f"{split}-ris-v1.json", made.to_json())


def test_mean_deviation_and_difference_over_seeds() -> None:
    table = read_table("table1")
    planned = plan_runs(table, None, 3)
    ((_, runs),) = [pair for pair in planned if pair[0].method == "CoupAlign"]
    assert [run.directory.name for run in runs] == [
        f"refcoco_resnet101-s{seed}" for seed in range(3)
    ]
    for run, value in zip(runs, (0.68, 0.69, 0.70)):
        given(run, value, blind=0.2)
    trained_only = next(runs for row, runs in planned if row.method == "LAVT")[0]
    write_json(
        trained_only.directory / "scores" / "val.json",
        Score(
            protocol="ris-v1", metrics=dict.fromkeys(METRICS, 0.9), samples=10, images=5
        ).to_json(),
    )
    results = collect(planned, table)
    shown = text_table(table, results, comparable=True)
    assert (
        re.search(r"ours +69\.00 ± 1\.00", shown)
        and re.search(r"difference +\+0\.07 ", shown)
        and re.search(r"blind +20\.00", shown)
    )
    assert (
        "LSCM: published only, not in this harness" in shown
        and "not there yet: refcoco_lavt_resnet101-s0" in shown
    )
    assert "leak: none" in shown and "seeds: 3" in shown
    marked = markdown_table(table, results, comparable=True)
    assert "| CoupAlign | paper | 68.93 |" in marked and "|  | ours | 69.00 ± 1.00 |" in marked
    assert "difference" not in text_table(table, results, comparable=False).replace(
        "a difference would", ""
    )


def test_only_the_splits_that_a_row_has_are_scored() -> None:
    planned = {row.method: runs for row, runs in plan_runs(read_table("main"), None, 1)}
    assert planned["CoupAlign, RefCOCO"][0].splits == ("val", "testA", "testB")
    assert planned["CoupAlign, G-Ref (umd)"][0].splits == ("val", "test")
    shapes = {row.method: runs for row, runs in plan_runs(read_table("main"), "tiny", 1)}
    assert (
        shapes["CoupAlign, RefCOCO"][0].splits == ("val", "testA", "testB")
        and not shapes["CoupAlign, RefCOCO+"]
    )


FAKE = """#!{python}
import json, os, pathlib, sys, time
pathlib.Path("calls.txt").open("a").write(" ".join(sys.argv[1:]) + "\\n")
if "sleep" in os.environ.get("FAKE", ""):
    import signal
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    pathlib.Path("asleep").touch()
    time.sleep(60)
if os.environ.get("FAKE_STATUS"):
    print("coupalign: error: data/shards/x/index.json: no such file", file=sys.stderr, flush=True)
    print("something later", file=sys.stderr, flush=True)
    sys.exit(int(os.environ["FAKE_STATUS"]))
"""


@pytest.fixture
def launcher(checkout: Path) -> Path:
    """Stands for torchrun or deepspeed: notes how it was called."""
    file = checkout / "launcher"
    file.write_text(FAKE.replace("{python}", sys.executable))
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return file


def test_runs_are_called_once_and_shared_between_rows(
    launcher: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    runs = [run for _, runs in plan_runs(read_table("table3"), "tiny", 1) for run in runs]
    given(runs[0], 0.5)  # this one has its scores already
    outcomes = run_all([*runs, *runs], ["train.steps=3"], [str(launcher)], jobs=3)
    assert [outcome.status for outcome in outcomes] == [0] * 6
    calls = Path("calls.txt").read_text().splitlines()
    assert len(calls) == 10, "five trainings, five scorings"
    assert (
        "train configs/refshapes_tiny.yaml train.steps=3 model.proposals.count=50 seed=0 name=refshapes_tiny-count-50-s0"
        in calls
    )
    assert "eval runs/refshapes_tiny-count-50-s0 --split val --language-blind --pictures 6" in calls
    with pytest.raises(InputError, match="run_dir = elsewhere: .* leave it out"):
        run_all(runs, ["run_dir=elsewhere"], [str(launcher)])
    monkeypatch.setenv("FAKE_STATUS", "3")
    failed = run_all(runs[1:2], [], [str(launcher)])
    assert failed[0].status == 3 and len(Path("calls.txt").read_text().splitlines()) == 11, (
        "what failed to train is not scored"
    )
    assert (
        "status 3: data/shards/x/index.json: no such file; all of it: runs/refshapes_tiny-count-20-s0.log"
        in capfd.readouterr().out
    )


def test_scores_of_another_configuration_are_not_taken(launcher: Path) -> None:
    run = plan_runs(read_table("table3"), "tiny", 1)[0][1][0]
    run.directory.mkdir(parents=True)
    (run.directory / "config.yaml").write_text(
        "base: ../../configs/refshapes_tiny.yaml\nmodel: {proposals: {count: 7}}\n"
    )
    with pytest.raises(
        InputError, match=r"another configuration: model\.proposals\.count is 7 there, 0 here"
    ):
        run_all([run], [], [str(launcher)])
    given(run, 0.5)
    with pytest.raises(InputError, match="another configuration"):
        collect(plan_runs(read_table("table3"), "tiny", 1), read_table("table3"))


def test_asked_to_stop_it_stops_its_runs_and_says_so(launcher: Path) -> None:
    words = [
        sys.executable,
        "-m",
        "coupalign",
        "reproduce",
        "table3",
        "--launcher",
        str(launcher),
        "--jobs",
        "2",
    ]
    process = subprocess.Popen(
        words,
        env={**os.environ, "FAKE": "sleep", "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not Path("asleep").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=30)[1]
    assert process.returncode == 75 and "repeat the same command to resume" in said


def test_slurm_gets_an_array_for_each_configuration(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sbatch = checkout / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(
        '#!/bin/sh\necho "$COUPALIGN_SPLITS: $*" >> sbatch.txt\necho Submitted batch job 7\n'
    )
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", str(sbatch.parent), prepend=os.pathsep)
    runs = [run for _, runs in plan_runs(read_table("table1"), None, 3) for run in runs]
    given(runs[0], 0.5)
    submit(runs, ["train.epochs=1"], "--nodes 1 --time 1:00:00", checkout / "runs" / "sweeps")
    first, second = Path("sbatch.txt").read_text().splitlines()
    assert first.startswith("val: --array 0-1 --nodes 1 --time 1:00:00 slurm/sweep.sbatch")
    assert (
        first.endswith(
            "refcoco_lavt_resnet101.txt configs/refcoco_lavt_resnet101.yaml train.epochs=1"
        )
        and "--array 0-2" in second
    )
    lines = (checkout / "runs" / "sweeps" / "refcoco_lavt_resnet101.txt").read_text().splitlines()
    assert lines == ["s1 seed=1", "s2 seed=2"], (
        "the first has its scores; sweep.sbatch calls the runs <configuration>-s1 …"
    )
    sbatch.unlink()
    monkeypatch.setenv("PATH", str(sbatch.parent))
    with pytest.raises(InputError, match="no sbatch here"):
        submit(runs, [], "", checkout / "runs" / "sweeps")


def test_runs_of_different_changes_have_different_names() -> None:
    def name(*changes: str) -> str:
        return PlannedRun(Path("configs/x.yaml"), changes, 1, ()).directory.name

    assert name() == "x-s1" and name("model.proposals.count=50") == "x-count-50-s1"
    assert (
        name("train.ema.decay=0.5")
        == "x-decay-0.5-s1"
        != name("data.augment.flip=0.5")
        == "x-flip-0.5-s1"
    )
    assert name("a.b=[true, false]", "c=1e-3") == "x-b-true-false-c-1e-3-s1"


def test_table_json_is_plain(checkout: Path) -> None:
    from coupalign.reproduce import publish

    table = read_table("table3")
    planned = plan_runs(table, "tiny", 1)
    for _, runs in planned:
        given(runs[0], 0.4)
    config = read_config("configs/refshapes_tiny.yaml", ["tracking.kind=none"])
    files = publish(
        "reproduce-table3-tiny",
        table,
        collect(planned, table),
        checkout / "runs" / "out",
        config,
        comparable=False,
    )
    value = json.loads((checkout / "runs" / "out" / "table.json").read_text())
    assert [row["ours"]["val mIoU"]["mean"] for row in value] == [40.0] * 6
    page = (checkout / "runs" / "out" / "index.html").read_text()
    assert (
        files[-1].name == "index.html" and "N = 100" in page and "75.49" in page and "40.00" in page
    )
