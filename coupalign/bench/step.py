"""`coupalign bench step CONFIG`: a training step of a configuration, on this machine, by part.

Three looks at the same steps, so that looking costs the times nothing: whole steps without any instrument; steps whose parts are
timed, by the phases that every engine marks and by hooks on the parts of the model; a few steps under torch's profiler.
"""

from __future__ import annotations

import resource
import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from torch.profiler import profile

from coupalign.bench.calls import activities, count_calls
from coupalign.bench.machine import Rates, Result, describe_machine, rates, resident_gigabytes
from coupalign.config.load import override
from coupalign.config.schema import Config
from coupalign.costs.traffic import step_traffic
from coupalign.costs.utilization import matmul_peak
from coupalign.data.batch import Batch, random_batch
from coupalign.data.build import build_train_loader, open_tokenizer
from coupalign.data.order import micro_batches
from coupalign.distributed.world import World
from coupalign.engine.base import DTYPES, Engine, Phases, seed_step
from coupalign.engine.build import build_engine
from coupalign.engine.optimizer import build_optimizer
from coupalign.model.base import called_modules
from coupalign.model.build import build_model
from coupalign.model.text import vocabulary_size

Steps = Iterator[list[Batch]]
_LOOKED_AT, _PROFILED = 5, 3
_EXCHANGES = ("nccl", "gloo:", "c10d::")


@dataclass(frozen=True)
class StepBench(Result):
    """What a step costs on this rank.

    Attributes:
        machine: see `describe_machine`.
        samples_per_second: of all ranks: median, lower and upper quartile of the timed steps.
        milliseconds: "step", the median of the timed ones; then, of others that were looked into, by part. "data" is waiting for the
            loader, "copy" to the device. The parts of the model are their forward pass; "losses" is what is left of "forward";
            "backward" holds the exchange of gradients that runs beside it.
        flop: forward and backward of a step, all ranks; counted.
        matmul_flop_per_s: the fastest matrix product of this machine in the configuration's precision; measured.
        utilization: flop per second and rank, as a share of that (MFU).
        gigabytes: "weights", "optimizer" and "average" (this rank's share); "other", what is held between steps besides, which on a CPU
            is mostly libraries; "a step's" own: activations, gradients, workspaces; "peak", the sum. Of the GPU, or of the process.
        calls: a step: kernels launched, waits for the device, numbers read back from it, milliseconds of exchange between ranks.
        beside: another configuration, whose steps took turns with this one's: the overrides that make it, its samples per second, and how
            many times its samples per second this one reached, step by step; empty where none was asked for.
    """

    bench: ClassVar[str] = "step"

    machine: dict[str, str]
    config: str
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
    beside: dict[str, Any]

    def figures(self) -> dict[str, float]:
        """What is compared with an earlier result, by name."""
        return {
            "samples/s": self.samples_per_second[0],
            "utilization": self.utilization,
            **{f"ms {name}": value for name, value in self.milliseconds.items()},
            **{f"GB {name}": value for name, value in self.gigabytes.items()},
            **self.calls,
        }

    def table(self) -> str:
        """The same for people."""
        median, low, high = self.samples_per_second
        looked_at = sum(self.milliseconds.values()) - self.milliseconds["step"]
        lines = [
            f"{self.config}: {self.engine}, {self.precision}, {self.ranks} ranks, {self.global_batch} samples a step in micro-batches "
            f"of {self.micro_batch}",
            "  ".join(f"{name} {value}" for name, value in self.machine.items()),
            "",
            f"{median:,.2f} samples/s (median of {self.steps} steps; quartiles {low:,.2f} … {high:,.2f})",
            f"{self.flop / 1e12:,.3f} TFLOP a step; {self.utilization:.1%} of the {self.matmul_flop_per_s / 1e12:,.2f} TFLOP/s "
            "that this machine's fastest matrix product reaches",
            "",
            f"{'part':<14}{'ms':>10}{'share':>8}",
        ]
        lines += [
            f"{name:<14}{value:>10.2f}" + (f"{value / looked_at:>8.1%}" if name != "step" else "")
            for name, value in self.milliseconds.items()
        ]
        lines += [
            "",
            "  ".join(f"{name} {value:.2f} GB" for name, value in self.gigabytes.items()),
            "  ".join(f"{name} {value:,.1f}" for name, value in self.calls.items()) + "  (a step)",
        ]
        if self.beside:
            ratio, low, high = self.beside["ratio"]
            lines += [
                "",
                f"{ratio:.2f} times the samples/s of the same with {self.beside['overrides']} "
                f"({self.beside['samples_per_second'][0]:,.2f}), steps in turn; quartiles {low:.2f} … {high:.2f}",
            ]
        return "\n".join(lines)


