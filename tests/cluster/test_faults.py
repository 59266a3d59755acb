"""Kill ranks at random, fill disks, move clocks: the run must end as an undisturbed one does.

The variable KILLS is how often the ranks of one run are killed (30).
"""

from __future__ import annotations

import os
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cluster.faults import broken, happened, random_faults, remains, tracked
from tests.cluster.outage import Outage

KILLS = int(os.environ.get("KILLS", 30))
STEPS = 40 + 4 * KILLS
LONG = [
    f"train.steps={STEPS}",
    "train.save_every=4",
    "train.evaluate_every=10",
    "train.keep_last=2",
    "train.log_every=1",
    "tracking.kind=mlflow",
    "data.evaluate.0.split=val",
]
SEED = 4


@pytest.fixture(scope="module", autouse=True)
def beside(outage: Outage) -> None:
    """The tracking server is away while these tests and those of the next files run."""


def test_thirty_kills_leave_no_trace(
    config: Path, tmp_path: Path, survived: Callable[[str], None]
) -> None:
    faults = random_faults(KILLS, 2, SEED)
    broken(
        tmp_path, [], "train", config, f"run_dir={tmp_path / 'a' / 'whole'}", "name=whole", *LONG
    )
    output = broken(
        tmp_path,
        faults,
        "train",
        config,
        f"run_dir={tmp_path / 'b' / 'killed'}",
        "name=killed",
        *LONG,
        restarts=2 * KILLS,
    )
    took_place = Counter(fault["name"] for fault in happened(tmp_path))
    assert took_place.total() == KILLS, f"only {took_place}\n{output[-3000:]}"
    whole, killed = remains(tmp_path / "a" / "whole"), remains(tmp_path / "b" / "killed")
    assert whole.keys() == killed.keys()
    assert [name for name in whole if whole[name] != killed[name]] == []
    assert {step for step, _ in killed["metrics"]} == set(range(1, STEPS + 1))
    sent = tracked(tmp_path / "b" / "mlflow.db", "killed")
    assert all(len(values) == 1 for values in sent.values()), "MLflow has each point once"
    assert sent == tracked(tmp_path / "a" / "mlflow.db", "whole")
    assert not list((tmp_path / "b" / "killed").rglob("*.partial")), "no debris"
    for name, times in took_place.items():
        for _ in range(times):
            survived(f"SIGKILL {name}")


ZERO = ["engine.kind=deepspeed", "engine.stage=2"]
WORLDS = (  # each start: ranks, what is changed, where rank 0 is killed
    (2, ZERO, None),
    (1, ZERO, {"event": "os.mkdir", "match": r"universal\.partial/zero/", "count": 40}),
    (1, ZERO, {"event": "os.rename", "match": r"universal\.partial$", "count": 1}),
    (1, ZERO, None),
    (2, ["engine.kind=ddp"], {"event": "coupalign.doing", "match": "loading", "count": 1}),
    (2, ["engine.kind=ddp"], None),
)


def test_kills_while_the_number_of_ranks_changes(
    config: Path, tmp_path: Path, survived: Callable[[str], None]
) -> None:
    """2 ranks of ZeRO 2, then 1, then 2 of DDP, killed at every stage of the conversion."""
    few = ["train.save_every=4", "train.evaluate_every=100", "train.keep_last=9"]
    steps, planned = 0, []
    for ranks, engine, place in WORLDS:
        run = [config, f"run_dir={tmp_path / 'killed'}", *few, *engine, f"train.steps={steps + 4}"]
        planned += (
            [{"rank": 0, "do": "kill", "name": "during the universal conversion", **place}]
            if place
            else []
        )
        output = broken(tmp_path, planned, "train", *run, ranks=ranks, status=1 if place else 0)
        if place:
            assert len(happened(tmp_path)) == len(planned), output[-3000:]
            continue
        assert remains(tmp_path / "killed")["newest"] == f"step-{steps + 4:08d}", output[-3000:]
        broken(
            tmp_path / "undisturbed",
            [],
            "train",
            config,
            f"run_dir={tmp_path / 'whole'}",
            *few,
            *engine,
            f"train.steps={steps + 4}",
            ranks=ranks,
        )
        assert remains(tmp_path / "killed") == remains(tmp_path / "whole"), steps
        steps += 4
    for fault in happened(tmp_path):
        survived(f"SIGKILL {fault['name']}")


def test_a_rank_that_hangs_is_named_and_ends_the_job(
    config: Path, tmp_path: Path, survived: Callable[[str], None]
) -> None:
    run = tmp_path / "run"
    hang = {"rank": 1, "event": "coupalign.doing", "match": "step 9: reading data", "do": "hang"}
    few = ["train.steps=12", "train.save_every=4", "train.evaluate_every=100"]
    output = broken(
        tmp_path,
        [hang],
        "train",
        config,
        f"run_dir={run}",
        *few,
        "train.hang_minutes=0.2",
        status=1,
    )
    assert "no progress for" in output and "status 70" in output
    culprit = "'step 9: reading data'  <- the others seem to wait for this rank"
    assert "rank 1 (" in output and culprit in output, output[-5000:]
    assert "silent" not in output, "ranks that wait, report and end are alive"
    broken(tmp_path, [], "train", config, f"run_dir={run}", *few)
    assert remains(run)["newest"] == "step-00000012"
    survived("hang")


