"""The commands of docs/operations.md, in order, on a real Slurm with a small configuration."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.conftest import (
    ASK_SLURM_EVERY_S,
    ROOT,
    Cluster,
    last_step,
    losses,
    wait_until,
)

PAGE = ROOT / "docs" / "operations.md"
# No job is over before the page stops it, however fast the machine is.
ENDLESS = 10_000


@pytest.fixture
def demo(cluster: Cluster, config: Path) -> Path:
    """The run directory of the page's commands."""
    write_config(cluster, config, ENDLESS)
    return cluster.checkout / "runs" / "demo"


def write_config(cluster: Cluster, config: Path, steps: int) -> None:
    """Write the page's configuration: many small steps."""
    text = config.read_text() + "name: demo\n"
    for old, new in (
        ("kind: none", "kind: mlflow"),
        ("steps: 14", f"steps: {steps}"),
        ("evaluate_every: 7", f"evaluate_every: {ENDLESS}"),
        ("save_every: 3", "save_every: 10"),
    ):
        assert old in text
        text = text.replace(old, new)

    (cluster.checkout / "configs").mkdir(exist_ok=True)
    (cluster.checkout / "configs" / "demo.yaml").write_text(text)


def test_every_command_of_the_page_works(cluster: Cluster, config: Path, demo: Path) -> None:
    blocks = re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) > 8

    job, steps = "", ENDLESS
    for block in blocks:
        restarts = restarts_of(cluster, job) if job and "sbatch" not in block else 0
        done = last_step(demo)
        if "--wait" in block and "train.sbatch" in block:
            # The last job ends by itself, and soon.
            steps = done + 20
            write_config(cluster, config, steps)

        job = run_block(cluster, block, job)

        if "job=$(sbatch" in block or "StartTime=now" in block and "scancel" not in block:
            wait_until(
                f"three more steps after\n{block}",
                lambda done=done: last_step(demo) >= done + 3,
                log=lambda job=job: cluster.output(job),
            )
        elif "scancel --signal" in block or "scontrol requeue" in block:
            wait_until(
                f"the requeue after\n{block}",
                lambda job=job, restarts=restarts: restarts_of(cluster, job) > restarts,
                log=lambda job=job: cluster.output(job),
                every_s=ASK_SLURM_EVERY_S,
            )
        elif "scancel $job" in block:
            cluster.wait_for_end(job, state="CANCELLED")

    assert sorted(losses(demo)) == list(range(1, steps + 1))
    assert (demo / "report.html").is_file()


def restarts_of(cluster: Cluster, job: str) -> int:
    return int(cluster.job(job)["Restarts"])


def run_block(cluster: Cluster, block: str, job: str) -> str:
    """Run a block in a shell in which `$job` is set, and return the `$job` that it leaves."""
    # A node refuses for good what starts in the very second in which it ended the previous start.
    pause = 2 if "sbatch" in block or "StartTime" in block else 0
    script = f'set -eo pipefail; job={job}; sleep {pause}\n{block}\necho; echo "$job"'
    environment = cluster.environment | {
        "PATH": f"{Path(sys.executable).parent}:{cluster.environment['PATH']}",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }

    done = subprocess.run(
        ["bash", "-c", script],
        cwd=cluster.checkout,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, f"{block}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    return done.stdout.splitlines()[-1]
