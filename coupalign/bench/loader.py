"""`coupalign bench loader CONFIG`: what the training loader gives on one core, beside what its photographs cost to decode.

The ways take turns over the same samples of data.train, step by step, in one process and on one thread, so that their ratios hold
whatever else the machine does:

    decode                       the stored JPEG, in memory already, to RGB at its full size: libjpeg-turbo alone, as the loader calls it
    decode and resize            and to the square of the model, the loader's way
    decode and resize, Pillow    the same two with Pillow, as the public repositories have them
    file by file                 how the public repositories do it: open a file by its name, decode it, decode the mask at full size, resize
                                 both, number the words of one sentence, for each sample. Their floating-point normalization is left out.
    loader                       the whole of ours: bytes from the shards, records, sentences, augmentation, batches
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from coupalign.bench.machine import Rates, Result, describe_machine, rates, resident_gigabytes
from coupalign.config.schema import Config, DataConfig
from coupalign.data import masks
from coupalign.data.build import build_train_loader, open_tokenizer
from coupalign.data.loader import TrainLoader
from coupalign.data.shards import is_remote
from coupalign.data.tokenizer import Tokenizer
from coupalign.data.transforms import decode_image, frame_of, image_to_square
from coupalign.distributed.world import World
from coupalign.errors import InputError

_WAYS = ("decode", "decode and resize", "decode and resize, Pillow", "file by file", "loader")


@dataclass(frozen=True)
class LoaderBench(Result):
    """What a loader gives.

    Attributes:
        samples_per_second: by way: median, lower and upper quartile over the steps; one core, but for "loader, N workers".
        ratios: of the medians, of "loader" to what stands behind the slash.
        kilobytes: of a stored photograph, mean.
        megapixels: the same.
        gigabytes: memory of this process before the first and after the last step ("start", "end"), and of its largest worker process
            ("worker start", "worker end") where there are workers.
        soak: memory of the largest worker process, by the samples that all of them have read since they started; empty where not asked for.
    """

    bench: ClassVar[str] = "loader"

    machine: dict[str, str]
    config: str
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
        """What is compared with an earlier result, by name."""
        return {
            **{f"samples/s {name}": rates[0] for name, rates in self.samples_per_second.items()},
            **self.ratios,
        }

    def table(self) -> str:
        """The same for people."""
        lines = [
            "  ".join(f"{name} {value}" for name, value in self.machine.items()),
            f"{self.config}: photographs of {self.megapixels:.2f} megapixels and {self.kilobytes:.0f} kB to {self.image_size} x "
            f"{self.image_size}, {self.steps} steps of {self.global_batch}",
            "",
            f"{'samples/s':<28}{'median':>10}{'lower':>10}{'upper quartile':>18}",
        ]
        lines += [
            f"{name:<28}{median:>10,.1f}{low:>10,.1f}{high:>18,.1f}"
            for name, (median, low, high) in self.samples_per_second.items()
        ]
        lines += [
            "",
            *(f"{name:<36}{value:>10.2f}" for name, value in self.ratios.items()),
            "",
            f"memory of this process: {self.gigabytes['start']:.2f} GB before, {self.gigabytes['end']:.2f} GB after",
        ]
        if "worker end" in self.gigabytes:
            before, after = self.gigabytes["worker start"], self.gigabytes["worker end"]
            lines.append(
                f"of the largest worker process: {before:.3f} GB before, {after:.3f} GB after"
            )
        lines += [
            f"{'of it after ' + samples + ' samples':<36}{held:>10.4f} GB"
            for samples, held in self.soak.items()
        ]
        return "\n".join(lines)


def bench_loader(config: Config, steps: int = 20, warmup: int = 2, soak: int = 0) -> LoaderBench:
    """Time the ways over `steps` steps, after `warmup` of them; then weigh the workers while they read `soak` samples.

    Raises:
        InputError: data.train is empty or cannot be read; there are no workers to weigh.
    """
    if soak and not config.data.workers:
        raise InputError(
            "--soak weighs worker processes, and there are none: set data.workers to 1 or more"
        )
    tokenizer = open_tokenizer(config.data)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with contextlib.closing(_open(config, config.data, tokenizer, 0)) as loader:
            seconds, photos, gigabytes = _one_core(loader, config, tokenizer, steps, warmup)
    finally:
        torch.set_num_threads(threads)
    found = {name: rates(config.train.global_batch, values) for name, values in seconds.items()}
    if config.data.workers:
        name = f"loader, {config.data.workers} workers"
        found[name], held = _through(
            config, config.data, tokenizer, config.data.workers, steps, warmup
        )
        gigabytes |= held
    found |= _uncached(config, tokenizer, steps)
    ratios = {f"loader / {name}": found["loader"][0] / found[name][0] for name in _WAYS[:-1]}
    bytes_, pixels = np.mean(photos, axis=0)
    return LoaderBench(
        describe_machine(torch.device("cpu")),
        config.name,
        config.data.image_size,
        config.train.global_batch,
        steps,
        found,
        ratios,
        float(bytes_) / 1e3,
        float(pixels) / 1e6,
        gigabytes,
        _soak(config, tokenizer, soak) if soak else {},
    )


def _open(config: Config, data: DataConfig, tokenizer: Tokenizer, workers: int) -> TrainLoader:
    return build_train_loader(
        data.model_copy(update={"workers": workers}),
        seed=config.seed,
        global_batch=config.train.global_batch,
        max_micro_batch=config.train.max_micro_batch,
        world=World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu")),
        tokenizer=tokenizer,
    )


def _one_core(
    loader: TrainLoader, config: Config, tokenizer: Tokenizer, steps: int, warmup: int
) -> tuple[dict[str, list[float]], list[tuple[int, int]], dict[str, float]]:
    """Seconds of each step by way; (bytes, pixels) of each photograph; memory."""
    seconds: dict[str, list[float]] = {name: [] for name in _WAYS}
    photos: list[tuple[int, int]] = []
    running = loader.steps_from(0)
    gigabytes = {}
    for step in tqdm(range(warmup + steps), desc="bench loader", unit="step", disable=None):
        if step == warmup:
            gigabytes["start"] = resident_gigabytes()
        taken, (_, batches) = _timed(lambda: next(running))
        numbers = [info.number for batch in batches for info in batch.info]
        stored = [loader.reader.read_stored(number) for number in numbers]
        with tempfile.TemporaryDirectory() as folder:
            ways = _ways(
                Path(folder),
                stored,
                [info.sentence for batch in batches for info in batch.info],
                config.data,
                tokenizer,
            )
            found = {name: _timed(way)[0] for name, way in ways.items()} | {"loader": taken}
        if step >= warmup:
            photos += [(len(jpeg), ref["height"] * ref["width"]) for jpeg, ref in stored]
            for name, value in found.items():
                seconds[name].append(value)
    gigabytes["end"] = resident_gigabytes()
    return seconds, photos, gigabytes


def _ways(
    folder: Path,
    stored: Sequence[tuple[bytes, dict[str, Any]]],
    sentences: Sequence[str],
    data: DataConfig,
    tokenizer: Tokenizer,
) -> dict[str, Callable[[], object]]:
    """What the loader is compared with, over one step's samples."""
    frames = [
        frame_of(ref["height"], ref["width"], data.image_size, data.resize) for _, ref in stored
    ]
    names = [folder / f"{place}.jpg" for place in range(len(stored))]
    for name, (jpeg, _) in zip(names, stored):
        name.write_bytes(jpeg)
    square = (data.image_size, data.image_size)
    return {
        "decode": lambda: [decode_image(jpeg).shape for jpeg, _ in stored],
        "decode and resize": lambda: [
            image_to_square(decode_image(jpeg, frame), frame)
            for (jpeg, _), frame in zip(stored, frames)
        ],
        "decode and resize, Pillow": lambda: [
            _pillow(io.BytesIO(jpeg), square) for jpeg, _ in stored
        ],
        "file by file": lambda: [
            _one_by_name(name, ref["rle"], sentence, data, tokenizer)
            for name, (_, ref), sentence in zip(names, stored, sentences)
        ],
    }


