"""What is said of a job in which nothing moves."""

from __future__ import annotations

import subprocess
import sys

import torch

from coupalign.distributed.watchdog import HUNG, phase_of_each_rank


def note(phase: str, beats: int, host: str = "n1") -> dict:
    return {
        "phase": phase,
        "alone": "reading" in phase,
        "seconds": 60,
        "beats": beats,
        "host": host,
    }


def test_the_rank_that_holds_up_the_others_comes_first() -> None:
    before = {rank: note("step 7: updating", 5) for rank in range(4)} | {
        1: note("step 7: reading data", 5, "n2")
    }
    after = {rank: {**said, "beats": 7} for rank, said in before.items()}
    first, second = phase_of_each_rank(before, after, 4)
    assert first.startswith("  rank 1 (n2): 'step 7: reading data'") and "wait here" in first
    assert (
        second.startswith("  ranks 0 (n1), 2 (n1), 3 (n1): 'step 7: updating'")
        and "wait here" not in second
    )


def test_a_rank_that_is_silent_and_one_that_was_never_there() -> None:
    before = {0: note("step 7: updating", 5), 1: note("saving", 5)}
    after = {0: note("step 7: updating", 7), 1: note("saving", 5)}
    lines = "\n".join(phase_of_each_rank(before, after, 3))
    assert "rank 1 (n1): silent" in lines and "last heard while 'saving'" in lines
    assert "rank 2 (host unknown): was never heard of" in lines


def test_of_two_ranks_it_is_the_one_that_works_alone() -> None:
    notes = {0: note("step 7: updating", 5), 1: note("step 7: reading data", 5)}
    first, second = phase_of_each_rank(
        notes, {rank: {**said, "beats": 7} for rank, said in notes.items()}, 2
    )
    assert "rank 1" in first and "wait here" in first and "wait here" not in second


def test_all_in_one_place_blames_nobody() -> None:
    notes = {rank: note("saving", 5) for rank in range(3)}
    (only,) = phase_of_each_rank(
        notes, {rank: {**said, "beats": 7} for rank, said in notes.items()}, 3
    )
    assert "ranks 0 (n1), 1 (n1), 2 (n1): 'saving'" in only and "wait here" not in only


WATCHED = """
import sys
from datetime import timedelta
import torch.distributed as dist
from coupalign.distributed.watchdog import Watchdog
from coupalign.distributed.watchdog import doing
rank = int(sys.argv[1])
store = dist.TCPStore("127.0.0.1", int(sys.argv[2]), 2, is_master=False, timeout=timedelta(seconds=60))
watch = Watchdog(rank, 2, store, 2.0)
doing("step 9: reading data" if rank else "step 9: updating", alone=bool(rank))
import time
time.sleep(60)
"""


def test_ranks_that_give_up_together_are_not_called_silent() -> None:
    """Both pass the limit at the same time: the one that reports sees its own beats and those of the other, which also waits."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, 1, is_master=True, wait_for_workers=False)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", WATCHED, str(rank), str(store.port)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    said = "".join(process.communicate(timeout=100)[1] for process in ranks)
    assert [process.returncode for process in ranks] == [HUNG, HUNG]
    assert "'step 9: reading data'  <- the others seem to wait here" in said, said
    assert "'step 9: updating'" in said and "silent" not in said, said
