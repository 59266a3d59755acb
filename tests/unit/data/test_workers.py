"""Worker processes: where they come from, which signals reach them, and that they end."""

from __future__ import annotations

import errno
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

from coupalign.bench.machine import resident_gigabytes
from coupalign.data import workers as room
from coupalign.data.workers import end_workers, open_data_loader, start_iteration, unwrap
from coupalign.errors import InputError, RunError
from tests.unit.data.batches import config_of, evaluate, rows_of, steps_of, train

OPEN_LOADERS = """
import os, signal, sys
from itertools import islice
from pathlib import Path
from tests.unit.data.batches import config_of, evaluate, train

config = config_of(Path(sys.argv[1]), workers=1)
"""

ABANDON = """
steps = train(config).steps_from(0)
evaluation = iter(evaluate(config))
next(steps), next(evaluation)
sys.exit("gone")
"""

SIGNAL_THE_SERVER = """
loader = train(config)
next(loader.steps_from(0))
server = int(Path(f"/proc/{loader.worker_pids[0]}/stat").read_text().split()[3])
assert server != os.getpid(), "a fork of this process"
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    os.kill(server, number)
loader.close()
next(iter(evaluate(config)))
os.kill(server, 0)
"""


def run(program: str, packed: Path) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[3]
    return subprocess.run(
        [sys.executable, "-c", OPEN_LOADERS + program, str(packed)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=root,
    )


def test_program_that_leaves_its_loaders_open_ends(packed: Path):
    done = run(ABANDON, packed)

    assert done.returncode == 1 and done.stderr == "gone\n"


def test_signals_do_not_end_the_fork_server(packed: Path):
    """Workers come from a server: a thread of the rank may hold a lock at the moment of a fork."""
    done = run(SIGNAL_THE_SERVER, packed)

    assert (done.returncode, done.stderr) == (0, "")


def test_signals_do_not_end_the_workers(packed: Path):
    expected = steps_of(train(config_of(packed)), 0, 30)
    loader = train(config_of(packed, workers=1))
    steps = loader.steps_from(0)
    next(steps)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        os.kill(loader.worker_pids[0], number)

    assert [rows_of(batch) for _, [batch] in islice(steps, 29)] == expected[1:]
    loader.close()


def test_loaders_leave_the_global_random_state_alone(packed: Path):
    torch.manual_seed(0)
    before = torch.get_rng_state()

    loader = train(config_of(packed, workers=1))
    steps_of(loader, 0, 1)
    loader.close()
    list(evaluate(config_of(packed)))

    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.slow
def test_memory_of_a_worker_stays_flat(packed: Path):
    """Over 200 epochs, after 100 others: by less than 4 MB, while 800 MB of samples pass."""
    config = config_of(packed, workers=1, image_size=256, resize="letterbox")
    loader = train(config, global_batch=16)

    held = {}
    for step, _ in islice(loader.steps_from(0), 300):
        if step in (99, 299):
            held[step] = resident_gigabytes(loader.worker_pids[0])
    loader.close()

    assert held[299] - held[99] < 0.004, held


class Wrong(Dataset):
    """Fails in a worker process, as its key says."""

    def __getitem__(self, key: str) -> object:
        if key == "cannot be sent":
            return lambda: None
        if key == "has no memory":
            return torch.empty(10**15)
        if key == "is a bug":
            raise RuntimeError("a bug")
        os.kill(os.getpid(), signal.Signals[key])
        raise AssertionError


def read_wrong(key: str, workers: int = 1) -> object:
    loader = open_data_loader(Wrong(), [key], workers, persistent=False)
    items = start_iteration(loader)
    try:
        return unwrap(next(items))
    finally:
        end_workers(items)


@pytest.mark.parametrize(
    ("key", "kind", "words"),
    [
        ("cannot be sent", InputError, "a data worker cannot send a batch: .*pickle"),
        ("has no memory", InputError, "out of memory.*lower train.max_micro_batch"),
        ("SIGBUS", InputError, "ended with a bus error: too little shared memory.*--shm-size"),
        ("SIGKILL", RunError, r"was killed \(SIGKILL\), as the system does when memory is short"),
        ("SIGSEGV", RunError, "ended with SIGSEGV; its own output says why"),
        ("is a bug", RuntimeError, "a bug"),
    ],
)
def test_end_of_a_worker_is_said_in_words(key: str, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        read_wrong(key)


def test_shortage_without_workers_is_said_in_words() -> None:
    with pytest.raises(InputError, match="out of memory"):
        read_wrong("has no memory", workers=0)


def test_workers_are_not_started_without_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_: object) -> None:
        raise AssertionError("a worker was started")

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", start)
    usual = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 8, usual[1]))
    try:
        with pytest.raises(InputError, match="data.workers=1: the worker processes.*ulimit -n"):
            read_wrong("SIGBUS")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, usual)


def test_workers_that_cannot_be_started_are_said_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", start)

    with pytest.raises(InputError, match="data.workers=1: the worker processes.*--shm-size"):
        read_wrong("SIGBUS")


def test_batches_must_fit_into_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "free_shared_memory", lambda: 64_000_000)

    room.require_shared_memory(1_000_000, workers=32)
    with pytest.raises(
        InputError, match="data.workers=33: 33 x 2 batches of 1.0 MB do not fit: too"
    ):
        room.require_shared_memory(1_000_000, workers=33)
