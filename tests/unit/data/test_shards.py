"""Shards on disk, over HTTP and on S3: whole, fetched once, within the bounds of the cache."""

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


class Site:
    """A directory on a real HTTP server; `answer` may replace the answer to the n-th request of a path."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.requests: Counter[str] = Counter()
        self.answer: Callable[[str, int, bytes], tuple[int, bytes, int]] | None = (
            None  # -> status, body, announced length
        )
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
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        ).start()


@pytest.fixture
def site(packed: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(shards, "FIRST_DELAY_S", 0.01)
    site = Site(packed)
    yield site
    site.server.shutdown()
    site.server.server_close()


def parts_of(index: ShardIndex) -> list[tuple[int, int, int]]:
    return [(image.shard, *place) for image in index.images for place in (image.jpg, image.json)]


def parts_in_tars(directory: Path) -> list[bytes]:
    """The files of all shards in their order, read by `tarfile`."""
    found = []
    for path in sorted(directory.glob("*.tar")):
        with tarfile.open(path) as tar:
            found += [tar.extractfile(member).read() for member in tar if member.isfile()]
    return found


def tars(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.tar"))


def test_a_local_shard_is_read_in_place(packed: Path):
    index = open_index(str(packed))
    assert index == open_index(f"file://{packed}")
    store = pickle.loads(pickle.dumps(ShardStore(index)))
    assert sorted(store.read(*part) for part in parts_of(index)) == sorted(parts_in_tars(packed))
    store.close()
    assert store.read(*parts_of(index)[0])


def test_few_files_stay_open(packed: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shards, "MAX_OPEN_LOCAL", 1)
    index = open_index(str(packed))
    store, before = ShardStore(index), len(os.listdir("/proc/self/fd"))
    for part in parts_of(index) * 2:
        store.read(*part)
    assert len(os.listdir("/proc/self/fd")) == before + 1


def test_a_missing_and_a_truncated_local_shard(packed: Path):
    index = open_index(str(packed))
    (packed / "shard-000000.tar").unlink()
    with pytest.raises(
        InputError, match=r"shard .*shard-000000.tar cannot be opened: No such file"
    ):
        ShardStore(index).read(0, 0, 10)
    os.truncate(packed / "shard-000001.tar", 2000)
    with pytest.raises(ValueError, match="cut short"):
        ShardStore(index).read(1, 1990, 20)


def test_index_vocabulary_and_shards_over_http(site: Site, packed: Path, tmp_path: Path):
    index, local = open_index(f"{site.url}/index.json"), read_index(packed)
    assert index == open_index(site.url + "/") and replace(index, location=local.location) == local
    vocabulary = open_vocabulary(index, tmp_path / "cache")
    assert vocabulary.read_bytes() == open_vocabulary(local).read_bytes()
    store = ShardStore(index, tmp_path / "cache")
    assert sorted(store.read(*part) for part in parts_of(index)) == sorted(parts_in_tars(packed))
    assert all(site.requests[shard.url] == 1 for shard in index.shards)
    assert [path.stem for path in tars(tmp_path / "cache")] == sorted(
        shard.sha256 for shard in index.shards
    )
    again = ShardStore(index, tmp_path / "cache")
    assert (
        again.read(*parts_of(index)[0]) and site.requests[index.shards[0].url] == 1
    )  # from the cache


def test_what_is_not_there_is_said_at_once(site: Site, tmp_path: Path):
    with pytest.raises(InputError, match="nowhere/index.json cannot be fetched"):
        open_index(f"{site.url}/nowhere")
    assert site.requests["nowhere/index.json"] == 1
    (site.directory / "shard-000000.tar").unlink()
    with pytest.raises(InputError, match="shard-000000.tar cannot be fetched"):
        ShardStore(open_index(site.url), tmp_path / "cache").read(0, 0, 1)
    assert site.requests["shard-000000.tar"] == 1


def test_a_server_in_trouble_is_asked_again(site: Site, tmp_path: Path):
    site.answer = lambda name, times, body: (500, b"", 0) if times <= 2 else (200, body, len(body))
    index = open_index(site.url)
    assert ShardStore(index, tmp_path / "cache").read(*parts_of(index)[0])
    assert site.requests["index.json"] == site.requests["shard-000000.tar"] == 3
    site.answer = lambda name, times, body: (503, b"", 0)
    with pytest.raises(InputError, match="tried 4 times: .*503"):
        fetch(f"{site.url}/index.json")


def test_a_server_that_is_not_there(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shards, "FIRST_DELAY_S", 0.01)
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    server.server_close()
    with pytest.raises(InputError, match="tried 4 times"):
        open_index(f"http://127.0.0.1:{server.server_address[1]}/x")


def test_a_server_that_stalls_is_asked_again(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    index, over = open_index(site.url), threading.Event()
    monkeypatch.setattr(shards, "SILENCE_TIMEOUT_S", 0.3)

    def stall(name: str, times: int, body: bytes) -> tuple[int, bytes, int]:
        if times == 1:
            over.wait(20)
        return 200, body, len(body)

    site.answer = stall
    assert ShardStore(index, tmp_path / "cache").read(*parts_of(index)[0])
    over.set()
    assert site.requests["shard-000000.tar"] == 2


def test_an_answer_cut_short_is_fetched_again(site: Site, tmp_path: Path):
    index = open_index(site.url)
    site.answer = lambda name, times, body: (
        200,
        body[: len(body) // 2] if times == 1 else body,
        len(body),
    )
    store = ShardStore(index, tmp_path / "cache")
    assert sorted(store.read(*part) for part in parts_of(index)) == sorted(
        parts_in_tars(site.directory)
    )
    assert site.requests["shard-000000.tar"] == 2


@pytest.mark.parametrize(
    "damage, words",
    [
        (
            lambda body: bytes([body[0] ^ 1]) + body[1:],
            "sha256 [0-9a-f]{64} instead of [0-9a-f]{64}",
        ),
        (lambda body: body[:-512], "bytes instead of [0-9]+"),
    ],
)
def test_a_wrong_shard_is_fetched_twice_then_named(
    site: Site, tmp_path: Path, damage: Callable[[bytes], bytes], words: str
):
    index = open_index(site.url)
    site.answer = lambda name, times, body: (200, damage(body), len(damage(body)))
    with pytest.raises(
        InputError, match=f"shard shard-000001.tar at {site.url}/shard-000001.tar .*{words}, twice"
    ):
        ShardStore(index, tmp_path / "cache").read(1, 0, 1)
    assert site.requests["shard-000001.tar"] == 2
    assert not tars(tmp_path / "cache") and not list((tmp_path / "cache").glob("*.partial"))
    site.answer = lambda name, times, body: (
        200,
        body if times > 3 else damage(body),
        len(body if times > 3 else damage(body)),
    )
    assert (
        len(ShardStore(index, tmp_path / "cache").read(1, 0, 1)) == 1
    )  # wrong once more, then right


def test_a_wrong_vocabulary_is_refused(site: Site, tmp_path: Path):
    index = open_index(site.url)
    site.answer = lambda name, times, body: (200, body + b"x\n", len(body) + 2)
    with pytest.raises(InputError, match="not the vocabulary of its index"):
        open_vocabulary(index, tmp_path / "cache")
    with pytest.raises(InputError, match="without a vocabulary"):
        open_vocabulary(replace(index, vocabulary=None))


def test_the_cache_throws_out_what_was_unused_longest(site: Site, tmp_path: Path):
    cache, index = tmp_path / "cache", open_index(site.url)
    limit = sum(shard.bytes for shard in index.shards) - 1
    for number in (0, 1):
        ShardStore(index, cache, limit).read(number, 0, 1)
    os.utime(cache / f"{index.shards[1].sha256}.tar", (1, 1))
    ShardStore(index, cache, limit).read(0, 0, 1)
    ShardStore(index, cache, limit).read(2, 0, 1)
    assert {path.stem for path in tars(cache)} == {index.shards[0].sha256, index.shards[2].sha256}


def test_a_shard_in_use_is_kept_and_a_cache_too_small_is_said(site: Site, tmp_path: Path):
    cache, index = tmp_path / "cache", open_index(site.url)
    size = max(shard.bytes for shard in index.shards)
    in_use = ShardStore(index, cache, 2 * size)
    in_use.read(0, 0, 1)
    os.utime(cache / f"{index.shards[0].sha256}.tar", (1, 1))  # the oldest, and yet
    other = ShardStore(index, cache, 2 * size)
    other.read(1, 0, 1)
    with pytest.raises(
        InputError, match="cache .* is full: .* shard shard-000002.tar, data.cache_gb allows"
    ):
        other.read(2, 0, 1)
    assert {path.stem for path in tars(cache)} == {index.shards[0].sha256, index.shards[1].sha256}
    in_use.close()
    assert other.read(2, 0, 1)
    assert {path.stem for path in tars(cache)} == {index.shards[1].sha256, index.shards[2].sha256}
    with pytest.raises(InputError, match="is full"):
        ShardStore(index, tmp_path / "tiny", 10).read(0, 0, 1)


def test_what_a_killed_process_left_is_removed(site: Site, tmp_path: Path):
    cache, index = tmp_path / "cache", open_index(site.url)
    cache.mkdir()
    left = [
        cache / f"{'0' * 64}.99999999.partial",
        cache / f"{index.shards[0].sha256}.{index.shards[0].bytes}.partial",
    ]
    for path in left:
        path.write_bytes(b"half")
    ShardStore(index, cache, 2 * max(shard.bytes for shard in index.shards)).read(0, 0, 1)
    assert not list(cache.glob("*.partial"))


def read_all(
    url: str, cache: Path, limit: float, first: int, results: multiprocessing.SimpleQueue
) -> None:
    index = open_index(url)
    store, parts = ShardStore(index, cache, limit), parts_of(index)
    results.put(sorted(store.read(*part) for part in parts[first:] + parts[:first]))


@pytest.mark.parametrize("shards_that_fit, processes", [(3, 4), (2, 2)])
def test_many_processes_share_a_cache(
    site: Site,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shards_that_fit: int,
    processes: int,
):
    monkeypatch.setattr(shards, "MAX_OPEN_CACHED", 1)
    index = open_index(site.url)
    limit = shards_that_fit * max(shard.bytes for shard in index.shards)
    results = FORK.SimpleQueue()
    cache = tmp_path / "cache"
    workers = [
        FORK.Process(target=read_all, args=(site.url, cache, limit, 8 * n, results))
        for n in range(processes)
    ]
    for worker in workers:
        worker.start()
    expected = sorted(parts_in_tars(site.directory))
    assert all(results.get() == expected for _ in workers)
    for worker in workers:
        worker.join()
    assert sum(path.stat().st_size for path in tars(cache)) <= limit
    if shards_that_fit == len(index.shards):
        assert all(site.requests[shard.url] == 1 for shard in index.shards)


def test_worker_processes_read_remote_shards(site: Site, packed: Path, tmp_path: Path):
    """They are forked from a process that has used the network library itself."""

    def read(location: str, workers: int) -> list[bytes]:
        source = Source(index=location, dataset="refcoco", split="train")
        config = DataConfig(
            train=(source,), image_size=32, workers=workers, cache_dir=tmp_path / "cache"
        )
        loader = train(config, 4, 2)
        steps = [step for _, step in islice(loader.steps_from(0), 5)]
        loader.close()
        return [
            batch.image.numpy().tobytes() + batch.words.numpy().tobytes()
            for step in steps
            for batch in step
        ]

    assert read(site.url, 2) == read(str(packed), 0)
    assert all(site.requests[shard.url] <= 1 for shard in read_index(packed).shards)


def test_s3(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
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
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "a",
            "AWS_SECRET_ACCESS_KEY": "b",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        client = boto3.client("s3")
        client.create_bucket(Bucket="sets")
        for path in packed.iterdir():
            client.upload_fileobj(io.BytesIO(path.read_bytes()), "sets", f"small/{path.name}")
        index = open_index("s3://sets/small/")
        assert (
            open_vocabulary(index, tmp_path / "cache").read_bytes()
            == (packed / "vocab.txt").read_bytes()
        )
        store = ShardStore(index, tmp_path / "cache")
        assert sorted(store.read(*part) for part in parts_of(index)) == sorted(
            parts_in_tars(packed)
        )
        with pytest.raises(InputError, match="s3://sets/other/index.json cannot be fetched"):
            open_index("s3://sets/other")
    finally:
        server.stop()
