"""Shards on disk, over HTTP and on S3: complete, fetched once, within the limit of the cache."""

from __future__ import annotations

import base64
import errno
import hashlib
import http.server
import io
import multiprocessing
import os
import pickle
import tarfile
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

import fsspec
import pytest
from fsspec import AbstractFileSystem

from coupalign.config.schema import DataConfig, Source
from coupalign.data import shards
from coupalign.data.index import Shard, ShardIndex, read_index
from coupalign.data.shards import ShardStore, fetch, open_index, open_vocabulary
from coupalign.errors import InputError
from tests.unit.data.batches import train
from tests.unit.data.conftest import change_index

FORK = multiprocessing.get_context("fork")

# (file name, how often it was requested, its bytes) -> status, body, announced length
Answer = Callable[[str, int, bytes], tuple[int, bytes, int]]


class Site:
    """A directory on a real HTTP server. `answer` may replace the answers."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.requests: Counter[str] = Counter()
        self.answer: Answer | None = None
        site, lock = self, threading.Lock()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.lstrip("/")
                with lock:
                    site.requests[name] += 1
                    times = site.requests[name]

                file = site.directory / name
                body = file.read_bytes() if file.is_file() else b""
                status, length = (200 if file.is_file() else 404), len(body)
                if site.answer is not None:
                    status, body, length = site.answer(name, times, body)

                self.send_response(status)
                self.send_header("Content-Length", str(length))
                self.end_headers()
                self.wfile.write(body)
                self.close_connection = True

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *_: None  # a client that has heard enough
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        serve = {"target": self.server.serve_forever, "kwargs": {"poll_interval": 0.05}}
        threading.Thread(**serve, daemon=True).start()


@pytest.fixture
def site(packed: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(shards, "FIRST_DELAY_S", 0.01)
    site = Site(packed)
    yield site
    site.server.shutdown()
    site.server.server_close()


def spans_of(index: ShardIndex) -> list[tuple[int, int, int]]:
    """(shard, offset, length) of every file."""
    spans = []
    for image in index.images:
        spans += [(image.shard, *image.jpg), (image.shard, *image.json)]
    return spans


def read_everything(store: ShardStore, index: ShardIndex) -> list[bytes]:
    return sorted(store.read(*span) for span in spans_of(index))


def files_in_tars(directory: Path) -> list[bytes]:
    """The files of all shards, read by `tarfile`."""
    found = []
    for path in directory.glob("*.tar"):
        with tarfile.open(path) as tar:
            found += [tar.extractfile(member).read() for member in tar if member.isfile()]
    return sorted(found)


def cached(cache: Path) -> set[str]:
    """The SHA-256 of the shards in a cache."""
    return {path.stem for path in cache.glob("*.tar")}


# ------------------------------------------------------------------------------------- on disk


def test_local_shard_is_read_in_place(packed: Path):
    index = open_index(str(packed))
    assert index == open_index(f"file://{packed}")

    store = pickle.loads(pickle.dumps(ShardStore(index)))

    assert read_everything(store, index) == files_in_tars(packed)
    store.close()
    assert store.read(*spans_of(index)[0])


def test_number_of_open_files_is_limited(packed: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shards, "MAX_OPEN_LOCAL", 1)
    index = open_index(str(packed))
    store, before = ShardStore(index), len(os.listdir("/proc/self/fd"))

    for span in spans_of(index) * 2:
        store.read(*span)

    assert len(os.listdir("/proc/self/fd")) == before + 1


def test_missing_local_shard_is_refused(packed: Path):
    index = open_index(str(packed))
    (packed / "shard-000000.tar").unlink()

    with pytest.raises(
        InputError, match=r"shard .*shard-000000.tar cannot be opened: No such file"
    ):
        ShardStore(index).read(0, 0, 10)


def test_truncated_local_shard_is_refused(packed: Path):
    index = open_index(str(packed))
    os.truncate(packed / "shard-000001.tar", 2000)

    with pytest.raises(InputError, match="shard-000001.tar has 2,000 bytes, its index says .* cut"):
        ShardStore(index).read(1, 0, 20)


# ------------------------------------------------------------------------------------ over HTTP


def test_index_and_vocabulary_are_fetched(site: Site, packed: Path, tmp_path: Path):
    local = read_index(packed)

    index = open_index(f"{site.url}/index.json")

    assert index == open_index(site.url + "/")
    assert replace(index, location=local.location) == local
    vocabulary = open_vocabulary(index, tmp_path / "cache")
    assert vocabulary.read_bytes() == open_vocabulary(local).read_bytes()


def test_each_shard_is_fetched_once(site: Site, packed: Path, tmp_path: Path):
    index = open_index(site.url)

    store = ShardStore(index, tmp_path / "cache")
    found = read_everything(store, index)

    assert found == files_in_tars(packed)
    assert cached(tmp_path / "cache") == {shard.sha256 for shard in index.shards}
    assert all(site.requests[shard.url] == 1 for shard in index.shards)

    # Another store reads from the cache.
    again = ShardStore(index, tmp_path / "cache")
    assert again.read(*spans_of(index)[0])
    assert site.requests[index.shards[0].url] == 1


class HostedFiles(AbstractFileSystem):
    """Files of a server, whose name an address holds, as with ftp, sftp, smb and webhdfs."""

    protocol = "hosted"
    cachable = False

    def __init__(self, host: str) -> None:
        super().__init__()
        self.host = host

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return urlsplit(path).path if "://" in path else path

    @staticmethod
    def _get_kwargs_from_urls(path: str) -> dict[str, str]:
        return {"host": urlsplit(path).netloc}

    def open(self, path: str, mode: str = "rb", **options: object) -> BinaryIO:
        assert self.host == "a-server:9"
        return open(path, mode)


def test_file_system_gets_its_host_from_the_address(packed: Path):
    fsspec.register_implementation("hosted", HostedFiles, clobber=True)

    index = open_index(f"hosted://a-server:9{packed}")

    assert len(index.images) == 12


def test_chained_address_is_refused_at_once(packed: Path):
    with pytest.raises(InputError, match="zip://x::http://h/s.*chained addresses .* directory"):
        open_index("zip://x::http://h/s")


def test_missing_file_is_requested_once(site: Site, tmp_path: Path):
    with pytest.raises(InputError, match="nowhere/index.json cannot be fetched"):
        open_index(f"{site.url}/nowhere")
    assert site.requests["nowhere/index.json"] == 1

    (site.directory / "shard-000000.tar").unlink()
    with pytest.raises(InputError, match="shard-000000.tar cannot be fetched"):
        ShardStore(open_index(site.url), tmp_path / "cache").read(0, 0, 1)
    assert site.requests["shard-000000.tar"] == 1


def test_answer_that_is_no_index_asks_for_the_address(site: Site, packed: Path):
    """A page that asks to log in, or the answer to an address with a query."""
    (packed / "index.json").write_text("<html>Please log in</html>")

    with pytest.raises(InputError, match="not valid JSON .* is it the address of a packed"):
        open_index(site.url)


def test_server_error_is_retried(site: Site, tmp_path: Path):
    site.answer = lambda name, times, body: (500, b"", 0) if times <= 2 else (200, body, len(body))

    index = open_index(site.url)
    assert ShardStore(index, tmp_path / "cache").read(*spans_of(index)[0])

    assert site.requests["index.json"] == site.requests["shard-000000.tar"] == 3


def test_server_error_that_stays_is_reported(site: Site):
    site.answer = lambda name, times, body: (503, b"", 0)

    with pytest.raises(InputError, match="tried 4 times: .*503"):
        fetch(f"{site.url}/index.json", 1000)


def test_missing_server_is_reported(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shards, "FIRST_DELAY_S", 0.01)
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    server.server_close()

    with pytest.raises(InputError, match="tried 4 times"):
        open_index(f"http://127.0.0.1:{server.server_address[1]}/x")


def test_stalled_answer_is_retried(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    index, over = open_index(site.url), threading.Event()
    monkeypatch.setattr(shards, "SILENCE_TIMEOUT_S", 0.3)

    def stall(name: str, times: int, body: bytes) -> tuple[int, bytes, int]:
        if times == 1:
            over.wait(20)
        return 200, body, len(body)

    site.answer = stall

    assert ShardStore(index, tmp_path / "cache").read(*spans_of(index)[0])
    over.set()
    assert site.requests["shard-000000.tar"] == 2


def test_answer_cut_short_is_retried(site: Site, tmp_path: Path):
    def cut_first(name: str, times: int, body: bytes) -> tuple[int, bytes, int]:
        sent = body[: len(body) // 2] if times == 1 else body
        return 200, sent, len(body)

    index = open_index(site.url)
    site.answer = cut_first

    found = read_everything(ShardStore(index, tmp_path / "cache"), index)

    assert found == files_in_tars(site.directory)
    assert site.requests["shard-000000.tar"] == 2


def flip_a_bit(body: bytes) -> bytes:
    return bytes([body[0] ^ 1]) + body[1:]


def cut_a_block(body: bytes) -> bytes:
    return body[:-512]


@pytest.mark.parametrize(
    "damage, reason",
    [
        (flip_a_bit, "sha256 [0-9a-f]{64} instead of [0-9a-f]{64}"),
        (cut_a_block, "bytes instead of [0-9]+"),
        (lambda body: body + bytes(512), "more than [0-9]+ bytes"),
    ],
)
def test_wrong_shard_is_fetched_twice_then_reported(
    site: Site, tmp_path: Path, damage: Callable[[bytes], bytes], reason: str
):
    index, cache = open_index(site.url), tmp_path / "cache"
    site.answer = lambda name, times, body: (200, damage(body), len(damage(body)))
    address = f"shard shard-000001.tar at {site.url}/shard-000001.tar"

    with pytest.raises(InputError, match=f"{address} .*{reason}, twice"):
        ShardStore(index, cache).read(1, 0, 1)

    assert site.requests["shard-000001.tar"] == 2
    assert not cached(cache) and not list(cache.glob("*.partial"))


@pytest.mark.parametrize("damage", [flip_a_bit, cut_a_block])
def test_shard_that_arrives_right_the_second_time_is_used(
    site: Site, tmp_path: Path, damage: Callable[[bytes], bytes]
):
    def damage_first(name: str, times: int, body: bytes) -> tuple[int, bytes, int]:
        sent = damage(body) if times == 1 else body
        return 200, sent, len(sent)

    index = open_index(site.url)
    site.answer = damage_first

    assert len(ShardStore(index, tmp_path / "cache").read(1, 0, 1)) == 1
    assert site.requests["shard-000001.tar"] == 2


def test_wrong_vocabulary_is_refused(site: Site, tmp_path: Path):
    index = open_index(site.url)
    site.answer = lambda name, times, body: (200, body + b"x\n", len(body) + 2)

    with pytest.raises(InputError, match="not the vocabulary of its index"):
        open_vocabulary(index, tmp_path / "cache")


def test_wrong_local_vocabulary_is_refused(packed: Path):
    index = open_index(str(packed))
    assert open_vocabulary(index) == packed / "vocab.txt"
    (packed / "vocab.txt").write_text("another\n")

    with pytest.raises(InputError, match="vocab.txt is not the vocabulary of its index"):
        open_vocabulary(index)

    (packed / "vocab.txt").unlink()
    with pytest.raises(InputError, match="vocab.txt: cannot be read .No such file"):
        open_vocabulary(index)


def test_shards_without_vocabulary_need_a_tokenizer(packed: Path):
    index = replace(read_index(packed), vocabulary=None)

    with pytest.raises(InputError, match="without a vocabulary"):
        open_vocabulary(index)


# ------------------------------------------------------------------------------ hostile servers


class HostileHandler(http.server.BaseHTTPRequestHandler):
    """Sends what `answers` says: headers, and a body that may not end."""

    answers: dict[str, tuple[int, dict[str, str], Iterator[bytes]]]
    seen: list[tuple[str, dict[str, str]]]
    sent: int

    def do_GET(self) -> None:
        self.seen.append((self.path, dict(self.headers)))
        status, headers, body = self.answers[self.path]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        for part in body:
            self.wfile.write(part)
            type(self).sent += len(part)
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hostile(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, type[HostileHandler]]]:
    """The address of a server, and its handler."""
    monkeypatch.setattr(shards, "FIRST_DELAY_S", 0.01)
    handler = type("Handler", (HostileHandler,), {"answers": {}, "seen": [], "sent": 0})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.handle_error = lambda *_: None
    serve = {"target": server.serve_forever, "kwargs": {"poll_interval": 0.05}}
    threading.Thread(**serve, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", handler
    server.shutdown()
    server.server_close()


def test_endless_shard_is_not_kept(
    hostile: tuple[str, type[HostileHandler]], packed: Path, tmp_path: Path
):
    url, handler = hostile
    index = replace(read_index(packed), location=url)
    endless = {"/shard-000000.tar": (200, {}, cycle([bytes(1 << 20)]))}
    handler.answers = endless
    watched: list[int] = []
    really_write = shards._receive

    def watch(address: str, shard: Shard, partial: Path) -> str | None:
        problem = really_write(address, shard, partial)
        watched.append(partial.stat().st_size)
        return problem

    with pytest.MonkeyPatch.context() as patch, pytest.raises(InputError, match="more than"):
        patch.setattr(shards, "_receive", watch)
        ShardStore(index, tmp_path / "cache").read(0, 0, 1)

    assert len(watched) == 2 and max(watched) <= index.shards[0].bytes
    assert not [path for path in (tmp_path / "cache").iterdir() if path.stat().st_size]


@pytest.mark.parametrize("encoding", ["identity", "gzip"])
def test_endless_index_is_refused(
    hostile: tuple[str, type[HostileHandler]], monkeypatch: pytest.MonkeyPatch, encoding: str
):
    url, handler = hostile
    monkeypatch.setattr(shards, "MAX_INDEX_BYTES", 3_000_000)
    squeeze = zlib.compressobj(9, zlib.DEFLATED, 31)
    packed_zeros = squeeze.compress(bytes(50_000_000)) + squeeze.flush()
    body = [packed_zeros] if encoding == "gzip" else cycle([b" " * (1 << 16)])
    handler.answers = {"/index.json": (200, {"Content-Encoding": encoding}, iter(body))}

    with pytest.raises(InputError, match=r"index.json: more than 3,000,000 bytes, the limit"):
        open_index(url)


def test_endless_vocabulary_is_refused(
    hostile: tuple[str, type[HostileHandler]], packed: Path, tmp_path: Path, monkeypatch
):
    url, handler = hostile
    monkeypatch.setattr(shards, "MAX_VOCABULARY_BYTES", 100_000)
    handler.answers = {"/vocab.txt": (200, {}, cycle([b"word\n" * 1000]))}

    with pytest.raises(InputError, match=r"vocab.txt: more than 100,000 bytes, the limit"):
        open_vocabulary(replace(read_index(packed), location=url), tmp_path)


@pytest.mark.parametrize("target", ["file:///etc/passwd", "/index.json", "gopher://x/y"])
def test_redirect_that_leads_nowhere_is_reported(
    hostile: tuple[str, type[HostileHandler]], target: str
):
    url, handler = hostile
    handler.answers = {"/index.json": (302, {"Location": target, "Content-Length": "0"}, iter([]))}

    with pytest.raises(InputError, match="index.json cannot be fetched: [A-Z]"):
        open_index(url)

    assert len(handler.seen) <= 31


@pytest.mark.parametrize(
    "sha256", ["../../../project/poetry", "/etc/passwd", "x" * 64, "A" * 64, "0" * 63, "", None, 5]
)
def test_sha256_of_a_foreign_index_is_no_path(site: Site, packed: Path, sha256: object):
    change_index(packed, lambda tree: tree["shardlist"][0].update(sha256=sha256))

    with pytest.raises(InputError, match=r"index.json: damaged index \(sha256 .* is not a SHA-256"):
        open_index(site.url)


# ------------------------------------------------------------------------- proxies and secrets


def test_proxy_of_the_environment_is_used(site: Site, monkeypatch: pytest.MonkeyPatch):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", site.url)
    asked = []

    def answer(name: str, times: int, body: bytes) -> tuple[int, bytes, int]:
        asked.append(name)
        data = (site.directory / "index.json").read_bytes()
        return 200, data, len(data)

    site.answer = answer

    index = open_index("http://shards.example.invalid/small")

    assert index.location == "http://shards.example.invalid/small"
    assert asked == ["http://shards.example.invalid/small/index.json"]


def test_no_proxy_is_used(site: Site, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    assert open_index(site.url).name == "small"


def test_login_of_netrc_is_sent(
    hostile: tuple[str, type[HostileHandler]],
    packed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    url, handler = hostile
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password s3cret\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    handler.answers = {
        "/index.json": (200, {}, iter([(packed / "index.json").read_bytes()])),
    }

    open_index(url)

    ((_, headers),) = handler.seen
    login = base64.b64encode(b"me:s3cret").decode()
    assert headers["Authorization"] == f"Basic {login}"


def test_password_in_an_address_is_never_shown(
    site: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    secret = site.url.replace("://", "://me:s3cret-word@")
    site.answer = lambda name, times, body: (503, b"", 0)
    messages = []
    with pytest.raises(InputError) as failed:
        open_index(secret)
    messages.append(str(failed.value))

    # Wrong shards, a wrong vocabulary, and a store that shows its addresses.
    site.answer = lambda name, times, body: (
        (200, body, len(body)) if name == "index.json" else (200, b"x", 1)
    )
    index = open_index(secret)
    store = ShardStore(index, tmp_path / "cache")
    for use in (lambda: store.read(0, 0, 1), lambda: open_vocabulary(index, tmp_path / "cache")):
        with pytest.raises(InputError) as failed:
            use()
        messages.append(str(failed.value))
    messages += [store.address(0), caplog.text]

    assert not [text for text in messages if "s3cret" in text]
    assert all("127.0.0.1" in text for text in messages)


# ------------------------------------------------------------------------------------ the cache


def change_in_cache(file: Path, *, keep_times: bool = False) -> None:
    """Change one byte of a cached shard, in place."""
    before = file.stat()
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    if keep_times:
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("keep_times", [False, True])
@pytest.mark.parametrize("process", ["the same", "another"])
def test_cached_shard_that_changed_is_fetched_again(
    site: Site, tmp_path: Path, caplog, keep_times: bool, process: str
):
    cache, index = tmp_path / "cache", open_index(site.url)
    store = ShardStore(index, cache)
    expected = read_everything(store, index)
    store.close()
    change_in_cache(cache / f"{index.shards[1].sha256}.tar", keep_times=keep_times)

    if process == "another":
        store = ShardStore(index, cache)
    found = read_everything(store, index)

    assert found == expected
    assert site.requests["shard-000001.tar"] == 2 and site.requests["shard-000000.tar"] == 1
    assert "shard-000001.tar changed in the cache after it was fetched" in caplog.text


def test_cached_shard_is_hashed_once_per_node(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    cache, index = tmp_path / "cache", open_index(site.url)
    read_everything(ShardStore(index, cache), index)
    hashed = []
    really_hash = hashlib.file_digest
    monkeypatch.setattr(
        hashlib, "file_digest", lambda *args: hashed.append(1) or really_hash(*args)
    )

    # Fetched within the hour: the note of the process that did so counts.
    read_everything(ShardStore(index, cache), index)
    assert hashed == []

    # The disk may have rotted since: each process looks once.
    monkeypatch.setattr(shards, "CHECKED_FOR_S", -100)
    store = ShardStore(index, cache)
    for _ in range(2):
        read_everything(store, index)
        store.close()
    assert len(hashed) == len(index.shards)


@pytest.mark.parametrize("note", [b"", b"x y", b"1 2 3", b"9" * 400, b"\xff", b"-1 0 0 0 0"])
def test_foreign_note_of_a_check_proves_nothing(site: Site, tmp_path: Path, note: bytes):
    cache, index = tmp_path / "cache", open_index(site.url)
    expected = read_everything(ShardStore(index, cache), index)
    for shard in index.shards:
        change_in_cache(cache / f"{shard.sha256}.tar", keep_times=True)
        (cache / f"{shard.sha256}.checked").write_bytes(note)

    assert read_everything(ShardStore(index, cache), index) == expected


def test_eviction_leaves_nothing_behind(site: Site, tmp_path: Path):
    cache, index = tmp_path / "cache", open_index(site.url)
    limit = max(shard.bytes for shard in index.shards)

    for number in (0, 1, 2):
        ShardStore(index, cache, limit).read(number, 0, 1)

    sha256 = index.shards[2].sha256
    assert {path.name for path in cache.iterdir()} == {f"{sha256}.tar", f"{sha256}.checked"}


def test_cache_that_cannot_be_written_names_the_setting(site: Site, tmp_path: Path):
    (tmp_path / "file").write_text("")
    index = open_index(site.url)

    for use in (
        lambda: ShardStore(index, tmp_path / "file").read(0, 0, 1),
        lambda: open_vocabulary(index, tmp_path / "file"),
    ):
        with pytest.raises(InputError, match="cannot be written .*; set data.cache_dir"):
            use()


def test_user_without_home_has_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def nobody(*_: object) -> None:
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.setattr("pwd.getpwuid", nobody)
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    own = tmp_path / f"coupalign-{os.geteuid()}"

    assert shards.default_cache() == own / "shards"
    assert own.stat().st_mode & 0o777 == 0o700

    # Somebody else's folder, or one that others can write to, is no place for a cache.
    own.chmod(0o777)
    with pytest.raises(InputError, match="data.cache_dir is empty, and .*others can write"):
        shards.default_cache()
    own.rmdir()
    own.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="set data.cache_dir"):
        shards.default_cache()


@pytest.mark.parametrize("answer", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_cache_works_without_locks(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: int
):
    def refuse(*_: object) -> None:
        raise OSError(answer, os.strerror(answer))

    monkeypatch.setattr("fcntl.flock", refuse)
    cache, index = tmp_path / "cache", open_index(site.url)
    limit = 2 * max(shard.bytes for shard in index.shards)

    assert read_everything(ShardStore(index, cache, limit), index) == files_in_tars(site.directory)
    assert len(cached(cache)) <= 2


def test_cache_evicts_the_shard_unused_longest(site: Site, tmp_path: Path):
    cache, index = tmp_path / "cache", open_index(site.url)
    limit = sum(shard.bytes for shard in index.shards) - 1
    for number in (0, 1):
        ShardStore(index, cache, limit).read(number, 0, 1)
    os.utime(cache / f"{index.shards[1].sha256}.checked", (1, 1))
    ShardStore(index, cache, limit).read(0, 0, 1)

    ShardStore(index, cache, limit).read(2, 0, 1)

    assert cached(cache) == {index.shards[0].sha256, index.shards[2].sha256}


def test_shard_in_use_is_not_evicted(site: Site, tmp_path: Path):
    cache, index = tmp_path / "cache", open_index(site.url)
    sha256 = [shard.sha256 for shard in index.shards]
    size = max(shard.bytes for shard in index.shards)
    in_use = ShardStore(index, cache, 2 * size)
    in_use.read(0, 0, 1)
    os.utime(cache / f"{sha256[0]}.checked", (1, 1))  # the oldest, and yet in use
    other = ShardStore(index, cache, 2 * size)
    other.read(1, 0, 1)

    with pytest.raises(
        InputError, match="cache .* is full: .* shard shard-000002.tar, data.cache_gb allows"
    ):
        other.read(2, 0, 1)
    assert cached(cache) == {sha256[0], sha256[1]}

    in_use.close()
    assert other.read(2, 0, 1)
    assert cached(cache) == {sha256[1], sha256[2]}


def test_cache_smaller_than_a_shard_is_reported(site: Site, tmp_path: Path):
    with pytest.raises(InputError, match="is full"):
        ShardStore(open_index(site.url), tmp_path / "tiny", 10).read(0, 0, 1)


def test_partial_files_of_killed_processes_are_removed(site: Site, tmp_path: Path):
    cache, index = tmp_path / "cache", open_index(site.url)
    cache.mkdir()
    first = index.shards[0]
    for name in (f"{'0' * 64}.99999999.partial", f"{first.sha256}.{first.bytes}.partial"):
        (cache / name).write_bytes(b"half")

    ShardStore(index, cache, 2 * max(shard.bytes for shard in index.shards)).read(0, 0, 1)

    assert not list(cache.glob("*.partial"))


def read_all(
    url: str, cache: Path, limit: float, first: int, results: multiprocessing.SimpleQueue
) -> None:
    """Read every file, beginning with the one numbered `first`."""
    index = open_index(url)
    store, spans = ShardStore(index, cache, limit), spans_of(index)
    results.put(sorted(store.read(*span) for span in spans[first:] + spans[:first]))


@pytest.mark.parametrize("shards_that_fit, processes", [(3, 4), (2, 2)])
def test_processes_share_a_cache(
    site: Site,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shards_that_fit: int,
    processes: int,
):
    monkeypatch.setattr(shards, "MAX_OPEN_CACHED", 1)
    index = open_index(site.url)
    limit = shards_that_fit * max(shard.bytes for shard in index.shards)
    cache, results = tmp_path / "cache", FORK.SimpleQueue()

    workers = [
        FORK.Process(target=read_all, args=(site.url, cache, limit, 8 * number, results))
        for number in range(processes)
    ]
    for worker in workers:
        worker.start()
    expected = files_in_tars(site.directory)
    assert all(results.get() == expected for _ in workers)
    for worker in workers:
        worker.join()

    assert sum(path.stat().st_size for path in cache.glob("*.tar")) <= limit
    if shards_that_fit == len(index.shards):
        assert all(site.requests[shard.url] == 1 for shard in index.shards)


def test_worker_processes_read_remote_shards(site: Site, packed: Path, tmp_path: Path):
    """They start from a process that has used the network library itself."""

    def read(location: str, workers: int) -> list[bytes]:
        source = Source(index=location, dataset="refcoco", split="train")
        config = DataConfig(
            train=(source,), image_size=32, workers=workers, cache_dir=tmp_path / "cache"
        )
        loader = train(config, 4, 2)
        read = []
        for _, batches in islice(loader.steps_from(0), 5):
            for batch in batches:
                read.append(batch.image.numpy().tobytes() + batch.words.numpy().tobytes())
        loader.close()
        return read

    assert read(site.url, 2) == read(str(packed), 0)
    assert all(site.requests[shard.url] <= 1 for shard in read_index(packed).shards)


# --------------------------------------------------------------------------------------- on S3


def test_shards_are_read_from_s3(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    server_of = pytest.importorskip(
        "moto.server", reason="S3 is tested against moto's server, which is not installed"
    )
    boto3 = pytest.importorskip("boto3", reason="S3 is tested with boto3, which is not installed")
    pytest.importorskip("s3fs", reason="s3:// addresses need s3fs, which is not installed")
    monkeypatch.setattr(shards, "FIRST_DELAY_S", 0.01)

    server = server_of.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        environment = {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "a",
            "AWS_SECRET_ACCESS_KEY": "b",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

        # Upload the set.
        client = boto3.client("s3")
        client.create_bucket(Bucket="sets")
        for path in packed.iterdir():
            client.upload_fileobj(io.BytesIO(path.read_bytes()), "sets", f"small/{path.name}")

        # Read it.
        index = open_index("s3://sets/small/")
        vocabulary = open_vocabulary(index, tmp_path / "cache")
        assert vocabulary.read_bytes() == (packed / "vocab.txt").read_bytes()
        store = ShardStore(index, tmp_path / "cache")
        assert read_everything(store, index) == files_in_tars(packed)
        with pytest.raises(InputError, match="s3://sets/other/index.json cannot be fetched"):
            open_index("s3://sets/other")
    finally:
        server.stop()
