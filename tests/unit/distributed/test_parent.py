"""A rank stops when its launcher ends, and only then."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from coupalign.distributed.parent import is_launcher_command

# A rank: says its pid, then trains until it is asked to stop.
RANK = """
import os, sys, time
from coupalign.distributed.parent import stop_with_launcher
from coupalign.distributed.stop import StopRequest

listens = sys.argv[1] == "listens"
stop = StopRequest()
if listens:
    stop.__enter__()
stop_with_launcher({"RANK": "3", **dict([sys.argv[2].split("=")])})
print(os.getpid(), flush=True)
while stop.name is None:
    time.sleep(0.05)
print("saved", stop.name, flush=True)
"""

# What starts ranks: a program of the name of a launcher, or a wrapper between it and the rank.
LAUNCHER = """
import subprocess, sys
sys.exit(subprocess.call([sys.executable, *sys.argv[1:]]))
"""


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder with a rank, and programs that start what their command line names."""
    for name in ("torchrun", "deepspeed", "wrapper"):
        (tmp_path / name).write_text(LAUNCHER)
    (tmp_path / "rank").write_text(RANK)
    return tmp_path


def start(folder: Path, *names: str, listens: str = "listens") -> tuple[subprocess.Popen, int]:
    """Start programs, each the parent of the next; returns the first and the pid of the rank."""
    marks = {"torchrun": "TORCHELASTIC_RUN_ID=1", "deepspeed": "CROSS_RANK=0"}
    mark = next((marks[name] for name in names if name in marks), "NO=1")
    command = [sys.executable, *(str(folder / name) for name in names), listens, mark]
    first = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path.cwd()
    )
    return first, int(first.stdout.readline())


def kill(process: subprocess.Popen | psutil.Process) -> None:
    process.kill()
    process.wait()


@pytest.mark.parametrize(
    "names", [("torchrun", "rank"), ("deepspeed", "rank"), ("torchrun", "wrapper", "rank")]
)
def test_rank_stops_when_its_launcher_is_killed(programs: Path, names: tuple[str, ...]) -> None:
    launcher, _ = start(programs, *names)

    kill(launcher)
    # The rank has the other end of the pipe, so this returns when it has ended.
    output, errors = launcher.communicate(timeout=60)

    assert "saved" in output
    assert "wrapper" in names or "SIGTERM" in output or "its launcher" in errors


def test_rank_stops_when_the_upper_process_of_deepspeed_is_killed(programs: Path) -> None:
    upper, _ = start(programs, "deepspeed", "deepspeed", "rank")

    kill(upper)
    output, errors = upper.communicate(timeout=60)

    assert output == "saved the end of its launcher\n"
    assert f"rank 3 on {socket.gethostname()}: its launcher, process {upper.pid}, has" in errors


def test_rank_that_nobody_can_ask_to_stop_ends(programs: Path) -> None:
    upper, _ = start(programs, "deepspeed", "deepspeed", "rank", listens="deaf")

    kill(upper)
    output, errors = upper.communicate(timeout=60)

    assert output == "" and "has ended; stopping" in errors


def test_rank_outlives_a_wrapper(programs: Path) -> None:
    launcher, rank = start(programs, "torchrun", "wrapper", "rank")
    wrapper = psutil.Process(rank).parent()

    # Then: the rank names the launcher, which ends later.
    wrapper.kill()
    launcher.wait(timeout=60)
    output, errors = launcher.communicate(timeout=60)

    assert f"its launcher, process {launcher.pid}, has ended" in errors
    assert "saved" in output


def test_rank_without_a_launcher_watches_nobody(programs: Path) -> None:
    shell, rank = start(programs, "wrapper", "rank")
    kill(shell)

    # It stops when it is asked to, with the name of the signal.
    os.kill(rank, signal.SIGTERM)

    assert shell.communicate(timeout=60)[0] == "saved SIGTERM\n"


@pytest.mark.parametrize(
    ("name", "command", "expected"),
    [
        ("python3", "python3 -m torch.distributed.run --standalone", True),
        ("torchrun", "/env/bin/python3.11 /env/bin/torchrun --nproc-per-node 2", True),
        ("deepspeed", "/env/bin/python /env/bin/deepspeed --num_gpus 2", True),
        ("python", "/env/bin/python -u -m deepspeed.launcher.launch --world_info=x", True),
        ("slurmstepd", "slurmstepd: [12.0]", True),
        ("bash", "bash launch/deepspeed.sh train x.yaml", False),
        ("bash", "bash torchrun", False),
        ("timeout", "timeout 600 torchrun --standalone", False),
        ("python", "python -m coupalign train deepspeed.yaml", False),
        ("sshd", "sshd: root@notty", False),
        ("kthreadd", "", False),
    ],
)
def test_launchers_are_told_from_shells_and_wrappers(
    name: str, command: str, expected: bool
) -> None:
    assert is_launcher_command(name, command.split()) == expected