def _one_by_name(
    name: Path, rle: dict[str, Any], sentence: str, data: DataConfig, tokenizer: Tokenizer
) -> tuple[torch.Tensor, ...]:
    """A sample as the public repositories make it: uint8 [3, S, S], bool [S, S], words [T]."""
    square = (data.image_size, data.image_size)
    image = _pillow(name, square)
    mask = np.asarray(Image.fromarray(masks.decode(rle)).resize(square, Image.Resampling.NEAREST))
    words, _, _ = tokenizer.encode([sentence], data.max_tokens)
    return (
        torch.from_numpy(image.transpose(2, 0, 1).copy()),
        torch.from_numpy(mask.copy()),
        words[0],
    )


def _pillow(file: Path | io.BytesIO, square: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.open(file).convert("RGB").resize(square, Image.Resampling.BILINEAR))


def _through(
    config: Config, data: DataConfig, tokenizer: Tokenizer, workers: int, steps: int, warmup: int
) -> tuple[Rates, dict[str, float]]:
    """The loader alone: its rates, with workers, which run ahead, the mean over all steps; and the memory of the largest worker."""
    seconds, gigabytes = [], {}
    with contextlib.closing(_open(config, data, tokenizer, workers)) as loader:
        running = loader.steps_from(0)
        for step in range(warmup + steps):
            seconds.append(_timed(lambda: next(running))[0])
            if workers and step in (warmup, warmup + steps - 1):
                gigabytes["worker start" if step == warmup else "worker end"] = max(
                    map(resident_gigabytes, loader.worker_pids)
                )
    seconds = seconds[warmup:]
    return rates(
        config.train.global_batch, seconds if not workers else [sum(seconds) / len(seconds)]
    ), gigabytes