def bench_step(
    config: Config,
    world: World,
    steps: int = 20,
    warmup: int = 5,
    random: bool = False,
    trace: Path | None = None,
    beside: Sequence[str] = (),
) -> StepBench:
    """Time training steps; collective.

    Args:
        random: random samples in place of data.train, which then need not be there.
        trace: where the profiler's trace is written, for ui.perfetto.dev.
        beside: overrides that make another configuration, to be measured in turn with this one.

    Raises:
        InputError: the configuration cannot be trained here.
    """
    torch.manual_seed(config.seed)
    with ExitStack() as stack:
        run = _start(config, world, stack, random, warmup)
        start = _gigabytes(world, peak=False)
        seconds = run.timed(steps)
        gigabytes = _by_kind(run.engine, start, _gigabytes(world, peak=True))
        milliseconds = _parts(run, run.engine.model, statistics.median(seconds))
        calls = _calls(run, trace)
        in_turn = (
            _beside(
                run, _start(override(config, beside), world, stack, random, warmup), beside, steps
            )
            if beside
            else {}
        )
    _, micro = micro_batches(config.train.global_batch, config.train.max_micro_batch, world.size)
    flop = sum(cost.flops for cost in step_traffic(config, micro).values()) * (
        config.train.global_batch // micro
    )
    fastest = matmul_peak(DTYPES[config.precision], world.device)
    rate = rates(config.train.global_batch, seconds)
    share = flop * rate[0] / config.train.global_batch / world.size / fastest
    return StepBench(
        describe_machine(world.device),
        config.name,
        world.size,
        config.train.global_batch,
        micro,
        config.precision,
        config.engine.kind
        + (f" ZeRO {config.engine.stage}" if config.engine.kind == "deepspeed" else ""),
        steps,
        rate,
        milliseconds,
        flop,
        fastest,
        share,
        gigabytes,
        calls,
        in_turn,
    )


def _start(config: Config, world: World, stack: ExitStack, random: bool, warmup: int) -> _Runner:
    """Everything that a configuration's steps need, and its first ones."""
    vocabulary, batches = _random(config, world) if random else _read(config, world, stack)
    model = build_model(config.model, vocabulary, config.data.image_size).to(world.device)
    run = _Runner(
        build_engine(model, build_optimizer(model, config.optim), config, world),
        batches,
        config,
        world,
    )
    for _ in range(warmup):
        run.step()
    return run


def _beside(run: _Runner, other: _Runner, overrides: Sequence[str], steps: int) -> dict[str, Any]:
    """Steps of two configurations in turn, see `StepBench.beside`."""
    pairs = [(run.timed(1)[0], other.timed(1)[0]) for _ in range(steps)]
    samples = other.config.train.global_batch
    gain = samples / run.config.train.global_batch  # a step of the other may be of another size
    low, median, high = np.quantile(
        [theirs / own / gain for own, theirs in pairs], (0.25, 0.5, 0.75)
    ).tolist()
    return {
        "overrides": " ".join(overrides),
        "samples_per_second": rates(samples, [theirs for _, theirs in pairs]),
        "ratio": (median, low, high),
    }


class _Runner:
    """Training steps, one after another."""

    def __init__(self, engine: Engine, batches: Steps, config: Config, world: World) -> None:
        self.engine, self.batches, self.config, self.world = engine, batches, config, world
        self.phases = Phases(world.device)
        self.done = 0
        self.found: dict[str, float] = {}

    def step(self) -> None:
        """One step; its phases are added to `found`, in seconds."""
        with self.phases("data"):
            micro_batches = next(self.batches)
        seed_step(self.config.seed, self.done, self.world.rank)
        with self.phases("copy"):
            micro_batches = [batch.to(self.world.device) for batch in micro_batches]
        stats = self.engine.train_step(micro_batches, 1.0)
        self.done += 1
        for seconds in (stats.seconds, self.phases.read()):
            for name, value in seconds.items():
                self.found[name] = self.found.get(name, 0.0) + value

    def timed(self, steps: int) -> list[float]:
        """Seconds of each of so many steps, from the end of one to the end of the next; nothing waits in between."""
        clock = Phases(self.world.device)
        for _ in range(steps):
            with clock("step"):
                self.step()
        _wait(self.world.device)
        return [clock.between(begin, end) for _, begin, end in clock.marks]


