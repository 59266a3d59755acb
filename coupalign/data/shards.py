"""Read bytes of shards: from local disk in place, or from a remote shard fetched once into a cache.

    store = ShardStore(open_index("s3://bucket/refcoco"), cache_dir, cache_bytes)
    data = store.read(shard, offset, length)

The cache is a flat folder that all processes of a node share:

    <sha256>.tar                a complete shard
    <sha256>.checked            when it was last compared with its SHA-256, and its state then; the
                                time stamp of this file is that of the last use
    <sha256>.<bytes>.partial    a shard being fetched; counted with its final size from the start
    <sha256>.lock               held by the process that fetches it
    cache.lock                  held by the process that makes room

A shard is in use while a process has its file open under a shared flock. It is not evicted then.

A server is not trusted: an answer may have as many bytes as the index says and no more, and is used
when its SHA-256 is right. The disk is not trusted either: a cached shard is hashed at its first use
in a process, unless another process of this node did so within the hour. One that has changed is
fetched again.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from coupalign.addresses import hide_secret
from coupalign.data.index import MAX_INDEX_BYTES, Shard, ShardIndex, read_index
from coupalign.errors import InputError
from coupalign.files import flock_if_possible, locked, remove_debris, user_cache, whole_file

log = logging.getLogger(__name__)
T = TypeVar("T")

MAX_ATTEMPTS = 4
FIRST_DELAY_S = 0.5  # before the second attempt; doubled before each further one
CONNECT_TIMEOUT_S = 30.0
SILENCE_TIMEOUT_S = 60.0  # without a byte, after which an attempt has failed

MAX_VOCABULARY_BYTES = 1 << 26
CHUNK_BYTES = 1 << 20  # that are read at a time

MAX_OPEN_LOCAL = 64  # files that a process keeps open
MAX_OPEN_CACHED = 2  # cached shards that a process keeps open, which therefore cannot be evicted

CHECKED_FOR_S = 3600.0  # how long the check of another process counts

# Errors that do not go away by themselves. A wrong address is a ValueError.
PERMANENT_ERRORS = (FileNotFoundError, PermissionError, ImportError, ValueError)
PERMANENT_STATUSES = (400, 401, 403, 404, 405, 410)

_PARTIAL = re.compile(r"[0-9a-f]{64}\.(?P<bytes>\d{1,19})\.partial")


def is_remote(location: str) -> bool:
    """Return whether `location` is an address (http, https, s3, ...) and not a path."""
    return "://" in location and not location.startswith("file://")


def open_index(location: str) -> ShardIndex:
    """Read the index of a shard directory.

    Args:
        location: the directory or its index.json; a path, or an http(s):// or s3:// address.

    Raises:
        InputError: there is no index, it cannot be fetched, or it is not one of ours.
    """
    if not is_remote(location):
        return read_index(location.removeprefix("file://"))

    prefix = location.rstrip("/").removesuffix("/index.json")
    return read_index(prefix, fetch(f"{prefix}/index.json", MAX_INDEX_BYTES))


def open_vocabulary(index: ShardIndex, cache_dir: Path | None = None) -> Path:
    """Return the vocabulary file that was trained when the shards were packed.

    A remote one is copied to the cache.

    Raises:
        InputError: the shards have no vocabulary, it cannot be fetched, or it is another one.
    """
    if index.vocabulary is None:
        raise InputError(
            f"{hide_secret(index.location)} was packed without a vocabulary: "
            "name a tokenizer in data.tokenizer"
        )
    address = f"{index.location}/{index.vocabulary}"
    if is_remote(address):
        data = fetch(address, MAX_VOCABULARY_BYTES)
    else:
        data = _read_local(Path(address))
    sha256 = hashlib.sha256(data).hexdigest()
    if index.vocabulary_sha256 not in (None, sha256):
        raise InputError(
            f"{hide_secret(address)} is not the vocabulary of its index "
            f"(sha256 {sha256}, not {index.vocabulary_sha256}). Pack, copy or upload both again"
        )
    if not is_remote(address):
        return Path(address)

    path = (cache_dir or default_cache()) / f"{sha256}.vocab.txt"
    _make_cache(path.parent)
    with _cache_errors(path.parent):
        if not path.is_file() or path.read_bytes() != data:
            with whole_file(path) as file:
                file.write(data)
    return path


def _read_local(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); pack again, or copy it next to its index"
        ) from None


def default_cache() -> Path:
    """Return the folder for fetched shards, in the user's cache folder."""
    try:
        return user_cache("shards")
    except InputError as error:
        raise InputError(f"data.cache_dir is empty, and {error}; or set data.cache_dir") from None


