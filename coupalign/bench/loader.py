"""`coupalign bench loader CONFIG`: compare the training loader on one core with decoding alone.

The methods take turns over the same samples of data.train, step by step, in one process and on one
thread. So their ratios hold whatever else the machine does:

    decode                       the stored JPEG, which is in memory, to RGB at its full size:
                                 libjpeg-turbo alone, called as the loader calls it
    decode and resize            the same, and resized to the square input of the model as the
                                 loader does it
    decode and resize, Pillow    the same two steps with Pillow, as in the public repositories
    file by file                 the method of the public repositories, per sample: open a file by
                                 its name, decode it, decode the mask at full size, resize both, and
                                 tokenize one sentence. Without their floating-point normalization.
    loader                       our whole loader: bytes from the shards, records, sentences,
                                 augmentation, batches
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from coupalign.bench.machine import (
    Rates,
    describe_machine,
    resident_gigabytes,
    sample_rates,
    time_call,
)
from coupalign.bench.result import Result, format_pairs, format_rows, format_values, prefixed
from coupalign.config.schema import Config, DataConfig
from coupalign.data import masks
from coupalign.data.build import build_train_loader, open_tokenizer
from coupalign.data.loader import TrainLoader
from coupalign.data.pictures import open_picture
from coupalign.data.shards import is_remote
from coupalign.data.tokenizer import Tokenizer
from coupalign.data.transforms import decode_image, frame_of, image_to_square
from coupalign.distributed.world import World
from coupalign.errors import InputError

# What the loader is compared with.
_BASELINES = ("decode", "decode and resize", "decode and resize, Pillow", "file by file")


@dataclass(frozen=True, kw_only=True)
class LoaderBench(Result):
    """How fast a loader is.

    Attributes:
        samples_per_second: by method: median, lower and upper quartile over the steps. All run on
            one core, except "loader, N workers".
        ratios: the median of "loader" divided by that of another method, as "loader / decode".
        kilobytes: mean size of a stored image.
        megapixels: mean size of a stored image.
        gigabytes: memory of this process before the first step ("start") and after the last
            ("end"), and of its largest worker process ("worker start", "worker end") if there are
            workers.
        soak: memory of the largest worker process, by the number of samples that all workers have
            read so far. Empty if not asked for.
    """

    bench: ClassVar[str] = "loader"

    image_size: int
    global_batch: int
    steps: int
    samples_per_second: dict[str, Rates]
    ratios: dict[str, float]
    kilobytes: float
    megapixels: float
    gigabytes: dict[str, float]
    soak: dict[str, float] = field(default_factory=dict)

    def figures(self) -> dict[str, float]:
        """Return the figures to compare with an earlier result, by name."""
        medians = {name: median for name, (median, _, _) in self.samples_per_second.items()}
        return {**prefixed("samples/s ", medians), **self.ratios}

    def table(self) -> str:
        """Format the result for people."""
        rates = []
        for name, (median, low, high) in self.samples_per_second.items():
            rates.append((name, f"{median:,.1f}", f"{low:,.1f}", f"{high:,.1f}"))

        lines = [
            format_pairs(self.machine),
            f"{self.config}: images of {self.megapixels:.2f} megapixels and "
            f"{self.kilobytes:.0f} kB to {self.image_size} x {self.image_size}, "
            f"{self.steps} steps of {self.global_batch}",
            "",
            format_rows(rates, headers=("samples/s", "median", "lower", "upper quartile")),
            "",
            format_rows(format_values("{:.2f}", self.ratios).items()),
            "",
            f"memory of this process: {self.gigabytes['start']:.2f} GB before, "
            f"{self.gigabytes['end']:.2f} GB after",
        ]
        if "worker end" in self.gigabytes:
            lines.append(
                f"memory of the largest worker process: {self.gigabytes['worker start']:.3f} GB "
                f"before, {self.gigabytes['worker end']:.3f} GB after"
            )
        if self.soak:
            soak = []
            for samples, held in self.soak.items():
                soak.append((f"largest worker after {samples} samples", f"{held:.4f} GB"))
            lines.append(format_rows(soak))
        return "\n".join(lines)


def bench_loader(config: Config, steps: int = 20, warmup: int = 2, soak: int = 0) -> LoaderBench:
    """Compare the loader with other methods, then measure the memory of its workers.

    Args:
        config: reads data, train and seed.
        steps: how many to time, for each method.
        warmup: steps before them that are not timed.
        soak: samples that the workers read while their memory is measured. 0: do not measure it.

    Raises:
        InputError: data.train is empty or cannot be read, or `soak` is set but there are no
            workers.
    """
    if soak and not config.data.workers:
        raise InputError(
            "--soak measures the memory of worker processes, and there are none: "
            "set data.workers to 1 or more"
        )
    tokenizer = open_tokenizer(config.data)

    with _one_thread(), _opened(config, tokenizer, workers=0) as loader:
        one_core = _measure_one_core(loader, config, tokenizer, steps, warmup=warmup)

    global_batch = config.train.global_batch
    rates = {name: sample_rates(global_batch, values) for name, values in one_core.seconds.items()}
    gigabytes = one_core.gigabytes
    if config.data.workers:
        name = f"loader, {config.data.workers} workers"
        rates[name], worker_gigabytes = _measure_workers(config, tokenizer, steps, warmup)
        gigabytes |= worker_gigabytes
    rates |= _measure_uncached(config, tokenizer, steps)

    return LoaderBench(
        machine=describe_machine(torch.device("cpu")),
        config=config.name,
        image_size=config.data.image_size,
        global_batch=global_batch,
        steps=steps,
        samples_per_second=rates,
        ratios={f"loader / {name}": rates["loader"][0] / rates[name][0] for name in _BASELINES},
        kilobytes=float(np.mean(one_core.image_bytes)) / 1e3,
        megapixels=float(np.mean(one_core.image_pixels)) / 1e6,
        gigabytes=gigabytes,
        soak=_soak(config, tokenizer, soak) if soak else {},
    )


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _opened(
    config: Config, tokenizer: Tokenizer, workers: int
) -> contextlib.AbstractContextManager[TrainLoader]:
    """Open the training loader of a single rank. The block's end closes it."""
    loader = build_train_loader(
        config.data.model_copy(update={"workers": workers}),
        seed=config.seed,
        global_batch=config.train.global_batch,
        max_micro_batch=config.train.max_micro_batch,
        world=World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu")),
        tokenizer=tokenizer,
    )
    return contextlib.closing(loader)


