"""Where a sample's bytes come from: a shard on disk, read in place, or one fetched once into a verified local cache.

    store = ShardStore(open_index("s3://bucket/refcoco"), cache_dir, cache_bytes)
    data = store.read(shard, offset, length)

The cache is a flat folder that all processes of a node share:

    <sha256>.tar                  a whole, verified shard; its time stamp says when it was last opened
    <sha256>.<bytes>.partial      one that is being fetched; its final size is taken as used from the start
    <sha256>.lock, cache.lock     flock: one process fetches a shard, one at a time makes room

A shard in use is one whose file is open under a shared flock; it is never thrown out.
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

ATTEMPTS = 4
FIRST_DELAY = 0.5  # seconds before the second attempt; doubled before each further one
SILENCE_S = 60.0  # without a byte, after which an attempt has failed
_OPEN_LOCAL = 64  # files a process keeps open
_OPEN_CACHED = 2  # the same for cached shards, which cannot be thrown out while they are open
_CANNOT_MEND = (FileNotFoundError, PermissionError, ImportError)


def is_remote(location: str) -> bool:
    """Whether `location` is an address (http, https, s3 …) and not a path."""
    return "://" in location and not location.startswith("file://")


def open_index(location: str) -> ShardIndex:
    """Read the index of a shard directory, given the directory or its index.json: a path, http(s):// or s3:// address.

    Raises:
        InputError: there is none, it cannot be fetched, or it is not one of ours.
    """
    if not is_remote(location):
        return read_index(location.removeprefix("file://"))
    prefix = location.rstrip("/").removesuffix("/index.json")
    return read_index(prefix, fetch(f"{prefix}/index.json"))


def open_vocabulary(index: ShardIndex, cache_dir: Path | None = None) -> Path:
    """The vocabulary file that was learned when the shards were packed; a remote one is copied to the cache."""
    if index.vocabulary is None:
        raise InputError(
            f"{index.location} was packed without a vocabulary: name a tokenizer in data.tokenizer"
        )
    if not is_remote(index.location):
        return Path(index.location) / index.vocabulary
    address = f"{index.location}/{index.vocabulary}"
    data = fetch(address)
    found = hashlib.sha256(data).hexdigest()
    if found != (index.vocabulary_sha256 or found):
        raise InputError(
            f"{address} is not the vocabulary of its index (sha256 {found}, not {index.vocabulary_sha256})"
        )
    path = (cache_dir or default_cache()) / f"{found}.vocab.txt"
    if not path.is_file():
        with whole_file(path) as file:
            file.write(data)
    return path


def default_cache() -> Path:
    """In the user's cache folder."""
    return user_cache("shards")


class ShardStore:
    """Reads byte ranges of the shards of one index. Can be pickled and forked; files are opened when they are needed."""

    def __init__(
        self, index: ShardIndex, cache_dir: Path | None = None, cache_bytes: float = 100e9
    ) -> None:
        self._shards = index.shards
        self._addresses = tuple(index.address(shard) for shard in range(len(index.shards)))
        self._cache = (
            ShardCache(cache_dir or default_cache(), cache_bytes)
            if is_remote(index.location)
            else None
        )
        self._open: OrderedDict[int, int] = OrderedDict()

    def read(self, shard: int, offset: int, length: int) -> bytes:
        """`length` bytes from `offset` of a shard.

        Raises:
            InputError: the shard is missing or cannot be fetched whole.
            ValueError: it ends before those bytes.
        """
        data = os.pread(self._handle(shard), length, offset)
        if len(data) != length:
            raise ValueError(
                f"the shard is cut short: {length} bytes at {offset}, of which {len(data)} are there"
            )
        return data

    def address(self, shard: int) -> str:
        """The path or address of a shard."""
        return self._addresses[shard]

    def close(self) -> None:
        """Close all files; a later read opens them again."""
        while self._open:
            os.close(self._open.popitem()[1])

    def _handle(self, shard: int) -> int:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        while len(self._open) >= (_OPEN_CACHED if self._cache else _OPEN_LOCAL):
            os.close(self._open.popitem(last=False)[1])
        if self._cache:
            handle = self._cache.open(self._addresses[shard], self._shards[shard])
        else:
            try:
                handle = os.open(self._addresses[shard], os.O_RDONLY)
            except OSError as error:
                raise InputError(
                    f"shard {self._addresses[shard]} cannot be opened: {error.strerror}; "
                    "`coupalign verify` shows what else is missing"
                ) from error
        self._open[shard] = handle
        return handle

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def __del__(self) -> None:
        if "_open" in self.__dict__:
            self.close()


