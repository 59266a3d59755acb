"""MLflow behind the journal, against a real server that dies, hangs, loses its answers, and comes back."""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest

from coupalign.config.schema import MlflowTracking
from coupalign.errors import InputError
from coupalign.tracking import forwarder as forward
from coupalign.tracking import open_tracker, sync
from coupalign.tracking.outbox import Outbox

pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A real `mlflow server` on one port and one database, which can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        environment = os.environ | {
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        command = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--workers",
            "1",
            "--backend-store-uri",
            f"sqlite:///{self.folder}/server.db",
            "--artifacts-destination",
            str(self.folder / "artifacts"),
        ]
        with open(self.folder / "server.log", "ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        until = time.monotonic() + 180
        while not self.answers():
            assert self.process.poll() is None and time.monotonic() < until, (
                self.folder / "server.log"
            ).read_text()[-2000:]
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
    """Stands between a client and the server: passes, answers nothing ("hang"), or delivers and drops the answer ("lose")."""

    def __init__(self, server: Server) -> None:
        self.server, self.mode, self.lost = server, "pass", 0
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
            return self._hold(client)
        with client, socket.create_connection(("127.0.0.1", self.server.port)) as server:
            threading.Thread(target=_pump, args=(client, server), daemon=True).start()
            while data := server.recv(65536):
                if self.mode == "lose":
                    self.lost += 1
                    client.shutdown(socket.SHUT_RDWR)
                    return None
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
def server(tmp_path_factory):
    running = Server(tmp_path_factory.mktemp("server"))
    running.start()
    yield running
    running.kill()


@pytest.fixture
def proxy(server):
    between = Proxy(server)
    yield between
    between.mode = "pass"
    between.listener.close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Short pauses, so that the tests wait for servers and not for us."""
    monkeypatch.setattr(forward, "POLL_S", 0.1)
    monkeypatch.setattr(forward, "FIRST_PAUSE_S", 0.2)
    monkeypatch.setattr(forward, "LONGEST_PAUSE_S", 1.0)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def client_of(uri: str):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def history(uri: str, run_id: str, name: str) -> list[tuple[int, float]]:
    return [
        (metric.step, metric.value) for metric in client_of(uri).get_metric_history(run_id, name)
    ]


def run_id_of(run_dir: Path) -> str | None:
    return Outbox.read(run_dir).run_id


def wait_for(condition) -> None:
    until = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < until, "waited two minutes"
        time.sleep(0.05)


def expected(last: int) -> list[tuple[int, float]]:
    return [(step, step / 7) for step in range(1, last + 1)]


def test_a_server_that_is_killed_mid_run_loses_nothing_and_holds_nothing_up(
    server, tmp_path, caplog
):
    config, run_dir = MlflowTracking(uri=server.uri, experiment="killed"), tmp_path / "run"
    with open_tracker(config, run_dir, "killed", rank=0, params={"a.b": 1}) as tracker:
        for step in range(1, 101):
            tracker.log(step, {"train/loss": step / 7})
        wait_for(lambda: (Outbox.read(run_dir) or Outbox).sent > 0)
        server.kill()
        for step in range(101, 1301):
            tracker.log(step, {"train/loss": step / 7})
        (run_dir / "score.json").write_text("{}")
        tracker.artifact(run_dir / "score.json", "scores")
        wait_for(lambda: "cannot be reached" in caplog.text)
        time.sleep(1.5)
        server.start()
        for step in range(1301, 1401):
            tracker.log(step, {"train/loss": step / 7})
    run_id = run_id_of(run_dir)
    assert sorted(history(server.uri, run_id, "train/loss")) == expected(1400)
    run = client_of(server.uri).get_run(run_id)
    assert run.info.status == "FINISHED" and run.data.params == {"a.b": "1"}
    assert [file.path for file in client_of(server.uri).list_artifacts(run_id, "scores")] == [
        "scores/score.json"
    ]
    assert (
        caplog.text.count("cannot be reached") == 1
        and caplog.text.count("is back and has everything") == 1
    )


def test_lost_answers_make_no_second_run_and_no_second_point(server, proxy, tmp_path):
    config, run_dir = MlflowTracking(uri=proxy.uri, experiment="lossy"), tmp_path / "run"
    with open_tracker(
        config, run_dir, "lossy", rank=0, params={"a": 1}, tags={"b": "c"}
    ) as tracker:
        tracker.log(1, {"loss": 1 / 7})
        proxy.mode = "lose"
        wait_for(lambda: proxy.lost >= 3)
        proxy.mode = "pass"
        wait_for(lambda: run_id_of(run_dir) is not None and Outbox.read(run_dir).params_sent)
        proxy.mode, proxy.lost = "lose", 0
        for step in range(2, 2501):
            tracker.log(step, {"loss": step / 7})
        wait_for(lambda: proxy.lost >= 3)
        proxy.mode = "pass"
    client = client_of(server.uri)
    runs = client.search_runs([client.get_experiment_by_name("lossy").experiment_id])
    assert [run.info.run_id for run in runs] == [run_id_of(run_dir)]
    assert sorted(history(server.uri, runs[0].info.run_id, "loss")) == expected(2500)
    assert runs[0].data.tags["b"] == "c"


def test_every_answer_of_a_session_is_lost_once(server, proxy, tmp_path):
    """The request that creates the run, the params, each batch, the tags and the status: all are delivered twice."""
    config, run_dir = MlflowTracking(uri=proxy.uri, experiment="echo"), tmp_path / "run"
    with open_tracker(config, run_dir, "echo", rank=0, params={"a": 1}) as tracker:
        for step in range(1, 1501):
            tracker.log(step, {"loss": step / 7})
    run_id = run_id_of(run_dir)
    outbox = Outbox.read(run_dir)
    outbox.change(run_id=None, sent=0, params_sent=False, tags_sent=False, status_sent=False)
    result = sync(run_dir)
    assert (result.run_id, result.rows, result.rows_left, result.error) == (run_id, 1500, 0, None)
    assert sorted(history(server.uri, run_id, "loss")) == expected(1500)


def test_a_server_that_is_away_at_the_start_and_hangs_at_the_end_gets_the_run_later(
    server, proxy, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(forward, "CLOSE_WAIT_S", 1.0)
    monkeypatch.setattr(forward, "CLOSE_WAIT_WORKING_S", 2.0)
    proxy.mode = "hang"
    config, run_dir = MlflowTracking(uri=proxy.uri, experiment="late"), tmp_path / "run"
    (tmp_path / "config.yaml").write_text("a: 1\n")
    with open_tracker(config, run_dir, "late", rank=0) as tracker:
        for step in range(1, 51):
            tracker.log(step, {"loss": step / 7})
        tracker.artifact(tmp_path / "config.yaml")
    assert (
        "50 rows and 1 artifacts are not there yet" in caplog.text
        and f"coupalign track {run_dir}" in caplog.text
    )
    assert run_id_of(run_dir) is None
    proxy.mode = "pass"
    result = sync(run_dir)
    assert (
        result.rows,
        result.artifacts,
        result.rows_left,
        result.artifacts_left,
        result.error,
    ) == (50, 1, 0, 0, None)
    assert sorted(history(server.uri, result.run_id, "loss")) == expected(50)
    assert client_of(server.uri).get_run(result.run_id).info.status == "FINISHED"
    again = sync(run_dir)
    assert (again.run_id, again.rows, again.artifacts) == (result.run_id, 0, 0)


SESSION = """
import sys, time
from pathlib import Path
from coupalign.config.schema import MlflowTracking
from coupalign.tracking import open_tracker
uri, run_dir, last = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
with open_tracker(MlflowTracking(uri=uri or None, experiment="shared"), run_dir, run_dir.name, rank=0) as tracker:
    for step in range(1, last + 1):
        tracker.log(step, {"loss": step / 7})
    if last == 40:
        print("logged", flush=True)
        time.sleep(1000)
"""


def session(uri: str, run_dir: Path, last: int) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", SESSION, uri, str(run_dir), str(last)],
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_killed_training_continues_the_same_run(server, tmp_path):
    run_dir = tmp_path / "run"
    killed = session(server.uri, run_dir, 40)
    assert killed.stdout.readline() == "logged\n"
    wait_for(lambda: (run_dir / "tracking.json").exists() and Outbox.read(run_dir).sent > 0)
    busy = sync(run_dir)
    assert "another process" in busy.error and busy.rows == 0
    killed.kill()
    killed.wait()
    first = run_id_of(run_dir)
    config = MlflowTracking(uri=server.uri, experiment="shared")
    with open_tracker(config, run_dir, "run", rank=0) as tracker:
        for step in range(31, 81):
            tracker.log(step, {"loss": step / 7})
    assert run_id_of(run_dir) == first
    assert sorted(history(server.uri, first, "loss")) == expected(80)
    assert client_of(server.uri).get_run(first).info.status == "FINISHED"


def test_without_a_server_two_runs_share_a_fresh_database_although_a_third_died_creating_it(
    tmp_path,
):
    runs = tmp_path / "two runs"
    died = session("", runs / "died", 40)
    wait_for(lambda: list(runs.glob(".mlflow.db.*.partial")))
    died.kill()
    died.wait()
    assert not (runs / "mlflow.db").exists()
    both = [session("", runs / name, 20) for name in ("a", "b")]
    assert [process.wait(timeout=200) for process in both] == [0, 0]
    uri = f"sqlite:///{runs}/mlflow.db"
    for name in ("a", "b"):
        assert sorted(history(uri, run_id_of(runs / name), "loss")) == expected(20)
    assert run_id_of(runs / "a") != run_id_of(runs / "b")
    assert not list(runs.glob(".*.partial*"))
    assert len(client_of(uri).search_experiments(filter_string="name = 'shared'")) == 1

    (runs / "pictures").mkdir()
    (runs / "pictures" / "one.png").write_bytes(b"1")
    config, long = MlflowTracking(experiment="shared", system_metrics=True), "x" * 7000
    many = {f"p{n}": n for n in range(230)}
    with open_tracker(
        config, runs / "a", "a", rank=0, params=many | {"long": long}, tags={"revision": "1"}
    ) as tracker:
        tracker.log(21, {"P@0.5": math.nan, "high": math.inf, "../up": 1.0, "loss": 3.0})
        tracker.artifact(runs / "pictures")
    client, first = client_of(uri), run_id_of(runs / "a")
    run = client.get_run(first)
    assert len(run.data.params) == 231 and run.data.params["long"] == "x" * 6000
    assert run.data.tags["revision"] == "1" and run.data.tags["mlflow.source.name"] == "coupalign"
    assert (
        math.isnan(run.data.metrics["P_at_0.5"])
        and run.data.metrics["high"] > 1e300
        and run.data.metrics["loss"] == 3.0
    )
    assert "../up" not in run.data.metrics and "system/process_memory_gb" in run.data.metrics
    assert [file.path for file in client.list_artifacts(first, "pictures")] == ["pictures/one.png"]
    assert list((runs / "mlartifacts").rglob("one.png")) and not (Path.cwd() / "mlruns").exists()

    with (
        pytest.raises(KeyError),
        open_tracker(config, runs / "a", "a", rank=0, params={"p0": 7, "new": 1}) as tracker,
    ):
        raise KeyError("training failed")
    run = client.get_run(first)
    assert (
        run.info.status == "FAILED"
        and run.data.params["new"] == "1"
        and run.data.params["p0"] == "0"
    )
    assert run.data.tags["changed.p0"] == "0 -> 7"


def test_sync_of_a_run_without_mlflow_is_refused(tmp_path):
    with pytest.raises(InputError, match="tracking.json"):
        sync(tmp_path)
