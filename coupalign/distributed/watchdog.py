"""Record what each rank is doing, and end a job that no longer makes progress.

If one rank never enters a collective, all the others wait for it, and none of them can say why. So
each rank announces each phase that it begins (`doing("step 7: reading data")`), and a thread copies
that to the job's store. The first rank that stays in one phase for too long prints what every rank
was doing and its own stack, then exits with ExitStatus.HANG. The launcher ends the other ranks.
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

from coupalign.errors import ExitStatus

_MAX_HEARTBEAT_S = 10.0
# A rank whose note has not changed for this many heartbeats is silent.
_HEARTBEATS_UNTIL_SILENT = 3
_MAX_RANKS_LISTED = 8


class Phase:
    """The current phase of this process. The main thread sets it, the watchdog's thread reads it.

    Attributes:
        name: what the process is doing.
        since: when it began, in seconds of `time.monotonic`.
        alone: whether the phase needs no other rank.
    """

    def __init__(self) -> None:
        self.name, self.since, self.alone = "starting", time.monotonic(), True


_phase = Phase()


def doing(name: str, alone: bool = False) -> None:
    """Announce the phase that this rank begins, such as "step 7: reading data".

    Each call counts as progress, and costs next to nothing. It also raises the audit event
    "coupalign.doing" (PEP 578), to which a profiler or a fault-injecting test can listen.

    Args:
        alone: the phase needs no other rank, so a rank that stays in it delays the others.
    """
    _phase.since = time.monotonic()
    _phase.name, _phase.alone = name, alone
    sys.audit("coupalign.doing", name)


def current_phase() -> str:
    """Return the phase that this rank announced last."""
    return _phase.name


class Watchdog:
    """Watch this rank from a thread, from construction until `close`.

    Args:
        store: a torch.distributed store of the job, not shared with another thread.
        limit_s: seconds in one phase after which the process exits.
    """

    def __init__(self, rank: int, size: int, store: Any, limit_s: float) -> None:
        self._rank, self._size, self._store, self._limit_s = rank, size, store, limit_s
        self._heartbeat_s = min(_MAX_HEARTBEAT_S, limit_s / 4)
        self._heartbeats = 0
        self._closed = threading.Event()

        doing("joining the job")
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        self._thread.join(2 * self._heartbeat_s)

    def _run(self) -> None:
        while not self._closed.wait(self._heartbeat_s):
            seconds = time.monotonic() - _phase.since
            self._publish(seconds)
            if seconds > self._limit_s:
                self._end_job(seconds)

    def _publish(self, seconds: float) -> None:
        """Write this rank's note into the store."""
        self._heartbeats += 1
        note = {
            "phase": _phase.name,
            "alone": _phase.alone,
            "seconds": round(seconds),
            "beats": self._heartbeats,
            "host": socket.gethostname(),
        }
        try:
            self._store.set(f"watch/{self._rank}", json.dumps(note))
        except Exception:  # the rank that holds the store is gone: the launcher is ending this job
            pass

    def _end_job(self, seconds: float) -> None:
        """Report where this rank is and exit. The first rank to get here also reports all others.

        Does not return.
        """
        lines = [
            f"rank {self._rank} on {socket.gethostname()}: no progress for {seconds:.0f} s while "
            f"{_phase.name!r}; ending the job (status {ExitStatus.HANG}). Run the same command to "
            "resume from the newest checkpoint"
        ]

        # If the store lives on a rank that hangs, reading it never returns: ask from a thread.
        asking = threading.Thread(target=self._describe_job, args=(lines, seconds), daemon=True)
        asking.start()
        asking.join((_HEARTBEATS_UNTIL_SILENT + 2) * self._heartbeat_s + 5)

        print("\n".join(lines), file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.stderr)
        os._exit(ExitStatus.HANG)

    def _describe_job(self, lines: list[str], seconds: float) -> None:
        """Append what every rank is doing to `lines`, if this rank is the first to report.

        Watches the other ranks' heartbeats for a while. This rank keeps sending its own, so that
        another one that reports does not take it for silent.
        """
        reporter = self._store.compare_set("watch/reporter", "", str(self._rank)).decode()
        is_reporter = reporter == str(self._rank)

        # The other ranks live for one heartbeat longer, until the reporter has read their notes.
        before = self._read_notes()
        heartbeats = _HEARTBEATS_UNTIL_SILENT if is_reporter else _HEARTBEATS_UNTIL_SILENT + 1
        for _ in range(heartbeats):
            self._publish(seconds)
            time.sleep(self._heartbeat_s)

        if is_reporter:
            lines += describe_phases(before, self._read_notes(), self._size)

    def _read_notes(self) -> dict[int, dict[str, Any]]:
        notes = {}
        for rank in range(self._size):
            key = f"watch/{rank}"
            if self._store.check([key]):
                notes[rank] = json.loads(self._store.get(key))
        return notes


def describe_phases(
    before: dict[int, dict[str, Any]], after: dict[int, dict[str, Any]], size: int
) -> list[str]:
    """Describe what each rank was doing, a line per phase, first the ranks that delay the others.

    Args:
        before, after: each rank's note, read some heartbeats apart. A rank whose count of
            heartbeats did not change in between is stopped or dead.
        size: number of ranks.
    """
    ranks_by_phase: dict[str, list[int]] = defaultdict(list)
    for rank in range(size):
        phase = _describe_phase(before.get(rank), after.get(rank))
        ranks_by_phase[phase].append(rank)

    # Blame silent ranks; without any, ranks that need nobody; without any, the smallest group.
    delaying = [phase for phase in ranks_by_phase if not phase.startswith("'")]
    if not delaying:
        delaying = [
            phase
            for phase, ranks in ranks_by_phase.items()
            if all(after[rank]["alone"] for rank in ranks)
        ]
    if not delaying and len(ranks_by_phase) > 1:
        delaying = [min(ranks_by_phase, key=lambda phase: len(ranks_by_phase[phase]))]

    def order(phase: str) -> tuple[bool, int]:
        return phase not in delaying, len(ranks_by_phase[phase])

    lines = []
    for phase in sorted(ranks_by_phase, key=order):
        line = f"  {_list_ranks(ranks_by_phase[phase], after)}: {phase}"
        if phase in delaying:
            line += "  <- the others seem to wait for this rank"
        lines.append(line)
    return lines


def _describe_phase(before: dict[str, Any] | None, after: dict[str, Any] | None) -> str:
    """Describe one rank's phase, in quotation marks if the rank is alive."""
    if after is None:
        return "was never heard of"
    if before is not None and before["beats"] != after["beats"]:
        return repr(after["phase"])
    # Nothing shows that the rank is alive, even if its only note arrived in between.
    return f"silent: stopped, dead or cut off; last heard while {after['phase']!r}"


def _list_ranks(ranks: list[int], notes: dict[int, dict[str, Any]]) -> str:
    """List ranks with their hosts: "ranks 0 (n1), 2 (n1)"."""
    named = []
    for rank in ranks[:_MAX_RANKS_LISTED]:
        host = notes[rank]["host"] if rank in notes else "host unknown"
        named.append(f"{rank} ({host})")

    noun = "rank" if len(ranks) == 1 else "ranks"
    more = " …" if len(ranks) > _MAX_RANKS_LISTED else ""
    return f"{noun} {', '.join(named)}{more}"
