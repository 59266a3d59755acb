"""The project's sbatch files on a real Slurm: every topology and engine, and interrupted jobs."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cluster.conftest import CHANGES, ROOT, Cluster, losses, processes_where, weights

# A constant learning rate: a run of 6 steps is the beginning of one of STEPS.
TRAIN = [
    "slurm/train.sbatch",
    "tiny.yaml",
    *CHANGES,
    "schedule.warmup_steps=0",
    "schedule.final=1",
    "train.evaluate_every=1000",
    "train.save_every=20",
]
STEPS = 80
SHORT = 6
TWO_NODES = ["--nodes=2", "--ntasks-per-node=1"]


@pytest.fixture(scope="module", autouse=True)
def tiny(cluster: Cluster, config: Path) -> None:
    """The configuration, where the jobs are submitted."""
    (cluster.checkout / "tiny.yaml").write_text(config.read_text())


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster) -> Path:
    """A run of STEPS steps by DDP on two nodes."""
    cluster.wait_end(cluster.sbatch(*TWO_NODES, *TRAIN, "name=undisturbed", f"train.steps={STEPS}"))
    run = cluster.checkout / "runs" / "undisturbed"
    assert sorted(losses(run)) == list(range(1, STEPS + 1))
    return run


def test_pack(cluster: Cluster, shards: Path) -> None:
    recipe = shards.parent / "recipe.yaml"
    job = cluster.sbatch("slurm/pack.sbatch", recipe, "--out", "packed", "--workers", "1")
    cluster.wait_end(job)

    def tars(folder: Path) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in folder.glob("*.tar")}

    assert tars(cluster.checkout / "packed") == tars(shards)


def test_a_failure_is_the_jobs_failure_and_is_not_queued_again(cluster: Cluster) -> None:
    job = cluster.sbatch(
        *TWO_NODES, "slurm/train.sbatch", "tiny.yaml", "name=wrong", "train.global_batch=9"
    )
    cluster.wait_end(job, state="FAILED")
    assert cluster.job(job)["ExitCode"] == "2:0" and cluster.job(job)["Restarts"] == "0"
    assert "train.global_batch=9" in cluster.output(job)


@pytest.mark.parametrize("nodes, tasks, stage", [(2, 2, 1), (4, 1, 2), (2, 1, 3)])
def test_every_topology_and_engine_has_the_same_losses(
    cluster: Cluster, undisturbed: Path, nodes: int, tasks: int, stage: int
) -> None:
    name = f"zero{stage}"
    job = cluster.sbatch(
        f"--nodes={nodes}",
        f"--ntasks-per-node={tasks}",
        *TRAIN,
        f"name={name}",
        f"train.steps={SHORT}",
        "engine.kind=deepspeed",
        f"engine.stage={stage}",
    )
    cluster.wait_end(job)
    assert f"({nodes * tasks} ranks x" in cluster.output(job)
    same = losses(undisturbed)
    assert losses(cluster.checkout / "runs" / name) == pytest.approx(
        {step: same[step] for step in range(1, SHORT + 1)}, rel=1e-5
    )


def test_score(cluster: Cluster, undisturbed: Path) -> None:
    job = cluster.sbatch(*TWO_NODES, "slurm/eval.sbatch", "runs/undisturbed")
    cluster.wait_end(job)
    assert json.loads((undisturbed / "score.json").read_text())["samples"] > 0
    assert cluster.output(job).count("oIoU  ") == 1, "one rank prints"


def ranks_of(job: str) -> list[int]:
    """Process ids of the job's ranks."""

    def is_rank(entry: Path) -> bool:
        environment = (entry / "environ").read_bytes().split(b"\0")
        words = (entry / "cmdline").read_bytes().split(b"\0")
        return (
            f"SLURM_JOB_ID={job}".encode() in environment
            and b"python" in words[0]
            and b"coupalign" in words
        )

    return processes_where(is_rank)


@contextmanager
def frozen(job: str, count: int) -> Iterator[None]:
    """Pause the job's ranks until Slurm sends a signal, which wakes them. They use no core."""
    ranks = ranks_of(job)
    assert len(ranks) == count, ranks
    for rank in ranks:
        os.kill(rank, signal.SIGSTOP)
    try:
        yield
    finally:
        for rank in set(ranks) & set(ranks_of(job)):
            os.kill(rank, signal.SIGCONT)