def test_a_stop_in_the_middle_of_an_evaluation(
    config: Path, tmp_path: Path, survived: Callable[[str], None]
) -> None:
    """The next start takes the missing scores first, then equals an uninterrupted run."""
    few = [
        "train.steps=12",
        "train.save_every=6",
        "train.evaluate_every=6",
        "evaluate.batch=1",
    ]  # ranks agree about once a second
    stop = {"rank": 1, "event": "coupalign.doing", "match": "scoring val: batch 2", "do": "usr1"}
    broken(tmp_path, [], "train", config, f"run_dir={tmp_path / 'whole'}", *few)
    output = broken(
        tmp_path, [stop], "train", config, f"run_dir={tmp_path / 'stopped'}", *few, status=1
    )
    assert "after step 6; the same command resumes" in output and "exitcode  : 75" in output
    assert not (tmp_path / "stopped" / "scores").exists()
    broken(tmp_path, [], "train", config, f"run_dir={tmp_path / 'stopped'}", *few)
    assert remains(tmp_path / "stopped") == remains(tmp_path / "whole")
    survived("stop during an evaluation")


@contextmanager
def mounted(folder: Path, megabytes: int) -> Iterator[None]:
    """A file system of its own, as small as this, at `folder`."""
    folder.mkdir(parents=True)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], check=True
    )
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small file system")
def test_a_disk_that_fills_up_and_one_that_cannot_be_written(
    config: Path, tmp_path: Path, survived: Callable[[str], None]
) -> None:
    """Bigger moments than the disk has room for; then the same disk read-only; then room enough."""
    few = [
        "train.steps=8",
        "train.save_every=4",
        "train.evaluate_every=100",
        "model.text.width=128",
    ]
    run = tmp_path / "small" / "run"
    broken(tmp_path, [], "train", config, f"run_dir={tmp_path / 'whole'}", *few)
    size = sum(
        file.stat().st_size for file in (tmp_path / "whole/checkpoints/step-00000004").rglob("*")
    )
    with mounted(tmp_path / "small", 1 + int(1.5 * size / 2**20)):
        output = broken(tmp_path, [], "train", config, f"run_dir={run}", *few, status=1)
        assert (
            "step-00000008: the checkpoint could not be written" in output and "GB free" in output
        ), output[-4000:]
        assert "Whole checkpoints there: step-00000004" in output and "exitcode  : 3" in output
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "small")], check=True)
        output = broken(tmp_path, [], "train", config, f"run_dir={run}", *few, status=1)
        assert (
            "the run directory cannot be written" in output and "Read-only file system" in output
        ), output[-4000:]
        assert "exitcode  : 2" in output
        subprocess.run(["mount", "-o", "remount,rw,size=500m", str(tmp_path / "small")], check=True)
        broken(tmp_path, [], "train", config, f"run_dir={run}", *few)
        assert remains(run) == remains(tmp_path / "whole")
    survived("full disk")
    survived("read-only disk")


def test_a_clock_that_jumps(config: Path, tmp_path: Path, survived: Callable[[str], None]) -> None:
    """A day back on rank 0, in mid-session and after a resume: nothing is sent twice."""
    few = [
        "train.steps=20",
        "train.save_every=5",
        "train.evaluate_every=10",
        "tracking.kind=mlflow",
        "schedule.final=1",
    ]
    jump = {"rank": 0, "event": "coupalign.doing", "match": "step 7: reading data", "do": "clock"}
    kill = {"rank": 1, "event": "coupalign.doing", "match": "step 14: reading data", "do": "kill"}
    broken(tmp_path, [], "train", config, f"run_dir={tmp_path / 'a' / 'whole'}", "name=whole", *few)
    run = [config, f"run_dir={tmp_path / 'b' / 'jumped'}", "name=jumped", *few]
    broken(
        tmp_path, [jump], "train", *run, "train.steps=10"
    )  # a step at which the whole run takes scores, too
    broken(
        tmp_path,
        [jump, kill, {**jump, "match": "step 15: reading data"}],
        "train",
        *run,
        restarts=1,
    )
    assert len(happened(tmp_path)) == 3
    assert remains(tmp_path / "a" / "whole") == remains(tmp_path / "b" / "jumped")
    sent = tracked(tmp_path / "b" / "mlflow.db", "jumped")
    assert sent == tracked(tmp_path / "a" / "mlflow.db", "whole") and all(
        len(values) == 1 for values in sent.values()
    )
    survived("clock a day back")
