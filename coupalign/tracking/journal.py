"""The journal of a run, and the tracker that the training loop talks to.

<run_dir>/metrics.jsonl is the record of what was measured, one line per measurement:

    {"step": 120, "time": 1790000000.25, "metrics": {"train/loss": 0.41, "train/grad_norm": "NaN"}}

`time` is in seconds since 1970. Numbers that JSON lacks are the strings "NaN", "Infinity" and
"-Infinity". A name appears once per step: a resumed run does not write it again. MLflow is fed from
this file, so a server may be down, fail, or be filled later.
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

from coupalign.errors import InputError, RunError

JOURNAL = "metrics.jsonl"

# What MLflow stores: a step of 64 bits, and milliseconds since 1970.
MAX_STEP = 1 << 62
MAX_TIME_S = 1e11

Status = Literal["FINISHED", "FAILED", "KILLED", "SCHEDULED"]

logger = logging.getLogger("coupalign.tracking")


class Tracker(Protocol):
    """What the training loop may report about a run.

    No method waits for a network, and none raises because a server is down.
    """

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record numbers measured at a step. A name that this step already has keeps its value."""

    def artifact(self, path: Path, folder: str = "") -> None:
        """Keep a file, or all files of a directory, with the run.

        Calling again sends the newer version.
        """

    def tag(self, tags: Mapping[str, str]) -> None:
        """Set tags that describe the run."""

    def close(self, status: Status = "FINISHED") -> None:
        """End the session.

        SCHEDULED means that the run resumes later. Only the first call counts.
        """


@dataclass(frozen=True)
class Measurement:
    """Numbers measured at one step."""

    step: int
    time: float
    metrics: dict[str, float]

    @classmethod
    def parse(cls, line: bytes) -> Measurement | None:
        """Parse a journal line. Returns None if the line is damaged."""
        try:
            value = json.loads(line)
            metrics = {str(name): float(number) for name, number in value["metrics"].items()}
            measurement = cls(int(value["step"]), float(value["time"]), metrics)
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
            return None
        is_possible = abs(measurement.step) < MAX_STEP and 0 <= measurement.time < MAX_TIME_S
        return measurement if is_possible else None

    def line(self) -> bytes:
        """Format the measurement as a journal line."""
        metrics = {name: _json_number(number) for name, number in self.metrics.items()}
        record = {"step": self.step, "time": self.time, "metrics": metrics}
        return json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def read_journal(journal: Path, start: int = 0) -> Iterator[tuple[Measurement, int]]:
    """Read the measurements of a journal from byte `start`, each with the offset of the next byte.

    Stops before a line that is still being written and skips damaged lines. A missing file has no
    measurements.
    """
    if not journal.exists():
        return

    with open(journal, "rb") as file:
        end = file.seek(start)
        for line in file:
            if not line.endswith(b"\n"):
                return
            end += len(line)

            measurement = Measurement.parse(line)
            if measurement is not None:
                yield measurement, end


class Journal:
    """A Tracker that writes numbers to the run directory and needs nothing else."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / JOURNAL
        run_dir.mkdir(parents=True, exist_ok=True)
        # A link in somebody else's run directory would have another file repaired and extended.
        if self.path.is_symlink():
            raise InputError(
                f"{self.path} is a link, and a run writes to it. Put the file itself there"
            )
        _repair_last_line(self.path)

        # Most steps have the same names, so equal sets are stored once.
        self._names_by_step: dict[int, frozenset[str]] = {}
        self._shared_names: dict[frozenset[str], frozenset[str]] = {}
        for measurement, _ in read_journal(self.path):
            self._remember_names(measurement)

        try:
            self._file = open(self.path, "ab", buffering=0)
        except OSError as error:
            raise RunError(
                f"{self.path}: the journal cannot be opened to write ({error.strerror}). Make it "
                "writable or free some space, then run the same command again"
            ) from error
        self._unwritten = b""
        self._failing = False

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        logged = self._names_by_step.get(step, frozenset())
        fresh = {name: float(number) for name, number in metrics.items() if name not in logged}
        if not fresh or self._file.closed:
            return

        measurement = Measurement(int(step), round(time.time(), 3), fresh)
        self._remember_names(measurement)
        self._unwritten += measurement.line()
        self._write()

    def artifact(self, path: Path, folder: str = "") -> None:
        """Do nothing: the file is in the run directory."""

    def tag(self, tags: Mapping[str, str]) -> None:
        """Do nothing: the run directory describes itself."""

    def close(self, status: Status = "FINISHED") -> None:
        if self._file.closed:
            return

        self._write()
        if self._unwritten:
            lost = self._unwritten.count(b"\n")
            logger.warning("%s: %d rows could not be written and are lost", self.path, lost)

        try:
            os.fsync(self._file.fileno())
            self._file.close()
        except OSError as error:
            logger.warning("%s: %s", self.path, error)

    def _remember_names(self, measurement: Measurement) -> None:
        logged = self._names_by_step.get(measurement.step, frozenset())
        names = logged.union(measurement.metrics)
        self._names_by_step[measurement.step] = self._shared_names.setdefault(names, names)

    def _write(self) -> None:
        """Write what is pending.

        On a full disk the rest stays in memory, and the next call continues.
        """
        try:
            while self._unwritten:
                written = self._file.write(self._unwritten)
                self._unwritten = self._unwritten[written:]
        except OSError as error:
            if not self._failing:
                logger.warning(
                    "%s: %s; training continues, rows stay in memory until the file is writable",
                    self.path,
                    error,
                )
            self._failing = True
        else:
            if self._failing:
                logger.warning("%s: can be written again, no row is missing", self.path)
            self._failing = False


class NullTracker:
    """The tracker of the ranks other than 0."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def artifact(self, path: Path, folder: str = "") -> None: ...
    def tag(self, tags: Mapping[str, str]) -> None: ...
    def close(self, status: Status = "FINISHED") -> None: ...


def _json_number(number: float) -> float | str:
    """Return a finite number as it is, and the others by the names that `float` reads."""
    if math.isfinite(number):
        return number
    if math.isnan(number):
        return "NaN"
    return "Infinity" if number > 0 else "-Infinity"


def _repair_last_line(journal: Path) -> None:
    """Cut off a last line that a kill left half-written. End it if only its newline is missing."""
    if not journal.exists():
        return

    with open(journal, "rb+") as file:
        content = file.read()
        end_of_lines = content.rfind(b"\n") + 1
        if end_of_lines == len(content):
            return

        if Measurement.parse(content[end_of_lines:]) is not None:
            file.write(b"\n")
        else:
            file.truncate(end_of_lines)
