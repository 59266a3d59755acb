"""The runs of a table: planned, trained and scored once, stopped, resumed, submitted to Slurm."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from coupalign.config.load import dump, read_config
from coupalign.errors import InputError
from coupalign.reproduce import collect, plan_runs, read_table, run_all, submit
from coupalign.reproduce.runs import PlannedRun
from tests.unit.reproduce.conftest import ROOT, write_scores


def runs_of_table(name: str, scale: str | None, seeds: int) -> list[PlannedRun]:
    """All runs of a shipped table."""
    planned = plan_runs(read_table(name), scale, seeds)
    return [run for _, runs in planned for run in runs]


def calls() -> list[str]:
    """The calls that the launcher noted."""
    return Path("calls.txt").read_text().splitlines()


def test_plan_scores_only_the_splits_that_a_row_has() -> None:
    table = read_table("main")
    on_real_data = {row.method: runs for row, runs in plan_runs(table, None, 1)}
    on_shapes = {row.method: runs for row, runs in plan_runs(table, "tiny", 1)}

    assert on_real_data["CoupAlign, RefCOCO"][0].splits == ("val", "testA", "testB")
    assert on_real_data["CoupAlign, G-Ref (umd)"][0].splits == ("val", "test")
    assert on_shapes["CoupAlign, RefCOCO"][0].splits == ("val", "testA", "testB")
    assert not on_shapes["CoupAlign, RefCOCO+"]


def test_plan_without_runs_names_the_remedy() -> None:
    with pytest.raises(InputError, match="add --data refshapes"):
        plan_runs(read_table("methods"), None, 1)


def test_runs_of_different_changes_have_different_names() -> None:
    def name(*changes: str) -> str:
        return PlannedRun(Path("configs/x.yaml"), changes, 1, ()).directory.name

    assert name() == "x-s1"
    assert name("model.proposals.count=50") == "x-count-50-s1"
    assert name("train.ema.decay=0.5") == "x-decay-0.5-s1"
    assert name("data.augment.flip=0.5") == "x-flip-0.5-s1"
    assert name("a.b=[true, false]", "c=1e-3") == "x-b-true-false-c-1e-3-s1"


def test_run_all_trains_and_scores_each_run_once(launcher: Path) -> None:
    runs = runs_of_table("table3", "tiny", 1)
    write_scores(runs[0], 0.5)  # needs no training

    # Rows may share runs: here each is given twice.
    results = run_all([*runs, *runs], ["train.steps=3"], [str(launcher)], jobs=3)

    assert [result.status for result in results] == [0] * 6
    assert len(calls()) == 10, "five trainings, five scorings"
    train = (
        "train configs/refshapes_tiny.yaml train.steps=3 model.proposals.count=50 seed=0 "
        "name=refshapes_tiny-count-50-s0"
    )
    score = "eval runs/refshapes_tiny-count-50-s0 --split val --language-blind --pictures 6"
    assert train in calls()
    assert score in calls()


def test_run_all_refuses_a_run_directory_of_its_own(launcher: Path) -> None:
    runs = runs_of_table("table3", "tiny", 1)

    with pytest.raises(InputError, match="run_dir = elsewhere: .* leave it out"):
        run_all(runs, ["run_dir=elsewhere"], [str(launcher)])


def test_run_that_failed_to_train_is_not_scored_and_its_error_is_shown(
    launcher: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    runs = runs_of_table("table3", "tiny", 1)
    monkeypatch.setenv("FAKE_STATUS", "3")

    [result] = run_all(runs[1:2], [], [str(launcher)])

    assert result.status == 3
    assert len(calls()) == 1, "one training, no scoring"
    error = (
        "status 3: data/shards/x/index.json: no such file; "
        "all of it: runs/refshapes_tiny-count-20-s0.log"
    )
    assert error in capfd.readouterr().out


def test_run_directory_of_another_configuration_is_refused(launcher: Path) -> None:
    table = read_table("table3")
    planned = plan_runs(table, "tiny", 1)
    _, [run] = planned[0]
    run.directory.mkdir(parents=True)
    other = read_config("configs/refshapes_tiny.yaml", ["model.proposals.count=7"])
    (run.directory / "config.yaml").write_text(dump(other))

    difference = r"another configuration: model\.proposals\.count is 7 there, 0 here"
    with pytest.raises(InputError, match=difference):
        run_all([run], [], [str(launcher)])

    write_scores(run, 0.5)
    with pytest.raises(InputError, match="another configuration"):
        collect(planned, table)


def test_sigterm_stops_the_runs_and_says_how_to_resume(launcher: Path) -> None:
    options = ["--launcher", str(launcher), "--jobs", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "coupalign", "reproduce", "table3", *options],
        env={**os.environ, "FAKE": "sleep", "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not Path("asleep").exists() and time.monotonic() < deadline:
        time.sleep(0.2)

    process.send_signal(signal.SIGTERM)

    _, errors = process.communicate(timeout=30)
    assert process.returncode == 75
    assert "repeat the same command to resume" in errors


@pytest.fixture
def sbatch(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for sbatch. It appends its splits and arguments to sbatch.txt."""
    file = checkout / "bin" / "sbatch"
    file.parent.mkdir()
    file.write_text(
        '#!/bin/sh\necho "$COUPALIGN_SPLITS: $*" >> sbatch.txt\necho Submitted batch job 7\n'
    )
    file.chmod(0o755)
    monkeypatch.setenv("PATH", str(file.parent), prepend=os.pathsep)
    return file


def test_submit_sends_one_array_per_configuration(checkout: Path, sbatch: Path) -> None:
    runs = runs_of_table("table1", None, 3)
    write_scores(runs[0], 0.5)  # needs no task
    sweeps = checkout / "runs" / "sweeps"

    submit(runs, ["train.epochs=1"], "--nodes 1 --time 1:00:00", sweeps)

    first, second = Path("sbatch.txt").read_text().splitlines()
    assert first.startswith("val: --array 0-1 --nodes 1 --time 1:00:00 slurm/sweep.sbatch")
    assert first.endswith(
        "refcoco_lavt_resnet101.txt configs/refcoco_lavt_resnet101.yaml train.epochs=1"
    )
    assert "--array 0-2" in second
    # sweep.sbatch calls the runs <configuration>-s1 …
    variants = (sweeps / "refcoco_lavt_resnet101.txt").read_text().splitlines()
    assert variants == ["s1 seed=1", "s2 seed=2"]


def test_submit_without_sbatch_is_refused(
    checkout: Path, sbatch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = runs_of_table("table1", None, 3)
    sbatch.unlink()
    monkeypatch.setenv("PATH", str(sbatch.parent))

    with pytest.raises(InputError, match="no sbatch here"):
        submit(runs, [], "", checkout / "runs" / "sweeps")
