"""Write files and directories that appear whole or not at all; lock them; read JSON.

Everything is written under a hidden name first, .NAME.PID-HOST.partial, and then renamed. The name
says who writes it, so that nobody removes what is not abandoned.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

from coupalign.errors import InputError, quoted

# What a file system without locks answers: NFS without lockd, Lustre without the mount option
# flock, some FUSE file systems.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
# Ten seconds.
_WAITS_UNTIL_SAID = 100

_PARTIAL = re.compile(r"\..+\.(?P<pid>\d+)-(?P<host>[\w.-]+)\.partial")
_LONGEST_NAME = 255
_A_DAY_S = 24 * 3600.0

logger = logging.getLogger("coupalign.files")


def user_cache(name: str) -> Path:
    """The folder `name` of this package in $XDG_CACHE_HOME, or in ~/.cache if that is not set.

    A user without a home (a container with an unknown user id) has it in the folder for temporary
    files.

    Raises:
        InputError: there is no home, and no safe folder for temporary files.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    if not base:
        try:
            base = Path.home() / ".cache"
        except RuntimeError:
            return _private_temporary_folder() / name
    return Path(base) / "coupalign" / name


def _private_temporary_folder() -> Path:
    """Create this user's folder among the temporary files, which others cannot write to."""
    try:
        folder = Path(tempfile.gettempdir()) / f"coupalign-{os.geteuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        raise InputError(
            f"there is no home directory, and no folder for temporary files ({error}). "
            "Set HOME or XDG_CACHE_HOME to a folder that you can write to"
        ) from None

    # Anybody could have created it before.
    is_own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
    if not is_own or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise InputError(
            f"{folder}: others can write to this folder, so it cannot be the cache. Remove it, or "
            "set HOME or XDG_CACHE_HOME to a folder that only you can write to"
        )
    return folder


@contextmanager
def whole_file(path: Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Write a file that appears only when the block ends without an error.

    The block writes to a temporary file in the same folder. It then replaces `path`, or is removed
    after an error.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    encoding = None if "b" in mode else "utf-8"

    try:
        with open(partial, mode, encoding=encoding) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """Write a directory that appears only when the block ends without an error.

    The block fills the empty directory that is yielded. It then replaces `path`, or is removed
    after an error.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_debris(path.parent)
    partial = partial_path(path)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()

    try:
        yield partial
        publish_directory(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def publish_directory(finished: Path, path: Path) -> None:
    """Flush a directory to disk, then rename it to `path`, and only then remove an older `path`."""
    # One sync of everything is faster than many of one file each, which take milliseconds.
    files = [finished, *finished.rglob("*")]
    if len(files) > 100:
        os.sync()
    else:
        for file in files:
            _sync(file)

    # A link is replaced, and what it points to stays.
    if path.is_symlink():
        path.unlink()
    # A crash between the two renames leaves the old directory under its hidden name.
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        os.replace(path, old)
    os.replace(finished, path)
    _sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove_debris(folder: Path) -> None:
    """Remove half-written files and directories from `folder` whose writers have ended.

    Only names that this module gives count, and only directly in `folder`. Whether a process of
    another host has ended is unknown, so what it wrote stays for a day.
    """
    for partial in sorted(folder.glob(".*.partial")):
        # Another process may remove it at the same time.
        with suppress(FileNotFoundError):
            if not _is_abandoned(partial):
                continue
            if partial.is_dir() and not partial.is_symlink():
                shutil.rmtree(partial)
            else:
                partial.unlink()


@contextmanager
def locked(
    file: Path, use: str, remedy: str, *, wait: bool = False, job: str = ""
) -> Iterator[None]:
    """Hold an exclusive lock that ends with this process. The file says who holds it.

        with locked(run_dir / "train.lock", "is being trained", "Choose another name"): ...

    The lock file is removed at the end. One that a killed process left blocks nobody. Where the
    file system has no locks, the owner in the file counts: on this host as long as it lives, on
    another host until somebody removes the file.

    Args:
        file: the lock file. Its folder must exist.
        use: what the owner does with the folder, for the refusal: "is being trained".
        remedy: what the other one can do, a sentence without its period.
        wait: wait for the owner instead of refusing.
        job: JOB/ATTEMPT of a scheduler. An owner in an earlier attempt of the same job has ended.

    Raises:
        InputError: another process holds the lock.
        OSError: the lock file cannot be written: a read-only place, a full disk.
    """
    file = Path(file)
    waits = 0
    while (handle := _try_lock(file, job)) is None:
        refusal = f"{file.parent}: {use} by {_describe_owner(file)}"
        if not wait:
            raise InputError(f"{refusal}. {remedy}")
        waits += 1
        if waits == _WAITS_UNTIL_SAID:
            logger.warning("%s; waiting for it", refusal)
        time.sleep(0.1)

    try:
        yield
    finally:
        # Remove it first: whoever waits for it then sees that it is not the file any more.
        with suppress(OSError):
            if _is_file(handle, file):
                file.unlink()
        os.close(handle)


def flock_if_possible(handle: int, operation: int) -> bool:
    """Call flock on an open file; returns False where the file system has no locks.

    Raises:
        BlockingIOError: the operation has LOCK_NB, and another process holds the lock.
    """
    try:
        fcntl.flock(handle, operation)
        return True
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False


def require_writable(folder: Path, use: str, remedy: str) -> None:
    """Make sure that files can be written to a folder, before the work that makes them.

    The folder is made if it is missing.

    Args:
        use: what is to be written, for the error message: "the scores".
        remedy: what else the user can do.

    Raises:
        InputError: nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Permissions do not tell: root has all of them, and the file system may be read-only.
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{folder}: {use} cannot be written there ({reason}). {remedy}") from error


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON with a final newline, see `whole_file`."""
    with whole_file(path, "w") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")


def read_json(path: Path | str, what: str) -> Any:
    """Read a JSON file.

    Args:
        what: what the file should be, for the error message: "the scores of a run".

    Raises:
        InputError: the file cannot be read or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; expected {what}") from error
    except RecursionError:
        raise InputError(f"{path}: cannot be read as {what} (nested too deeply)") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as {what} ({error})") from error


def parse_strict_json(text: str | bytes) -> Any:
    """Parse JSON, and refuse what Python's parser lets pass.

    Raises:
        ValueError: it is not JSON: also where an object has a key twice, where a number is NaN or
            infinite, or where lists are nested too deeply.
    """
    try:
        return json.loads(
            text, object_pairs_hook=_object_of_unique_keys, parse_constant=_refuse_constant
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _object_of_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"an object has the key {quoted(repeated)} twice")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"it holds {name}, which is no number in JSON")


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def partial_path(path: Path) -> Path:
    """Where this process writes what will be `path`."""
    owner = f"{os.getpid()}-{_plain_host()}"
    name = f".{path.name}.{owner}.partial"
    if len(os.fsencode(name)) > _LONGEST_NAME:
        digest = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]
        name = f".{digest}.{owner}.partial"
    return path.with_name(name)


