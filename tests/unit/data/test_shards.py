"""Shards on disk, over HTTP and on S3: complete, fetched once, within the limit of the cache."""

from __future__ import annotations

import http.server
import io
import multiprocessing
import os
import pickle
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

from coupalign.config.schema import DataConfig, Source
from coupalign.data import shards
from coupalign.data.index import ShardIndex, read_index
from coupalign.data.shards import ShardStore, fetch, open_index, open_vocabulary
from coupalign.errors import InputError
from tests.unit.data.batches import train

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


def test_missing_file_is_requested_once(site: Site, tmp_path: Path):
    with pytest.raises(InputError, match="nowhere/index.json cannot be fetched"):
        open_index(f"{site.url}/nowhere")
    assert site.requests["nowhere/index.json"] == 1

    (site.directory / "shard-000000.tar").unlink()
    with pytest.raises(InputError, match="shard-000000.tar cannot be fetched"):
        ShardStore(open_index(site.url), tmp_path / "cache").read(0, 0, 1)
    assert site.requests["shard-000000.tar"] == 1


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


def test_shards_without_vocabulary_need_a_tokenizer(packed: Path):
    index = replace(read_index(packed), vocabulary=None)

    with pytest.raises(InputError, match="without a vocabulary"):
        open_vocabulary(index)


# ------------------------------------------------------------------------------------ the cache


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
