"""Talk to an MLflow server.

Only this module imports mlflow, and only on use, because it takes seconds.

A request whose answer was lost is simply repeated. The key of a metric in MLflow's SQL stores is
(name, step, time, value), and the journal fixes all four (primary key `metric_pk` in
mlflow/store/tracking/dbmodels/models.py). A run is looked up by a tag of ours before it is created.
"""

from __future__ import annotations

import getpass
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from coupalign.addresses import hide_secret
from coupalign.errors import InputError
from coupalign.files import locked
from coupalign.tracking.journal import JOURNAL, logger, read_journal
from coupalign.tracking.outbox import Outbox, find_way_out

KEY_TAG = "coupalign.key"

# MLflow's limits (mlflow/utils/validation.py): items per request, then characters.
METRICS_PER_REQUEST = 1000
PARAMS_PER_REQUEST = 100
TAGS_PER_REQUEST = 100
PARAM_LENGTH = 6000
TAG_LENGTH = 8000
NAME_LENGTH = 250

_REFUSALS = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST"}
_LOGIN_REFUSED = {"PERMISSION_DENIED", "CUSTOMER_UNAUTHORIZED", "UNAUTHENTICATED"}
# MLflow alone would hold one request for about four minutes (7 retries), but we retry ourselves.
# Standard output is ours. The user's own values win.
_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}

# What one answer may take. The largest that we ask for is the list of a run's params.
ANSWER_BYTES = 32 << 20
ANSWER_S = 60.0
# The rows of a split have some megabytes.
DOWNLOAD_BYTES = 1 << 30

# Variables whose value may come back in the text of an error.
_SECRET_VARIABLES = ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")


class Refusal(RuntimeError):
    """The server answers, and what it says does not change by itself; the text has the remedy."""


