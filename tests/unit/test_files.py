"""Files and directories appear whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from coupalign.errors import InputError
from coupalign.files import (
    locked,
    publish_directory,
    read_json,
    remove_debris,
    require_writable,
    sha256_of,
    user_cache,
    whole_directory,
    whole_file,
    write_json,
)


def names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_failed_write_leaves_the_old_file_and_no_debris(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "file.txt"
    with whole_file(file, "w") as out:
        out.write("old")

    with pytest.raises(RuntimeError), whole_file(file, "w") as out:
        out.write("new")
        raise RuntimeError

    assert file.read_text() == "old"
    assert names_in(file.parent) == ["file.txt"]


@pytest.mark.parametrize("files", [1, 150])
def test_directory_is_replaced_as_a_whole(tmp_path: Path, files: int) -> None:
    target = tmp_path / "target"

    for text in ("old", "new"):
        with whole_directory(target) as folder:
            for number in range(files):
                (folder / str(number)).write_text(text)
    with pytest.raises(RuntimeError), whole_directory(target) as folder:
        (folder / "0").write_text("half")
        raise RuntimeError

    assert {file.read_text() for file in target.iterdir()} == {"new"}
    assert names_in(tmp_path) == ["target"]


def test_publish_directory_replaces_an_older_one(tmp_path: Path) -> None:
    finished, target = tmp_path / ".partial", tmp_path / "target"
    for folder, text in ((finished, "new"), (target, "old")):
        folder.mkdir()
        (folder / "file").write_text(text)

    publish_directory(finished, target)

    assert (target / "file").read_text() == "new"
    assert names_in(tmp_path) == ["target"]


def test_publish_directory_replaces_a_link_and_not_its_target(tmp_path: Path) -> None:
    elsewhere, target = tmp_path / "elsewhere", tmp_path / "target"
    elsewhere.mkdir()
    (elsewhere / "file").write_text("precious")
    target.symlink_to(elsewhere)

    for text in ("new", "newer"):
        with whole_directory(target) as folder:
            (folder / "file").write_text(text)
        assert (target / "file").read_text() == text

    assert (elsewhere / "file").read_text() == "precious"
    assert sorted(names_in(tmp_path)) == ["elsewhere", "target"]


def test_write_json_ends_with_a_newline_and_keeps_accents(tmp_path: Path) -> None:
    file = tmp_path / "a.json"

    write_json(file, {"é": 1})

    assert file.read_text(encoding="utf-8") == '{\n  "é": 1\n}\n'
    assert read_json(file, "an example") == {"é": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "a.json: no such file; expected the scores of a run"),
        (b"{", "a.json: cannot be read as the scores of a run"),
        (b"\xff", "a.json: cannot be read as the scores of a run"),
    ],
)
def test_read_json_says_what_the_file_should_be(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    file = tmp_path / "a.json"
    if content is not None:
        file.write_bytes(content)

    with pytest.raises(InputError, match=message):
        read_json(file, "the scores of a run")


def test_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"some bytes")

    assert sha256_of(file) == hashlib.sha256(b"some bytes").hexdigest()


@pytest.fixture
def ended() -> int:
    """The pid of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_remove_debris_removes_what_ended_processes_of_this_host_left(
    tmp_path: Path, ended: int
) -> None:
    here = socket.gethostname()
    (tmp_path / f".a.json.{ended}-{here}.partial").write_text("half")
    (tmp_path / f".pictures.{ended}-{here}.partial").mkdir()
    (tmp_path / f".pictures.{ended}-{here}.partial" / "a.png").write_text("half")

    remove_debris(tmp_path)

    assert names_in(tmp_path) == []


def test_remove_debris_spares_living_and_foreign_owners(tmp_path: Path, ended: int) -> None:
    here = socket.gethostname()
    names = [
        f".a.json.{os.getpid()}-{here}.partial",
        f".a.json.{ended}-elsewhere.partial",
        ".photos.partial",
        ".photos.1.partial",
        f"a.{ended}-{here}.partial",
        f".a.{ended}-{here}.partial.txt",
    ]
    for name in names:
        (tmp_path / name).write_text("half")
    os.utime(tmp_path / ".photos.partial", (1, 1))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / f".b.{ended}-{here}.partial").write_text("half")

    remove_debris(tmp_path)

    assert sorted(names_in(tmp_path)) == sorted([*names, "sub"])
    assert names_in(tmp_path / "sub")