def _is_abandoned(partial: Path) -> bool:
    """Whether the process that wrote a partial file or directory has ended."""
    match = _PARTIAL.fullmatch(partial.name)
    if match is None:
        return False
    if match["host"] == _plain_host():
        return _start_of(int(match["pid"])) is None
    return time.time() - partial.lstat().st_mtime > _A_DAY_S


def _plain_host() -> str:
    """The name of this host, as a part of file names."""
    return re.sub(r"[^\w.-]", "_", socket.gethostname())[:64] or "_"


def _try_lock(file: Path, job: str) -> int | None:
    """Lock the file and write this process into it.

    Returns:
        the open file, which is the lock; None: another process holds it.
    """
    while True:
        handle, is_new = _open_or_create(file)
        try:
            if not _is_free(handle, file, is_new, job=job):
                os.close(handle)
                return None

            # Its last owner may have removed it between our open and our lock.
            if _is_file(handle, file):
                _write_owner(handle, file, job)
                return handle
            os.close(handle)
        except BaseException:
            if is_new:
                file.unlink(missing_ok=True)
            os.close(handle)
            raise


def _open_or_create(file: Path) -> tuple[int, bool]:
    """Open a file for reading and writing; returns also whether this call has created it.

    A link is not followed: whoever made the folder may have put one there.
    """
    while True:
        with suppress(FileExistsError):
            return os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), True
        with suppress(FileNotFoundError):
            return os.open(file, os.O_RDWR | os.O_NOFOLLOW), False


def _is_free(handle: int, file: Path, is_new: bool, *, job: str) -> bool:
    """Lock an open lock file; returns False if another process holds it."""
    try:
        if flock_if_possible(handle, fcntl.LOCK_EX | fcntl.LOCK_NB):
            return True
    except BlockingIOError:
        return False

    # Only one process can create the file.
    _warn_of_no_locks(file.parent)
    if is_new:
        return True
    if _may_live(_read_owner(file), job):
        return False
    file.unlink(missing_ok=True)
    return True


def _write_owner(handle: int, file: Path, job: str) -> None:
    before = _read_owner(file)
    host = socket.gethostname()
    if before.get("host", host) != host and _may_live(before, job):
        # Some mounts (NFS with nolock, Lustre with localflock) lock for one host only, silently.
        logger.warning(
            "%s: its owner, %s, did not give it back. Make sure that it has ended",
            file,
            _describe_owner(file),
        )

    owner = {
        "pid": os.getpid(),
        "host": host,
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "started": _start_of(os.getpid()),
        "job": job,
    }
    os.ftruncate(handle, 0)
    os.write(handle, json.dumps(owner).encode())


def _read_owner(file: Path) -> dict[str, Any]:
    """Read who holds a lock; empty if the file does not say."""
    try:
        owner = json.loads(file.read_bytes()[:1000])
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _may_live(owner: dict[str, Any], job: str) -> bool:
    """Whether the owner of a lock may be alive, as far as is known on this host and in this job."""
    own_name, _, own_attempt = job.partition("/")
    name, _, attempt = str(owner.get("job")).partition("/")
    if own_name and name == own_name and attempt != own_attempt:
        return False
    if owner.get("host") != socket.gethostname():
        return True
    return _start_of(owner.get("pid")) == owner.get("started")


def _start_of(pid: Any) -> str | None:
    """When a process of this host began, in clock ticks since boot; None if there is none.

    A later process may have the same pid, but not the same start.
    """
    if not isinstance(pid, int):
        return None
    try:
        # The name of the program, in parentheses, may contain spaces.
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    has_ended = state in ("Z", "X")
    return None if has_ended else fields[18]


def _describe_owner(file: Path) -> str:
    owner = _read_owner(file)
    if not owner:
        return f"another process (if that has ended, remove {file})"

    pid, host, since = (str(owner.get(key))[:80] for key in ("pid", "host", "since"))
    text = f"process {pid} on host {host!r} since {since!r}"
    if owner.get("host") == socket.gethostname():
        return text
    return f"{text} (if that has ended, remove {file})"


@cache
def _warn_of_no_locks(folder: Path) -> None:
    logger.warning(
        "%s: the file system has no locks. The owner that a lock file names counts instead", folder
    )


def _is_file(handle: int, path: Path) -> bool:
    """Whether an open file is the one that is at `path` now."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