class Delivery:
    """What one process sends, as the sole sender of its run.

    Raises whatever MLflow raises. It is always right to repeat a call.
    """

    def __init__(self, outbox: Outbox, uri: str) -> None:
        self.outbox = outbox
        self.uri = uri
        self.run_dir = outbox.path.parent
        # When a request was last completed, by time.monotonic().
        self.last_progress = 0.0
        self.rows = 0
        self.artifacts = 0
        self._client: Any = None
        self._refused: set[str] = set()

    def send_all(self, stopped: Callable[[], bool] = lambda: False) -> None:
        """Send everything that the server lacks.

        Stops early, between requests, when `stopped()`.
        """
        try:
            if self._client is None:
                self._client = self._connect()
                self._note_progress()
            self._send_params()
            while not stopped() and self._send_rows():
                self._note_progress()
            while not stopped() and self._send_artifact():
                self._note_progress()
            if not stopped():
                self._send_tags()
                self._send_status()
        except Exception as error:
            self._client = None
            if refusal := _refusal(error):
                raise refusal from error
            raise

    def _note_progress(self) -> None:
        self.last_progress = time.monotonic()

    def _connect(self) -> Any:
        """Open the server, the experiment and the run. Creates what is missing."""
        client = _client(self.uri)
        from mlflow.exceptions import MlflowException

        # The run of an earlier session, if the server still has it.
        if self.outbox.run_id is not None:
            try:
                run = self._require_active(client)
                # The id alone is no proof: tracking.json may come from somebody else.
                if run.data.tags.get(KEY_TAG) == self.outbox.key:
                    return client
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
            logger.warning(
                "MLflow (%s) has no run %s of this directory; it gets a new one",
                self.outbox.uri,
                self.outbox.run_id,
            )
            self.outbox.start_over()

        # A run that was created although its answer was lost.
        experiment_id = _experiment(client, self.outbox)
        same_key = f"tags.`{KEY_TAG}` = '{self.outbox.key}'"
        runs = client.search_runs([experiment_id], filter_string=same_key, max_results=1)
        if runs:
            self.outbox.change(run_id=runs[0].info.run_id)
            return client

        journal = read_journal(self.run_dir / JOURNAL)
        start = next((measurement.time for measurement, _ in journal), time.time())
        tags = {KEY_TAG: self.outbox.key, "mlflow.user": _user(), "mlflow.source.name": "coupalign"}
        run = client.create_run(
            experiment_id,
            start_time=int(start * 1000),
            tags=tags,
            run_name=self.outbox.run_name,
        )
        self.outbox.change(run_id=run.info.run_id)
        return client

    def _require_active(self, client: Any) -> Any:
        """Get the MLflow run, which must not be deleted, nor its experiment."""
        run = client.get_run(self.outbox.run_id)
        if run.info.lifecycle_stage != "active":
            raise Refusal(
                f"run {self.outbox.run_id} was deleted there; restore it "
                f"(mlflow runs restore --run-id {self.outbox.run_id}), or delete {self.outbox.path}"
            )
        experiment = client.get_experiment(run.info.experiment_id)
        _require_active_experiment(experiment)
        return run

    def _send_params(self) -> None:
        """Send the configuration. Params cannot change in MLflow, so a change becomes a tag."""
        if self.outbox.params_sent:
            return
        from mlflow.entities import Param, RunTag

        wanted = {_name(name): value[:PARAM_LENGTH] for name, value in self.outbox.params.items()}
        on_server = self._client.get_run(self.outbox.run_id).data.params

        params, tags = [], []
        for name, value in wanted.items():
            if name not in on_server:
                params.append(Param(name, value))
            elif on_server[name] != value:
                change = f"{on_server[name]} -> {value}"
                tags.append(RunTag(f"changed.{name}"[:NAME_LENGTH], change[:TAG_LENGTH]))

        for chunk in _chunks(params, PARAMS_PER_REQUEST):
            self._client.log_batch(self.outbox.run_id, params=chunk, synchronous=True)
        for chunk in _chunks(tags, TAGS_PER_REQUEST):
            self._client.log_batch(self.outbox.run_id, tags=chunk, synchronous=True)
        self.outbox.change(params_sent=True)

    def _send_rows(self) -> bool:
        """Send rows of the journal that fill one request. Returns whether there were any."""
        from mlflow.entities import Metric

        # The cursor is of another file if it points past the end.
        journal = self.run_dir / JOURNAL
        if journal.exists() and journal.stat().st_size < self.outbox.sent:
            self.outbox.change(sent=0)

        metrics: list[Any] = []
        rows, end = 0, self.outbox.sent
        for measurement, next_byte in read_journal(journal, self.outbox.sent):
            if metrics and len(metrics) + len(measurement.metrics) > METRICS_PER_REQUEST:
                break
            milliseconds = int(measurement.time * 1000)
            metrics += [
                Metric(_name(name), value, milliseconds, measurement.step)
                for name, value in measurement.metrics.items()
            ]
            rows, end = rows + 1, next_byte

        for chunk in _chunks(metrics, METRICS_PER_REQUEST):
            self._send_metrics(chunk)
        if rows:
            self.outbox.change(sent=end)
            self.rows += rows
        return rows > 0

    def _send_metrics(self, metrics: list[Any]) -> None:
        """Send metrics.

        One that the server refuses is named and skipped, so the rest gets through.
        """
        from mlflow.exceptions import MlflowException

        try:
            self._client.log_batch(self.outbox.run_id, metrics=metrics, synchronous=True)
        except MlflowException as error:
            if error.error_code not in _REFUSALS:
                raise
            self._require_active(self._client)

            # Halve the request until the refused metric is alone.
            if len(metrics) > 1:
                middle = len(metrics) // 2
                self._send_metrics(metrics[:middle])
                self._send_metrics(metrics[middle:])
            elif metrics[0].key not in self._refused:
                self._refused.add(metrics[0].key)
                logger.warning(
                    "MLflow refuses the metric %r: %s; it stays in the journal only",
                    metrics[0].key,
                    brief(error),
                )

    def _send_artifact(self) -> bool:
        """Send one artifact. Returns whether there was one to send."""
        with self.outbox.lock:
            artifact = self._next_artifact()
            if artifact is None:
                return False
            asked = artifact["asked"]

        self.artifacts += self._send_path(self.run_dir / artifact["path"], artifact["folder"])
        with self.outbox.lock:
            artifact["sent"] = asked
            self.outbox.change()
        return True

    def _send_path(self, path: Path, folder: str) -> bool:
        """Send a file or folder of the run. Returns whether it was there and may be sent."""
        if not path.exists():
            logger.warning("MLflow: the artifact %s was removed before it was sent", path)
            return False
        if problem := find_way_out(self.run_dir, path, folder):
            logger.warning("MLflow: the artifact %s is not sent: %s", path, problem)
            return False

        if path.is_dir():
            self._client.log_artifacts(self.outbox.run_id, str(path), folder or path.name)
        else:
            self._client.log_artifact(self.outbox.run_id, str(path), folder or None)
        return True

    def _next_artifact(self) -> dict[str, Any] | None:
        for artifact in self.outbox.artifacts:
            if artifact["sent"] < artifact["asked"]:
                return artifact
        return None

    def _send_tags(self) -> None:
        from mlflow.entities import RunTag

        with self.outbox.lock:
            if self.outbox.tags_sent:
                return
            tags = dict(self.outbox.tags)

        run_tags = [RunTag(_name(name), value[:TAG_LENGTH]) for name, value in tags.items()]
        for chunk in _chunks(run_tags, TAGS_PER_REQUEST):
            self._client.log_batch(self.outbox.run_id, tags=chunk, synchronous=True)

        # A tag may have been set while these were sent.
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


