"""`coupalign bench step CONFIG`: measure the training steps of a configuration, by part.

It measures three times, so that instruments do not slow down the times:

1. whole steps, without any instrument;
2. steps by part, with the phases that every engine marks and with hooks on the parts of the model;
3. a few steps under torch's profiler.
"""

from __future__ import annotations

import resource
import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from torch.profiler import profile

from coupalign.bench.machine import Rates, describe_machine, resident_gigabytes, sample_rates
from coupalign.bench.profiler import count_calls, profiler_activities
from coupalign.bench.result import Result, format_pairs, format_rows, format_values, prefixed
from coupalign.config.load import override
from coupalign.config.schema import Config
from coupalign.costs.traffic import step_traffic
from coupalign.costs.utilization import matmul_peak, model_flops_utilization
from coupalign.data.batch import Batch, random_batch
from coupalign.data.build import build_train_loader, open_tokenizer
from coupalign.data.order import micro_batches
from coupalign.distributed.world import World
from coupalign.engine.base import DTYPES, Engine, Phases, seed_step
from coupalign.engine.build import build_engine, engine_name
from coupalign.engine.optimizer import build_optimizer
from coupalign.model.base import called_modules
from coupalign.model.build import build_model
from coupalign.model.text import vocabulary_size

# The micro-batches of each step.
Steps = Iterator[list[Batch]]

_STEPS_BY_PART, _PROFILED_STEPS = 5, 3

# How the names of communication events begin.
_COMMUNICATION = ("nccl", "gloo:", "c10d::")


@dataclass(frozen=True, kw_only=True)
class StepBench(Result):
    """What a training step costs on this rank.

    Attributes:
        samples_per_second: of all ranks: median, lower and upper quartile of the timed steps.
        milliseconds: "step" is the median of the timed steps. The other entries are means of other
            steps, by part: "data" waits for the loader, "copy" copies to the device. The parts of
            the model are their forward pass, and "losses" is the rest of "forward". "backward"
            includes the exchange of gradients that overlaps it.
        flop: counted FLOPs of forward and backward per step, on all ranks.
        matmul_flop_per_s: measured speed of this machine's fastest matrix product in the precision
            of the configuration.
        utilization: MFU, the achieved FLOP/s per rank divided by `matmul_flop_per_s`.
        gigabytes: of the GPU, or of the process on a CPU. "weights", "optimizer" and "average" are
            this rank's share. "other" is what else is held between steps; on a CPU these are mostly
            libraries. "a step's" is what a step adds: activations, gradients, workspaces. "peak" is
            the sum.
        calls: per step: operators, numbers read back from the device, milliseconds of communication
            between ranks; on a GPU also kernels launched and waits for the device.
        beside: another configuration, measured in alternation with this one: the overrides that
            make it, its samples per second, and "ratio", how many times its samples per second this
            configuration reached, step by step: median, lower and upper quartile. Empty if not
            asked for.
    """

    bench: ClassVar[str] = "step"

    ranks: int
    global_batch: int
    micro_batch: int
    precision: str
    engine: str
    steps: int
    samples_per_second: Rates
    milliseconds: dict[str, float]
    flop: int
    matmul_flop_per_s: float
    utilization: float
    gigabytes: dict[str, float]
    calls: dict[str, float]
    beside: dict[str, Any] = field(default_factory=dict)

    def figures(self) -> dict[str, float]:
        """Return the figures to compare with an earlier result, by name."""
        return {
            "samples/s": self.samples_per_second[0],
            "utilization": self.utilization,
            **prefixed("ms ", self.milliseconds),
            **prefixed("GB ", self.gigabytes),
            **self.calls,
        }

    def table(self) -> str:
        """Format the result for people."""
        median, low, high = self.samples_per_second
        gigabytes = format_values("{:.2f} GB", self.gigabytes)
        calls = format_values("{:,.1f}", self.calls)

        lines = [
            f"{self.config}: {self.engine}, {self.precision}, {self.ranks} ranks, "
            f"{self.global_batch} samples per step in micro-batches of {self.micro_batch}",
            format_pairs(self.machine),
            "",
            f"{median:,.2f} samples/s (median of {self.steps} steps; "
            f"quartiles {low:,.2f} … {high:,.2f})",
            f"{self.flop / 1e12:,.3f} TFLOP per step; MFU {self.utilization:.1%} of the "
            f"{self.matmul_flop_per_s / 1e12:,.2f} TFLOP/s that this machine's fastest matrix "
            "product reaches",
            "",
            self._table_of_parts(),
            "",
            format_pairs(gigabytes),
            f"{format_pairs(calls)}  (per step)",
        ]
        if self.beside:
            ratio, low, high = self.beside["ratio"]
            other_rate = self.beside["samples_per_second"][0]
            lines += [
                "",
                f"{ratio:.2f} times the samples/s of the same with {self.beside['overrides']} "
                f"({other_rate:,.2f}), steps in turn; quartiles {low:.2f} … {high:.2f}",
            ]
        return "\n".join(lines)

    def _table_of_parts(self) -> str:
        """Format the milliseconds, with the share of each part in the sum of the parts."""
        whole = self.milliseconds["step"]
        sum_of_parts = sum(self.milliseconds.values()) - whole

        rows = [("step", f"{whole:.2f}", "")]
        for name, value in self.milliseconds.items():
            if name != "step":
                rows.append((name, f"{value:.2f}", f"{value / sum_of_parts:.1%}"))
        return format_rows(rows, headers=("part", "ms", "share"))


