"""What an MLflow run should hold and how much of it was sent, in files that need no MLflow.

<run_dir>/metrics.jsonl   the journal; rows are sent from a cursor on
<run_dir>/tracking.json   the cursor, the id of the MLflow run, and what is still to be sent
<run_dir>/tracking.lock   held by the process that is sending
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, Field, ValidationError

from coupalign.addresses import hide_secret
from coupalign.config.schema import MlflowTracking
from coupalign.errors import InputError
from coupalign.files import write_json
from coupalign.tracking.journal import JOURNAL, read_journal

STATE = "tracking.json"
MAX_STATE_BYTES = 64 << 20


def tracking_address(config: MlflowTracking, run_dir: Path) -> str:
    """Find the MLflow address: configured, else MLFLOW_TRACKING_URI, else SQLite next to the run.

    The environment's address may hold a password. Write and print it with `hide_secret` only.

    Raises:
        InputError: the address is a folder (MLflow refuses its old file store).
    """
    database = f"sqlite:///{run_dir.resolve().parent / 'mlflow.db'}"
    uri = config.uri or os.environ.get("MLFLOW_TRACKING_URI") or database

    if uri != "databricks" and urlsplit(uri).scheme in ("", "file"):
        raise InputError(
            f"tracking.uri {hide_secret(uri)!r} is a folder, which MLflow no longer writes to: "
            "use sqlite:///FILE.db or http://HOST:PORT"
        )
    if uri.startswith("sqlite:///"):
        return f"sqlite:///{Path(uri.removeprefix('sqlite:///')).resolve()}"
    return uri


def track_command(run_dir: Path, uri: str) -> str:
    """The command that sends a run to `uri`. It names the address unless that is the default."""
    # The address may be somebody else's text, and the reader may paste the command into a shell.
    command = f"coupalign track {shlex.quote(str(run_dir))}"
    shown = hide_secret(uri)
    is_default = hide_secret(tracking_address(MlflowTracking(), run_dir)) == shown
    return command if is_default else f"{command} --tracking-uri {shlex.quote(shown)}"


def _is_printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("control characters, which a terminal would obey")
    return text


Printable = Annotated[str, AfterValidator(_is_printable)]


class _StoredArtifact(BaseModel):
    path: Printable
    folder: Printable = ""
    asked: int = Field(ge=0)
    sent: int = Field(ge=0)


class _StoredState(BaseModel):
    """What tracking.json may hold. The file may be somebody else's."""

    uri: Printable
    experiment: Printable
    run_name: Printable
    key: str = Field(default_factory=lambda: uuid.uuid4().hex, pattern=r"^[0-9a-f]{32}$")
    place: str | None = None
    inode: tuple[int, int] | None = None
    run_id: str | None = Field(None, pattern=r"^[\w-]+$", max_length=256)
    sent: int = Field(0, ge=0)
    params: dict[str, str] = {}
    params_sent: bool = False
    tags: dict[str, str] = {}
    tags_sent: bool = False
    artifacts: list[_StoredArtifact] = []
    status: str = "RUNNING"
    ended: int | None = None
    status_sent: bool = False