def fetch(url: str, limit: int) -> bytes:
    """Fetch the bytes of a small remote file.

    Args:
        limit: the most bytes that it may have.

    Raises:
        InputError: it cannot be fetched, or it has more bytes.
    """

    def read() -> bytes:
        data = bytearray()
        with closing(_chunks(url)) as chunks:
            for chunk in chunks:
                data += chunk
                if len(data) > limit:
                    raise InputError(
                        f"{hide_secret(url)}: more than {limit:,} bytes, the limit. "
                        "Is it the file that `coupalign pack` wrote?"
                    )
        return bytes(data)

    return _with_retries(url, read)


class ShardStore:
    """Reads byte ranges of the shards of one index.

    It can be pickled and forked. Files are opened when they are needed.
    """

    def __init__(
        self, index: ShardIndex, cache_dir: Path | None = None, cache_bytes: float = 100e9
    ) -> None:
        self._shards = index.shards
        self._addresses = tuple(index.address(shard) for shard in range(len(index.shards)))
        self._cache: ShardCache | None = None
        if is_remote(index.location):
            self._cache = ShardCache(cache_dir or default_cache(), cache_bytes)
        self._open: OrderedDict[int, int] = OrderedDict()  # shard -> file descriptor, latest last

    def read(self, shard: int, offset: int, length: int) -> bytes:
        """Read `length` bytes of a shard from `offset` on.

        Raises:
            InputError: the shard is missing or cannot be fetched whole.
            ValueError: it ends before those bytes.
        """
        data = os.pread(self._descriptor(shard), length, offset)
        if len(data) != length:
            raise ValueError(
                f"the shard is cut short: {length} bytes are needed at {offset}, "
                f"{len(data)} are there"
            )
        return data

    def address(self, shard: int) -> str:
        """Return the path or address of a shard, to print it."""
        return hide_secret(self._addresses[shard])

    def close(self) -> None:
        """Close all files. A later read opens them again."""
        while self._open:
            _, descriptor = self._open.popitem()
            os.close(descriptor)

    def _descriptor(self, shard: int) -> int:
        """Return an open file of a shard. Closes the one unused longest if there are too many."""
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]

        max_open = MAX_OPEN_CACHED if self._cache else MAX_OPEN_LOCAL
        while len(self._open) >= max_open:
            _, oldest = self._open.popitem(last=False)
            os.close(oldest)

        self._open[shard] = self._open_file(shard)
        return self._open[shard]

    def _open_file(self, shard: int) -> int:
        address = self._addresses[shard]
        if self._cache:
            return self._cache.open(address, self._shards[shard])
        try:
            descriptor = os.open(address, os.O_RDONLY)
        except OSError as error:
            raise InputError(
                f"shard {address} cannot be opened: {error.strerror}; "
                "`coupalign verify` shows what else is missing"
            ) from error

        # Its SHA-256 would take too long here; `coupalign verify` computes it.
        size = os.fstat(descriptor).st_size
        if size != self._shards[shard].bytes:
            os.close(descriptor)
            raise InputError(
                f"shard {address} has {size:,} bytes, its index says "
                f"{self._shards[shard].bytes:,}: it is cut short or another one. `coupalign "
                "verify` shows what else is wrong; pack again or copy it again"
            )
        return descriptor

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def __del__(self) -> None:
        if "_open" in self.__dict__:
            self.close()