def _soak(config: Config, tokenizer: Tokenizer, samples: int) -> dict[str, float]:
    """Memory of the largest worker process at some ten places on the way through so many samples, by what was read until then."""
    steps = max(10, samples // config.train.global_batch)
    held = {}
    with contextlib.closing(_open(config, config.data, tokenizer, config.data.workers)) as loader:
        for step, _ in zip(
            tqdm(range(1, steps + 1), desc="soak", unit="step", disable=None), loader.steps_from(0)
        ):
            if step % (steps // 10) == 0:
                held[f"{step * config.train.global_batch:,}"] = max(
                    map(resident_gigabytes, loader.worker_pids)
                )
    return held


def _uncached(config: Config, tokenizer: Tokenizer, steps: int) -> dict[str, Rates]:
    """The loader on one core where the shards are not in memory, and where they are fetched over HTTP into an empty cache."""
    folders = [
        source.index.removeprefix("file://").removesuffix("/index.json")
        for source in config.data.train
    ]
    if any(is_remote(folder) for folder in folders):
        return {}
    for folder in folders:
        for shard in Path(folder).glob("*.tar"):
            _forget(shard)
    found = {"loader, cold files": _through(config, config.data, tokenizer, 0, steps, 0)[0]}
    with contextlib.ExitStack() as stack:
        addresses = [stack.enter_context(_served(Path(folder))) for folder in folders]
        cache = stack.enter_context(tempfile.TemporaryDirectory())
        sources = tuple(
            source.model_copy(update={"index": address})
            for source, address in zip(config.data.train, addresses)
        )
        remote = config.data.model_copy(
            update={"train": sources, "evaluate": (), "cache_dir": Path(cache)}
        )
        found["loader, HTTP, empty cache"] = _through(config, remote, tokenizer, 0, steps, 0)[0]
    return found


def _forget(file: Path) -> None:
    """Drop a file from the page cache."""
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fdatasync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _served(folder: Path) -> Iterator[str]:
    """The address at which a folder can be fetched by this machine; a process of its own serves it."""
    command = [
        sys.executable,
        "-u",
        "-m",
        "http.server",
        "0",
        "--bind",
        "127.0.0.1",
        "--directory",
        str(folder),
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        try:
            assert server.stdout is not None
            yield re.search(r"http://[\d.:]+", server.stdout.readline())[0]
        finally:
            server.terminate()


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result