def _refusal(error: Exception) -> Refusal | None:
    """Recognize an error that waiting does not mend, and name the remedy."""
    if isinstance(error, ImportError):
        return Refusal(
            f"this address needs the Python package {error.name!r}: pip install {error.name}"
        )
    if getattr(error, "error_code", None) in _LOGIN_REFUSED:
        return Refusal(
            f"the login was refused ({brief(error)}); set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        )
    return None


def fetch_artifact(uri: str, run: str, path: str, folder: Path) -> Path:
    """Download an artifact of the run with that id or name. Returns the file in `folder`.

    Raises:
        InputError: the server does not answer, it has no such run or several of that name, or the
            run has no such artifact.
    """
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        raise InputError(
            f"{run}: neither a run directory nor a run on a tracking server "
            f"({uri} does not exist); name the server with --tracking-uri or MLFLOW_TRACKING_URI"
        )
    from mlflow.exceptions import MlflowException

    shown = hide_secret(uri)
    try:
        client = _client(uri)
        run_id = _run_id(client, shown, run)
        parent = path.rpartition("/")[0]
        paths = [artifact.path for artifact in client.list_artifacts(run_id, parent or None)]
        if path not in paths:
            listing = ", ".join(paths) or "none"
            raise InputError(f"run {run} on {shown} has no artifact {path}; it has {listing} there")
        return Path(client.download_artifacts(run_id, path, str(folder)))
    except (MlflowException, OSError) as error:
        raise InputError(
            f"run {run}: {path} cannot be fetched from {shown}: {brief(error)}"
        ) from error


def _run_id(client: Any, uri: str, run: str) -> str:
    """Find the id of a run by its id or its name."""
    if re.fullmatch(r"[0-9a-f]{32}", run):
        return run

    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    quote = '"' if "'" in run else "'"
    same_name = f"attributes.run_name = {quote}{run}{quote}"
    runs = client.search_runs(experiments, filter_string=same_name, max_results=10)

    if not runs:
        raise InputError(f"{run}: neither a run directory nor the name of a run on {uri}")
    if len(runs) > 1:
        ids = ", ".join(one.info.run_id for one in runs)
        raise InputError(
            f"{run}: {len(runs)} runs on {uri} are called that; name one by its id: {ids}"
        )
    return runs[0].info.run_id


def _client(uri: str) -> Any:
    """Open a client, with our defaults where the user set none."""
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    # The second one repeats each failed attempt as a warning; the last attempt is our error.
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.ERROR)
    _bound_answers()
    if uri.startswith("sqlite:///"):
        _create_database(Path(uri.removeprefix("sqlite:///")))
    return MlflowClient(tracking_uri=uri)