class ShardCache:
    """A folder of fetched shards, at most `limit` bytes of them.

    Evicts the shard that was unused longest. Safe for many processes on one file system.
    """

    def __init__(self, directory: Path, limit: float) -> None:
        self.directory = Path(directory)
        self.limit = limit
        self._checked: dict[str, FileState] = {}  # by SHA-256: states in which it was right

    def open(self, url: str, shard: Shard) -> int:
        """Open a shard, and fetch it first if it is not in the cache.

        Returns:
            a file descriptor of the complete, verified shard, under a shared lock until closed.

        Raises:
            InputError: it cannot be fetched, its SHA-256 is not that of the index, or it does not
                fit in the cache.
        """
        path = self.directory / f"{shard.sha256}.tar"
        while True:
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except (FileNotFoundError, NotADirectoryError):
                self._fetch(url, shard, path)
                continue
            except OSError as error:
                raise InputError(
                    f"{path}: cannot be opened ({error.strerror}); remove it, or set data.cache_dir"
                ) from None

            # Without locks, a shard may be evicted in use. It can still be read: its file is open.
            flock_if_possible(descriptor, fcntl.LOCK_SH)
            is_evicted = os.fstat(descriptor).st_nlink == 0  # between open and flock
            if not is_evicted and self._is_intact(descriptor, shard, path):
                with suppress(OSError):  # a cache of another user
                    os.utime(_note_of(path))
                return descriptor

            if not is_evicted:
                log.warning(
                    "shard %s changed in the cache after it was fetched (%s); fetching it again",
                    shard.url,
                    path,
                )
                self._remove_changed(descriptor, path)
            os.close(descriptor)

    def _is_intact(self, descriptor: int, shard: Shard, path: Path) -> bool:
        """Return whether an open shard is the one that was fetched."""
        state = _state_of(descriptor)
        if state[0] != shard.bytes:
            return False
        if self._checked.get(shard.sha256) == state or _was_checked(path, state):
            self._checked[shard.sha256] = state
            return True

        with open(os.dup(descriptor), "rb") as file:
            file.seek(0)
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if sha256 != shard.sha256 or _state_of(descriptor) != state:
            return False
        self._note_check(path, state)
        return True

    def _note_check(self, path: Path, state: FileState) -> None:
        """Write down that a shard was compared with its SHA-256 just now."""
        self._checked[path.stem] = state
        with suppress(OSError), whole_file(_note_of(path), "w") as file:
            file.write(" ".join(map(str, (int(time.time()), *state))))

    def _remove_changed(self, descriptor: int, path: Path) -> None:
        """Remove a shard that changed, unless another process has replaced it already."""
        try:
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    path.unlink()
        except OSError as error:
            raise InputError(
                f"{path}: changed after it was fetched, and cannot be removed ({error.strerror}); "
                "remove it, or set data.cache_dir"
            ) from None

    def _fetch(self, url: str, shard: Shard, path: Path) -> None:
        _make_cache(self.directory)
        with _cache_errors(self.directory), _exclusively(path.with_suffix(".lock")):
            if path.exists():  # another process was faster
                return

            partial = path.with_suffix(f".{shard.bytes}.partial")
            try:
                self._make_room(partial, shard)
                _download(url, shard, partial)
                os.replace(partial, path)
                with open(path, "rb") as file:
                    self._note_check(path, _state_of(file.fileno()))
            finally:
                partial.unlink(missing_ok=True)

    def _make_room(self, partial: Path, shard: Shard) -> None:
        """Create `partial`, then evict old shards until everything fits."""
        with _exclusively(self.directory / "cache.lock"):
            partial.touch()
            remove_debris(self.directory)
            used = 0
            for other in self.directory.glob("*.partial"):
                # A partial file counts with its final size, which is in its name.
                named = _PARTIAL.fullmatch(other.name)
                if named and (other == partial or not _remove_if_abandoned(other)):
                    used += int(named["bytes"])

            complete = []
            for path in self.directory.glob("*.tar"):
                with suppress(FileNotFoundError):  # a changed one is removed at any time
                    status = path.stat()
                    complete.append((_last_use_of(path, status), status.st_size, path))
                    used += status.st_size

            for _, size, path in sorted(complete):
                if used <= self.limit:
                    return
                if _remove_if_unused(path):
                    used -= size

            if used > self.limit:
                raise InputError(
                    f"the shard cache {self.directory} is full: {used / 1e9:.3f} GB are in use or "
                    f"needed for shard {shard.url}, data.cache_gb allows {self.limit / 1e9:.3f}; "
                    "raise it"
                )


# Size, time of the last change of content and of anything, and inode of a file. Nobody can set the
# third one.
FileState = tuple[int, int, int, int]


def _state_of(descriptor: int) -> FileState:
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _note_of(path: Path) -> Path:
    return path.with_suffix(".checked")


def _was_checked(path: Path, state: FileState) -> bool:
    """Return whether a process has found a shard right in this state within the hour."""
    try:
        checked_at, *noted = map(int, _note_of(path).read_bytes()[:200].split())
    except (OSError, ValueError):
        return False
    age = time.time() - checked_at
    return tuple(noted) == state and -60 <= age <= CHECKED_FOR_S


def _last_use_of(path: Path, status: os.stat_result) -> int:
    with suppress(OSError):
        return _note_of(path).stat().st_mtime_ns
    return status.st_mtime_ns


def _make_cache(directory: Path) -> None:
    with _cache_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)


