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

from tests.cluster.conftest import (
    CHANGES,
    ROOT,
    Cluster,
    last_step,
    losses,
    processes_where,
    weights,
)

# The learning rate is constant, so a run of 6 steps is the beginning of one of STEPS.
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
ONE_TASK = ["--nodes=1", "--ntasks-per-node=1"]


@pytest.fixture(scope="module", autouse=True)
def tiny(cluster: Cluster, config: Path) -> None:
    """Put the configuration where the jobs are submitted."""
    (cluster.checkout / "tiny.yaml").write_text(config.read_text())


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster) -> Path:
    """A run of STEPS steps by DDP on two nodes."""
    job = cluster.sbatch(*TWO_NODES, *TRAIN, "name=undisturbed", f"train.steps={STEPS}")
    cluster.wait_for_end(job)

    run = cluster.checkout / "runs" / "undisturbed"
    assert sorted(losses(run)) == list(range(1, STEPS + 1))
    return run


def begins_like(undisturbed: Path, run: Path) -> bool:
    """Whether a run of SHORT steps has the losses of the first ones of the undisturbed run."""
    whole = losses(undisturbed)
    expected = {step: whole[step] for step in range(1, SHORT + 1)}
    return losses(run) == pytest.approx(expected, rel=1e-5)


def test_pack_job_writes_the_same_shards(cluster: Cluster, shards: Path) -> None:
    recipe = shards.parent / "recipe.yaml"

    job = cluster.sbatch("slurm/pack.sbatch", recipe, "--out", "packed", "--workers", "1")
    cluster.wait_for_end(job)

    def tars(folder: Path) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in folder.glob("*.tar")}

    assert tars(cluster.checkout / "packed") == tars(shards)


def test_failed_training_is_a_failed_job_and_is_not_requeued(cluster: Cluster) -> None:
    wrong = ["tiny.yaml", "name=wrong", "train.global_batch=9"]

    job = cluster.sbatch(*TWO_NODES, "slurm/train.sbatch", *wrong)
    cluster.wait_for_end(job, state="FAILED")

    record = cluster.job(job)
    assert (record["ExitCode"], record["Restarts"]) == ("2:0", "0")
    assert "train.global_batch=9" in cluster.output(job)


@pytest.mark.parametrize("nodes, tasks, stage", [(2, 2, 1), (4, 1, 2), (2, 1, 3)])
def test_every_topology_and_engine_has_the_same_losses(
    cluster: Cluster, undisturbed: Path, nodes: int, tasks: int, stage: int
) -> None:
    topology = [f"--nodes={nodes}", f"--ntasks-per-node={tasks}"]
    engine = ["engine.kind=deepspeed", f"engine.stage={stage}"]

    job = cluster.sbatch(*topology, *TRAIN, *engine, f"name=zero{stage}", f"train.steps={SHORT}")
    cluster.wait_for_end(job)

    assert f"({nodes * tasks} ranks x" in cluster.output(job)
    assert begins_like(undisturbed, cluster.checkout / "runs" / f"zero{stage}")


def test_eval_job_writes_a_score_and_one_rank_prints_it(
    cluster: Cluster, undisturbed: Path
) -> None:
    job = cluster.sbatch(*TWO_NODES, "slurm/eval.sbatch", "runs/undisturbed")
    cluster.wait_for_end(job)

    assert json.loads((undisturbed / "score.json").read_text())["samples"] > 0
    assert cluster.output(job).count("oIoU  ") == 1


def ranks_of(job: str) -> list[int]:
    """Return the process ids of the job's ranks."""

    def is_rank(folder: Path) -> bool:
        variables = (folder / "environ").read_bytes().split(b"\0")
        words = (folder / "cmdline").read_bytes().split(b"\0")
        of_this_job = f"SLURM_JOB_ID={job}".encode() in variables
        return of_this_job and b"python" in words[0] and b"coupalign" in words

    return processes_where(is_rank)


@contextmanager
def paused(job: str, count: int) -> Iterator[None]:
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


