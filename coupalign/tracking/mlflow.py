"""One conversation with an MLflow server; the only importer of mlflow, and only when it is used (it takes seconds).

A request whose answer was lost is simply repeated: a metric in MLflow's SQL stores is a set of (name, step, time, value)
and the journal fixes all four (primary key `metric_pk` in mlflow/store/tracking/dbmodels/models.py); a run is looked up
by a tag of ours before it is created.
"""

from __future__ import annotations

import fcntl
import getpass
import logging
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from coupalign.errors import InputError
from coupalign.tracking.journal import JOURNAL, logger, read_journal
from coupalign.tracking.outbox import Outbox

KEY_TAG = "coupalign.key"
METRICS_A_REQUEST, WORDS_A_REQUEST, PARAM_LENGTH, TAG_LENGTH, NAME_LENGTH = (
    1000,
    100,
    6000,
    8000,
    250,
)
"""MLflow's limits (mlflow/utils/validation.py): metrics, params or tags a request; characters of a value, of a name."""
_REFUSALS = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST"}
_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
"""MLflow alone would hold one request for about four minutes (7 retries); we retry ourselves. Standard output is ours.
The user's own values win."""


class Delivery:
    """What one process sends, as the sole sender of its run. Raises whatever MLflow raises; repeating it is always right."""

    def __init__(self, outbox: Outbox) -> None:
        self.outbox = outbox
        self.run_dir = outbox.path.parent
        self.rows = 0
        self.artifacts = 0
        self._client: Any = None
        self._refused: set[str] = set()

    def send_all(self, stopped: Callable[[], bool] = lambda: False) -> None:
        """Send everything that is not there yet; stops early, between requests, when `stopped()`."""
        try:
            if self._client is None:
                self._client = self._connect()
            self._send_params()
            while not stopped() and self._send_rows():
                pass
            while not stopped() and self._send_artifact():
                pass
            if not stopped():
                self._send_tags()
                self._send_status()
        except Exception:
            self._client = None
            raise

    def _connect(self) -> Any:
        """Open the server, the experiment and the run; create what is missing."""
        client = _client(self.outbox.uri)
        from mlflow.exceptions import MlflowException

        if self.outbox.run_id is not None:
            try:
                self._require_active(client)
                return client
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
            logger.warning(
                "MLflow (%s) no longer has run %s; it gets a new one",
                self.outbox.uri,
                self.outbox.run_id,
            )
            self.outbox.start_over()
        experiment_id = _experiment(client, self.outbox)
        found = client.search_runs(
            [experiment_id], filter_string=f"tags.`{KEY_TAG}` = '{self.outbox.key}'", max_results=1
        )
        if found:
            self.outbox.change(run_id=found[0].info.run_id)
            return client
        first = next((row.time for row, _ in read_journal(self.run_dir / JOURNAL)), time.time())
        tags = {KEY_TAG: self.outbox.key, "mlflow.user": _user(), "mlflow.source.name": "coupalign"}
        run = client.create_run(
            experiment_id, start_time=int(first * 1000), tags=tags, run_name=self.outbox.run_name
        )
        self.outbox.change(run_id=run.info.run_id)
        return client

    def _require_active(self, client: Any) -> None:
        run = client.get_run(self.outbox.run_id)
        if run.info.lifecycle_stage != "active":
            raise RuntimeError(
                f"run {self.outbox.run_id} was deleted there; restore it, or delete {self.outbox.path}"
            )

    def _send_params(self) -> None:
        """Params of a run cannot change in MLflow: what a resumed run changed becomes a tag `changed.<name>`."""
        if self.outbox.params_sent:
            return
        from mlflow.entities import Param, RunTag

        wanted = {_name(name): value[:PARAM_LENGTH] for name, value in self.outbox.params.items()}
        there = self._client.get_run(self.outbox.run_id).data.params
        params = [Param(name, value) for name, value in wanted.items() if name not in there]
        tags = [
            RunTag(f"changed.{name}"[:NAME_LENGTH], f"{there[name]} -> {value}"[:TAG_LENGTH])
            for name, value in wanted.items()
            if name in there and there[name] != value
        ]
        for start in range(0, len(params), WORDS_A_REQUEST):
            self._client.log_batch(
                self.outbox.run_id, params=params[start : start + WORDS_A_REQUEST], synchronous=True
            )
        for start in range(0, len(tags), WORDS_A_REQUEST):
            self._client.log_batch(
                self.outbox.run_id, tags=tags[start : start + WORDS_A_REQUEST], synchronous=True
            )
        self.outbox.change(params_sent=True)

    def _send_rows(self) -> bool:
        """Send the next request's worth of rows; whether there were any."""
        from mlflow.entities import Metric

        journal = self.run_dir / JOURNAL
        if journal.exists() and journal.stat().st_size < self.outbox.sent:
            self.outbox.change(sent=0)
        metrics, count, end = [], 0, self.outbox.sent
        for row, behind in read_journal(journal, self.outbox.sent):
            if metrics and len(metrics) + len(row.metrics) > METRICS_A_REQUEST:
                break
            metrics += [
                Metric(_name(name), value, int(row.time * 1000), row.step)
                for name, value in row.metrics.items()
            ]
            count, end = count + 1, behind
        for start in range(0, len(metrics), METRICS_A_REQUEST):
            self._send_metrics(metrics[start : start + METRICS_A_REQUEST])
        if count:
            self.outbox.change(sent=end)
            self.rows += count
        return count > 0

    def _send_metrics(self, metrics: list[Any]) -> None:
        """Send metrics; what the server refuses by itself is named and left out, so that it does not hold up the rest."""
        from mlflow.exceptions import MlflowException

        try:
            self._client.log_batch(self.outbox.run_id, metrics=metrics, synchronous=True)
        except MlflowException as error:
            if error.error_code not in _REFUSALS:
                raise
            self._require_active(self._client)
            if len(metrics) > 1:
                self._send_metrics(metrics[: len(metrics) // 2])
                self._send_metrics(metrics[len(metrics) // 2 :])
            elif metrics[0].key not in self._refused:
                self._refused.add(metrics[0].key)
                logger.warning(
                    "MLflow refuses the metric %r: %s; it stays in the journal only",
                    metrics[0].key,
                    brief(error),
                )

    def _send_artifact(self) -> bool:
        """Send one artifact; whether there was one to send."""
        with self.outbox.lock:
            artifact = next(
                (
                    artifact
                    for artifact in self.outbox.artifacts
                    if artifact["sent"] < artifact["asked"]
                ),
                None,
            )
            asked = artifact["asked"] if artifact else 0
        if artifact is None:
            return False
        path, folder = self.run_dir / artifact["path"], artifact["folder"]
        if path.is_dir():
            self._client.log_artifacts(self.outbox.run_id, str(path), folder or path.name)
        elif path.exists():
            self._client.log_artifact(self.outbox.run_id, str(path), folder or None)
        else:
            logger.warning("MLflow: the artifact %s is gone before it was sent", path)
        with self.outbox.lock:
            artifact["sent"] = asked
            self.outbox.change()
        self.artifacts += 1
        return True

    def _send_tags(self) -> None:
        from mlflow.entities import RunTag

        with self.outbox.lock:
            if self.outbox.tags_sent:
                return
            tags = dict(self.outbox.tags)
        words = [RunTag(_name(name), value[:TAG_LENGTH]) for name, value in tags.items()]
        for start in range(0, len(words), WORDS_A_REQUEST):
            self._client.log_batch(
                self.outbox.run_id, tags=words[start : start + WORDS_A_REQUEST], synchronous=True
            )
        with self.outbox.lock:
            self.outbox.change(tags_sent=tags == self.outbox.tags)

    def _send_status(self) -> None:
        with self.outbox.lock:
            status, ended, sent = self.outbox.status, self.outbox.ended, self.outbox.status_sent
        if sent:
            return
        if ended is None:
            self._client.update_run(self.outbox.run_id, status=status)
        else:
            self._client.set_terminated(self.outbox.run_id, status, ended)
        with self.outbox.lock:
            self.outbox.change(status_sent=status == self.outbox.status)


def fetch_artifact(uri: str, run: str, path: str, folder: Path) -> Path:
    """Download an artifact of the run with that id or name into `folder`; its place there.

    Raises:
        InputError: the server does not answer, there is no such run or more than one of that name, or it has no such artifact.
    """
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        raise InputError(
            f"{run}: neither a run directory nor a run of a tracking server ({uri} does not exist); name the server with "
            "--tracking-uri or MLFLOW_TRACKING_URI"
        )
    from mlflow.exceptions import MlflowException

    try:
        client = _client(uri)
        run_id = _run_id(client, uri, run)
        parent = path.rpartition("/")[0]
        there = [found.path for found in client.list_artifacts(run_id, parent or None)]
        if path not in there:
            raise InputError(
                f"run {run} on {uri} has no artifact {path}; it has {', '.join(there) or 'none'} there"
            )
        return Path(client.download_artifacts(run_id, path, str(folder)))
    except (MlflowException, OSError) as error:
        raise InputError(
            f"run {run}: {path} cannot be fetched from {uri}: {brief(error)}"
        ) from error


def _run_id(client: Any, uri: str, run: str) -> str:
    if re.fullmatch(r"[0-9a-f]{32}", run):
        return run
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    quote = '"' if "'" in run else "'"
    found = client.search_runs(
        experiments, filter_string=f"attributes.run_name = {quote}{run}{quote}", max_results=10
    )
    if not found:
        raise InputError(f"{run}: neither a run directory nor the name of a run on {uri}")
    if len(found) > 1:
        raise InputError(
            f"{run}: {len(found)} runs on {uri} are called that; name one by its id: "
            f"{', '.join(one.info.run_id for one in found)}"
        )
    return found[0].info.run_id


def _client(uri: str) -> Any:
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if uri.startswith("sqlite:///"):
        _create_database(Path(uri.removeprefix("sqlite:///")))
    return MlflowClient(tracking_uri=uri)


def _create_database(file: Path) -> None:
    """Create MLflow's SQLite file where it is missing, whole or not at all.

    MLflow fills it in some seconds of migrations; a kill in the middle, or two runs at once, would leave a database
    that no later start can open ("table _alembic_tmp_… already exists").
    """
    if file.exists():
        return
    from mlflow import MlflowClient

    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file.with_name(f".{file.name}.lock"), "w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        if file.exists():
            return
        for left in file.parent.glob(f".{file.name}.*.partial*"):
            left.unlink()
        beside = file.with_name(f".{file.name}.{os.getpid()}.partial")
        try:
            MlflowClient(tracking_uri=f"sqlite:///{beside}").search_experiments(max_results=1)
            os.replace(beside, file)
        finally:
            beside.unlink(missing_ok=True)


def _experiment(client: Any, outbox: Outbox) -> str:
    """The id of the experiment, created where it is missing.

    Without a server MLflow would put artifacts below the working directory: there they go beside the database.
    """
    from mlflow.exceptions import MlflowException

    if (experiment := client.get_experiment_by_name(outbox.experiment)) is not None:
        return experiment.experiment_id
    location = None
    if urlsplit(outbox.uri).scheme not in ("http", "https", ""):
        sqlite = outbox.uri.startswith("sqlite:///")
        neighbor = (
            Path(outbox.uri.removeprefix("sqlite:///")) if sqlite else outbox.path.resolve().parent
        )
        location = (
            neighbor.parent / "mlartifacts" / re.sub(r"[^\w.-]", "_", outbox.experiment)
        ).as_uri()
    try:
        return client.create_experiment(outbox.experiment, artifact_location=location)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        return client.get_experiment_by_name(outbox.experiment).experiment_id


def _name(name: str) -> str:
    """A name that MLflow takes: letters, digits and _-. :/ (so "P@0.5" becomes "P_at_0.5")."""
    return re.sub(r"[^/\w.\- :]", "_", name.replace("@", "_at_"))[:NAME_LENGTH]


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"


def brief(error: Exception) -> str:
    """The first line of an error, cut to a readable length."""
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first[:200]}"
