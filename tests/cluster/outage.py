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
    """Take two seconds per step, so that the run outlasts the outage and leaves the cores free."""

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
        self.training = start(
            folder,
            [slow],
            "train",
            config,
            f"run_dir={folder / 'run'}",
            f"train.steps={40 + AWAY_S // 2}",
            "train.evaluate_every=1000",
            "data.workers=0",
            "tracking.kind=mlflow",
            f"tracking.uri={self.server.uri}",
            ranks=1,
        )
        self.thread = threading.Thread(target=self._go_away, daemon=True)
        self.thread.start()

    def _go_away(self) -> None:
        journal = self.folder / "run" / "metrics.jsonl"
        wait_until(
            "the first steps", lambda: journal.exists() and journal.read_bytes().count(b"\n") >= 3
        )
        self.server.kill()
        time.sleep(AWAY_S)
        self.server.start()

    def close(self) -> None:
        """End what still runs."""
        for process in (self.training, self.server.process):
            if process and process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
