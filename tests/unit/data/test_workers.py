"""Worker processes: where they come from, which signals reach them, and that they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch

from coupalign.bench.machine import resident_gigabytes
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
