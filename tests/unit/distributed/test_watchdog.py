"""The report on a job in which nothing moves."""

from __future__ import annotations

import subprocess
import sys

import torch

from coupalign.distributed.watchdog import describe_phases
from coupalign.errors import ExitStatus


def note(phase: str, beats: int, host: str = "n1") -> dict:
    return {
        "phase": phase,
        "alone": "reading" in phase,
        "seconds": 60,
        "beats": beats,
        "host": host,
    }


def later(notes: dict[int, dict]) -> dict[int, dict]:
    """The notes of the same ranks two heartbeats later."""
    return {rank: {**one, "beats": one["beats"] + 2} for rank, one in notes.items()}


def test_report_begins_with_the_rank_that_delays_the_others() -> None:
    before = {rank: note("step 7: updating", 5) for rank in range(4)}
    before[1] = note("step 7: reading data", 5, "n2")

    first, second = describe_phases(before, later(before), 4)

    assert first.startswith("  rank 1 (n2): 'step 7: reading data'")
    assert "wait for this rank" in first
    assert second.startswith("  ranks 0 (n1), 2 (n1), 3 (n1): 'step 7: updating'")
    assert "wait for this rank" not in second


def test_report_names_silent_and_missing_ranks() -> None:
    before = {0: note("step 7: updating", 5), 1: note("saving", 5)}
    after = {0: note("step 7: updating", 7), 1: note("saving", 5)}

    lines = "\n".join(describe_phases(before, after, 3))

    assert "rank 1 (n1): silent" in lines and "last heard while 'saving'" in lines
    assert "rank 2 (host unknown): was never heard of" in lines


def test_report_blames_the_rank_that_works_alone() -> None:
    before = {0: note("step 7: updating", 5), 1: note("step 7: reading data", 5)}

    first, second = describe_phases(before, later(before), 2)

    assert "rank 1" in first and "wait for this rank" in first
    assert "wait for this rank" not in second


def test_report_blames_nobody_if_all_ranks_are_in_one_phase() -> None:
    before = {rank: note("saving", 5) for rank in range(3)}

    (only,) = describe_phases(before, later(before), 3)

    assert only == "  ranks 0 (n1), 1 (n1), 2 (n1): 'saving'"


WATCHED = """
import sys
import time
from datetime import timedelta

import torch.distributed as dist

from coupalign.distributed.watchdog import Watchdog, doing

rank, port = int(sys.argv[1]), int(sys.argv[2])
timeout = timedelta(seconds=60)
store = dist.TCPStore("127.0.0.1", port, 2, is_master=False, timeout=timeout)
watchdog = Watchdog(rank, 2, store, 2.0)
doing("step 9: reading data" if rank else "step 9: updating", alone=bool(rank))
time.sleep(60)
"""


def test_ranks_that_give_up_together_are_not_reported_as_silent() -> None:
    """Both pass the limit at once: the reporter must see its own heartbeats and the other's."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, 1, is_master=True, wait_for_workers=False)

    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", WATCHED, str(rank), str(store.port)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    output = "".join(process.communicate(timeout=100)[1] for process in ranks)

    assert [process.returncode for process in ranks] == [ExitStatus.HANG, ExitStatus.HANG]
    assert "'step 9: reading data'  <- the others seem to wait for this rank" in output, output
    assert "'step 9: updating'" in output and "silent" not in output, output
