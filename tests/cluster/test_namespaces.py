"""The launchers over a network: two connected network namespaces, each with its own sshd."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import psutil
import pytest

from tests.cluster.conftest import (
    CHANGES,
    ROOT,
    SLURM,
    clean_environment,
    last_step,
    losses,
    processes_where,
    wait_until,
    why_no_slurm,
)

# Ports in namespaces that nobody else uses. Each test has its own, whatever another one has left.
PORTS = count(29500)
NEEDED_PROGRAMS = ("ip", "unshare", "nsenter", "sshd", "ssh-keygen", "pdsh")
TRAIN = [
    "train",
    "tiny.yaml",
    *CHANGES,
    "schedule.warmup_steps=0",
    "schedule.final=1",
    "train.evaluate_every=1000",
    "train.steps=6",
]
ZERO_2 = ["engine.kind=deepspeed", "engine.stage=2"]
SSHD = """
Port 22
ListenAddress 0.0.0.0
HostKey {folder}/host
AuthorizedKeysFile {folder}/user.pub
PermitRootLogin yes
PasswordAuthentication no
UsePAM no
StrictModes no
PidFile none
"""
SSH = """
IdentityFile {folder}/user
UserKnownHostsFile /dev/null
StrictHostKeyChecking no
LogLevel ERROR
"""
# It runs in namespaces that end with it: nobody else sees what is mounted here.
MACHINE = """
set -e
hostname {name}
mount --bind {folder}/hosts /etc/hosts
mount --bind {folder}/ssh_config /etc/ssh/ssh_config
mount -t tmpfs tmpfs /run
mkdir /run/sshd
ip link set lo up
touch {folder}/{name}.made
until ip addr add {address}/24 dev eth0 2>/dev/null; do sleep 0.05; done
ip link set eth0 up
exec {sshd} -D -e -f {folder}/sshd_config
"""


@dataclass(frozen=True)
class Machine:
    """A network namespace with a name, and everything that runs in it."""

    name: str
    pid: int
    folder: Path

    def start(self, *words: str | Path, **changes: str) -> subprocess.Popen[str]:
        """Start a command on this machine, in the tests' folder."""
        namespaces = ["--net", "--uts", "--mount", f"--wdns={self.folder}"]
        inside = ["nsenter", "--target", str(self.pid), *namespaces]
        environment = clean_environment(
            OMP_NUM_THREADS="1",
            DS_ACCELERATOR="cpu",
            PYTHONPATH=str(ROOT),
            PYTHONFAULTHANDLER="1",
            **changes,
        )
        return subprocess.Popen(
            [str(word) for word in (*inside, *words)],
            env=environment,
            cwd=self.folder,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def finish(*processes: subprocess.Popen[str]) -> str:
    """Wait until all have ended with status 0, and return what they printed."""
    try:
        outputs = [process.communicate(timeout=280)[0] for process in processes]
    except subprocess.TimeoutExpired as late:
        # Python prints the stacks of the ranks, which get the signal first. The launchers end too.
        running = [process for process in processes if process.poll() is None]
        for process in running:
            for victim in reversed(psutil.Process(process.pid).children(recursive=True)):
                victim.send_signal(signal.SIGABRT)
        outputs = "".join(process.communicate(timeout=60)[0] for process in processes)
        raise AssertionError(f"still running after 280 s:\n{outputs[-9000:]}") from late

    for process, output in zip(processes, outputs):
        assert process.returncode == 0, output[-6000:]
    return "".join(outputs)


@contextmanager
def machine(name: str, address: str, folder: Path) -> Iterator[Machine]:
    """Start a machine without a cable, and end everything in it."""
    script = MACHINE.format(
        name=name,
        address=address,
        folder=folder,
        sshd=shutil.which("sshd", path=clean_environment()["PATH"]),
    )
    with (folder / f"{name}.log").open("w") as log:
        process = subprocess.Popen(
            ["unshare", "--net", "--uts", "--mount", "bash", "-c", script],
            env=clean_environment(),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        wait_until(
            f"machine {name}",
            (folder / f"{name}.made").exists,
            30,
            (folder / f"{name}.log").read_text,
        )
        yield Machine(name, process.pid, folder)
    finally:
        # The sessions of sshd are other process groups: end all that is left in the namespace.
        here = os.readlink(f"/proc/{process.pid}/ns/net")
        for pid in processes_where(lambda entry: os.readlink(entry / "ns/net") == here):
            os.kill(pid, signal.SIGKILL)
        process.wait(timeout=30)


@pytest.fixture(scope="module")
def machines(
    config: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Machine, Machine]]:
    """Two machines, one, two, joined by a cable: eth0 on both sides, ssh without a password."""
    if reason := why_no_slurm():
        pytest.skip(reason)
    subprocess.run([SLURM, "install"], check=True, env=clean_environment())
    missing = [
        program
        for program in NEEDED_PROGRAMS
        if not shutil.which(program, path=clean_environment()["PATH"])
    ]
    assert not missing, missing
    folder = tmp_path_factory.mktemp("machines")
    for key in ("host", "user"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True
        )
    (folder / "sshd_config").write_text(SSHD.format(folder=folder))
    (folder / "ssh_config").write_text(SSH.format(folder=folder))
    (folder / "hosts").write_text("127.0.0.1 localhost\n10.77.0.1 one\n10.77.0.2 two\n")
    (folder / "tiny.yaml").write_text(config.read_text())
    (folder / "hostfile").write_text("one slots=1\ntwo slots=1\n")
    # The launcher forwards hardly any variable to the other machine.
    (folder / ".deepspeed_env").write_text(
        "GLOO_SOCKET_IFNAME=eth0\nDS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\n"
    )
    with ExitStack() as stack:
        one = stack.enter_context(machine("one", "10.77.0.1", folder))
        two = stack.enter_context(machine("two", "10.77.0.2", folder))
        of_one, of_two = ["netns", str(one.pid)], ["netns", str(two.pid)]
        peer = ["type", "veth", "peer", "name", "eth0"]
        cable = ["ip", "link", "add", "name", "eth0", *of_one, *peer, *of_two]
        subprocess.run(cable, check=True, env=clean_environment())
        for here, there in ((one, "two"), (two, "one")):

            def reached(here: Machine = here, there: str = there) -> bool:
                ssh = here.start("ssh", "-o", "ConnectTimeout=2", there, "true")
                return ssh.wait(timeout=30) == 0

            log = (folder / f"{there}.log").read_text
            wait_until(f"ssh from {here.name} to {there}", reached, 30, log)
        yield one, two


@pytest.fixture(scope="module")
def through_ssh(machines: tuple[Machine, Machine]) -> dict[int, float]:
    """The losses of a ZeRO 2 training that machine one starts on both, as the README does."""
    launcher = [ROOT / "launch/deepspeed.sh", "--hostfile", "hostfile"]
    output = finish(machines[0].start(*launcher, *TRAIN, *ZERO_2, "name=ssh"))
    assert "(2 ranks x" in output
    return losses(machines[0].folder / "runs" / "ssh")


def test_deepspeed_starts_the_other_machine_over_ssh(through_ssh: dict[int, float]) -> None:
    assert sorted(through_ssh) == [1, 2, 3, 4, 5, 6]


def on_both(
    machines: tuple[Machine, Machine], launcher: str, *words: str, **changes: str
) -> list[subprocess.Popen[str]]:
    """Start the same on each machine; {rank} in a variable is the machine's number."""
    common = {
        "GLOO_SOCKET_IFNAME": "eth0",
        "MASTER_ADDR": "one",
        "MASTER_PORT": str(next(PORTS)),
        "NNODES": "2",
    }

    processes = []
    for rank, each in enumerate(machines):
        variables = {name: value.format(rank=rank) for name, value in (common | changes).items()}
        processes.append(each.start(ROOT / "launch" / launcher, *words, **variables))
    return processes


def test_deepspeed_without_ssh_starts_on_each_machine(
    machines: tuple[Machine, Machine], through_ssh: dict[int, float]
) -> None:
    processes = on_both(
        machines,
        "deepspeed.sh",
        "--hostfile",
        "hostfile",
        *TRAIN,
        *ZERO_2,
        "name=no-ssh",
        DEEPSPEED_ARGS="--no_ssh --node_rank {rank}",
    )

    assert "(2 ranks x" in finish(*processes)
    # The same ranks add in the same order.
    assert losses(machines[0].folder / "runs" / "no-ssh") == through_ssh


def test_torchrun_starts_with_the_rank_of_each_machine(
    machines: tuple[Machine, Machine], through_ssh: dict[int, float]
) -> None:
    processes = on_both(machines, "torchrun.sh", *TRAIN, "name=static", NODE_RANK="{rank}")

    assert "(2 ranks x" in finish(*processes)
    assert losses(machines[0].folder / "runs" / "static") == pytest.approx(through_ssh, rel=1e-5)


def test_torchrun_with_c10d_restarts_lost_ranks(
    machines: tuple[Machine, Machine],
    through_ssh: dict[int, float],
    survived: Callable[[str], None],
) -> None:
    run = machines[0].folder / "runs" / "c10d"
    processes = on_both(
        machines,
        "torchrun.sh",
        *TRAIN,
        "name=c10d",
        "train.steps=30",
        "train.save_every=3",
        RDZV="c10d",
        RDZV_ID="test",
        TORCHRUN_ARGS="--max-restarts 3",
    )

    def is_rank_one(folder: Path) -> bool:
        variables = (folder / "environ").read_bytes().split(b"\0")
        return b"RANK=1" in variables and f"PWD={machines[0].folder}".encode() in variables

    def trained_or_ended() -> bool:
        return last_step(run) >= 6 or any(process.poll() is not None for process in processes)

    wait_until("step 6", trained_or_ended)
    for pid in processes_where(is_rank_one):
        os.kill(pid, signal.SIGKILL)
    output = finish(*processes)

    assert output.count("(2 ranks x") == 2, output[-6000:]
    loss_at = losses(run)
    assert sorted(loss_at) == list(range(1, 31))
    first = {step: loss_at[step] for step in through_ssh}
    assert first == pytest.approx(through_ssh, rel=1e-5)
    survived("lost rank under torchrun")
