"""A real Slurm of four nodes on this machine, and a list of the faults that its jobs survived."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from coupalign.tracking import read_journal
from tests.e2e.conftest import TINY

if TYPE_CHECKING:
    from tests.cluster.outage import Outage

ROOT = Path(__file__).resolve().parents[2]
SLURM = ROOT / "tests" / "cluster" / "slurm.sh"
# What a job must not inherit from whoever runs the tests.
FOREIGN = (
    "SLURM_",
    "SBATCH_",
    "MASTER_",
    "OMP_",
    "NPROC",
    "NNODES",
    "NODE_RANK",
    "DS_",
    "COUPALIGN_",
    "DRY_RUN",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_",
    "GLOO_",
    "PYTEST_",
    "TRITON_INTERPRET",
    "DEEPSPEED_",
)
SITE = """
source {bin}/activate
export GLOO_SOCKET_IFNAME=lo CUDA_VISIBLE_DEVICES= DS_ACCELERATOR=cpu PYTHONPATH={root}
COUPALIGN_CONTAINER=()
COUPALIGN_SRUN=()
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("cluster")
            item.add_marker(
                pytest.mark.timeout(900)
            )  # a busy machine takes a minute for the start of four ranks


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [
        report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, ())
    ]
    counts = Counter(
        what for report in reports for name, what in report.user_properties if name == "survived"
    )
    if counts:
        kinds = ", ".join(
            what if times == 1 else f"{what} ({times})" for what, times in counts.items()
        )
        terminalreporter.write_line(f"survived: {kinds}")
        terminalreporter.write_line(
            f"survived {counts.total()} disturbances of {len(counts)} kinds"
        )


