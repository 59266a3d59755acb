"""`coupalign bench eval CONFIG`: what scoring costs, by part: the very scoring of `coupalign eval`, watched from outside."""
from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from coupalign import dist
from coupalign.bench.machine import Rates, Result, describe_machine, rates
from coupalign.config.schema import Config
from coupalign.data.batch import Batch
from coupalign.data.loader import EvalLoader, build_eval_loader, open_tokenizer
from coupalign.dist import World
from coupalign.engine.base import MixedPrecision
from coupalign.errors import InputError
from coupalign.evaluation.evaluator import evaluate
from coupalign.evaluation.protocols import find_protocol
from coupalign.model.methods import build_model


@dataclass(frozen=True)
class EvalBench(Result):
    """What scoring costs on this rank.

    Attributes:
        samples_per_second: of all ranks: median, lower and upper quartile over the batches.
        milliseconds: of a batch, medians: "batch"; "data", waiting for the loader; "model", to the device and through the model;
            "counting", the pixels at the original resolution.
    """

    bench: ClassVar[str] = "eval"

    machine: dict[str, str]
    config: str
    ranks: int
    batch: int
    batches: int
    precision: str
    protocol: str
    samples_per_second: Rates
    milliseconds: dict[str, float]

    def figures(self) -> dict[str, float]:
        """What is compared with an earlier result, by name."""
        return {"samples/s": self.samples_per_second[0], **{f"ms {name}": value for name, value in self.milliseconds.items()}}

    def table(self) -> str:
        """The same for people."""
        median, low, high = self.samples_per_second
        lines = [f"{self.config}: {self.precision}, {self.ranks} ranks, batches of {self.batch}, protocol {self.protocol}",
                 "  ".join(f"{name} {value}" for name, value in self.machine.items()), "",
                 f"{median:,.2f} samples/s (median of {self.batches} batches; quartiles {low:,.2f} … {high:,.2f}); RefCOCO val, 10,834 "
                 f"sentences, would take {10_834 / median:,.0f} s (calculated)", "", f"{'part':<14}{'ms':>10}"]
        return "\n".join([*lines, *(f"{name:<14}{value:>10.2f}" for name, value in self.milliseconds.items())])


def bench_eval(config: Config, world: World, batches: int = 20, warmup: int = 5) -> EvalBench:
    """Time the scoring of so many batches of the first of data.evaluate, by a model with random weights; collective.

    Raises:
        InputError: data.evaluate is empty, cannot be read, or has fewer samples.
    """
    tokenizer = open_tokenizer(config.data)
    batch, source = config.evaluate.batch, config.data.evaluate[:1]
    wanted = (batches + warmup) * batch * world.size
    loader = build_eval_loader(config.data, source, batch, world.rank, world.size, tokenizer, limit=wanted)
    if loader.samples < wanted:
        raise InputError(f"{source[0].index} has {loader.samples:,} samples to score, {wanted:,} are asked for: lower --steps, --warmup or "
                         "evaluate.batch")
    model = MixedPrecision(build_model(config.model, len(tokenizer), config.data.image_size).to(world.device).eval(), config.precision)
    watched = _Watched(loader)
    evaluate(partial(watched.infer, model, world), watched, [find_protocol(config.evaluate.protocol)],
             gather=partial(dist.gather_rows, world=world), rank=world.rank, bootstrap=0, title="bench eval")
    parts = {name: values[warmup:] for name, values in watched.parts().items()}
    return EvalBench(describe_machine(world.device), config.name, world.size, batch, batches, config.precision,
                     config.evaluate.protocol, rates(batch * world.size, parts["batch"]),
                     {name: 1e3 * statistics.median(values) for name, values in parts.items()})


class _Watched:
    """An EvalLoader that notes when a batch is asked for, handed out, and through the model."""

    def __init__(self, loader: EvalLoader) -> None:
        self.loader = loader
        self.times: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        self.times.append(time.perf_counter())
        for batch in self.loader:
            self.times.append(time.perf_counter())
            yield batch
            self.times.append(time.perf_counter())

    @torch.no_grad()
    def infer(self, model: torch.nn.Module, world: World, batch: Batch) -> Tensor:
        """Logits float32 [B, S, S], which are there when it returns."""
        batch = batch.to(world.device)
        logits = model(batch.image, batch.words, batch.word_mask).float()
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
        self.times.append(time.perf_counter())
        return logits

    def parts(self) -> dict[str, list[float]]:
        """Seconds of each batch: whole, and by part."""
        asked, given, through, asked_again = (self.times[first::3] for first in (0, 1, 2, 3))
        return {"batch": [end - begin for begin, end in zip(asked, asked_again)],
                "data": [end - begin for begin, end in zip(asked, given)],
                "model": [end - begin for begin, end in zip(given, through)],
                "counting": [end - begin for begin, end in zip(through, asked_again)]}
