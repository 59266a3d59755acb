"""The journal of a run, and the tracker that the training loop talks to.

<run_dir>/metrics.jsonl is the truth about what was measured. One line a row:

    {"step": 120, "time": 1790000000.25, "metrics": {"train/loss": 0.41, "train/grad_norm": "NaN"}}

`time` is in seconds since 1970; numbers that JSON does not have are the strings "NaN", "Infinity" and "-Infinity".
A name appears once at a step: what a resumed run measures again is not written again. Anything else that shows
the numbers (MLflow) is fed from this file, so it can be away, die, or be filled later.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

JOURNAL = "metrics.jsonl"
Status = Literal["FINISHED", "FAILED", "KILLED", "SCHEDULED"]

logger = logging.getLogger("coupalign.tracking")


class Tracker(Protocol):
    """What the training loop may say about a run. No method waits for a network; none raises because a tracker is away."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record numbers measured at a step; a name that this step has already is left as it is."""

    def artifact(self, path: Path, folder: str = "") -> None:
        """Keep a file, or all files of a directory, with the run; asking again sends the newer version."""

    def tag(self, tags: Mapping[str, str]) -> None:
        """Set words that describe the run."""

    def close(self, status: Status = "FINISHED") -> None:
        """End the session; SCHEDULED is a run that goes on later. Only the first call counts."""


@dataclass(frozen=True)
class Measurement:
    """Numbers measured at one step."""

    step: int
    time: float
    metrics: dict[str, float]

    @classmethod
    def parse(cls, line: bytes) -> Measurement | None:
        """The row of a journal line, or none where the line is damaged."""
        try:
            value = json.loads(line)
            metrics = {str(name): float(number) for name, number in value["metrics"].items()}
            return cls(int(value["step"]), float(value["time"]), metrics)
        except (ValueError, TypeError, KeyError, AttributeError):
            return None

    def line(self) -> bytes:
        metrics = {
            name: number if math.isfinite(number) else _spell(number)
            for name, number in self.metrics.items()
        }
        row = {"step": self.step, "time": self.time, "metrics": metrics}
        return json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def read_journal(journal: Path, start: int = 0) -> Iterator[tuple[Measurement, int]]:
    """Rows of a journal file from byte `start` on, each with the offset of the byte behind it.

    Ends before a line that is still being written; leaves out damaged lines. A missing file has no rows.
    """
    if not journal.exists():
        return
    with open(journal, "rb") as file:
        end = file.seek(start)
        for line in file:
            if not line.endswith(b"\n"):
                return
            end += len(line)
            if (row := Measurement.parse(line)) is not None:
                yield row, end


class Journal:
    """The open journal: a Tracker that writes numbers to the run directory and needs nothing else."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / JOURNAL
        run_dir.mkdir(parents=True, exist_ok=True)
        _mend_tail(self.path)
        self._names: dict[int, frozenset[str]] = {}
        self._same: dict[frozenset[str], frozenset[str]] = {}
        for row, _ in read_journal(self.path):
            self._remember(row)
        self._file = open(self.path, "ab", buffering=0)
        self._unwritten = b""
        self._failing = False

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        known = self._names.get(step, frozenset())
        fresh = {name: float(number) for name, number in metrics.items() if name not in known}
        if not fresh or self._file.closed:
            return
        row = Measurement(int(step), round(time.time(), 3), fresh)
        self._remember(row)
        self._unwritten += row.line()
        self._write()

    def artifact(self, path: Path, folder: str = "") -> None:
        """Nothing to do: the file is there."""

    def tag(self, tags: Mapping[str, str]) -> None:
        """Nothing to do: the run directory describes itself."""

    def close(self, status: Status = "FINISHED") -> None:
        if self._file.closed:
            return
        self._write()
        if self._unwritten:
            logger.warning(
                "%s: %d rows could not be written and are lost",
                self.path,
                self._unwritten.count(b"\n"),
            )
        try:
            os.fsync(self._file.fileno())
            self._file.close()
        except OSError as error:
            logger.warning("%s: %s", self.path, error)

    def _remember(self, row: Measurement) -> None:
        names = self._names.get(row.step, frozenset()).union(row.metrics)
        self._names[row.step] = self._same.setdefault(names, names)

    def _write(self) -> None:
        """Write what is waiting. On a full disk the rest waits in memory and the next call goes on at the very byte."""
        try:
            while self._unwritten:
                written = self._file.write(self._unwritten)
                self._unwritten = self._unwritten[written:]
        except OSError as error:
            if not self._failing:
                logger.warning(
                    "%s: %s; training goes on, rows wait in memory until the file can be written",
                    self.path,
                    error,
                )
            self._failing = True
        else:
            if self._failing:
                logger.warning("%s: can be written again, no row is missing", self.path)
            self._failing = False


class NullTracker:
    """The tracker of the other ranks."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def artifact(self, path: Path, folder: str = "") -> None: ...
    def tag(self, tags: Mapping[str, str]) -> None: ...
    def close(self, status: Status = "FINISHED") -> None: ...


def _spell(number: float) -> str:
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"


def _mend_tail(journal: Path) -> None:
    """Cut off a last line that a kill left half-written; end it where only its newline is missing."""
    if not journal.exists():
        return
    with open(journal, "rb+") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole == len(content):
            return
        if Measurement.parse(content[whole:]) is not None:
            file.write(b"\n")
        else:
            file.truncate(whole)