def _bound_answers() -> None:
    """Make the HTTP sessions of MLflow read answers of a limited size, in a limited time.

    MLflow itself reads an answer for as long as bytes arrive.
    """
    from mlflow.utils import request_utils
    from requests.exceptions import ConnectionError, ReadTimeout

    plain = request_utils.TCPKeepAliveHTTPAdapter
    if plain.__name__ == "BoundedAdapter":
        return

    class BoundedAdapter(plain):
        def send(self, request: Any, stream: bool = False, **options: Any) -> Any:
            response = super().send(request, stream=stream, **options)
            if stream:
                # A download, which MLflow writes to a file.
                pieces = response.iter_content
                response.iter_content = lambda *args, **kwargs: _at_most(
                    DOWNLOAD_BYTES, pieces(*args, **kwargs)
                )
                return response

            content, deadline = bytearray(), time.monotonic() + ANSWER_S
            while chunk := response.raw.read1(1 << 16, decode_content=True):
                content += chunk
                problem: Exception | None = None
                if len(content) > ANSWER_BYTES:
                    problem = ConnectionError(f"an answer of more than {ANSWER_BYTES} bytes")
                elif time.monotonic() > deadline:
                    problem = ReadTimeout(f"an answer that takes more than {ANSWER_S:.0f} s")
                if problem:
                    # The error's traceback would keep the bytes.
                    content.clear()
                    response.close()
                    raise problem
            response.raw.release_conn()
            response._content, response._content_consumed = bytes(content), True
            return response

    request_utils.TCPKeepAliveHTTPAdapter = BoundedAdapter


def _at_most(limit: int, pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Pass the pieces of a download on.

    Raises:
        OSError: they are more than `limit` bytes together.
    """
    for piece in pieces:
        limit -= len(piece)
        if limit < 0:
            raise OSError("the file that the server sends does not end where a file of ours would")
        yield piece


def _create_database(file: Path) -> None:
    """Create MLflow's SQLite file if it is missing, whole or not at all.

    MLflow fills it with some seconds of migrations. A kill in the middle, or two runs at once,
    would leave a database that no later start can open ("table _alembic_tmp_… already exists").
    """
    if file.exists():
        return
    from mlflow import MlflowClient

    file.parent.mkdir(parents=True, exist_ok=True)
    lock = file.with_name(f".{file.name}.lock")
    with locked(lock, f"{file.name} is being created", "Wait for it", wait=True):
        if file.exists():
            return

        for leftover in file.parent.glob(f".{file.name}.*.partial*"):
            leftover.unlink()
        partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
        try:
            MlflowClient(tracking_uri=f"sqlite:///{partial}").search_experiments(max_results=1)
            os.replace(partial, file)
        finally:
            partial.unlink(missing_ok=True)


def _experiment(client: Any, outbox: Outbox) -> str:
    """Find the id of the experiment, which is created if it is missing."""
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(outbox.experiment)
    if experiment is not None:
        _require_active_experiment(experiment)
        return experiment.experiment_id

    try:
        return client.create_experiment(
            outbox.experiment, artifact_location=_artifact_location(outbox)
        )
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        return client.get_experiment_by_name(outbox.experiment).experiment_id


def _require_active_experiment(experiment: Any) -> None:
    """Refuse a deleted experiment, which keeps its name and takes no runs."""
    if experiment.lifecycle_stage != "active":
        raise Refusal(
            f"the experiment {experiment.name!r:.80} was deleted there; restore it (mlflow "
            f"experiments restore --experiment-id {experiment.experiment_id}), "
            "or set another tracking.experiment"
        )


def _artifact_location(outbox: Outbox) -> str | None:
    """Choose where artifacts go: a server decides itself; without one, next to the database.

    MLflow's own choice would be a folder below the working directory.
    """
    if urlsplit(outbox.uri).scheme in ("http", "https", ""):
        return None

    neighbor = outbox.path.resolve().parent
    if outbox.uri.startswith("sqlite:///"):
        neighbor = Path(outbox.uri.removeprefix("sqlite:///"))
    folder = re.sub(r"[^\w.-]", "_", outbox.experiment)
    return (neighbor.parent / "mlartifacts" / folder).as_uri()


def _chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    """Cut a list into pieces that one request may hold."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _name(name: str) -> str:
    """Turn a name into one that MLflow accepts: letters, digits and _-. :/

    "P@0.5" becomes "P_at_0.5".
    """
    return re.sub(r"[^/\w.\- :]", "_", name.replace("@", "_at_"))[:NAME_LENGTH]


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"


def brief(error: Exception) -> str:
    """Return the first line of an error, cut to a readable length."""
    secrets = [os.environ.get(name) for name in _SECRET_VARIABLES]
    first = hide_secret(str(error), *secrets).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first[:200]}"
