"""Kill ranks at random, fill disks, move clocks: the run must end as an undisturbed one does.

The variable KILLS says how often the ranks of one run are killed (default: 30).
"""

from __future__ import annotations

import os
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cluster.faults import happened, random_faults, remains, run_with_faults, tracked
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
def meanwhile(outage: Outage) -> None:
    """Start the outage, which lasts as long as these tests."""


def test_kills_at_random_moments_leave_no_trace(
    config: Path, tmp_path: Path, survived: Callable[[str], None]
) -> None:
    whole, killed = tmp_path / "a" / "whole", tmp_path / "b" / "killed"
    faults = random_faults(KILLS, 2, SEED)

    run_with_faults(tmp_path, [], "train", config, f"run_dir={whole}", "name=whole", *LONG)
    train = ["train", config, f"run_dir={killed}", "name=killed", *LONG]
    output = run_with_faults(tmp_path, faults, *train, restarts=2 * KILLS)

    kinds = Counter(fault["name"] for fault in happened(tmp_path))
    assert kinds.total() == KILLS, f"only {kinds}\n{output[-3000:]}"
    expected, found = remains(whole), remains(killed)
    assert expected.keys() == found.keys()
    assert [name for name in expected if expected[name] != found[name]] == []
    assert {step for step, _ in found["metrics"]} == set(range(1, STEPS + 1))
    assert not list(killed.rglob("*.partial"))

    # MLflow has each point once.
    sent = tracked(tmp_path / "b" / "mlflow.db", "killed")
    assert all(len(values) == 1 for values in sent.values())
    assert sent == tracked(tmp_path / "a" / "mlflow.db", "whole")

    for kind in kinds.elements():
        survived(f"SIGKILL {kind}")


ZERO = ["engine.kind=deepspeed", "engine.stage=2"]
DDP = ["engine.kind=ddp"]
# Each start: its ranks, its engine, and where rank 0 is killed. After the starts that are not
# killed, four more steps are done.
STARTS = (
    (2, ZERO, None),
    (1, ZERO, {"event": "os.mkdir", "match": r"universal\.[^/]+\.partial/zero/", "count": 40}),
    (1, ZERO, {"event": "os.rename", "match": r"universal\.[^/]+\.partial$", "count": 1}),
    (1, ZERO, None),
    (2, DDP, {"event": "coupalign.doing", "match": "loading", "count": 1}),
    (2, DDP, None),
)


