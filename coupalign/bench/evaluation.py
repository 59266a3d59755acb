"""`coupalign bench eval CONFIG`: what scoring costs, by part: the very scoring of `coupalign eval`, watched from outside."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.profiler import profile, record_function

from coupalign.bench.calls import activities, count_calls
from coupalign.bench.machine import Rates, Result, describe_machine, rates
from coupalign.config.schema import Config
from coupalign.data.batch import Batch
from coupalign.data.build import build_eval_loader, open_tokenizer
from coupalign.data.loader import EvalLoader
from coupalign.distributed.world import World
from coupalign.engine.base import MixedPrecision, Phases
from coupalign.errors import InputError
from coupalign.evaluation.evaluator import evaluate
from coupalign.evaluation.protocols import find_protocol
from coupalign.model.build import build_model

_MODEL = "bench eval: model"  # what the profiler calls it
_PROFILED = 3  # batches


@dataclass(frozen=True)
class EvalBench(Result):
    """What scoring costs on this rank.

    Attributes:
        samples_per_second: of all ranks: median, lower and upper quartile over the batches.
        milliseconds: of a batch, medians: "batch"; "data", waiting for the loader; "model", to the device and through the model;
            "counting", the pixels at the original resolution, and reading the integers of the batch before. On a GPU the last two are
            the time of its stream, which goes on while the host waits for data: the parts may be more than the whole.
        calls: a sample, counted in a few other batches: operators, those of counting among them, numbers read back; on a GPU kernels
            launched and waits for it.
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
    calls: dict[str, float]

    def figures(self) -> dict[str, float]:
        """What is compared with an earlier result, by name."""
        return {
            "samples/s": self.samples_per_second[0],
            **{f"ms {name}": value for name, value in self.milliseconds.items()},
            **self.calls,
        }

    def table(self) -> str:
        """The same for people."""
        median, low, high = self.samples_per_second
        lines = [
            f"{self.config}: {self.precision}, {self.ranks} ranks, batches of {self.batch}, protocol {self.protocol}",
            "  ".join(f"{name} {value}" for name, value in self.machine.items()),
            "",
            f"{median:,.2f} samples/s (median of {self.batches} batches; quartiles {low:,.2f} … {high:,.2f}); RefCOCO val, 10,834 "
            f"sentences, would take {10_834 / median:,.0f} s (calculated)",
            "",
            f"{'part':<14}{'ms':>10}",
        ]
        lines += [f"{name:<14}{value:>10.2f}" for name, value in self.milliseconds.items()]
        return "\n".join(
            [
                *lines,
                "",
                "  ".join(f"{name} {value:,.2f}" for name, value in self.calls.items())
                + "  (a sample)",
            ]
        )


def bench_eval(config: Config, world: World, batches: int = 20, warmup: int = 5) -> EvalBench:
    """Time the scoring of so many batches of the first of data.evaluate, by a model with random weights; collective.

    Raises:
        InputError: data.evaluate is empty, cannot be read, or has fewer samples.
    """
    tokenizer = open_tokenizer(config.data)
    batch, source = config.evaluate.batch, config.data.evaluate[:1]
    wanted = (batches + warmup) * batch * world.size
    loader = build_eval_loader(
        config.data, source, batch=batch, world=world, tokenizer=tokenizer, limit=wanted
    )
    if loader.samples < wanted:
        raise InputError(
            f"{source[0].index} has {loader.samples:,} samples to score, {wanted:,} are asked for: lower --steps, --warmup or "
            "evaluate.batch"
        )
    model = MixedPrecision(
        build_model(config.model, len(tokenizer), config.data.image_size).to(world.device),
        config.precision,
    ).eval()
    watched = _Watched(loader, model, world.device)
    _score(watched, config, world)
    parts = {name: values[warmup:] for name, values in watched.parts().items()}
    few = build_eval_loader(
        config.data,
        source,
        batch=batch,
        world=world,
        tokenizer=tokenizer,
        limit=_PROFILED * batch * world.size,
    )
    return EvalBench(
        describe_machine(world.device),
        config.name,
        world.size,
        batch,
        batches,
        config.precision,
        config.evaluate.protocol,
        rates(batch * world.size, parts["batch"]),
        {name: 1e3 * statistics.median(values) for name, values in parts.items()},
        _calls(_Watched(few, model, world.device), config, world),
    )


def _score(watched: _Watched, config: Config, world: World) -> None:
    evaluate(
        watched.infer,
        watched,
        [find_protocol(config.evaluate.protocol)],
        world=world,
        bootstrap=0,
        title="bench eval",
    )


def _calls(watched: _Watched, config: Config, world: World) -> dict[str, float]:
    """What the profiler counts, a sample of this rank."""
    with profile(activities=activities(world.device)) as profiler:
        _score(watched, config, world)
    samples = len(watched) * config.evaluate.batch
    events = list(profiler.events())
    calls = count_calls(events, samples, world.device)
    counting = count_calls(
        (event for event in events if not _within(event, _MODEL)), samples, world.device
    )["operators"]
    return {"operators": calls.pop("operators"), "operators of counting": counting, **calls}


def _within(event: Any, name: str) -> bool:
    """Whether an event of a profile began inside one of that name."""
    while event is not None and event.name != name:
        event = event.cpu_parent
    return event is not None


class _Watched:
    """An EvalLoader and a model that note when a batch is asked for and handed out, and how long it is in the model."""

    def __init__(self, loader: EvalLoader, model: torch.nn.Module, device: torch.device) -> None:
        self.loader, self.model, self.device = loader, model, device
        self.phases = Phases(device)
        self.times: list[tuple[float, float]] = []  # asked for, handed out

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        asked = time.perf_counter()
        for batch in self.loader:
            self.times.append((asked, time.perf_counter()))
            with self.phases("used"):
                yield batch
            asked = time.perf_counter()
        self.times.append((asked, asked))

    @torch.no_grad()
    def infer(self, batch: Batch) -> Tensor:
        """Logits float32 [B, S, S]."""
        with self.phases("model"), record_function(_MODEL):
            batch = batch.to(self.device)
            return self.model(batch.image, batch.words, batch.word_mask).float()

    def parts(self) -> dict[str, list[float]]:
        """Seconds of each batch: whole, and by part."""
        used, model = (
            [
                self.phases.between(begin, end)
                for name, begin, end in self.phases.marks
                if name == wanted
            ]
            for wanted in ("used", "model")
        )
        return {
            "batch": [after - asked for (asked, _), (after, _) in pairwise(self.times)],
            "data": [given - asked for asked, given in self.times[:-1]],
            "model": model,
            "counting": [whole - part for whole, part in zip(used, model)],
        }