@contextmanager
def _cache_errors(directory: Path) -> Iterator[None]:
    """Turn what a disk answers into an error that names the setting."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"the shard cache {directory} cannot be written ({error.strerror or error}); set "
            "data.cache_dir to a folder that can"
        ) from error


# --------------------------------------------------------------------------------- the network


def _download(url: str, shard: Shard, partial: Path) -> None:
    """Fetch a shard to `partial` and verify it. One that arrives wrong is fetched a second time."""
    for last in (False, True):
        problem = _with_retries(url, lambda: _receive(url, shard, partial))
        if problem is None:
            return
        again = "" if last else "; fetching it again"
        log.warning(
            "shard %s from %s arrived with %s%s", shard.url, hide_secret(url), problem, again
        )

    raise InputError(
        f"shard {shard.url} at {hide_secret(url)} is not the one its index describes: {problem}, "
        "twice. Upload the shard or the index again (`coupalign verify` on the source finds the "
        "wrong one)"
    )


def _receive(url: str, shard: Shard, partial: Path) -> str | None:
    """Write a shard to `partial` as it arrives. Returns what is wrong with it, or None."""
    received, digest = 0, hashlib.sha256()
    with open(partial, "wb") as file, closing(_chunks(url)) as chunks:
        for chunk in chunks:
            received += len(chunk)
            if received > shard.bytes:
                return f"more than {shard.bytes} bytes"
            digest.update(chunk)
            file.write(chunk)

    if received != shard.bytes:
        return f"{received} bytes instead of {shard.bytes}"
    if digest.hexdigest() != shard.sha256:
        return f"sha256 {digest.hexdigest()} instead of {shard.sha256}"
    return None


def _chunks(url: str) -> Iterator[bytes]:
    """Request a file and yield its bytes as they arrive."""
    scheme = url.partition("://")[0].lower()
    if scheme in ("http", "https"):
        yield from _http_chunks(url)
        return

    if "::" in url:
        raise InputError(
            f"{hide_secret(url)}: chained addresses (::) are not read; give the address of the "
            "directory itself"
        )
    from fsspec.core import url_to_fs

    # Some file systems get their host and port from the address.
    system, path = url_to_fs(url)
    with system.open(path, "rb", block_size=16 * CHUNK_BYTES) as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def _http_chunks(url: str) -> Iterator[bytes]:
    import requests

    # The library reads http_proxy, https_proxy, no_proxy and ~/.netrc. Compressed answers are
    # not asked for; it unpacks one that comes, a chunk at a time.
    with requests.get(
        url,
        stream=True,
        timeout=(CONNECT_TIMEOUT_S, SILENCE_TIMEOUT_S),
        headers={"Accept-Encoding": "identity"},
    ) as answer:
        answer.raise_for_status()
        yield from answer.iter_content(CHUNK_BYTES)


def _with_retries(url: str, request: Callable[[], T]) -> T:
    """Make a request, and repeat it after growing pauses if the failure may be temporary."""
    shown = hide_secret(url)
    for attempt in range(1, MAX_ATTEMPTS + 1):
        try:
            return request()
        except InputError:
            raise
        except Exception as error:  # each protocol's library has exceptions of its own
            reason = hide_secret(f"{type(error).__name__}: {error}", url)[:500]
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise InputError(
                    f"the disk of the shard cache is full, {shown} does not fit: lower "
                    "data.cache_gb, or set data.cache_dir"
                ) from error
            if _is_permanent(error):
                raise InputError(f"{shown} cannot be fetched: {reason}") from None
            if attempt == MAX_ATTEMPTS:
                raise InputError(
                    f"{shown} cannot be fetched, tried {MAX_ATTEMPTS} times: {reason}"
                ) from None

        log.warning("%s: attempt %d of %d failed (%s)", shown, attempt, MAX_ATTEMPTS, reason)
        time.sleep(FIRST_DELAY_S * 2 ** (attempt - 1))
    raise AssertionError("the last attempt returns or raises")


def _is_permanent(error: Exception) -> bool:
    answer = getattr(error, "response", None)  # of HTTP
    status = getattr(answer, "status_code", None)
    is_endless = type(error).__name__ == "TooManyRedirects"
    return isinstance(error, PERMANENT_ERRORS) or is_endless or status in PERMANENT_STATUSES


# --------------------------------------------------------------------------------------- locks


def _exclusively(path: Path) -> AbstractContextManager[None]:
    """Wait for the lock of a shard or of the cache, and hold it."""
    return locked(path, "is being fetched into", "Wait for it", wait=True)


def _remove_if_unused(path: Path) -> bool:
    """Remove a shard unless a process has it open. Returns whether it is gone."""
    try:
        with open(path, "r+b") as file:
            flock_if_possible(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except BlockingIOError:
        return False
    except FileNotFoundError:
        pass
    _note_of(path).unlink(missing_ok=True)
    return True


def _remove_if_abandoned(partial: Path) -> bool:
    """Remove a partial file of a killed process. A living one holds the lock of its shard."""
    lock = partial.with_suffix("").with_suffix(".lock")
    try:
        with locked(lock, "is being fetched into", "Wait for it"):
            partial.unlink(missing_ok=True)
    except InputError:
        return False
    return True