def test_kills_while_the_number_of_ranks_changes_leave_no_trace(
    config: Path, tmp_path: Path, survived: Callable[[str], None]
) -> None:
    """2 ranks of ZeRO 2, then 1, then 2 of DDP, killed at every stage of the conversion."""
    rarely = ["train.save_every=4", "train.evaluate_every=100", "train.keep_last=9"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    steps, faults = 0, []
    for ranks, engine, moment in STARTS:
        changes = [*rarely, *engine, f"train.steps={steps + 4}"]
        train = ["train", config, f"run_dir={killed}", *changes]

        if moment:
            name = "during the universal conversion"
            faults.append({"rank": 0, "do": "kill", "name": name, **moment})
            output = run_with_faults(tmp_path, faults, *train, ranks=ranks, status=1)
            assert len(happened(tmp_path)) == len(faults), output[-3000:]
            continue

        output = run_with_faults(tmp_path, faults, *train, ranks=ranks)
        assert remains(killed)["newest"] == f"step-{steps + 4:08d}", output[-3000:]
        train = ["train", config, f"run_dir={whole}", *changes]
        run_with_faults(tmp_path / "undisturbed", [], *train, ranks=ranks)
        assert remains(killed) == remains(whole), steps
        steps += 4

    for fault in happened(tmp_path):
        survived(f"SIGKILL {fault['name']}")


def test_hanging_rank_is_named_and_the_job_ends(
    config: Path, tmp_path: Path, survived: Callable[[str], None]
) -> None:
    run = tmp_path / "run"
    hang = {"rank": 1, "event": "coupalign.doing", "match": "step 9: reading data", "do": "hang"}
    rarely = ["train.steps=12", "train.save_every=4", "train.evaluate_every=100"]
    train = ["train", config, f"run_dir={run}", *rarely]

    output = run_with_faults(tmp_path, [hang], *train, "train.hang_minutes=0.2", status=1)

    assert "no progress for" in output and "status 70" in output
    culprit = "'step 9: reading data'  <- the others seem to wait for this rank"
    assert "rank 1 (" in output and culprit in output, output[-5000:]
    # Ranks that wait, report and end are alive.
    assert "silent" not in output

    # The same command resumes.
    run_with_faults(tmp_path, [], *train)
    assert remains(run)["newest"] == "step-00000012"
    survived("hang")


def test_stop_during_an_evaluation_leaves_it_to_the_next_start(
    config: Path, tmp_path: Path, survived: Callable[[str], None]
) -> None:
    """The next start takes the missing scores first, then equals an uninterrupted run."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    # With batches of one, an evaluation takes longer than the ranks' agreement on a stop.
    changes = ["train.steps=12", "train.save_every=6", "train.evaluate_every=6"]
    train = ["train", config, *changes, "evaluate.batch=1"]
    stop = {"rank": 1, "event": "coupalign.doing", "match": "scoring val: batch 2", "do": "usr1"}

    run_with_faults(tmp_path, [], *train, f"run_dir={whole}")
    output = run_with_faults(tmp_path, [stop], *train, f"run_dir={stopped}", status=1)

    assert "after step 6; the same command resumes" in output and "exitcode  : 75" in output
    assert not (stopped / "scores").exists()
    run_with_faults(tmp_path, [], *train, f"run_dir={stopped}")
    assert remains(stopped) == remains(whole)
    survived("stop during an evaluation")


@contextmanager
def mounted(folder: Path, megabytes: int) -> Iterator[None]:
    """Mount a file system of this size at `folder`."""
    folder.mkdir(parents=True)
    options = ["-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs"]
    subprocess.run(["mount", *options, str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small file system")
def test_full_disk_and_read_only_disk_end_the_run_and_a_larger_disk_resumes_it(
    config: Path, tmp_path: Path, survived: Callable[[str], None]
) -> None:
    # The disk has room for one checkpoint and a half.
    rarely = ["train.steps=8", "train.save_every=4", "train.evaluate_every=100"]
    train = ["train", config, *rarely, "model.text.width=128"]
    whole, small = tmp_path / "whole", tmp_path / "small"
    run = small / "run"
    run_with_faults(tmp_path, [], *train, f"run_dir={whole}")
    files = (whole / "checkpoints/step-00000004").rglob("*")
    size = sum(file.stat().st_size for file in files)

    with mounted(small, 1 + int(1.5 * size / 2**20)):
        # The disk fills up.
        output = run_with_faults(tmp_path, [], *train, f"run_dir={run}", status=1)
        message = "step-00000008: the checkpoint could not be written"
        assert message in output and "; free: 0." in output, output[-4000:]
        assert "Whole checkpoints there: step-00000004" in output and "exitcode  : 3" in output

        # The disk is read-only.
        subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
        output = run_with_faults(tmp_path, [], *train, f"run_dir={run}", status=1)
        message = "the run directory cannot be written"
        assert message in output and "Read-only file system" in output, output[-4000:]
        assert "exitcode  : 2" in output

        # The disk has room.
        subprocess.run(["mount", "-o", "remount,rw,size=500m", str(small)], check=True)
        run_with_faults(tmp_path, [], *train, f"run_dir={run}")
        assert remains(run) == remains(whole)

    survived("full disk")
    survived("read-only disk")


def test_clock_that_jumps_changes_nothing_and_sends_nothing_twice(
    config: Path, tmp_path: Path, survived: Callable[[str], None]
) -> None:
    """Rank 0's clock jumps a day back, within a session and again after a resume."""
    whole, jumped = tmp_path / "a" / "whole", tmp_path / "b" / "jumped"
    changes = [
        "train.steps=20",
        "train.save_every=5",
        "train.evaluate_every=10",
        "tracking.kind=mlflow",
        "schedule.final=1",
    ]
    jump = {"rank": 0, "event": "coupalign.doing", "match": "step 7: reading data", "do": "clock"}
    kill = {"rank": 1, "event": "coupalign.doing", "match": "step 14: reading data", "do": "kill"}
    later = {**jump, "match": "step 15: reading data"}

    run_with_faults(tmp_path, [], "train", config, f"run_dir={whole}", "name=whole", *changes)
    train = ["train", config, f"run_dir={jumped}", "name=jumped", *changes]
    # The first session ends at a step at which the whole run takes scores, too.
    run_with_faults(tmp_path, [jump], *train, "train.steps=10")
    run_with_faults(tmp_path, [jump, kill, later], *train, restarts=1)

    assert len(happened(tmp_path)) == 3
    assert remains(whole) == remains(jumped)
    sent = tracked(tmp_path / "b" / "mlflow.db", "jumped")
    assert sent == tracked(tmp_path / "a" / "mlflow.db", "whole")
    assert all(len(values) == 1 for values in sent.values())
    survived("clock a day back")