def test_remove_debris_removes_a_foreign_owners_after_a_day(tmp_path: Path) -> None:
    old = tmp_path / ".a.json.1-elsewhere.partial"
    old.write_text("half")
    os.utime(old, (1, 1))

    remove_debris(tmp_path)

    assert names_in(tmp_path) == []


def test_remove_debris_does_not_follow_links(tmp_path: Path, ended: int) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "mine").write_text("mine")
    (tmp_path / f".a.{ended}-{socket.gethostname()}.partial").symlink_to(target)

    remove_debris(tmp_path)

    assert names_in(tmp_path) == ["target"] and names_in(target) == ["mine"]


def test_two_writers_of_one_directory_do_not_remove_each_other(tmp_path: Path) -> None:
    write = (
        "import sys; from pathlib import Path; from coupalign.files import whole_directory\n"
        "with whole_directory(Path(sys.argv[1])) as folder:\n"
        "    print(flush=True); sys.stdin.read(); (folder / 'a').write_text('other')\n"
    )
    command = [sys.executable, "-c", write, str(tmp_path / "target")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()

        with whole_directory(tmp_path / "target") as folder:
            (folder / "a").write_text("mine")
        assert (tmp_path / "target" / "a").read_text() == "mine"

    assert other.returncode == 0 and (tmp_path / "target" / "a").read_text() == "other"


def test_names_may_be_as_long_as_the_file_system_allows(tmp_path: Path) -> None:
    for name in ("a" * 255, "é" * 127):
        with whole_file(tmp_path / name, "w") as file:
            file.write("text")

    assert sorted(names_in(tmp_path)) == sorted(["a" * 255, "é" * 127])


def test_user_cache_follows_xdg_cache_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert user_cache("shards") == Path("/cache/coupalign/shards")

    monkeypatch.delenv("XDG_CACHE_HOME")
    assert user_cache("shards") == Path.home() / ".cache" / "coupalign" / "shards"


HOLD = """
import sys
from pathlib import Path
from coupalign.files import locked
with locked(Path(sys.argv[1]), "is being trained", ""):
    print("locked", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(lock: Path) -> Iterator[subprocess.Popen]:
    """Another process that holds a lock until its standard input is closed."""
    command = [sys.executable, "-c", HOLD, str(lock)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"locked\n"
        yield process
        process.kill()


def refused(lock: Path) -> str:
    """The refusal of a lock that is taken."""
    with pytest.raises(InputError) as error, locked(lock, "is being trained", "Wait for it"):
        pass
    return str(error.value)


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """A file system that has no locks."""

    def flock(*_: object) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", flock)


without_locks = pytest.mark.parametrize(
    "no_locks", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL], indirect=True
)


def test_lock_is_refused_with_pid_and_host_of_its_owner(tmp_path: Path) -> None:
    lock = tmp_path / "train.lock"

    with holder(lock) as process:
        message = refused(lock)

    assert message.startswith(f"{tmp_path}: is being trained by process {process.pid} on host ")
    assert repr(socket.gethostname()) in message and message.endswith(". Wait for it")


def test_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    lock = tmp_path / "train.lock"

    with holder(lock):
        pass
    assert lock.exists()
    with locked(lock, "is being trained", ""):
        assert json.loads(lock.read_text())["pid"] == os.getpid()

    assert names_in(tmp_path) == []


def test_lock_can_be_waited_for(tmp_path: Path) -> None:
    lock = tmp_path / "shard.lock"

    with holder(lock) as process:
        threading.Timer(0.3, process.stdin.close).start()
        with locked(lock, "is being fetched", "", wait=True):
            assert json.loads(lock.read_text())["pid"] == os.getpid()


def test_many_processes_hold_a_lock_one_after_the_other(tmp_path: Path) -> None:
    # Given: processes that add 1 to the number in a file, not atomically.
    (tmp_path / "sum").write_text("0")
    add = (
        "import sys; from pathlib import Path; from coupalign.files import locked\n"
        "folder = Path(sys.argv[1])\n"
        "for _ in range(50):\n"
        "    with locked(folder / 'lock', '', '', wait=True):\n"
        "        (folder / 'sum').write_text(str(int((folder / 'sum').read_text()) + 1))\n"
    )

    processes = [
        subprocess.Popen([sys.executable, "-c", add, str(tmp_path)], stderr=subprocess.PIPE)
        for _ in range(3)
    ]

    assert [process.communicate()[1] for process in processes] == [b""] * 3
    assert (tmp_path / "sum").read_text() == "150"


@without_locks
def test_without_locks_a_living_owner_counts(tmp_path: Path, no_locks: None) -> None:
    lock = tmp_path / "train.lock"

    with locked(lock, "is being trained", ""):
        message = refused(lock)
        assert f"process {os.getpid()} on host" in message and "remove" not in message

    with locked(lock, "is being trained", ""):
        pass


@without_locks
def test_without_locks_a_dead_owner_of_this_host_does_not_count(
    tmp_path: Path, no_locks: None
) -> None:
    lock = tmp_path / "train.lock"
    owner = {"pid": os.getpid(), "host": socket.gethostname(), "started": "1"}
    lock.write_text(json.dumps(owner))

    with locked(lock, "is being trained", ""):
        assert json.loads(lock.read_text())["started"] != "1"


@without_locks
@pytest.mark.parametrize("content", ['{"pid": 1, "host": "n7", "since": "2026"}', "", "[1]", "{"])
def test_without_locks_an_owner_that_cannot_be_asked_counts(
    tmp_path: Path, no_locks: None, content: str
) -> None:
    lock = tmp_path / "train.lock"
    lock.write_text(content)

    assert f"(if that has ended, remove {lock})" in refused(lock)
    assert lock.read_text() == content


@without_locks
@pytest.mark.parametrize(
    ("owner", "is_free"), [("7/0", True), ("7/1", False), ("8/0", False), ("", False)]
)
def test_without_locks_an_earlier_attempt_of_the_job_does_not_count(
    tmp_path: Path, no_locks: None, owner: str, is_free: bool
) -> None:
    lock = tmp_path / "train.lock"
    lock.write_text(json.dumps({"pid": 1, "host": "n7", "job": owner}))

    if is_free:
        with locked(lock, "is being trained", "", job="7/1"):
            assert json.loads(lock.read_text())["job"] == "7/1"
    else:
        with pytest.raises(InputError), locked(lock, "is being trained", "", job="7/1"):
            pass


@without_locks
def test_without_locks_a_warning_says_so_once(
    tmp_path: Path, no_locks: None, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        with locked(tmp_path / "train.lock", "is being trained", ""):
            pass

    assert [record.message.count("has no locks") for record in caplog.records] == [1]


def test_lock_left_by_another_host_is_taken_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lock = tmp_path / "train.lock"
    lock.write_text('{"pid": 5, "host": "n7", "since": "2026"}')

    with locked(lock, "is being trained", ""):
        pass

    assert "process 5 on host 'n7'" in caplog.text and "Make sure that it has ended" in caplog.text


def test_folder_that_can_be_written_is_made_and_stays_empty(tmp_path: Path) -> None:
    require_writable(tmp_path / "new" / "folder", "the scores", "")

    assert names_in(tmp_path / "new" / "folder") == []


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_folder_that_cannot_be_written_is_refused_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("coupalign.files.TemporaryFile", refuse)

    with pytest.raises(InputError, match="the scores cannot be written there .* Use --out"):
        require_writable(tmp_path, "the scores", "Use --out")


def test_lock_on_a_full_disk_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", write)

    with pytest.raises(OSError, match="No space"), locked(tmp_path / "lock", "", ""):
        pass

    assert names_in(tmp_path) == []


def test_lock_file_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("precious")
    lock = tmp_path / "a.lock"
    lock.symlink_to(other)

    with pytest.raises(OSError), locked(lock, "is used", "Wait"):
        pass

    assert other.read_text() == "precious"
    assert lock.is_symlink()
