"""The tracker that feeds MLflow: the journal, and a thread that sends it.

Training only writes files. If the server is down, the thread retries later. What is left at the end
is sent at the next start of the run or by `sync`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coupalign.addresses import hide_secret
from coupalign.config.schema import MlflowTracking
from coupalign.errors import InputError
from coupalign.tracking.journal import Journal, Status, logger
from coupalign.tracking.mlflow import Delivery, Refusal, brief
from coupalign.tracking.outbox import STATE, Outbox, sole_sender, track_command, tracking_address

POLL_S = 2.0
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0
SYSTEM_EVERY_S = 10.0

# How long the end of a session waits for a server that completes no request …
CLOSE_WAIT_S = 15.0
# … for one that completes requests, or a local database that is being set up …
CLOSE_WAIT_WORKING_S = 120.0
# … for one that refused, which waiting does not change …
CLOSE_WAIT_REFUSED_S = 2.0
# … and after a failure, where the launcher may be about to start the session that sends the rest.
CLOSE_WAIT_FAILED_S = 2.0


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
        self._system_metrics = config.system_metrics
        self._system_due = 0.0
        if self._system_metrics:
            system_reading()  # percentages are since the previous reading

        # Continue the MLflow run of an earlier session, unless it was on another server or of the
        # directory that this one is a copy of.
        run_dir = journal.path.parent
        shown = hide_secret(uri)
        self._uri = uri
        earlier = Outbox.read(run_dir)
        if earlier is None and (run_dir / STATE).exists():
            logger.warning("%s is damaged; this run gets a new MLflow run", run_dir / STATE)
        self._outbox = earlier or Outbox(
            path=run_dir / STATE, uri=shown, experiment=config.experiment, run_name=run_name
        )
        self._settle()
        if (self._outbox.uri, self._outbox.experiment) != (shown, config.experiment):
            logger.warning(
                "MLflow: this run was sent to %s (%s) before; everything goes to %s (%s) now",
                hide_secret(self._outbox.uri),
                self._outbox.experiment,
                shown,
                config.experiment,
            )
            self._outbox.start_over(uri=shown, experiment=config.experiment)

        self._change(
            params={name: str(value) for name, value in params.items()},
            params_sent=False,
            run_name=run_name,
            status="RUNNING",
            ended=None,
            status_sent=False,
        )
        self.tag(tags)

        self._thread = Forwarder(self._outbox, uri)
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._journal.log(step, metrics)
        if self._system_metrics and time.monotonic() >= self._system_due:
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
                self._change(tags=merged, tags_sent=False)

    def close(self, status: Status = "FINISHED") -> None:
        if self._outbox.status != "RUNNING":
            return

        self._journal.close()
        self._change(status=status, ended=int(time.time() * 1000), status_sent=False)
        all_sent = self._thread.finish(hurry=status in ("FAILED", "KILLED"))
        if not all_sent:
            rows, artifacts = self._outbox.waiting()
            # One warning is enough for a server that was reported as failing.
            logger.log(
                logging.INFO if self._thread.is_failing else logging.WARNING,
                "MLflow (%s): %d rows and %d artifacts are not there yet; `%s` "
                "or the next start of this run sends them",
                self._outbox.uri,
                rows,
                artifacts,
                track_command(self._outbox.path.parent, self._uri),
            )

    def _settle(self) -> None:
        try:
            if found := self._outbox.settle():
                logger.warning("MLflow: %s", found)
        except OSError as error:
            logger.warning("%s: %s", self._outbox.path, error)

    def _change(self, **values: Any) -> None:
        try:
            self._outbox.change(**values)
        except OSError as error:
            logger.warning("%s: %s", self._outbox.path, error)


class Forwarder(threading.Thread):
    """Sends what the outbox and the journal hold, again and again until asked to finish."""

    def __init__(self, outbox: Outbox, uri: str) -> None:
        super().__init__(name="mlflow-forwarder", daemon=True)
        self._delivery = Delivery(outbox, uri)
        self._closing = threading.Event()
        self._given_up = False
        self._failing = False
        self._refused = False

    def run(self) -> None:
        pause = FIRST_PAUSE_S
        with ExitStack() as stack:
            locked = False
            while not self._given_up:
                # Read before sending: what is written until `finish` must be sent once more.
                last = self._closing.is_set()
                try:
                    if not locked:
                        stack.enter_context(sole_sender(self._delivery.run_dir))
                        locked = True
                    self._delivery.send_all(lambda: self._given_up)
                except Exception as error:
                    self._report_failure(error)
                    if last:
                        time.sleep(FIRST_PAUSE_S)
                    else:
                        self._closing.wait(pause)
                    pause = min(2 * pause, LONGEST_PAUSE_S)
                    continue

                self._report_recovery()
                pause = FIRST_PAUSE_S
                if last:
                    return
                self._closing.wait(POLL_S)

    def finish(self, hurry: bool = False) -> bool:
        """Ask the thread to send the rest and wait for a limited time.

        Returns whether all was sent.
        """
        start = time.monotonic()
        self._closing.set()
        while self.is_alive():
            self.join(0.1)
            if self.is_alive() and self._patience_is_over(start, hurry):
                self._given_up = True
                return False
        return True

    @property
    def is_failing(self) -> bool:
        """Whether the last attempt failed, which was reported."""
        return self._failing

    def _patience_is_over(self, start: float, hurry: bool) -> bool:
        now = time.monotonic()
        if hurry:
            return now > start + CLOSE_WAIT_FAILED_S
        if self._refused:
            return now > start + CLOSE_WAIT_REFUSED_S

        # A server that hangs or drips completes nothing. Only creating a local database takes long.
        idle = now - max(start, self._delivery.last_progress)
        is_local = self._delivery.uri.startswith("sqlite:")
        if idle > CLOSE_WAIT_S and (self._failing or not is_local):
            return True
        return now > start + CLOSE_WAIT_WORKING_S

    def _report_failure(self, error: Exception) -> None:
        self._refused = isinstance(error, Refusal)
        if not self._failing:
            problem = f"cannot be reached: {brief(error)}. Training continues; the numbers stay"
            remedy = "when it is back"
            if self._refused:
                problem = f"takes nothing: {error}. Training continues; the numbers stay"
                remedy = "once this is mended"
            logger.warning(
                "MLflow (%s) %s in the run directory and are sent %s.",
                self._delivery.outbox.uri,
                problem,
                remedy,
            )
        self._failing = True

    def _report_recovery(self) -> None:
        if self._failing:
            logger.warning("MLflow (%s) is back and has everything.", self._delivery.outbox.uri)
        self._failing = self._refused = False


@dataclass(frozen=True, kw_only=True)
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


def sync(run_dir: Path, uri: str | None = None) -> Synced:
    """Send what an earlier session left. `error` tells why a server did not answer.

    Only an address that the caller gives, or that is this user's default, gets anything: what the
    run directory itself names may be somebody else's choice.

    Args:
        uri: the tracking server. Default: MLFLOW_TRACKING_URI, else mlflow.db next to the run.

    Raises:
        InputError: the directory holds no run that was tracked with MLflow, or the run was sent to
            another address before and `uri` does not confirm one.
    """
    run_dir = Path(run_dir)
    outbox = Outbox.read(run_dir)
    if outbox is None:
        raise InputError(
            f"{run_dir / STATE} is missing or damaged: this run was not tracked with MLflow "
            "(tracking.kind)"
        )

    address = tracking_address(MlflowTracking(), run_dir) if uri is None else _given_address(uri)
    if uri is None and not is_own_address(outbox, address):
        raise InputError(not_sent(outbox))

    delivery = Delivery(outbox, address)
    error = None
    try:
        with sole_sender(run_dir):
            # Read again: another process may have sent something before this one had the lock.
            outbox = Outbox.read(run_dir) or outbox
            if found := outbox.settle():
                logger.warning("MLflow: %s", found)
            if outbox.uri != hide_secret(address):
                outbox.start_over(uri=hide_secret(address))
            delivery = Delivery(outbox, address)
            delivery.send_all()
    except Exception as problem:
        error = str(problem) if isinstance(problem, Refusal) else brief(problem)

    outbox = delivery.outbox
    rows_left, artifacts_left = outbox.waiting()
    return Synced(
        uri=outbox.uri,
        experiment=outbox.experiment,
        run_id=outbox.run_id,
        rows=delivery.rows,
        artifacts=delivery.artifacts,
        rows_left=rows_left,
        artifacts_left=artifacts_left,
        error=error,
    )


def is_own_address(outbox: Outbox, address: str) -> bool:
    """Whether a run was sent to `address`, which the user or the environment gives, before."""
    return hide_secret(outbox.uri) == hide_secret(address)


def not_sent(outbox: Outbox) -> str:
    """Say that the run's files name an address that the user has not given, and how to give it."""
    command = track_command(outbox.path.parent, outbox.uri)
    return (
        f"{outbox.path}: nothing was sent to {hide_secret(outbox.uri)!r:.200}, which only the "
        f"run's own files name. If it is your server, set MLFLOW_TRACKING_URI, or run `{command}`"
    )


def _given_address(uri: str) -> str:
    """Check an address of the command line; a path of SQLite becomes absolute."""
    return tracking_address(MlflowTracking.model_construct(uri=uri), Path())


def system_reading() -> dict[str, float]:
    """Read CPU load (percent since the last call) and memory in use (GB, 1e9 bytes)."""
    import psutil

    memory = psutil.virtual_memory()
    return {
        "system/cpu_percent": psutil.cpu_percent(None),
        "system/memory_used_gb": (memory.total - memory.available) / 1e9,
        "system/process_memory_gb": psutil.Process().memory_info().rss / 1e9,
    }