# --------------------------------------------------------------------------- methods on one core

# The bytes of an image, and the record of its ref, as the reader returns them.
Stored = tuple[bytes, dict[str, Any]]


@dataclass
class _OneCore:
    """Measurements on one core.

    Attributes:
        seconds: of each step, by method.
        image_bytes: size of each stored image.
        image_pixels: size of each stored image.
        gigabytes: see `LoaderBench.gigabytes`.
    """

    seconds: dict[str, list[float]] = field(default_factory=dict)
    image_bytes: list[int] = field(default_factory=list)
    image_pixels: list[int] = field(default_factory=list)
    gigabytes: dict[str, float] = field(default_factory=dict)


def _measure_one_core(
    loader: TrainLoader, config: Config, tokenizer: Tokenizer, steps: int, *, warmup: int
) -> _OneCore:
    """Time the loader and every baseline on the samples of each step."""
    measured = _OneCore(seconds={name: [] for name in (*_BASELINES, "loader")})
    loaded_steps = loader.steps_from(0)

    for step in tqdm(range(warmup + steps), desc="bench loader", unit="step", disable=None):
        if step == warmup:
            measured.gigabytes["start"] = resident_gigabytes()

        # The loader reads a step, then the baselines process the same samples.
        loader_seconds, (_, batches) = time_call(lambda: next(loaded_steps))
        infos = [info for batch in batches for info in batch.info]
        stored = [loader.reader.read_stored(info.number) for info in infos]
        sentences = [info.sentence for info in infos]
        with tempfile.TemporaryDirectory() as folder:
            baselines = _baselines(Path(folder), stored, sentences, config.data, tokenizer)
            seconds = {name: time_call(method)[0] for name, method in baselines.items()}
        seconds["loader"] = loader_seconds

        if step >= warmup:
            for name, value in seconds.items():
                measured.seconds[name].append(value)
            measured.image_bytes += [len(jpeg) for jpeg, _ in stored]
            measured.image_pixels += [ref["height"] * ref["width"] for _, ref in stored]

    measured.gigabytes["end"] = resident_gigabytes()
    return measured


def _baselines(
    folder: Path,
    stored: Sequence[Stored],
    sentences: Sequence[str],
    data: DataConfig,
    tokenizer: Tokenizer,
) -> dict[str, Callable[[], object]]:
    """Return what the loader is compared with: functions that process the samples of one step."""
    square = (data.image_size, data.image_size)
    jpegs = [jpeg for jpeg, _ in stored]
    refs = [ref for _, ref in stored]
    frames = [frame_of(ref["height"], ref["width"], data.image_size, data.resize) for ref in refs]

    files = []
    for index, jpeg in enumerate(jpegs):
        files.append(folder / f"{index}.jpg")
        files[-1].write_bytes(jpeg)

    def decode() -> object:
        return [decode_image(jpeg).shape for jpeg in jpegs]

    def decode_and_resize() -> object:
        return [
            image_to_square(decode_image(jpeg, frame), frame) for jpeg, frame in zip(jpegs, frames)
        ]

    def decode_and_resize_with_pillow() -> object:
        return [_load_with_pillow(io.BytesIO(jpeg), square) for jpeg in jpegs]

    def file_by_file() -> object:
        return [
            _load_file(file, ref["rle"], sentence, data=data, tokenizer=tokenizer)
            for file, ref, sentence in zip(files, refs, sentences)
        ]

    functions = (decode, decode_and_resize, decode_and_resize_with_pillow, file_by_file)
    return dict(zip(_BASELINES, functions))