@pytest.fixture
def survived(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Call it with what a job was disturbed by, once the job has shown that it does not matter."""
    return partial(record_property, "survived")


def clean_environment(**changes: str) -> dict[str, str]:
    """Return the environment without the variables of a launcher, a scheduler or the tests."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    path = f"{kept['PATH']}:/usr/sbin:/sbin"
    return kept | {"PATH": path, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""} | changes


def wait_until(
    what: str, done: Callable[[], object], seconds: float = 200, log: Callable[[], str] = str
) -> None:
    """Wait until `done` is true. Fail with `what` and the end of `log` if it takes too long."""
    until = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < until, f"{what}: not within {seconds:.0f} s\n{log()[-6000:]}"
        time.sleep(0.05)


def losses(run: Path) -> dict[int, float]:
    """The training loss by step. Asserts that no step was written twice."""
    found: dict[int, float] = {}
    if not (run / "metrics.jsonl").exists():
        return found
    for row, _ in read_journal(run / "metrics.jsonl"):
        if "train/loss" in row.metrics:
            assert row.step not in found, f"step {row.step} was written twice"
            found[row.step] = row.metrics["train/loss"]
    return found


def processes_where(known: Callable[[Path], bool]) -> list[int]:
    """Find the ids of the processes whose folder in /proc satisfies `known`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if known(entry):
                found.append(int(entry.name))
        except OSError:
            pass
    return found


def weights(run: Path) -> dict[str, bytes]:
    """The bytes of the newest checkpoint's weights and averaged weights."""
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    return {
        file: (newest / file).read_bytes() for file in ("weights.safetensors", "ema.safetensors")
    }


@dataclass(frozen=True)
class Cluster:
    """A running Slurm, and the folder of its jobs: a checkout with the project's own slurm/."""

    folder: Path
    checkout: Path
    environment: dict[str, str]

    def call(self, *words: str | Path, status: int | None = 0) -> str:
        """Run a command in the checkout; its output."""
        done = subprocess.run(
            [str(word) for word in words],
            cwd=self.checkout,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert status is None or done.returncode == status, (
            f"{words}: {done.returncode}\n{done.stdout}{done.stderr}"
        )
        return done.stdout

    def sbatch(self, *words: str | Path) -> str:
        """Submit; the job's id."""
        return self.call("sbatch", "--parsable", *words).strip()

    def job(self, job: str) -> dict[str, str]:
        """Slurm's record of a job (or of one task of an array): JobState, Restarts, ExitCode …"""
        text = self.call("scontrol", "show", "job", job, "--oneliner")
        return dict(re.findall(r"(\S+?)=(\S*)", text.splitlines()[0]))

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, FAILED, CANCELLED …"""
        return self.job(job)["JobState"]

    def output(self, job: str) -> str:
        """What the job has printed until now."""
        file = Path(self.job(job)["StdOut"])
        return file.read_text(errors="replace") if file.exists() else "(no output)"

    def wait_rows(self, job: str, run: Path, step: int) -> None:
        """Return when the job's run has written this step."""

        def there() -> bool:
            assert self.state(job) in ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING"), (
                self.output(job)[-6000:]
            )
            return max(losses(run), default=0) >= step

        wait_until(f"step {step} of job {job}", there, log=lambda: self.output(job))

    def wait_end(self, *jobs: str, state: str = "COMPLETED", seconds: float = 400) -> None:
        """Return when the jobs have ended, all in this state."""
        ends = (
            "COMPLETED",
            "FAILED",
            "CANCELLED",
            "TIMEOUT",
            "NODE_FAIL",
            "OUT_OF_MEMORY",
            "DEADLINE",
        )
        for job in jobs:
            wait_until(
                f"the end of job {job}",
                lambda job=job: self.state(job) in ends,
                seconds,
                log=lambda job=job: self.output(job),
            )
            assert self.state(job) == state, f"{self.job(job)}\n{self.output(job)[-6000:]}"

    def start_again(self, job: str, restarts: int, seconds: float = 200) -> None:
        """Wait until Slurm has requeued the job, then skip the two minutes that Slurm holds it."""

        def queued() -> bool:
            record = self.job(job)
            return record["Restarts"] == str(restarts) and record["JobState"] in (
                "PENDING",
                "RUNNING",
            )

        wait_until(
            f"restart {restarts} of job {job}",
            queued,
            seconds,
            log=lambda: f"{self.job(job)}\n{self.output(job)}",
        )
        if self.state(job) == "PENDING":
            # A node refuses for good ("credential revoked") what starts in the very second in which
            # it ended the start before.
            time.sleep(2)
            self.call("scontrol", "update", f"jobid={job}", "StartTime=now")


def why_no_slurm() -> str | None:
    """Why there can be no Slurm here, or none."""
    if os.geteuid() != 0:
        return "slurmd takes root"
    if not shutil.which("slurmctld", path=clean_environment()["PATH"]) and not shutil.which(
        "apt-get"
    ):
        return "Slurm is not installed, and there is no apt-get"
    return None


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Four nodes of two CPUs each; stopped without leftovers."""
    if reason := why_no_slurm():
        pytest.skip(reason)
    folder, checkout = tmp_path_factory.mktemp("slurm"), tmp_path_factory.mktemp("checkout")
    (checkout / "slurm").symlink_to(ROOT / "slurm")
    (checkout / "launch").symlink_to(ROOT / "launch")
    (checkout / "runs" / "slurm").mkdir(parents=True)
    site = checkout / "site.sh"
    site.write_text(SITE.format(bin=Path(sys.executable).parent, root=ROOT))
    environment = clean_environment(
        SLURM_CONF=str(folder / "slurm.conf"),
        COUPALIGN_TEST_SLURM=str(folder),
        COUPALIGN_ENV=str(site),
    )
    subprocess.run([SLURM, "install"], check=True, env=environment)
    try:
        subprocess.run([SLURM, "start", folder], check=True, env=environment)
        yield Cluster(folder, checkout, environment)
    finally:
        subprocess.run([SLURM, "stop", folder], check=True, env=environment)


# Without dropout, whose draws are each rank's own, every topology trains on the same numbers; eps
# keeps Adam's first steps from amplifying the last bit of gradients near 0.
CHANGES = [
    "model.text.dropout=0",
    "model.proposals.dropout=0",
    "optim.eps=1e-5",
    "train.log_every=1",
]


@pytest.fixture(scope="session")
def config(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tests' tiny configuration, for comparisons between topologies."""
    file = tmp_path_factory.mktemp("configs") / "tiny.yaml"
    file.write_text(TINY.format(shards=shards))
    return file


@pytest.fixture(scope="session")
def outage(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outage]:
    """The run of an outage. Whoever needs it first starts it; test_outage.py checks its end."""
    from tests.cluster.outage import Outage  # which needs this file

    away = Outage(config, tmp_path_factory.mktemp("server"), tmp_path_factory.mktemp("away"))
    yield away
    away.close()