@dataclass(kw_only=True)
class Outbox:
    """What an MLflow run should hold and how much of it was sent, kept in <run_dir>/tracking.json.

    The training thread and the sending thread share it under `lock`.

    Attributes:
        uri: the tracking address, with its secrets masked.
        key: a random name of the run, which its MLflow run has as a tag.
        place: the run directory, when it was last written to.
        inode: device and inode of that directory.
    """

    path: Path
    uri: str
    experiment: str
    run_name: str
    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    place: str | None = None
    inode: tuple[int, int] | None = None
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
        try:
            with open(run_dir / STATE, "rb") as file:
                state = json.loads(file.read(MAX_STATE_BYTES))
            values = _StoredState.model_validate(state).model_dump()
            # Earlier versions wrote the whole address.
            values["uri"] = hide_secret(values["uri"])
            return cls(path=run_dir / STATE, **values)
        except (OSError, ValueError, RecursionError, ValidationError):
            return None

    def change(self, **values: Any) -> None:
        """Set fields and write the file."""
        with self.lock:
            for name, value in values.items():
                setattr(self, name, value)

            state = asdict(self)
            del state["path"]
            write_json(self.path, state)

    def settle(self) -> str | None:
        """Make the outbox that of the directory it is in, before anything is sent.

        A moved directory continues in its MLflow run. A copy gets a run of its own, which receives
        the whole journal. Returns what was found out, for the log; None for the usual place.
        """
        directory = self.path.parent.resolve()
        # The bytes of a name need not be UTF-8.
        place = os.fsencode(directory).decode("utf-8", "backslashreplace")
        status = directory.stat()
        inode = (status.st_dev, status.st_ino)
        with self.lock:
            before, is_copy = self.place, self._is_copy_in(directory, inode)
            if is_copy:
                self.start_over(key=uuid.uuid4().hex, place=place, inode=inode)
            elif (self.place, self.inode) != (place, inode):
                self.change(place=place, inode=inode)

        if is_copy:
            return f"{place!r} is a copy of {before!r:.200}; it gets an MLflow run of its own"
        if before not in (None, place):
            return f"{place!r} was {before!r:.200} before; it continues in the same MLflow run"
        return None

    def _is_copy_in(self, directory: Path, inode: tuple[int, int]) -> bool:
        if self.place is None or _is_same_folder(self.place, directory):
            return False
        original = Outbox.read(Path(self.place))
        if original is not None and original.key == self.key:
            return True

        # The original is gone. A rename keeps the inode; a move to another device cannot.
        recorded = self.inode or inode
        return recorded[0] == inode[0] and recorded[1] != inode[1]

    def start_over(self, **values: Any) -> None:
        """Mark everything as unsent, because the server changed or lost the run."""
        with self.lock:
            for artifact in self.artifacts:
                artifact["sent"] = 0
            self.change(
                run_id=None, sent=0, params_sent=False, tags_sent=False, status_sent=False, **values
            )

    def add_artifact(self, path: Path, folder: str = "") -> None:
        """Ask for a file or directory of the run to be sent, again if it was sent before."""
        name = str(path.absolute().relative_to(self.path.parent.absolute()))
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


def _is_same_folder(place: str, directory: Path) -> bool:
    """Whether a recorded path and a directory are one, perhaps mounted at two paths."""
    try:
        return os.path.samefile(place, directory)
    except (OSError, ValueError):
        return False


def find_way_out(run_dir: Path, path: Path, folder: str = "") -> str | None:
    """Say why a file or folder must not be sent: it, or something in it, is not of the run.

    Links that leave the run directory, and pipes and devices, would hand over other files of this
    machine. Returns None for ordinary files.

    Args:
        folder: where it would go in the artifacts of the run.
    """
    if Path(folder).is_absolute() or ".." in Path(folder).parts:
        return f"its folder {folder!r:.80} leads out of the run's artifacts"

    root = run_dir.resolve()
    entries = [path]
    if path.is_dir():
        entries += path.rglob("*")

    for entry in entries:
        if not entry.resolve().is_relative_to(root):
            return f"{entry} leads out of the run directory"
        if not (entry.is_file() or entry.is_dir()):
            return f"{entry} is no ordinary file"
    return None


@contextmanager
def sole_sender(run_dir: Path) -> Iterator[None]:
    """Hold the sender's lock.

    Forked loader workers do not inherit it, and it ends with the process.

    Raises:
        RuntimeError: another process is sending this run.
    """
    # Whoever made the directory may have put a link there, to a file that must not be touched.
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(run_dir / "tracking.lock", flags, 0o644), "r+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise RuntimeError(f"another process is sending {run_dir}") from None
        except OSError:
            pass  # a file system without locks: MLflow accepts repeated rows
        yield
