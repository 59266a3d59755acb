"""What an MLflow run should hold and how much of it was sent, in files that need no MLflow.

<run_dir>/metrics.jsonl   the journal; rows are sent from a cursor on
<run_dir>/tracking.json   the cursor, the id of the MLflow run, and what is still to be sent
<run_dir>/tracking.lock   held by the process that is sending
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from coupalign.config.schema import MlflowTracking
from coupalign.errors import InputError
from coupalign.files import write_json
from coupalign.tracking.journal import JOURNAL, read_journal

STATE = "tracking.json"


def tracking_address(config: MlflowTracking, run_dir: Path) -> str:
    """Find the MLflow address: configured, else MLFLOW_TRACKING_URI, else SQLite next to the run.

    Raises:
        InputError: the address is a folder (MLflow refuses its old file store) or holds a password.
    """
    database = f"sqlite:///{run_dir.resolve().parent / 'mlflow.db'}"
    uri = config.uri or os.environ.get("MLFLOW_TRACKING_URI") or database

    parts = urlsplit(uri)
    if uri != "databricks" and parts.scheme in ("", "file"):
        raise InputError(
            f"tracking.uri {uri!r} is a folder, which MLflow no longer writes to: "
            "use sqlite:///FILE.db or http://HOST:PORT"
        )
    if parts.scheme in ("http", "https") and parts.password:
        raise InputError(
            "tracking.uri holds a password, and the address is written into files of the run: "
            "put user and password into MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )

    if uri.startswith("sqlite:///"):
        return f"sqlite:///{Path(uri.removeprefix('sqlite:///')).resolve()}"
    return uri


@dataclass(kw_only=True)
class Outbox:
    """What an MLflow run should hold and how much of it was sent, kept in <run_dir>/tracking.json.

    The training thread and the sending thread share it under `lock`.
    """

    path: Path
    uri: str
    experiment: str
    run_name: str
    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    run_id: str | None = None
    sent: int = 0
    params: dict[str, str] = field(default_factory=dict)
    params_sent: bool = False
    tags: dict[str, str] = field(default_factory=dict)
    tags_sent: bool = False
    artifacts: list[dict[str, Any]] = field(default_factory=list)
    status: str = "RUNNING"
    ended: int | None = None
    status_sent: bool = False

    def __post_init__(self) -> None:
        self.lock = threading.RLock()

    @classmethod
    def read(cls, run_dir: Path) -> Outbox | None:
        """Read the state of an earlier session. Returns None if it is missing or damaged."""
        field_names = {f.name for f in fields(cls)} - {"path"}
        try:
            state = json.loads((run_dir / STATE).read_text("utf-8"))
            values = {name: value for name, value in state.items() if name in field_names}
            return cls(path=run_dir / STATE, **values)
        except (OSError, ValueError, TypeError, AttributeError):
            return None

    def change(self, **values: Any) -> None:
        """Set fields and write the file."""
        with self.lock:
            for name, value in values.items():
                setattr(self, name, value)

            state = asdict(self)
            del state["path"]
            write_json(self.path, state)

    def start_over(self, **values: Any) -> None:
        """Mark everything as unsent, because the server changed or lost the run."""
        with self.lock:
            for artifact in self.artifacts:
                artifact["sent"] = 0
            self.change(
                run_id=None, sent=0, params_sent=False, tags_sent=False, status_sent=False, **values
            )

    def add_artifact(self, path: Path, folder: str) -> None:
        """Ask for a file or directory to be sent, again if it was sent before."""
        absolute = path.resolve()
        run_dir = self.path.parent.resolve()
        inside = absolute.is_relative_to(run_dir)
        name = str(absolute.relative_to(run_dir) if inside else absolute)

        with self.lock:
            for artifact in self.artifacts:
                if (artifact["path"], artifact["folder"]) == (name, folder):
                    artifact["asked"] += 1
                    break
            else:
                self.artifacts.append({"path": name, "folder": folder, "asked": 1, "sent": 0})
            self.change()

    def waiting(self) -> tuple[int, int]:
        """Count the rows and the artifacts that the server does not have."""
        rows = sum(1 for _ in read_journal(self.path.parent / JOURNAL, self.sent))
        artifacts = sum(artifact["sent"] < artifact["asked"] for artifact in self.artifacts)
        return rows, artifacts


@contextmanager
def sole_sender(run_dir: Path) -> Iterator[None]:
    """Hold the sender's lock.

    Forked loader workers do not inherit it, and it ends with the process.

    Raises:
        RuntimeError: another process is sending this run.
    """
    with open(run_dir / "tracking.lock", "w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise RuntimeError(f"another process is sending {run_dir}") from None
        except OSError:
            pass  # a file system without locks: MLflow accepts repeated rows
        yield