def _parts(run: _Runner, model: nn.Module, step_s: float) -> dict[str, float]:
    """Milliseconds a step by part; the times of the model's parts are taken by hooks."""
    inside = Phases(run.world.device)
    run.found = {}
    with _hooks(model, inside):
        for _ in range(_LOOKED_AT):
            run.step()
        _wait(run.world.device)
    found = {name: 1e3 * value / _LOOKED_AT for name, value in run.found.items()}
    own = {name: 1e3 * value / _LOOKED_AT for name, value in inside.read().items()}
    forward = found.pop("forward")
    means = found.pop("losses", 0.0)
    order = [name for name, _ in model.named_children() if name in own]
    return {
        "step": 1e3 * step_s,
        "data": found["data"],
        "copy": found["copy"],
        **{name: own[name] for name in order},
        "losses": forward - sum(own.values()),
        "backward": found["backward"],
        "optimizer": found.get("optimizer", 0.0),
        "loss means": means,
    }


@contextmanager
def _hooks(model: nn.Module, phases: Phases) -> Iterator[None]:
    """Inside, the forward pass of each child of the model is a phase; what checkpointing computes again in the backward pass is not."""
    with ExitStack() as handles:
        for name, _ in model.named_children():
            for module in called_modules(model, name).values():
                running: list[Any] = []

                def begin(*_: Any, name: str = name, running: list[Any] = running) -> None:
                    if torch._C._current_graph_task_id() == -1:
                        running.append(phases(name))
                        running[-1].__enter__()

                def end(*_: Any, running: list[Any] = running) -> None:
                    if running:
                        running.pop().__exit__(None, None, None)

                handles.callback(module.register_forward_pre_hook(begin).remove)
                handles.callback(module.register_forward_hook(end).remove)
        yield


def _calls(run: _Runner, trace: Path | None) -> dict[str, float]:
    """What the profiler counts, a step."""
    cuda = run.world.device.type == "cuda"
    with profile(activities=activities(run.world.device)) as profiler:
        for _ in range(_PROFILED):
            run.step()
        _wait(run.world.device)
    if trace is not None and run.world.is_main:
        trace.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(trace))
    events = profiler.events()
    exchange = sum(
        event.device_time_total if cuda else event.cpu_time_total
        for event in events
        if event.name.startswith(_EXCHANGES)
    )
    # The last wait is ours.
    return {
        **count_calls(events, _PROFILED, run.world.device, own_waits=1),
        "ms of exchange": exchange / 1e3 / _PROFILED,
    }


def _read(config: Config, world: World, stack: ExitStack) -> tuple[int, Steps]:
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


def _random(config: Config, world: World) -> tuple[int, Steps]:
    """The same few random batches again and again."""
    vocabulary = vocabulary_size(config.model.text)
    count, samples = micro_batches(
        config.train.global_batch, config.train.max_micro_batch, world.size
    )
    step = [
        random_batch(samples, config.data.image_size, config.data.max_tokens, vocabulary)
        for _ in range(count)
    ]
    return vocabulary, cycle(
        [[batch.pin_memory() for batch in step] if world.device.type == "cuda" else step]
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _by_kind(engine: Engine, start: float, peak: float) -> dict[str, float]:
    """See `StepBench.gigabytes`; what is held between steps, and the most, 1e9 bytes."""
    kinds = {name: count / 1e9 for name, count in engine.held_bytes().items()}
    kinds["other"] = start - sum(kinds.values())
    return {**kinds, "a step's": peak - start, "peak": peak}


def _gigabytes(world: World, peak: bool) -> float:
    """Memory that is held, or the most that was since the last look, 1e9 bytes. On a CPU that of the process, whose most never falls."""
    if world.device.type == "cuda":
        value = (
            torch.cuda.max_memory_allocated(world.device)
            if peak
            else torch.cuda.memory_allocated(world.device)
        )
        torch.cuda.reset_peak_memory_stats(world.device)
        return value / 1e9
    if peak:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return resident_gigabytes()