class ShardCache:
    """Fetched shards below `limit` bytes; the one unused longest goes first. Safe for many processes on one file system."""

    def __init__(self, directory: Path, limit: float) -> None:
        self.directory = Path(directory).expanduser()
        self.limit = limit

    def open(self, url: str, shard: Shard) -> int:
        """A file descriptor of the whole, verified shard, under a shared lock until it is closed.

        Raises:
            InputError: it cannot be fetched, has another sha256 than its index says, or does not fit in the cache.
        """
        path = self.directory / f"{shard.sha256}.tar"
        while True:
            try:
                handle = os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                self._bring(url, shard, path)
                continue
            fcntl.flock(handle, fcntl.LOCK_SH)
            if os.fstat(handle).st_nlink:
                os.utime(path)
                return handle
            os.close(handle)  # it was thrown out between open and flock

    def _bring(self, url: str, shard: Shard, path: Path) -> None:
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
        """Create `partial`, which counts with its final size, and throw out old shards until everything fits."""
        with _locked(self.directory / "cache.lock"):
            partial.touch()
            for other in self.directory.glob("*.partial"):
                _remove_abandoned(other, besides=partial)
            used = sum(int(other.suffixes[-2][1:]) for other in self.directory.glob("*.partial"))
            whole = sorted(
                (path.stat().st_mtime_ns, path.stat().st_size, path)
                for path in self.directory.glob("*.tar")
            )
            used += sum(size for _, size, _ in whole)
            for _, size, path in whole:
                if used <= self.limit:
                    return
                if _remove_unused(path):
                    used -= size
            if used > self.limit:
                raise InputError(
                    f"the shard cache {self.directory} is full: {used / 1e9:.3f} GB are in use or needed for shard "
                    f"{shard.url}, data.cache_gb allows {self.limit / 1e9:.3f}; raise it"
                )


# ------------------------------------------------------------------------------------------------------ the network


def fetch(url: str) -> bytes:
    """The bytes of a small remote file."""
    return _persist(url, lambda: _file_system(url).cat_file(url))


def _download(url: str, shard: Shard, partial: Path) -> None:
    """Fetch a shard to `partial` and verify it; one that arrives wrong is fetched a second time."""
    for last in (False, True):
        _persist(url, lambda: _file_system(url).get_file(url, str(partial)))
        size = partial.stat().st_size
        found = sha256_of(partial) if size == shard.bytes else None
        if found == shard.sha256:
            return
        problem = (
            f"{size} bytes instead of {shard.bytes}"
            if found is None
            else f"sha256 {found} instead of {shard.sha256}"
        )
        log.warning(
            "shard %s from %s arrived with %s%s",
            shard.url,
            url,
            problem,
            "" if last else "; fetching it again",
        )
    raise InputError(
        f"shard {shard.url} at {url} is not the one its index describes: {problem}, twice. "
        "Upload the shard or the index again (`coupalign verify` on the source finds the wrong one)"
    )


def _persist(url: str, act: Callable[[], T]) -> T:
    """Do `act`; on a failure that may pass, again after a growing pause."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return act()
        except Exception as error:  # each protocol's library has its own kinds
            reason = f"{type(error).__name__}: {error}"
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise InputError(
                    f"the disk of the shard cache is full, {url} does not fit: lower data.cache_gb"
                ) from error
            if isinstance(error, _CANNOT_MEND) or getattr(error, "status", 500) in (
                400,
                401,
                403,
                404,
                405,
                410,
            ):
                raise InputError(f"{url} cannot be fetched: {reason}") from error
            if attempt == ATTEMPTS:
                raise InputError(
                    f"{url} cannot be fetched, tried {ATTEMPTS} times: {reason}"
                ) from error
        log.warning("%s: attempt %d of %d failed (%s)", url, attempt, ATTEMPTS, reason)
        time.sleep(FIRST_DELAY * 2 ** (attempt - 1))
    raise AssertionError


def _file_system(url: str) -> Any:
    import fsspec

    scheme = url.partition("://")[0]
    if scheme not in ("http", "https"):
        return fsspec.filesystem(scheme)
    import aiohttp

    patience = aiohttp.ClientTimeout(
        total=None, sock_connect=30, sock_read=SILENCE_S
    )  # the library's own: 5 minutes in all
    return fsspec.filesystem(scheme, client_kwargs={"timeout": patience})


# ------------------------------------------------------------------------------------------------------------ locks


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove_unused(path: Path) -> bool:
    """Remove a shard that no process has open."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except BlockingIOError:
        return False
    except FileNotFoundError:
        pass
    return True


def _remove_abandoned(partial: Path, besides: Path) -> None:
    """Remove what a killed process left; one that is being fetched is under its shard's lock."""
    if partial == besides:
        return
    try:
        with open(partial.with_suffix("").with_suffix(".lock"), "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            partial.unlink(missing_ok=True)
    except BlockingIOError:
        pass