def test_whatever_ends_a_job_the_run_is_that_of_an_undisturbed_one(
    cluster: Cluster, undisturbed: Path, survived: Callable[[str], None]
) -> None:
    run = cluster.checkout / "runs" / "disturbed"
    words = [*TWO_NODES, "--time=30", *TRAIN, "name=disturbed", f"train.steps={STEPS}"]
    job = cluster.sbatch(*words)

    def go_on(steps: int = 5) -> None:
        cluster.wait_rows(job, run, max(losses(run), default=0) + steps)

    go_on()
    cluster.call("scontrol", "requeue", job)
    cluster.start_again(job, restarts=1)

    go_on()
    # The end comes so close that Slurm warns at its next look, at most 30 s from now; two minutes
    # are left then.
    cluster.call("scontrol", "update", f"jobid={job}", "TimeLimit=2")
    with frozen(job, 2):
        cluster.start_again(job, restarts=2)
    assert "stopped by SIGUSR1" in cluster.output(job) and "queued again" in cluster.output(job)

    cluster.call("scontrol", "update", f"jobid={job}", "TimeLimit=30")
    go_on()
    cluster.call("scontrol", "update", "nodename=node2", "state=down", "reason=test")
    cluster.start_again(job, restarts=3)
    cluster.wait_rows(job, run, max(losses(run)) + 1)
    assert (
        "node2"
        not in cluster.call("scontrol", "show", "hostnames", cluster.job(job)["NodeList"]).split()
    )
    cluster.call("scontrol", "update", "nodename=node2", "state=resume")

    go_on()
    cluster.call("scancel", job)
    cluster.wait_end(job, state="CANCELLED")
    done = max(losses(run))
    assert done < STEPS, "the job was over before it could be canceled"
    time.sleep(1)
    assert cluster.state(job) == "CANCELLED", "canceled is not queued again"
    cluster.wait_end(cluster.sbatch(*words))

    assert losses(run) == losses(undisturbed)
    assert weights(run) == weights(undisturbed)
    for what in ("requeue", "time limit", "node down", "scancel"):
        survived(what)


def test_a_sweep_is_an_array_of_trainings_with_their_scores(
    cluster: Cluster, survived: Callable[[str], None]
) -> None:
    (cluster.checkout / "sweep.txt").write_text(
        "# two variants\n\nwpa-off  model.wpa.stages=[false,false,false,false]\n"
        "other-seed seed=7 data.augment='{flip: 0.5}'\n"
    )
    words = [
        "--nodes=1",
        "--ntasks-per-node=1",
        "slurm/sweep.sbatch",
        "sweep.txt",
        "tiny.yaml",
        *CHANGES,
        "train.evaluate_every=1000",
    ]
    array = cluster.sbatch("--array=0-2", *words, "train.steps=40", "train.save_every=100")
    # The array's last task has the array's own number: queued again by that, all of them would
    # start again.
    first, second, third = (f"{array}_{index}" for index in range(3))
    stopped = cluster.checkout / "runs" / "tiny-other-seed"
    cluster.wait_rows(second, stopped, 3)
    cluster.call("scancel", "--signal=USR1", second)
    cluster.start_again(second, restarts=1)
    cluster.wait_end(first, second)
    cluster.wait_end(third, state="FAILED")
    assert [cluster.job(task)["Restarts"] for task in (first, second, third)] == ["0", "1", "0"]
    assert "sweep.txt has 2 lines, tasks 0 to 1: there is no task 2" in cluster.output(third)
    for name in ("tiny-wpa-off", "tiny-other-seed"):
        run = cluster.checkout / "runs" / name
        assert sorted(losses(run)) == list(range(1, 41))
        assert json.loads((run / "score.json").read_text())["samples"] > 0
    survived("requeue of one task of an array")


def test_a_table_is_an_array_for_each_configuration(cluster: Cluster) -> None:
    """`coupalign reproduce --slurm` submits the runs of a table; `--only-print` prints it later."""
    for file in (
        "configs/refshapes_tiny.yaml",
        "configs/refshapes.yaml",
        "shards/recipes/refshapes.yaml",
    ):
        (cluster.checkout / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, cluster.checkout / file)
    (cluster.checkout / "own.yaml").write_text(
        "title: Ours\nsource: ours\ncolumns: [val oIoU]\nrows: [{method: CoupAlign, shapes: []}]\n"
    )
    reproduce = [
        sys.executable,
        "-m",
        "coupalign",
        "reproduce",
        "own.yaml",
        "--data",
        "refshapes",
        "--scale",
        "tiny",
        "--seeds",
        "2",
    ]
    changes = ["train.steps=4", "tracking.kind=none"]
    said = cluster.call(*reproduce, "--slurm", "--nodes 1 --ntasks-per-node 1", *changes)
    array = re.search(r"job (\d+)", said)[1]
    cluster.wait_end(f"{array}_0", f"{array}_1")
    table = cluster.call(*reproduce, "--only-print", *changes)
    assert "not there yet" not in table and "seeds: 2" in table, table


def test_nodes_are_examined_before_a_training(cluster: Cluster) -> None:
    job = cluster.sbatch(*TWO_NODES, "slurm/doctor.sbatch")
    cluster.wait_end(job)


def test_the_deepspeed_launcher_inside_an_allocation(cluster: Cluster, undisturbed: Path) -> None:
    (cluster.checkout / "hostfile").write_text("node1 slots=1\nnode3 slots=1\n")
    script = cluster.checkout / "launcher.sh"
    script.write_text(
        "#!/usr/bin/env bash\nset -e\nsource site.sh\nexport OMP_NUM_THREADS=1\n"
        'export DEEPSPEED_ARGS="--launcher slurm"\n'
        'launch/deepspeed.sh --hostfile hostfile train tiny.yaml "$@"\n'
    )
    job = cluster.sbatch(
        "--nodelist=node1,node3",
        *TWO_NODES,
        "--output=runs/slurm/%j.out",
        script,
        *TRAIN[2:],
        "name=launcher",
        f"train.steps={SHORT}",
        "engine.kind=deepspeed",
        "engine.stage=2",
    )
    cluster.wait_end(job)
    assert "(2 ranks x" in cluster.output(job)
    same = losses(undisturbed)
    assert losses(cluster.checkout / "runs" / "launcher") == pytest.approx(
        {step: same[step] for step in range(1, SHORT + 1)}, rel=1e-5
    )
