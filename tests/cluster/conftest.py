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
from typing import TYPE_CHECKING, Any

import pytest

from coupalign.tracking import read_journal
from tests.e2e.conftest import TINY

if TYPE_CHECKING:
    from tests.cluster.outage import Outage

ROOT = Path(__file__).resolve().parents[2]
SLURM = ROOT / "tests" / "cluster" / "slurm.sh"
# What a job must not inherit from the shell that runs the tests.
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
# Two processes run the tests. A group stays in one of them, because its tests share a Slurm or an
# outage. Files run in this order, the longest first. The outage ends by itself.
GROUPS = {
    "test_slurm.py": "slurm",
    "test_faults.py": "outage",
    "test_operations.py": "slurm",
    "test_namespaces.py": "namespaces",
    "test_memory.py": "memory",
    "test_outage.py": "outage",
}
# A question to Slurm is a process.
ASK_SLURM_EVERY_S = 0.25
PENDING_OR_RUNNING = ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING")
ENDED = (
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "DEADLINE",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder, and put its files into the order of GROUPS."""
    files = {Path(__file__).parent / name: order for order, name in enumerate(GROUPS)}
    for item in items:
        if item.path in files:
            item.add_marker("cluster")
            # A busy machine takes a minute to start four ranks.
            item.add_marker(pytest.mark.timeout(900))
    items.sort(key=lambda item: files.get(item.path, -1))


# The mark `xdist_group` would do, if pytest-xdist 3.8 found its groups under pytest 9.2.
@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each group of files to one process."""
    from xdist.scheduler import LoadScopeScheduling

    class GroupScheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = Path(nodeid.partition("::")[0]).name
            return GROUPS.get(file, file)

    return GroupScheduling(config, log)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what the jobs survived."""
    stats = terminalreporter.stats
    reports = [*stats.get("passed", ()), *stats.get("failed", ())]
    properties = [named for report in reports for named in report.user_properties]
    counts = Counter(fault for name, fault in properties if name == "survived")
    if not counts:
        return

    faults = [fault if times == 1 else f"{fault} ({times})" for fault, times in counts.items()]
    terminalreporter.write_line(f"survived: {', '.join(faults)}")
    terminalreporter.write_line(f"survived {counts.total()} faults of {len(counts)} kinds")


@pytest.fixture
def survived(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Call it with the name of a fault when a job has shown that the fault changed nothing."""
    return partial(record_property, "survived")


def clean_environment(**changes: str) -> dict[str, str]:
    """Return the environment without the variables of a launcher, a scheduler or the tests."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    path = f"{kept['PATH']}:/usr/sbin:/sbin"
    return kept | {"PATH": path, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""} | changes


def wait_until(
    what: str,
    done: Callable[[], object],
    seconds: float = 200,
    log: Callable[[], str] = str,
    every_s: float = 0.05,
) -> None:
    """Wait until `done` is true. Fail with `what` and the end of `log` if it takes too long."""
    until = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < until, f"{what}: not within {seconds:.0f} s\n{log()[-6000:]}"
        time.sleep(every_s)


def losses(run: Path) -> dict[int, float]:
    """Return the training loss by step, and assert that no step was written twice."""
    journal, loss_at = run / "metrics.jsonl", {}
    if not journal.exists():
        return loss_at

    for row, _ in read_journal(journal):
        if "train/loss" in row.metrics:
            assert row.step not in loss_at, f"step {row.step} was written twice"
            loss_at[row.step] = row.metrics["train/loss"]
    return loss_at


def last_step(run: Path) -> int:
    """Return the last step that the run has written, or 0."""
    return max(losses(run), default=0)


def processes_where(wanted: Callable[[Path], bool]) -> list[int]:
    """Find the ids of the processes whose folder in /proc satisfies `wanted`."""
    ids = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if wanted(folder):
                ids.append(int(folder.name))
        except OSError:
            # It ended meanwhile.
            pass
    return ids


def weights(run: Path) -> dict[str, bytes]:
    """Return the bytes of the newest checkpoint's weights and averaged weights."""
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    files = ("weights.safetensors", "ema.safetensors")
    return {file: (newest / file).read_bytes() for file in files}


@dataclass(frozen=True)
class Cluster:
    """A running Slurm, and the folder of its jobs: a checkout with the project's own slurm/."""

    folder: Path
    checkout: Path
    environment: dict[str, str]

    def call(self, *words: str | Path, status: int | None = 0) -> str:
        """Run a command in the checkout and return its output."""
        done = subprocess.run(
            [str(word) for word in words],
            cwd=self.checkout,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        right = status is None or done.returncode == status
        assert right, f"{words}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def sbatch(self, *words: str | Path) -> str:
        """Submit a job and return its id."""
        return self.call("sbatch", "--parsable", *words).strip()

    def job(self, job: str) -> dict[str, str]:
        """Return Slurm's record of a job or of a task of an array: JobState, Restarts, ..."""
        text = self.call("scontrol", "show", "job", job, "--oneliner")
        return dict(re.findall(r"(\S+?)=(\S*)", text.splitlines()[0]))

    def state(self, job: str) -> str:
        """Return PENDING, RUNNING, COMPLETED, FAILED, CANCELLED, ..."""
        return self.job(job)["JobState"]

    def output(self, job: str) -> str:
        """Return what the job has printed until now."""
        file = Path(self.job(job)["StdOut"])
        return file.read_text(errors="replace") if file.exists() else "(no output)"

    def describe(self, job: str) -> str:
        """Return Slurm's record and the end of the output, for a failed test."""
        return f"{self.job(job)}\n{self.output(job)[-6000:]}"

    def wait_for_step(self, job: str, run: Path, step: int) -> None:
        """Wait until the job's run has written this step."""
        next_question = 0.0

        def written() -> bool:
            nonlocal next_question
            if time.monotonic() >= next_question:
                assert self.state(job) in PENDING_OR_RUNNING, self.describe(job)
                next_question = time.monotonic() + ASK_SLURM_EVERY_S
            return last_step(run) >= step

        wait_until(f"step {step} of job {job}", written, log=lambda: self.output(job))

    def wait_for_end(self, *jobs: str, state: str = "COMPLETED", seconds: float = 400) -> None:
        """Wait until the jobs have ended, and assert that all are in this state."""
        for job in jobs:
            wait_until(
                f"the end of job {job}",
                lambda job=job: self.state(job) in ENDED,
                seconds,
                log=lambda job=job: self.output(job),
                every_s=ASK_SLURM_EVERY_S,
            )
            assert self.state(job) == state, self.describe(job)

    def restart(self, job: str, restarts: int, seconds: float = 200) -> None:
        """Wait until Slurm has requeued the job, then skip the two minutes that Slurm holds it."""

        def requeued() -> bool:
            record = self.job(job)
            queued_or_started = record["JobState"] in ("PENDING", "RUNNING")
            return record["Restarts"] == str(restarts) and queued_or_started

        wait_until(
            f"restart {restarts} of job {job}",
            requeued,
            seconds,
            log=lambda: self.describe(job),
            every_s=ASK_SLURM_EVERY_S,
        )
        if self.state(job) == "PENDING":
            # A node refuses a start in the very second in which it ended the previous one, and then
            # it does so for good ("credential revoked").
            time.sleep(2)
            self.call("scontrol", "update", f"jobid={job}", "StartTime=now")


def why_no_slurm() -> str | None:
    """Say why there can be no Slurm here, or return None."""
    if os.geteuid() != 0:
        return "slurmd takes root"
    installed = shutil.which("slurmctld", path=clean_environment()["PATH"])
    if not installed and not shutil.which("apt-get"):
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


# Each rank draws its own dropout. Without it, every topology trains on the same numbers. The eps
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
    """A training whose server is away while other tests run; test_outage.py checks its end."""
    from tests.cluster.outage import Outage  # which needs this file

    away = Outage(config, tmp_path_factory.mktemp("server"), tmp_path_factory.mktemp("away"))
    yield away
    away.close()