def test_interrupted_job_ends_with_the_weights_of_an_undisturbed_one(
    cluster: Cluster, undisturbed: Path, survived: Callable[[str], None]
) -> None:
    run = cluster.checkout / "runs" / "disturbed"
    words = [*TWO_NODES, "--time=30", *TRAIN, "name=disturbed", f"train.steps={STEPS}"]
    job = cluster.sbatch(*words)

    def train_on(steps: int = 5) -> None:
        cluster.wait_for_step(job, run, last_step(run) + steps)

    # The administrator requeues it.
    train_on()
    cluster.call("scontrol", "requeue", job)
    cluster.restart(job, restarts=1)

    # It reaches its time limit. Slurm looks every 30 s and warns two minutes before the end.
    train_on()
    cluster.call("scontrol", "update", f"jobid={job}", "TimeLimit=2")
    with paused(job, 2):
        cluster.restart(job, restarts=2)
    output = cluster.output(job)
    assert "stopped by SIGUSR1" in output and "queued again" in output

    # It loses a node.
    cluster.call("scontrol", "update", f"jobid={job}", "TimeLimit=30")
    train_on()
    cluster.call("scontrol", "update", "nodename=node2", "state=down", "reason=test")
    cluster.restart(job, restarts=3)
    train_on(1)
    nodes = cluster.call("scontrol", "show", "hostnames", cluster.job(job)["NodeList"])
    assert "node2" not in nodes.split()
    cluster.call("scontrol", "update", "nodename=node2", "state=resume")

    # Its user cancels it, and it stays canceled.
    train_on()
    cluster.call("scancel", job)
    cluster.wait_for_end(job, state="CANCELLED")
    assert last_step(run) < STEPS, "the job was over before it could be canceled"
    time.sleep(1)
    assert cluster.state(job) == "CANCELLED"

    # The same command resumes.
    cluster.wait_for_end(cluster.sbatch(*words))

    assert losses(run) == losses(undisturbed)
    assert weights(run) == weights(undisturbed)
    for fault in ("requeue", "time limit", "node down", "scancel"):
        survived(fault)


def test_sweep_is_an_array_of_trainings_with_their_scores(
    cluster: Cluster, survived: Callable[[str], None]
) -> None:
    (cluster.checkout / "sweep.txt").write_text(
        "# two variants\n\nwpa-off  model.wpa.stages=[false,false,false,false]\n"
        "other-seed seed=7 data.augment='{flip: 0.5}'\n"
    )
    changes = [
        *CHANGES,
        "train.evaluate_every=1000",
        "train.steps=40",
        "train.save_every=100",
    ]
    sweep = ["slurm/sweep.sbatch", "sweep.txt", "tiny.yaml"]

    array = cluster.sbatch("--array=0-2", *ONE_TASK, *sweep, *changes)
    # The array's last task has the array's own number. If it were requeued by that number, all
    # tasks would start again.
    first, second, third = (f"{array}_{index}" for index in range(3))
    cluster.wait_for_step(second, cluster.checkout / "runs" / "tiny-other-seed", 3)
    cluster.call("scancel", "--signal=USR1", second)
    cluster.restart(second, restarts=1)
    cluster.wait_for_end(first, second)
    cluster.wait_for_end(third, state="FAILED")

    restarts = [cluster.job(task)["Restarts"] for task in (first, second, third)]
    assert restarts == ["0", "1", "0"]
    assert "sweep.txt has 2 lines, tasks 0 to 1: there is no task 2" in cluster.output(third)
    for name in ("tiny-wpa-off", "tiny-other-seed"):
        run = cluster.checkout / "runs" / name
        assert sorted(losses(run)) == list(range(1, 41))
        assert json.loads((run / "score.json").read_text())["samples"] > 0
    survived("requeue of one task of an array")


def test_reproduce_submits_an_array_and_prints_the_table_later(cluster: Cluster) -> None:
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
    table = ["own.yaml", "--data", "refshapes", "--scale", "tiny", "--seeds", "2"]
    reproduce = [sys.executable, "-m", "coupalign", "reproduce", *table]
    changes = ["train.steps=4", "tracking.kind=none"]

    output = cluster.call(*reproduce, "--slurm", " ".join(ONE_TASK), *changes)
    array = re.search(r"job (\d+)", output)[1]
    cluster.wait_for_end(f"{array}_0", f"{array}_1")
    printed = cluster.call(*reproduce, "--only-print", *changes)

    assert "not there yet" not in printed and "seeds: 2" in printed, printed


def test_doctor_job_finds_healthy_nodes(cluster: Cluster) -> None:
    job = cluster.sbatch(*TWO_NODES, "slurm/doctor.sbatch")

    cluster.wait_for_end(job)


def test_deepspeed_launcher_starts_its_ranks_inside_an_allocation(
    cluster: Cluster, undisturbed: Path
) -> None:
    (cluster.checkout / "hostfile").write_text("node1 slots=1\nnode3 slots=1\n")
    script = cluster.checkout / "launcher.sh"
    script.write_text(
        "#!/usr/bin/env bash\nset -e\nsource site.sh\nexport OMP_NUM_THREADS=1\n"
        'export DEEPSPEED_ARGS="--launcher slurm"\n'
        'launch/deepspeed.sh --hostfile hostfile train tiny.yaml "$@"\n'
    )
    options = ["--nodelist=node1,node3", *TWO_NODES, "--output=runs/slurm/%j.out"]
    engine = ["engine.kind=deepspeed", "engine.stage=2"]

    job = cluster.sbatch(
        *options, script, *TRAIN[2:], *engine, "name=launcher", f"train.steps={SHORT}"
    )
    cluster.wait_for_end(job)

    assert "(2 ranks x" in cluster.output(job)
    assert begins_like(undisturbed, cluster.checkout / "runs" / "launcher")
