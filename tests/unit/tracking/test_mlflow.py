"""Sending the journal to MLflow: a real server dies, hangs, loses its answers and comes back."""

from __future__ import annotations

import http.server
import logging
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from coupalign.config.schema import MlflowTracking
from coupalign.errors import InputError
from coupalign.tracking import Tracker, forwarder, mlflow, open_tracker, sync
from coupalign.tracking.outbox import STATE, Outbox

if TYPE_CHECKING:
    from mlflow import MlflowClient

pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A real `mlflow server` with one port and one database. It can be killed and restarted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        environment = os.environ | {
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        options = {
            "--host": "127.0.0.1",
            "--port": str(self.port),
            "--workers": "1",
            "--backend-store-uri": f"sqlite:///{self.folder}/server.db",
            "--artifacts-destination": str(self.folder / "artifacts"),
        }
        command = [sys.executable, "-m", "mlflow", "server"]
        for option, value in options.items():
            command += [option, value]

        log_file = self.folder / "server.log"
        with open(log_file, "ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True
            )

        deadline = time.monotonic() + 180
        while not self.answers():
            assert self.process.poll() is None, log_file.read_text()[-2000:]
            assert time.monotonic() < deadline, log_file.read_text()[-2000:]
            time.sleep(0.2)

    def answers(self) -> bool:
        try:
            return urllib.request.urlopen(f"{self.uri}/health", timeout=5).status == 200
        except OSError:
            return False

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Proxy:
    """A TCP proxy in front of the server.

    Its mode is "pass", "hang" (read nothing, answer nothing) or "lose" (deliver the request, drop
    the answer). `lost` counts the dropped answers.
    """

    def __init__(self, server: Server) -> None:
        self.server = server
        self.mode = "pass"
        self.lost = 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.uri = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        if self.mode == "hang":
            self._hold(client)
            return

        with client, socket.create_connection(("127.0.0.1", self.server.port)) as server:
            threading.Thread(target=_pump, args=(client, server), daemon=True).start()
            while data := server.recv(65536):
                if self.mode == "lose":
                    self.lost += 1
                    client.shutdown(socket.SHUT_RDWR)
                    return
                client.sendall(data)

    def _hold(self, client: socket.socket) -> None:
        with client:
            while self.mode == "hang":
                time.sleep(0.05)


def _pump(source: socket.socket, sink: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            sink.sendall(data)
    except OSError:
        pass


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    proxy = Proxy(server)
    yield proxy
    proxy.mode = "pass"
    proxy.listener.close()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten our pauses, so that the tests wait for servers only."""
    monkeypatch.setattr(forwarder, "POLL_S", 0.1)
    monkeypatch.setattr(forwarder, "FIRST_PAUSE_S", 0.2)
    monkeypatch.setattr(forwarder, "LONGEST_PAUSE_S", 1.0)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def client_of(uri: str) -> MlflowClient:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def points_on_server(uri: str, run_id: str, name: str) -> list[tuple[int, float]]:
    """The (step, value) pairs of a metric on the server, in order."""
    history = client_of(uri).get_metric_history(run_id, name)
    return sorted((metric.step, metric.value) for metric in history)


def run_id_of(run_dir: Path) -> str | None:
    return Outbox.read(run_dir).run_id


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "waited two minutes"
        time.sleep(0.05)


def log_losses(tracker: Tracker, first: int, last: int, name: str = "loss") -> None:
    """Log a known loss at each step from `first` to `last`."""
    for step in range(first, last + 1):
        tracker.log(step, {name: step / 7})


def losses_until(last: int) -> list[tuple[int, float]]:
    """What `log_losses(tracker, 1, last)` should leave on the server."""
    return [(step, step / 7) for step in range(1, last + 1)]


def test_server_killed_mid_run_loses_nothing_and_delays_nothing(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = MlflowTracking(uri=server.uri, experiment="killed")
    run_dir = tmp_path / "run"

    with open_tracker(config, run_dir, "killed", rank=0, params={"a.b": 1}) as tracker:
        # Wait until the first rows have arrived, then kill the server.
        log_losses(tracker, 1, 100, "train/loss")
        wait_for(lambda: (Outbox.read(run_dir) or Outbox).sent > 0)
        server.kill()

        # Training continues without it.
        log_losses(tracker, 101, 1300, "train/loss")
        (run_dir / "score.json").write_text("{}")
        tracker.artifact(run_dir / "score.json", "scores")
        wait_for(lambda: "cannot be reached" in caplog.text)
        time.sleep(1.5)

        server.start()
        log_losses(tracker, 1301, 1400, "train/loss")

    run_id = run_id_of(run_dir)
    client = client_of(server.uri)
    assert points_on_server(server.uri, run_id, "train/loss") == losses_until(1400)
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"a.b": "1"}
    artifacts = [file.path for file in client.list_artifacts(run_id, "scores")]
    assert artifacts == ["scores/score.json"]
    assert caplog.text.count("cannot be reached") == 1
    assert caplog.text.count("is back and has everything") == 1


def test_lost_answers_create_no_second_run_and_no_second_point(
    server: Server, proxy: Proxy, tmp_path: Path
) -> None:
    config = MlflowTracking(uri=proxy.uri, experiment="lossy")
    run_dir = tmp_path / "run"
    params, tags = {"a": 1}, {"b": "c"}

    with open_tracker(config, run_dir, "lossy", rank=0, params=params, tags=tags) as tracker:
        # Lose the answers to the requests that create the run …
        tracker.log(1, {"loss": 1 / 7})
        proxy.mode = "lose"
        wait_for(lambda: proxy.lost >= 3)
        proxy.mode = "pass"
        wait_for(lambda: run_id_of(run_dir) is not None and Outbox.read(run_dir).params_sent)

        # … and those to the requests that send rows.
        proxy.mode = "lose"
        proxy.lost = 0
        log_losses(tracker, 2, 2500)
        wait_for(lambda: proxy.lost >= 3)
        proxy.mode = "pass"

    client = client_of(server.uri)
    experiment = client.get_experiment_by_name("lossy")
    runs = client.search_runs([experiment.experiment_id])
    assert [run.info.run_id for run in runs] == [run_id_of(run_dir)]
    assert points_on_server(server.uri, runs[0].info.run_id, "loss") == losses_until(2500)
    assert runs[0].data.tags["b"] == "c"


def test_session_delivered_twice_leaves_one_run_and_single_points(
    server: Server, proxy: Proxy, tmp_path: Path
) -> None:
    """Every request is sent twice: run creation, params, each batch, tags and status."""
    config = MlflowTracking(uri=proxy.uri, experiment="echo")
    run_dir = tmp_path / "run"
    with open_tracker(config, run_dir, "echo", rank=0, params={"a": 1}) as tracker:
        log_losses(tracker, 1, 1500)
    run_id = run_id_of(run_dir)

    # Forget that anything was delivered.
    outbox = Outbox.read(run_dir)
    outbox.change(run_id=None, sent=0, params_sent=False, tags_sent=False, status_sent=False)
    result = sync(run_dir, proxy.uri)

    assert result.error is None
    assert result.run_id == run_id
    assert (result.rows, result.rows_left) == (1500, 0)
    assert points_on_server(server.uri, run_id, "loss") == losses_until(1500)


def test_sync_sends_the_run_of_a_session_whose_server_never_answered(
    server: Server,
    proxy: Proxy,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.INFO, "coupalign.tracking")
    monkeypatch.setattr(forwarder, "CLOSE_WAIT_S", 1.0)
    monkeypatch.setattr(forwarder, "CLOSE_WAIT_WORKING_S", 2.0)
    config = MlflowTracking(uri=proxy.uri, experiment="late")
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text("a: 1\n")

    # The server hangs during the whole session.
    proxy.mode = "hang"
    with open_tracker(config, run_dir, "late", rank=0) as tracker:
        log_losses(tracker, 1, 50)
        tracker.artifact(run_dir / "config.yaml")
    assert "50 rows and 1 artifacts are not there yet" in caplog.text
    assert f"coupalign track {run_dir} --tracking-uri {proxy.uri}" in caplog.text
    assert run_id_of(run_dir) is None

    # It answers again: sync sends everything …
    proxy.mode = "pass"
    with pytest.raises(InputError, match=f"nothing was sent to '{proxy.uri}'"):
        sync(run_dir)
    result = sync(run_dir, proxy.uri)
    assert result.error is None
    assert (result.rows, result.rows_left) == (50, 0)
    assert (result.artifacts, result.artifacts_left) == (1, 0)
    assert points_on_server(server.uri, result.run_id, "loss") == losses_until(50)
    assert client_of(server.uri).get_run(result.run_id).info.status == "FINISHED"

    # … once.
    again = sync(run_dir, proxy.uri)
    assert (again.run_id, again.rows, again.artifacts) == (result.run_id, 0, 0)


# A session in a process of its own. With 40 steps it waits to be killed after logging.
SESSION = """
import sys, time
from pathlib import Path
from coupalign.config.schema import MlflowTracking
from coupalign.tracking import open_tracker

uri, run_dir, last = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
config = MlflowTracking(uri=uri or None, experiment="shared")
with open_tracker(config, run_dir, run_dir.name, rank=0) as tracker:
    for step in range(1, last + 1):
        tracker.log(step, {"loss": step / 7})
    if last == 40:
        print("logged", flush=True)
        time.sleep(1000)
"""


def start_session(uri: str, run_dir: Path, last: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SESSION, uri, str(run_dir), str(last)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_session_after_a_kill_continues_the_same_run(server: Server, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    killed = start_session(server.uri, run_dir, 40)
    assert killed.stdout.readline() == "logged\n"
    wait_for(lambda: (run_dir / "tracking.json").exists() and Outbox.read(run_dir).sent > 0)

    # While the session lives, nobody else sends.
    busy = sync(run_dir, server.uri)
    assert "another process" in busy.error
    assert busy.rows == 0

    killed.kill()
    killed.wait()
    first_run_id = run_id_of(run_dir)
    config = MlflowTracking(uri=server.uri, experiment="shared")
    with open_tracker(config, run_dir, "run", rank=0) as tracker:
        log_losses(tracker, 31, 80)

    assert run_id_of(run_dir) == first_run_id
    assert points_on_server(server.uri, first_run_id, "loss") == losses_until(80)
    assert client_of(server.uri).get_run(first_run_id).info.status == "FINISHED"


def test_runs_without_a_server_share_a_database_although_one_died_creating_it(
    tmp_path: Path,
) -> None:
    runs = tmp_path / "two runs"
    uri = f"sqlite:///{runs}/mlflow.db"

    # A session dies while it creates the database.
    died = start_session("", runs / "died", 40)
    wait_for(lambda: bool(list(runs.glob(".mlflow.db.*.partial"))))
    died.kill()
    died.wait()
    assert not (runs / "mlflow.db").exists()

    # Two others create it at the same time.
    sessions = [start_session("", runs / name, 20) for name in ("a", "b")]
    assert [session.wait(timeout=200) for session in sessions] == [0, 0]
    for name in ("a", "b"):
        assert points_on_server(uri, run_id_of(runs / name), "loss") == losses_until(20)
    assert run_id_of(runs / "a") != run_id_of(runs / "b")
    assert not list(runs.glob(".*.partial*"))
    client = client_of(uri)
    assert len(client.search_experiments(filter_string="name = 'shared'")) == 1

    # MLflow's limits: many and long params, NaN and infinity, names that it does not allow.
    (runs / "a" / "pictures").mkdir()
    (runs / "a" / "pictures" / "one.png").write_bytes(b"1")
    config = MlflowTracking(experiment="shared", system_metrics=True)
    params = {f"p{n}": n for n in range(230)} | {"long": "x" * 7000}
    tags = {"revision": "1"}
    with open_tracker(config, runs / "a", "a", rank=0, params=params, tags=tags) as tracker:
        tracker.log(21, {"P@0.5": math.nan, "high": math.inf, "../up": 1.0, "loss": 3.0})
        tracker.artifact(runs / "a" / "pictures")

    run_id = run_id_of(runs / "a")
    run = client.get_run(run_id)
    assert len(run.data.params) == 231
    assert run.data.params["long"] == "x" * 6000
    assert run.data.tags["revision"] == "1"
    assert run.data.tags["mlflow.source.name"] == "coupalign"
    assert math.isnan(run.data.metrics["P_at_0.5"])
    assert run.data.metrics["high"] > 1e300
    assert run.data.metrics["loss"] == 3.0
    assert "../up" not in run.data.metrics
    assert "system/process_memory_gb" in run.data.metrics
    artifacts = [file.path for file in client.list_artifacts(run_id, "pictures")]
    assert artifacts == ["pictures/one.png"]
    assert list((runs / "mlartifacts").rglob("one.png"))
    assert not (Path.cwd() / "mlruns").exists()

    # A session that fails and whose configuration changed.
    params = {"p0": 7, "new": 1}
    with pytest.raises(KeyError):
        with open_tracker(config, runs / "a", "a", rank=0, params=params):
            raise KeyError("training failed")

    run = client.get_run(run_id)
    assert run.info.status == "FAILED"
    assert run.data.params["new"] == "1"
    assert run.data.params["p0"] == "0"
    assert run.data.tags["changed.p0"] == "0 -> 7"


def test_sync_refuses_a_run_without_mlflow(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="tracking.json"):
        sync(tmp_path)


def test_copied_run_directory_leaves_the_mlflow_run_of_the_original_alone(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = MlflowTracking(uri=server.uri, experiment="copies")
    a, b, c = (tmp_path / name for name in "abc")
    with open_tracker(config, a, "a", rank=0) as tracker:
        log_losses(tracker, 1, 4)

    # Train on in a copy, then in the original, which has a new name.
    shutil.copytree(a, b)
    with open_tracker(config, b, "b", rank=0) as tracker:
        log_losses(tracker, 5, 8)
    a.rename(c)
    with open_tracker(config, c, "c", rank=0) as tracker:
        log_losses(tracker, 5, 6)

    assert run_id_of(b) != run_id_of(c)
    assert points_on_server(server.uri, run_id_of(b), "loss") == losses_until(8)
    assert points_on_server(server.uri, run_id_of(c), "loss") == losses_until(6)
    experiment = client_of(server.uri).get_experiment_by_name("copies")
    assert len(client_of(server.uri).search_runs([experiment.experiment_id])) == 2
    assert "is a copy of" in caplog.text and "continues in the same MLflow run" in caplog.text


def test_deleted_experiment_is_named_with_the_remedy_and_costs_no_wait(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = MlflowTracking(uri=server.uri, experiment="deleted")
    with open_tracker(config, tmp_path / "a", "a", rank=0) as tracker:
        log_losses(tracker, 1, 2)
    client = client_of(server.uri)
    experiment_id = client.get_experiment_by_name("deleted").experiment_id
    client.delete_experiment(experiment_id)

    for name in ("a", "b"):
        caplog.clear()
        with open_tracker(config, tmp_path / name, name, rank=0) as tracker:
            log_losses(tracker, 3, 4)
        assert "cannot be reached" not in caplog.text
        assert f"restore --experiment-id {experiment_id}" in caplog.text or name == "a"
        assert caplog.text.count("takes nothing") == 1
        assert caplog.text.count("WARNING") == 1
    assert "another tracking.experiment" in sync(tmp_path / "b", server.uri).error

    client.restore_experiment(experiment_id)
    client.restore_run(run_id_of(tmp_path / "a"))
    for name, rows in (("a", 4), ("b", 2)):
        assert sync(tmp_path / name, server.uri).error is None
        points = points_on_server(server.uri, run_id_of(tmp_path / name), "loss")
        assert len(points) == rows


def test_tracking_file_of_somebody_else_sends_only_what_is_in_the_run(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "keys").write_text("secret")
    run = tmp_path / "run"
    (run / "pictures").mkdir(parents=True)
    (run / "pictures" / "a.png").symlink_to(tmp_path / "keys")
    (run / "score.json").write_text("{}")
    mine = MlflowTracking(uri=server.uri, experiment="mine")
    with open_tracker(mine, tmp_path / "victim", "victim", rank=0) as tracker:
        log_losses(tracker, 1, 1)

    # The id of another run, files elsewhere, a link, and one honest file.
    foreign = Outbox(path=run / STATE, uri=server.uri, experiment="mine", run_name="x")
    paths = ["../keys", str(tmp_path / "keys"), "pictures", "score.json"]
    foreign.change(
        run_id=run_id_of(tmp_path / "victim"),
        artifacts=[{"path": path, "folder": "", "asked": 1, "sent": 0} for path in paths],
    )
    result = sync(run, server.uri)

    assert result.error is None
    assert result.run_id != run_id_of(tmp_path / "victim")
    client = client_of(server.uri)
    assert [file.path for file in client.list_artifacts(result.run_id)] == ["score.json"]
    assert client.list_artifacts(run_id_of(tmp_path / "victim")) == []
    assert caplog.text.count("is not sent") == 3


class EndlessAnswer(http.server.BaseHTTPRequestHandler):
    """Answers every request with blanks, or with one blank per moment, without end."""

    pause_s = 0.0

    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        try:
            while True:
                self.wfile.write(b" " * (1 if self.pause_s else 1 << 20))
                self.wfile.flush()
                time.sleep(self.pause_s)
        except OSError:
            pass

    do_POST = do_GET


@pytest.mark.parametrize(
    ("pause_s", "message"), [(0.0, "more than 4194304 bytes"), (0.02, "more than 1 s")]
)
def test_endless_answer_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pause_s: float, message: str
) -> None:
    monkeypatch.setattr(mlflow, "ANSWER_BYTES", 4 << 20)
    monkeypatch.setattr(mlflow, "ANSWER_S", 1.0)
    monkeypatch.setattr(EndlessAnswer, "pause_s", pause_s)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), EndlessAnswer)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    uri = f"http://127.0.0.1:{server.server_port}"
    Outbox(path=tmp_path / STATE, uri=uri, experiment="a", run_name="a").change()

    result = sync(tmp_path, uri)

    server.shutdown()
    assert message in result.error


class NoLogin(http.server.BaseHTTPRequestHandler):
    """Answers every request with status 401."""

    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        self.send_response(401)
        self.send_header("Content-Length", "0")
        self.end_headers()


def test_refused_login_and_missing_driver_name_the_remedy(tmp_path: Path) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), NoLogin)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    uri = f"http://127.0.0.1:{server.server_port}"
    Outbox(path=tmp_path / STATE, uri=uri, experiment="a", run_name="a").change()

    refused = sync(tmp_path, uri)
    driver = mlflow._refusal(ModuleNotFoundError("No module named 'psycopg2'", name="psycopg2"))

    server.shutdown()
    assert "MLFLOW_TRACKING_USERNAME" in refused.error
    assert "pip install psycopg2" in str(driver)


def test_error_of_a_library_shows_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:hun%40ter2@host/db")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "abc123")

    text = mlflow.brief(ValueError("no login with hun@ter2 or abc123 at http://a:b@c/\nmore"))

    assert text == "ValueError: no login with *** or *** at http://***@c/"
