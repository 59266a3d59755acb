"""The tracker that feeds MLflow: the journal, and a thread that sends it.

The training side only writes files. Where the server is away the thread tries again later; what is left at the end
goes out at the next start of the run or by `sync`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coupalign.config.schema import MlflowTracking
from coupalign.errors import InputError
from coupalign.tracking.journal import Journal, Status, logger
from coupalign.tracking.mlflow import Delivery, brief
from coupalign.tracking.outbox import STATE, Outbox, sole_sender

POLL_S = 2.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
CLOSE_WAIT_S = 30.0
"""Longest wait at the end of a session for a server that does not answer …"""
CLOSE_WAIT_WORKING_S = 120.0
"""… and for one that is taking what is sent, or a database that is being set up."""
CLOSE_WAIT_FAILED_S = 2.0
"""The wait of a session that failed: its launcher may be about to start the next one, which sends the rest."""
SYSTEM_EVERY_S = 10.0


class MlflowTracker:
    """A Tracker: the journal, followed by a sending thread."""

    def __init__(
        self,
        journal: Journal,
        uri: str,
        config: MlflowTracking,
        run_name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
    ) -> None:
        self._journal = journal
        self._system = config.system_metrics
        self._system_due = 0.0
        if self._system:
            system_reading()
        run_dir = journal.path.parent
        self._outbox = Outbox.read(run_dir) or Outbox(
            run_dir / STATE, uri, config.experiment, run_name
        )
        if (self._outbox.uri, self._outbox.experiment) != (uri, config.experiment):
            logger.warning(
                "MLflow: this run was sent to %s (%s) before; %s (%s) gets all of it",
                self._outbox.uri,
                self._outbox.experiment,
                uri,
                config.experiment,
            )
            self._outbox.start_over(uri=uri, experiment=config.experiment)
        words = {name: str(value) for name, value in params.items()}
        self._keep(
            params=words,
            params_sent=False,
            run_name=run_name,
            status="RUNNING",
            ended=None,
            status_sent=False,
        )
        self.tag(tags)
        self._thread = Forwarder(self._outbox)
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._journal.log(step, metrics)
        if self._system and time.monotonic() >= self._system_due:
            self._system_due = time.monotonic() + SYSTEM_EVERY_S
            self._journal.log(step, system_reading())

    def artifact(self, path: Path, folder: str = "") -> None:
        try:
            self._outbox.add_artifact(Path(path), folder)
        except OSError as error:
            logger.warning("%s: %s", self._outbox.path, error)

    def tag(self, tags: Mapping[str, str]) -> None:
        with self._outbox.lock:
            merged = self._outbox.tags | {name: str(value) for name, value in tags.items()}
            if merged != self._outbox.tags:
                self._keep(tags=merged, tags_sent=False)

    def close(self, status: Status = "FINISHED") -> None:
        if self._outbox.status != "RUNNING":
            return
        self._journal.close()
        self._keep(status=status, ended=int(time.time() * 1000), status_sent=False)
        if not self._thread.finish(hurry=status in ("FAILED", "KILLED")):
            rows, artifacts = self._outbox.waiting()
            logger.warning(
                "MLflow (%s): %d rows and %d artifacts are not there yet; `coupalign track %s` or the next start "
                "of this run sends them",
                self._outbox.uri,
                rows,
                artifacts,
                self._outbox.path.parent,
            )

    def _keep(self, **values: Any) -> None:
        try:
            self._outbox.change(**values)
        except OSError as error:
            logger.warning("%s: %s", self._outbox.path, error)


class Forwarder(threading.Thread):
    """Sends what the outbox and the journal hold, again and again until told to finish."""

    def __init__(self, outbox: Outbox) -> None:
        super().__init__(name="mlflow-forwarder", daemon=True)
        self._delivery = Delivery(outbox)
        self._closing = threading.Event()
        self._given_up = False
        self._failing = False

    def run(self) -> None:
        pause = FIRST_PAUSE_S
        with ExitStack() as stack:
            sole = False
            while not self._given_up:
                last = self._closing.is_set()
                try:
                    if not sole:
                        stack.enter_context(sole_sender(self._delivery.run_dir))
                        sole = True
                    self._delivery.send_all(lambda: self._given_up)
                except Exception as error:
                    self._say_away(error)
                    time.sleep(FIRST_PAUSE_S) if last else self._closing.wait(pause)
                    pause = min(2 * pause, LONGEST_PAUSE_S)
                    continue
                self._say_back()
                pause = FIRST_PAUSE_S
                if last:
                    return
                self._closing.wait(POLL_S)

    def finish(self, hurry: bool = False) -> bool:
        """Ask the thread to send what is left and wait for it, within bounds; whether everything was sent."""
        start = time.monotonic()
        self._closing.set()
        while self.is_alive():
            self.join(0.1)
            waited = time.monotonic() - start
            patience = (
                CLOSE_WAIT_FAILED_S
                if hurry
                else CLOSE_WAIT_S
                if self._failing
                else CLOSE_WAIT_WORKING_S
            )
            if self.is_alive() and waited > patience:
                self._given_up = True
                return False
        return True

    def _say_away(self, error: Exception) -> None:
        if not self._failing:
            logger.warning(
                "MLflow (%s) cannot be reached: %s. Training goes on; the numbers are kept in the run directory "
                "and sent when it is back.",
                self._delivery.outbox.uri,
                brief(error),
            )
        self._failing = True

    def _say_back(self) -> None:
        if self._failing:
            logger.warning("MLflow (%s) is back and has everything.", self._delivery.outbox.uri)
        self._failing = False


@dataclass(frozen=True)
class Synced:
    """What `sync` did."""

    uri: str
    experiment: str
    run_id: str | None
    rows: int
    artifacts: int
    rows_left: int
    artifacts_left: int
    error: str | None


def sync(run_dir: Path) -> Synced:
    """Send what an earlier session left; a server that does not answer is reported in `error`.

    Raises InputError where the directory holds no run that was tracked with MLflow.
    """
    run_dir, error = Path(run_dir), None
    if (outbox := Outbox.read(run_dir)) is None:
        raise InputError(
            f"{run_dir / STATE} is missing or damaged: this run was not tracked with MLflow (tracking.kind)"
        )
    delivery = Delivery(outbox)
    try:
        with sole_sender(run_dir):
            delivery = Delivery(Outbox.read(run_dir) or outbox)
            delivery.send_all()
    except Exception as problem:
        error = brief(problem)
    outbox = delivery.outbox
    return Synced(
        outbox.uri,
        outbox.experiment,
        outbox.run_id,
        delivery.rows,
        delivery.artifacts,
        *outbox.waiting(),
        error,
    )


def system_reading() -> dict[str, float]:
    """Load of this machine and memory of this process (GB, 1e9 bytes); percentages since the reading before."""
    import psutil

    memory = psutil.virtual_memory()
    return {
        "system/cpu_percent": psutil.cpu_percent(None),
        "system/memory_used_gb": (memory.total - memory.available) / 1e9,
        "system/process_memory_gb": psutil.Process().memory_info().rss / 1e9,
    }