def bench_step(
    config: Config,
    world: World,
    steps: int = 20,
    *,
    warmup: int = 5,
    random_data: bool = False,
    trace: Path | None = None,
    beside: Sequence[str] = (),
) -> StepBench:
    """Time training steps.

    Collective: every rank must call it.

    Args:
        config: of the training run.
        steps: how many to time.
        warmup: steps before them that are not timed.
        random_data: use random samples. data.train need not exist then.
        trace: where to write the profiler's trace, for ui.perfetto.dev.
        beside: overrides that make another configuration, which takes turns with this one.

    Raises:
        InputError: the configuration cannot be trained here.
    """
    torch.manual_seed(config.seed)
    with ExitStack() as stack:
        trainer = _start(config, world, stack, random_data=random_data, warmup=warmup)

        # The plain times and the memory come first: instruments would change both.
        held_between_steps = _held_gigabytes(world)
        seconds = trainer.timed_steps(steps)
        gigabytes = _memory_by_kind(trainer.engine, held_between_steps, _peak_gigabytes(world))

        milliseconds = {"step": 1e3 * statistics.median(seconds), **_time_parts(trainer)}
        calls = _count_calls(trainer, trace)

        compared = {}
        if beside:
            other_config = override(config, beside)
            other = _start(other_config, world, stack, random_data=random_data, warmup=warmup)
            compared = _compare(trainer, other, beside, steps)

    rates = sample_rates(config.train.global_batch, seconds)
    steps_per_second = rates[0] / config.train.global_batch
    micro_batch, flop = _flop_per_step(config, world)
    peak = matmul_peak(DTYPES[config.precision], world.device)
    return StepBench(
        machine=describe_machine(world.device),
        config=config.name,
        ranks=world.size,
        global_batch=config.train.global_batch,
        micro_batch=micro_batch,
        precision=config.precision,
        engine=engine_name(config.engine),
        steps=steps,
        samples_per_second=rates,
        milliseconds=milliseconds,
        flop=flop,
        matmul_flop_per_s=peak,
        utilization=model_flops_utilization(
            flop_per_step=flop, steps_per_second=steps_per_second, ranks=world.size, peak=peak
        ),
        gigabytes=gigabytes,
        calls=calls,
        beside=compared,
    )


