"""`coupalign bench eval CONFIG`: measure what scoring costs, by part.

It times the same function that `coupalign eval` calls, from outside.
"""

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

from coupalign.bench.machine import Rates, describe_machine, sample_rates
from coupalign.bench.profiler import count_calls, profiler_activities
from coupalign.bench.result import Result, format_pairs, format_rows, format_values, prefixed
from coupalign.config.schema import Config
from coupalign.data.batch import Batch
from coupalign.data.build import build_eval_loader, open_tokenizer
from coupalign.data.loader import EvalLoader
from coupalign.data.tokenizer import Tokenizer
from coupalign.distributed.world import World
from coupalign.engine.base import MixedPrecision, Phases, infer_logits
from coupalign.errors import InputError
from coupalign.evaluation.evaluator import evaluate
from coupalign.evaluation.protocols import find_protocol
from coupalign.model.build import build_model

# How the profiler labels the model.
_MODEL = "bench eval: model"

_PROFILED_BATCHES = 3


@dataclass(frozen=True, kw_only=True)
class EvalBench(Result):
    """What scoring costs on this rank.

    Attributes:
        samples_per_second: of all ranks: median, lower and upper quartile over the batches.
        milliseconds: per batch, medians: "batch"; "data", waiting for the loader; "model", copying
            the batch to the device and running the model; "counting", counting the pixels at the
            original resolution and reading the integers of the previous batch. On a GPU, the last
            two are the time of its stream, which continues while the host waits for data. The parts
            may therefore add up to more than the whole.
        calls: per sample, counted in a few other batches: operators, how many of them belong to
            counting, numbers read back; on a GPU also kernels launched and waits for it.
    """

    bench: ClassVar[str] = "eval"

    ranks: int
    batch: int
    batches: int
    precision: str
    protocol: str
    samples_per_second: Rates
    milliseconds: dict[str, float]
    calls: dict[str, float]

    def figures(self) -> dict[str, float]:
        """Return the figures to compare with an earlier result, by name."""
        return {
            "samples/s": self.samples_per_second[0],
            **prefixed("ms ", self.milliseconds),
            **self.calls,
        }

    def table(self) -> str:
        """Format the result for people."""
        median, low, high = self.samples_per_second
        refcoco_val_sentences = 10_834
        milliseconds = format_values("{:.2f}", self.milliseconds)
        calls = format_values("{:,.2f}", self.calls)

        lines = [
            f"{self.config}: {self.precision}, {self.ranks} ranks, batches of {self.batch}, "
            f"protocol {self.protocol}",
            format_pairs(self.machine),
            "",
            f"{median:,.2f} samples/s (median of {self.batches} batches; "
            f"quartiles {low:,.2f} … {high:,.2f}); RefCOCO val, {refcoco_val_sentences:,} "
            f"sentences, would take {refcoco_val_sentences / median:,.0f} s (calculated)",
            "",
            format_rows(milliseconds.items(), headers=("part", "ms")),
            "",
            f"{format_pairs(calls)}  (per sample)",
        ]
        return "\n".join(lines)


