"""Notes what every rank is doing, and ends a job in which nothing moves any more.

A collective that one rank never enters holds up all the others, and none of them can say why. So each rank says what it
begins (`doing("step 7: reading data")`), a thread puts that into the job's store, and the first rank that stays in one
phase for too long prints who was where, its own stack, and ends with status 70; the launcher ends the others.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections import defaultdict
from typing import Any

HUNG = 70  # EX_SOFTWARE: the exit status of a rank that saw no progress
_SLOWEST_BEAT_S = 10.0
_BEATS_TO_JUDGE = 3  # a rank that gave no sign of life for so long is silent


class Phase:
    """What this process is doing, and since when; set by the main thread, read by the watch."""

    def __init__(self) -> None:
        self.name, self.since, self.alone = "starting", time.monotonic(), True


_phase = Phase()


def doing(name: str, alone: bool = False) -> None:
    """Say what this rank begins now: "step 7: reading data". That is progress, and it costs nothing.

    It is also an audit event (PEP 578), for whoever wants to be called at a certain place: a profiler, or a test that breaks things.

    Args:
        alone: it needs no other rank, so whoever stays in it holds up the others.
    """
    _phase.since = time.monotonic()
    _phase.name, _phase.alone = name, alone
    sys.audit("coupalign.doing", name)


class Watchdog:
    """The watching thread of one rank, from its making to `close`.

    Args:
        store: a torch.distributed store of the job, not shared with another thread.
        limit_s: seconds in one phase after which the process ends.
    """

    def __init__(self, rank: int, size: int, store: Any, limit_s: float) -> None:
        self._rank, self._size, self._store, self._limit = rank, size, store, limit_s
        self._beat = min(_SLOWEST_BEAT_S, limit_s / 4)
        self._beats = 0
        self._end = threading.Event()
        doing("joining the job")
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop watching."""
        self._end.set()
        self._thread.join(2 * self._beat)

    def _run(self) -> None:
        while not self._end.wait(self._beat):
            passed = time.monotonic() - _phase.since
            self._publish(passed)
            if passed > self._limit:
                self._report(passed)

    def _publish(self, passed: float) -> None:
        self._beats += 1
        note = {
            "phase": _phase.name,
            "alone": _phase.alone,
            "seconds": round(passed),
            "beats": self._beats,
            "host": socket.gethostname(),
        }
        try:
            self._store.set(f"watch/{self._rank}", json.dumps(note))
        except Exception:  # the rank that holds the store is gone: the launcher is ending this job
            pass

    def _report(self, passed: float) -> None:
        """Say where this rank is; the first to come here also says where all the others are. Does not return."""
        lines = [
            f"rank {self._rank} on {socket.gethostname()}: no progress for {passed:.0f} s while {_phase.name!r}; ending the job "
            f"(status {HUNG}). The same command goes on from the newest checkpoint"
        ]
        # Where the store itself lives on a rank that stands still, asking it would never return.
        asking = threading.Thread(target=self._ask_everybody, args=(lines, passed), daemon=True)
        asking.start()
        asking.join((_BEATS_TO_JUDGE + 2) * self._beat + 5)
        print("\n".join(lines), file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.stderr)
        os._exit(HUNG)

    def _ask_everybody(self, lines: list[str], passed: float) -> None:
        """Look at everybody's beats for a while, without missing one of its own: who has given up waiting is not silent."""
        first = self._store.compare_set("watch/reporter", "", str(self._rank)).decode() == str(
            self._rank
        )
        before = self._notes()
        for _ in range(
            _BEATS_TO_JUDGE if first else _BEATS_TO_JUDGE + 1
        ):  # the others live until the first has looked at them
            self._publish(passed)
            time.sleep(self._beat)
        if first:
            lines += phase_of_each_rank(before, self._notes(), self._size)

    def _notes(self) -> dict[int, dict[str, Any]]:
        keys = {rank: f"watch/{rank}" for rank in range(self._size)}
        return {
            rank: json.loads(self._store.get(key))
            for rank, key in keys.items()
            if self._store.check([key])
        }


def phase_of_each_rank(
    before: dict[int, dict[str, Any]], after: dict[int, dict[str, Any]], size: int
) -> list[str]:
    """Lines that say what each rank was doing, those first that the others seem to wait for.

    Args:
        before, after: rank -> its note, read some beats apart: a rank whose count of beats stood still is stopped or dead.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for rank in range(size):
        note = after.get(rank)
        if note is None:
            groups["was never heard of"].append(rank)
        elif note["beats"] == before.get(rank, note)["beats"]:
            groups[f"silent: stopped, dead or cut off; last heard while {note['phase']!r}"].append(
                rank
            )
        else:
            groups[repr(note["phase"])].append(rank)
    working = {
        what
        for what, ranks in groups.items()
        if all(rank in after and after[rank]["alone"] for rank in ranks)
    }
    absent = {what for what in groups if not what.startswith("'")}
    fewest = {min(groups, key=lambda what: len(groups[what]))} if len(groups) > 1 else set()
    blamed = absent or working or fewest
    lines = []
    for what in sorted(groups, key=lambda what: (what not in blamed, len(groups[what]))):
        ranks = groups[what]
        named = ", ".join(
            f"{rank} ({after[rank]['host'] if rank in after else 'host unknown'})"
            for rank in ranks[:8]
        )
        lines.append(
            f"  rank{'s' * (len(ranks) > 1)} {named}{' …' * (len(ranks) > 8)}: {what}"
            f"{'  <- the others seem to wait here' * (what in blamed)}"
        )
    return lines