def _load_file(
    file: Path, rle: dict[str, Any], sentence: str, *, data: DataConfig, tokenizer: Tokenizer
) -> tuple[Tensor, Tensor, Tensor]:
    """Load a sample as the public repositories do.

    Returns:
        image uint8 [3, S, S], mask bool [S, S], words int64 [T].
    """
    square = (data.image_size, data.image_size)
    image = _load_with_pillow(file, square)
    mask = Image.fromarray(masks.decode(rle)).resize(square, Image.Resampling.NEAREST)
    words, _, _ = tokenizer.encode([sentence], data.max_tokens)
    return (
        torch.from_numpy(image.transpose(2, 0, 1).copy()),
        torch.from_numpy(np.asarray(mask).copy()),
        words[0],
    )


def _load_with_pillow(file: Path | io.BytesIO, square: tuple[int, int]) -> np.ndarray:
    opened = open_picture(file, ("JPEG",))
    image = opened.convert("RGB").resize(square, Image.Resampling.BILINEAR)
    return np.asarray(image)


# ---------------------------------------------------------------------------------- workers


def _measure_workers(
    config: Config, tokenizer: Tokenizer, steps: int, warmup: int
) -> tuple[Rates, dict[str, float]]:
    """Time the loader with its workers.

    The workers read ahead, so the time of a single step says nothing: all three rates are the mean.

    Returns:
        the rates, and the memory of the largest worker before and after.
    """
    seconds, gigabytes = [], {}
    with _opened(config, tokenizer, config.data.workers) as loader:
        loaded_steps = loader.steps_from(0)
        for step in range(warmup + steps):
            seconds.append(time_call(lambda: next(loaded_steps))[0])
            if step == warmup:
                gigabytes["worker start"] = _largest_worker_gigabytes(loader)
        gigabytes["worker end"] = _largest_worker_gigabytes(loader)

    mean = sum(seconds[warmup:]) / steps
    return sample_rates(config.train.global_batch, [mean]), gigabytes


def _soak(config: Config, tokenizer: Tokenizer, samples: int) -> dict[str, float]:
    """Measure the memory of the largest worker about ten times while `samples` are read."""
    global_batch = config.train.global_batch
    steps = max(10, samples // global_batch)
    gigabytes = {}
    with _opened(config, tokenizer, config.data.workers) as loader:
        loaded_steps = loader.steps_from(0)
        for step in tqdm(range(1, steps + 1), desc="soak", unit="step", disable=None):
            next(loaded_steps)
            if step % (steps // 10) == 0:
                gigabytes[f"{step * global_batch:,}"] = _largest_worker_gigabytes(loader)
    return gigabytes


def _largest_worker_gigabytes(loader: TrainLoader) -> float:
    return max(resident_gigabytes(pid) for pid in loader.worker_pids)


# ---------------------------------------------------------------------------- without a warm cache


def _measure_uncached(config: Config, tokenizer: Tokenizer, steps: int) -> dict[str, Rates]:
    """Time the loader on one core with cold files, and over HTTP with an empty cache.

    Cold files are not in the page cache. Remote shards are not measured.
    """
    sources = config.data.train
    folders = [
        source.index.removeprefix("file://").removesuffix("/index.json") for source in sources
    ]
    if any(is_remote(folder) for folder in folders):
        return {}

    for folder in folders:
        for shard in Path(folder).glob("*.tar"):
            _drop_from_page_cache(shard)
    rates = {"loader, cold files": _measure_from_first_step(config, tokenizer, steps)}

    with contextlib.ExitStack() as stack:
        cache = stack.enter_context(tempfile.TemporaryDirectory())
        served = []
        for source, folder in zip(sources, folders):
            address = stack.enter_context(_served_over_http(Path(folder)))
            served.append(source.model_copy(update={"index": address}))

        changes = {"train": tuple(served), "evaluate": (), "cache_dir": Path(cache)}
        remote = config.model_copy(update={"data": config.data.model_copy(update=changes)})
        rates["loader, HTTP, empty cache"] = _measure_from_first_step(remote, tokenizer, steps)
    return rates


def _measure_from_first_step(config: Config, tokenizer: Tokenizer, steps: int) -> Rates:
    """Time the loader without workers and without warmup."""
    with _opened(config, tokenizer, workers=0) as loader:
        loaded_steps = loader.steps_from(0)
        seconds = [time_call(lambda: next(loaded_steps))[0] for _ in range(steps)]
    return sample_rates(config.train.global_batch, seconds)


def _drop_from_page_cache(file: Path) -> None:
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fdatasync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _served_over_http(folder: Path) -> Iterator[str]:
    """Serve a folder to this machine from another process. Yields its address."""
    options = ["--bind", "127.0.0.1", "--directory", str(folder)]
    command = [sys.executable, "-u", "-m", "http.server", "0", *options]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        try:
            assert server.stdout is not None
            first_line = server.stdout.readline()
            yield re.search(r"http://[\d.:]+", first_line)[0]
        finally:
            server.terminate()