def bench_eval(config: Config, world: World, batches: int = 20, warmup: int = 5) -> EvalBench:
    """Time the scoring of the first entry of data.evaluate, by a model with random weights.

    Collective: every rank must call it.

    Args:
        config: reads data, model, precision and evaluate.
        batches: how many to time.
        warmup: batches before them that are not timed.

    Raises:
        InputError: data.evaluate is empty, cannot be read, or has too few samples.
    """
    tokenizer = open_tokenizer(config.data)
    batch = config.evaluate.batch

    # Open exactly as many samples as are scored.
    needed = (batches + warmup) * batch * world.size
    loader = _open_loader(config, world, tokenizer, samples=needed)
    if loader.samples < needed:
        raise InputError(
            f"{config.data.evaluate[0].index} has {loader.samples:,} samples to score, but "
            f"{needed:,} are needed: lower --steps, --warmup or evaluate.batch"
        )

    model = build_model(config.model, len(tokenizer), config.data.image_size).to(world.device)
    net = MixedPrecision(model, config.precision).eval()
    scoring = _TimedScoring(loader, net, world.device)
    _score(scoring, config, world)
    seconds = {name: values[warmup:] for name, values in scoring.seconds_by_part().items()}

    # The profiler slows scoring down, so it watches other batches.
    profiled_samples = _PROFILED_BATCHES * batch * world.size
    loader = _open_loader(config, world, tokenizer, samples=profiled_samples)
    calls = _count_calls(_TimedScoring(loader, net, world.device), config, world)

    return EvalBench(
        machine=describe_machine(world.device),
        config=config.name,
        ranks=world.size,
        batch=batch,
        batches=batches,
        precision=config.precision,
        protocol=config.evaluate.protocol,
        samples_per_second=sample_rates(batch * world.size, seconds["batch"]),
        milliseconds={name: 1e3 * statistics.median(values) for name, values in seconds.items()},
        calls=calls,
    )


def _open_loader(config: Config, world: World, tokenizer: Tokenizer, samples: int) -> EvalLoader:
    return build_eval_loader(
        config.data,
        config.data.evaluate[:1],
        batch=config.evaluate.batch,
        world=world,
        tokenizer=tokenizer,
        limit=samples,
    )


def _score(scoring: _TimedScoring, config: Config, world: World) -> None:
    evaluate(
        scoring.infer,
        scoring,
        [find_protocol(config.evaluate.protocol)],
        world=world,
        bootstrap=0,
        title="bench eval",
    )


def _count_calls(scoring: _TimedScoring, config: Config, world: World) -> dict[str, float]:
    """Count calls per sample of this rank, with the profiler."""
    with profile(activities=profiler_activities(world.device)) as profiler:
        _score(scoring, config, world)
    samples = len(scoring) * config.evaluate.batch

    events = list(profiler.events())
    calls = count_calls(events, samples, world.device)
    outside_model = [event for event in events if not _is_within(event, _MODEL)]
    counting = count_calls(outside_model, samples, world.device)
    return {
        "operators": calls.pop("operators"),
        "operators of counting": counting["operators"],
        **calls,
    }


def _is_within(event: Any, name: str) -> bool:
    """Whether an event of a profile began inside one with that name."""
    while event is not None and event.name != name:
        event = event.cpu_parent
    return event is not None


class _TimedScoring:
    """An EvalLoader and a network that record when each batch is loaded, inferred and counted.

    Attributes:
        load_times: per batch, when it was asked for and when it arrived; then when the loader
            ended, twice.
    """

    def __init__(self, loader: EvalLoader, net: torch.nn.Module, device: torch.device) -> None:
        self.loader, self.net, self.device = loader, net, device
        self.phases = Phases(device)
        self.load_times: list[tuple[float, float]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        asked = time.perf_counter()
        for batch in self.loader:
            self.load_times.append((asked, time.perf_counter()))
            with self.phases("used"):
                yield batch
            asked = time.perf_counter()
        self.load_times.append((asked, asked))

    def infer(self, batch: Batch) -> Tensor:
        """Return the logits, float32 [B, S, S]."""
        with self.phases("model"), record_function(_MODEL):
            return infer_logits(self.net, batch.to(self.device))

    def seconds_by_part(self) -> dict[str, list[float]]:
        """Return the seconds of each batch: whole, and by part."""
        used, model = self._seconds("used"), self._seconds("model")
        return {
            "batch": [
                next_asked - asked for (asked, _), (next_asked, _) in pairwise(self.load_times)
            ],
            "data": [arrived - asked for asked, arrived in self.load_times[:-1]],
            "model": model,
            "counting": [whole - part for whole, part in zip(used, model)],
        }

    def _seconds(self, wanted: str) -> list[float]:
        return [
            self.phases.between(begin, end)
            for name, begin, end in self.phases.marks
            if name == wanted
        ]
