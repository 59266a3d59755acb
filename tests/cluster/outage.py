"""A slow training run whose MLflow server goes away for five minutes while other tests run."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

from tests.cluster.conftest import wait_until
from tests.cluster.faults import start
from tests.unit.tracking.test_mlflow import Server

AWAY_S = 300


class Outage:
    """A training that takes two seconds per step, so it outlasts the outage and uses few cores.

    Attributes:
        server: the tracking server, which is killed after some steps and started again.
        folder: of the training.
        training: its launcher.
        thread: it ends when the server is back.
    """

    def __init__(self, config: Path, server: Path, folder: Path) -> None:
        self.server, self.folder = Server(server), folder
        self.server.start()
        slow = {
            "rank": 0,
            "event": "coupalign.doing",
            "match": "reading data",
            "do": "slow",
            "after_s": 2.0,
        }
        changes = [
            f"run_dir={folder / 'run'}",
            f"train.steps={40 + AWAY_S // 2}",
            "train.evaluate_every=1000",
            "data.workers=0",
            "tracking.kind=mlflow",
            f"tracking.uri={self.server.uri}",
        ]
        self.training = start(folder, [slow], "train", config, *changes, ranks=1)
        self.thread = threading.Thread(target=self._go_away, daemon=True)
        self.thread.start()

    def _go_away(self) -> None:
        journal = self.folder / "run" / "metrics.jsonl"

        def some_steps_are_done() -> bool:
            return journal.exists() and journal.read_bytes().count(b"\n") >= 3

        wait_until("the first steps", some_steps_are_done)
        self.server.kill()
        time.sleep(AWAY_S)
        self.server.start()

    def close(self) -> None:
        """End what still runs."""
        for process in (self.training, self.server.process):
            if process and process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
