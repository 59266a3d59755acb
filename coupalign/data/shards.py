"""Read bytes of shards: from local disk in place, or from a remote shard fetched once into a cache.

    store = ShardStore(open_index("s3://bucket/refcoco"), cache_dir, cache_bytes)
    data = store.read(shard, offset, length)

The cache is a flat folder that all processes of a node share:

    <sha256>.tar                a complete, verified shard; its time stamp is that of its last use
    <sha256>.<bytes>.partial    a shard being fetched; counted with its final size from the start
    <sha256>.lock               flock: one process fetches a shard
    cache.lock                  flock: one process at a time makes room

A shard is in use while a process has its file open under a shared flock. It is not evicted then.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from coupalign.data.index import Shard, ShardIndex, read_index
from coupalign.errors import InputError
from coupalign.files import sha256_of, user_cache, whole_file

log = logging.getLogger(__name__)
T = TypeVar("T")

MAX_ATTEMPTS = 4
FIRST_DELAY_S = 0.5  # before the second attempt; doubled before each further one
SILENCE_TIMEOUT_S = 60.0  # without a byte, after which an attempt has failed

MAX_OPEN_LOCAL = 64  # files that a process keeps open
MAX_OPEN_CACHED = 2  # cached shards that a process keeps open, which therefore cannot be evicted

# Errors that do not go away by themselves.
PERMANENT_ERRORS = (FileNotFoundError, PermissionError, ImportError)
PERMANENT_STATUSES = (400, 401, 403, 404, 405, 410)


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
    return read_index(prefix, fetch(f"{prefix}/index.json"))


def open_vocabulary(index: ShardIndex, cache_dir: Path | None = None) -> Path:
    """Return the vocabulary file that was trained when the shards were packed.

    A remote one is copied to the cache.

    Raises:
        InputError: the shards have no vocabulary, it cannot be fetched, or it is another one.
    """
    if index.vocabulary is None:
        raise InputError(
            f"{index.location} was packed without a vocabulary: name a tokenizer in data.tokenizer"
        )
    if not is_remote(index.location):
        return Path(index.location) / index.vocabulary

    address = f"{index.location}/{index.vocabulary}"
    data = fetch(address)
    sha256 = hashlib.sha256(data).hexdigest()
    if index.vocabulary_sha256 not in (None, "", sha256):
        raise InputError(
            f"{address} is not the vocabulary of its index "
            f"(sha256 {sha256}, not {index.vocabulary_sha256}). Upload it or the index again"
        )

    path = (cache_dir or default_cache()) / f"{sha256}.vocab.txt"
    if not path.is_file():
        with whole_file(path) as file:
            file.write(data)
    return path


def default_cache() -> Path:
    """Return the folder for fetched shards, in the user's cache folder."""
    return user_cache("shards")


def fetch(url: str) -> bytes:
    """Fetch the bytes of a small remote file.

    Raises:
        InputError: it cannot be fetched.
    """
    return _with_retries(url, lambda: _file_system(url).cat_file(url))


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
        """Return the path or address of a shard."""
        return self._addresses[shard]

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
            return os.open(address, os.O_RDONLY)
        except OSError as error:
            raise InputError(
                f"shard {address} cannot be opened: {error.strerror}; "
                "`coupalign verify` shows what else is missing"
            ) from error

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
        self.directory = Path(directory).expanduser()
        self.limit = limit

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
            except FileNotFoundError:
                self._fetch(url, shard, path)
                continue

            fcntl.flock(descriptor, fcntl.LOCK_SH)
            if os.fstat(descriptor).st_nlink:
                os.utime(path)
                return descriptor

            # Another process evicted it between open and flock.
            os.close(descriptor)

    def _fetch(self, url: str, shard: Shard, path: Path) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):
            if path.exists():  # another process was faster
                return

            partial = path.with_suffix(f".{shard.bytes}.partial")
            try:
                self._make_room(partial, shard)
                _download(url, shard, partial)
                os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)

    def _make_room(self, partial: Path, shard: Shard) -> None:
        """Create `partial`, then evict old shards until everything fits."""
        with _locked(self.directory / "cache.lock"):
            partial.touch()
            for other in self.directory.glob("*.partial"):
                if other != partial:
                    _remove_if_abandoned(other)

            # A partial file counts with its final size, which is in its name.
            used = sum(int(other.suffixes[-2][1:]) for other in self.directory.glob("*.partial"))
            complete = []
            for path in self.directory.glob("*.tar"):
                status = path.stat()
                complete.append((status.st_mtime_ns, status.st_size, path))
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


# --------------------------------------------------------------------------------- the network


def _download(url: str, shard: Shard, partial: Path) -> None:
    """Fetch a shard to `partial` and verify it. One that arrives wrong is fetched a second time."""
    for last in (False, True):
        _with_retries(url, lambda: _file_system(url).get_file(url, str(partial)))

        size = partial.stat().st_size
        if size != shard.bytes:
            problem = f"{size} bytes instead of {shard.bytes}"
        else:
            sha256 = sha256_of(partial)
            if sha256 == shard.sha256:
                return
            problem = f"sha256 {sha256} instead of {shard.sha256}"

        again = "" if last else "; fetching it again"
        log.warning("shard %s from %s arrived with %s%s", shard.url, url, problem, again)

    raise InputError(
        f"shard {shard.url} at {url} is not the one its index describes: {problem}, twice. "
        "Upload the shard or the index again (`coupalign verify` on the source finds the wrong one)"
    )


def _with_retries(url: str, request: Callable[[], T]) -> T:
    """Make a request, and repeat it after growing pauses if the failure may be temporary."""
    for attempt in range(1, MAX_ATTEMPTS + 1):
        try:
            return request()
        except Exception as error:  # each protocol's library has exceptions of its own
            reason = f"{type(error).__name__}: {error}"
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise InputError(
                    f"the disk of the shard cache is full, {url} does not fit: lower data.cache_gb"
                ) from error
            if _is_permanent(error):
                raise InputError(f"{url} cannot be fetched: {reason}") from error
            if attempt == MAX_ATTEMPTS:
                raise InputError(
                    f"{url} cannot be fetched, tried {MAX_ATTEMPTS} times: {reason}"
                ) from error

        log.warning("%s: attempt %d of %d failed (%s)", url, attempt, MAX_ATTEMPTS, reason)
        time.sleep(FIRST_DELAY_S * 2 ** (attempt - 1))
    raise AssertionError("the last attempt returns or raises")


def _is_permanent(error: Exception) -> bool:
    status = getattr(error, "status", None)  # of an HTTP response
    return isinstance(error, PERMANENT_ERRORS) or status in PERMANENT_STATUSES


def _file_system(url: str) -> Any:
    import fsspec

    scheme = url.partition("://")[0]
    if scheme not in ("http", "https"):
        return fsspec.filesystem(scheme)

    import aiohttp

    # The library's default gives up after 5 minutes in all, whether bytes arrive or not.
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=SILENCE_TIMEOUT_S)
    return fsspec.filesystem(scheme, client_kwargs={"timeout": timeout})


# --------------------------------------------------------------------------------------- locks


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove_if_unused(path: Path) -> bool:
    """Remove a shard unless a process has it open. Returns whether it is gone."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except BlockingIOError:
        return False
    except FileNotFoundError:
        pass
    return True


def _remove_if_abandoned(partial: Path) -> None:
    """Remove a partial file of a killed process. A living one holds the lock of its shard."""
    try:
        with open(partial.with_suffix("").with_suffix(".lock"), "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            partial.unlink(missing_ok=True)
    except BlockingIOError:
        pass