def _flop_per_step(config: Config, world: World) -> tuple[int, int]:
    """Return the samples of a micro-batch, and the FLOPs of a step on all ranks."""
    global_batch = config.train.global_batch
    _, samples = micro_batches(global_batch, config.train.max_micro_batch, world.size)
    costs = step_traffic(config, samples).values()
    return samples, sum(cost.flops for cost in costs) * (global_batch // samples)


# ---------------------------------------------------------------------------------- training steps


class _Trainer:
    """Run training steps one after another.

    Attributes:
        phase_seconds: seconds of each phase, summed over the steps since it was last cleared.
    """

    def __init__(self, engine: Engine, steps: Steps, config: Config, world: World) -> None:
        self.engine, self.steps, self.config, self.world = engine, steps, config, world
        self.phases = Phases(world.device)
        self.steps_done = 0
        self.phase_seconds: dict[str, float] = {}

    def step(self) -> None:
        """Train one step, and add its phases to `phase_seconds`."""
        with self.phases("data"):
            batches = next(self.steps)
        seed_step(self.config.seed, self.steps_done, self.world.rank)
        with self.phases("copy"):
            batches = [batch.to(self.world.device) for batch in batches]
        stats = self.engine.train_step(batches, lr_scale=1.0)
        self.steps_done += 1

        for seconds in (stats.seconds, self.phases.read()):
            for name, value in seconds.items():
                self.phase_seconds[name] = self.phase_seconds.get(name, 0.0) + value

    def timed_steps(self, steps: int) -> list[float]:
        """Train and return the seconds of each step. Nothing waits for the device in between."""
        clock = Phases(self.world.device)
        for _ in range(steps):
            with clock("step"):
                self.step()
        _wait(self.world.device)
        return [clock.between(begin, end) for _, begin, end in clock.marks]


def _start(
    config: Config, world: World, stack: ExitStack, *, random_data: bool, warmup: int
) -> _Trainer:
    """Open the data, build the model and the engine, and train the first steps."""
    if random_data:
        vocabulary, steps = _random_steps(config, world)
    else:
        vocabulary, steps = _loaded_steps(config, world, stack)

    model = build_model(config.model, vocabulary, config.data.image_size).to(world.device)
    engine = build_engine(model, build_optimizer(model, config.optim), config, world)
    trainer = _Trainer(engine, steps, config, world)
    for _ in range(warmup):
        trainer.step()
    return trainer


def _loaded_steps(config: Config, world: World, stack: ExitStack) -> tuple[int, Steps]:
    """Return the size of the vocabulary, and the steps of data.train."""
    tokenizer = open_tokenizer(config.data)
    loader = build_train_loader(
        config.data,
        seed=config.seed,
        global_batch=config.train.global_batch,
        max_micro_batch=config.train.max_micro_batch,
        world=world,
        tokenizer=tokenizer,
    )
    stack.callback(loader.close)
    return len(tokenizer), (batches for _, batches in loader.steps_from(0))


def _random_steps(config: Config, world: World) -> tuple[int, Steps]:
    """Return the size of the vocabulary, and the same random step again and again."""
    data, train = config.data, config.train
    vocabulary = vocabulary_size(config.model.text)
    number, samples = micro_batches(train.global_batch, train.max_micro_batch, world.size)

    step = [
        random_batch(samples, data.image_size, data.max_tokens, vocabulary) for _ in range(number)
    ]
    if world.device.type == "cuda":
        step = [batch.pin_memory() for batch in step]
    return vocabulary, cycle([step])


def _compare(
    trainer: _Trainer, other: _Trainer, overrides: Sequence[str], steps: int
) -> dict[str, Any]:
    """Alternate steps of two configurations, see `StepBench.beside`."""
    own_seconds, other_seconds = [], []
    for _ in range(steps):
        own_seconds += trainer.timed_steps(1)
        other_seconds += other.timed_steps(1)

    # The global batches may differ, so compare seconds per sample.
    own_samples = trainer.config.train.global_batch
    other_samples = other.config.train.global_batch
    size_ratio = other_samples / own_samples
    ratios = [theirs / own / size_ratio for own, theirs in zip(own_seconds, other_seconds)]
    low, median, high = np.quantile(ratios, (0.25, 0.5, 0.75)).tolist()
    return {
        "overrides": " ".join(overrides),
        "samples_per_second": sample_rates(other_samples, other_seconds),
        "ratio": (median, low, high),
    }


# ---------------------------------------------------------------------------------- time by part


def _time_parts(trainer: _Trainer) -> dict[str, float]:
    """Return the milliseconds per step of each part, see `StepBench.milliseconds`."""
    model, device = trainer.engine.model, trainer.world.device
    model_phases = Phases(device)
    trainer.phase_seconds = {}
    with _forward_timed(model, model_phases):
        for _ in range(_STEPS_BY_PART):
            trainer.step()
        _wait(device)

    phases = _mean_milliseconds(trainer.phase_seconds)
    children = _mean_milliseconds(model_phases.read())
    return {
        "data": phases["data"],
        "copy": phases["copy"],
        **{name: children[name] for name, _ in model.named_children() if name in children},
        "losses": phases["forward"] - sum(children.values()),
        "backward": phases["backward"],
        "optimizer": phases.get("optimizer", 0.0),
        "loss means": phases.get("losses", 0.0),
    }


def _mean_milliseconds(seconds: dict[str, float]) -> dict[str, float]:
    return {name: 1e3 * value / _STEPS_BY_PART for name, value in seconds.items()}


@contextmanager
def _forward_timed(model: nn.Module, phases: Phases) -> Iterator[None]:
    """Record the forward pass of each child of the model as a phase.

    Recomputation in the backward pass, by checkpointing, is not recorded.
    """
    with ExitStack() as handles:
        for name, _ in model.named_children():
            for module in called_modules(model, name).values():
                handles.enter_context(_module_timed(module, name, phases))
        yield


@contextmanager
def _module_timed(module: nn.Module, name: str, phases: Phases) -> Iterator[None]:
    running: list[Any] = []

    def begin(*_: Any) -> None:
        is_backward = torch._C._current_graph_task_id() != -1
        if not is_backward:
            running.append(phases(name))
            running[-1].__enter__()

    def end(*_: Any) -> None:
        if running:
            running.pop().__exit__(None, None, None)

    before, after = module.register_forward_pre_hook(begin), module.register_forward_hook(end)
    try:
        yield
    finally:
        before.remove()
        after.remove()


# ---------------------------------------------------------------------------------- calls


def _count_calls(trainer: _Trainer, trace: Path | None) -> dict[str, float]:
    """Count calls per step with the profiler, see `StepBench.calls`."""
    device = trainer.world.device
    with profile(activities=profiler_activities(device)) as profiler:
        for _ in range(_PROFILED_STEPS):
            trainer.step()
        _wait(device)

    if trace is not None and trainer.world.is_main:
        trace.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(trace))

    events = profiler.events()
    communication = [event for event in events if event.name.startswith(_COMMUNICATION)]
    if device.type == "cuda":
        microseconds = sum(event.device_time_total for event in communication)
    else:
        microseconds = sum(event.cpu_time_total for event in communication)

    # The last wait is our own.
    calls = count_calls(events, _PROFILED_STEPS, device, own_waits=1)
    calls["ms of exchange"] = microseconds / 1e3 / _PROFILED_STEPS
    return calls


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---------------------------------------------------------------------------------- memory


def _memory_by_kind(engine: Engine, between_steps: float, peak: float) -> dict[str, float]:
    """Divide memory by what it is for, in 1e9 bytes, see `StepBench.gigabytes`."""
    kinds = {name: size / 1e9 for name, size in engine.held_bytes().items()}
    kinds["other"] = between_steps - sum(kinds.values())
    return {**kinds, "a step's": peak - between_steps, "peak": peak}


def _held_gigabytes(world: World) -> float:
    """Return the memory that is held now, in 1e9 bytes, and let the peak begin here."""
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(world.device)
        return torch.cuda.memory_allocated(world.device) / 1e9
    return resident_gigabytes()


def _peak_gigabytes(world: World) -> float:
    """Return the highest memory since `_held_gigabytes`; on a CPU, since the process began."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated(world.device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
