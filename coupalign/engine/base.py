"""The engine interface, one optimizer step, and the base class that DDP and DeepSpeed share."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from coupalign.config.schema import Config
from coupalign.data.batch import Batch
from coupalign.distributed.world import World, gather_on_device, sum_over_ranks
from coupalign.engine.ema import Ema
from coupalign.engine.layout import AVERAGES, WEIGHTS
from coupalign.engine.optimizer_state import OptimizerState, load_whole_state, open_optimizer_state
from coupalign.errors import InputError
from coupalign.model.weights.load import load_model_weights, read_weights

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class TrainState:
    """What a run needs to resume exactly, besides weights and optimizer state.

    The data order is a function of the step, so no loader state is needed.

    Attributes:
        step: optimizer steps done, including skipped ones; also the position in the data.
        bad_steps: consecutive skipped steps up to now.
        best: best score on the first evaluated split.
        best_step: the step with that score.
        evaluated: the step after which the scores were last taken. An evaluation that was
            interrupted does not count.
        best_of: what `best` was measured on: split, data, protocol. Scores on anything else are
            not compared with it. None: an earlier version did not say.
    """

    step: int = 0
    bad_steps: int = 0
    best: float | None = None
    best_step: int | None = None
    evaluated: int | None = None
    best_of: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain values, as state.json stores them."""
        return asdict(self)


@dataclass(frozen=True)
class StepStats:
    """What one optimizer step did, averaged over all ranks and micro-batches.

    The numbers stay on the device until you read a property, so a step waits for nothing.

    Attributes:
        terms: names of the losses. "loss" is the weighted sum; the others are unweighted.
        means: float64 [ranks, terms], each rank's means over its micro-batches.
        norm: of the whole gradient, before clipping; 0-dim.
        loss_scale: factor on the loss, for fp16.
        seconds: of this rank, by phase: "forward" (which only ZeRO 3 lets other ranks delay),
            "backward" (with the exchange of gradients that overlaps it), "losses" (averaging over
            the ranks), "optimizer" (clipping, update, moving average).
    """

    terms: tuple[str, ...]
    means: Tensor
    norm: Tensor
    loss_scale: float = 1.0
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def losses(self) -> dict[str, float]:
        """Mean over the ranks, by term."""
        return dict(zip(self.terms, self.means.mean(0).tolist()))

    @property
    def bad_ranks(self) -> tuple[int, ...]:
        """Ranks whose loss was not finite."""
        finite = torch.isfinite(self.means[:, self.terms.index("loss")]).tolist()
        return tuple(rank for rank, is_finite in enumerate(finite) if not is_finite)

    @property
    def applied(self) -> bool:
        """Whether the weights changed. False: the loss or the gradient was not finite."""
        return math.isfinite(self.norm.item())

    @property
    def grad_norm(self) -> float:
        """Norm of the whole gradient before clipping; NaN if it is not finite."""
        return self.norm.item() if self.applied else math.nan


class Engine(Protocol):
    """One optimizer step, and what it needs. Every rank must call each method, in the same order.

    Attributes:
        device: on which the model computes.
        model: the bare model, without the engine's wrapper.
    """

    device: torch.device
    model: nn.Module

    def train_step(self, micro_batches: Sequence[Batch], lr_scale: float) -> StepStats:
        """Take one optimizer step over this rank's micro-batches.

        Args:
            lr_scale: the learning rates are their peaks times this.
        """

    def infer(self, batch: Batch) -> Tensor:
        """Return logits, float32 [B, S, S], in evaluation mode and without gradients."""

    def averaged(self) -> AbstractContextManager[None]:
        """Enter a context in which the weights are their moving average, if the run keeps one."""

    def save(self, directory: Path) -> None:
        """Write the optimizer state into an existing directory, each rank its share."""

    def load(self, directory: Path, counters: dict[str, float]) -> None:
        """Load weights, moving average and optimizer state.

        `save` and `export` of the same kind of engine, on as many ranks, wrote the directory.
        """

    def adopt(
        self, directory: Path, optimizer_state: OptimizerState, counters: dict[str, float]
    ) -> None:
        """Load like `load`, but from a checkpoint of any engine on any number of ranks.

        Args:
            optimizer_state: reads the moments of whole parameters.
        """

    def counters(self) -> dict[str, float]:
        """Return the optimizer's scalars, the same on every rank, for `load` and `adopt`."""

    def held_bytes(self) -> dict[str, int]:
        """Return the bytes that this rank keeps between steps: "weights", "optimizer", "average".

        Under ZeRO, the optimizer's copies of this rank's share of the weights count as its own.
        """

    def export(self, averaged: bool = False) -> dict[str, Tensor] | None:
        """Return all weights by the model's own names, fp32 on the CPU, on rank 0.

        Returns None on the other ranks, and if there is no moving average to return.
        """


class EngineBase:
    """What the engines share: learning rates, loss scale, phases, moving average, checkpoints.

    A subclass sets `inference_net`, calls `_start_ema` when the weights are in place, and
    implements `train_step`, `save`, `_update` and `_collect_weights`.

    Attributes:
        peak_lrs: peak learning rate of each parameter group.
        parameters: the trainable ones.
        clip_norm: infinity if gradients are not clipped.
        ema: moving average of the weights. None: the run keeps none.
        inference_net: what `infer` runs; on one rank, without waiting for the others.
    """

    inference_net: nn.Module

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, config: Config, world: World
    ) -> None:
        self.model, self.optimizer, self.world = model, optimizer, world
        self.device = world.device
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.peak_lrs = [group["lr"] for group in optimizer.param_groups]
        self.clip_norm = config.optim.clip_norm or float("inf")
        self.loss_scale = LossScale(config.precision, world.device)
        self.phases = Phases(world.device)
        self.ema: Ema | None = None

    def infer(self, batch: Batch) -> Tensor:
        self.inference_net.eval()
        return infer_logits(self.inference_net, batch)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        if self.ema is None:
            yield
            return
        self._forget_gathered_weights()
        with self.ema.swapped_in():
            # A stop during an evaluation leaves by an exception: what ZeRO 3 has gathered of the
            # averages must be forgotten then as well, or it would pass for weights.
            try:
                yield
            finally:
                self._forget_gathered_weights()

    def load(self, directory: Path, counters: dict[str, float]) -> None:
        self.adopt(directory, open_optimizer_state(directory), counters)

    def adopt(
        self, directory: Path, optimizer_state: OptimizerState, counters: dict[str, float]
    ) -> None:
        self.loss_scale.restore(counters)
        weights = read_weights(directory / WEIGHTS)
        self._adopt_weights(weights, optimizer_state, source=str(directory))
        self._load_ema(directory)

    def counters(self) -> dict[str, float]:
        return self.loss_scale.state()

    def held_bytes(self) -> dict[str, int]:
        return held_bytes(
            self.model, self.optimizer, self.ema.averages.values() if self.ema else ()
        )

    def export(self, averaged: bool = False) -> dict[str, Tensor] | None:
        if averaged and self.ema is None:
            return None
        with self.averaged() if averaged else nullcontext():
            return self._collect_weights()

    def _set_learning_rates(self, scale: float) -> None:
        for group, peak in zip(self.optimizer.param_groups, self.peak_lrs):
            group["lr"] = peak * scale

    def _clip_gradients(self) -> Tensor:
        """Undo the loss scale, then clip; returns the gradients' norm before clipping, 0-dim."""
        if self.loss_scale.scale != 1.0:
            gradients = [p.grad for p in self.parameters if p.grad is not None]
            torch._foreach_div_(gradients, self.loss_scale.scale)
        return torch.nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)

    def _end_step(self, micro_losses: Sequence[dict[str, Tensor]]) -> StepStats:
        """Average the losses over the ranks, take the step and count it."""
        terms = tuple(micro_losses[0])
        with self.phases("losses"):
            rows = [
                torch.stack([losses[name].detach().float() for name in terms])
                for losses in micro_losses
            ]
            means = gather_on_device(torch.stack(rows).mean(0), self.world)

        with self.phases("optimizer"):
            norm = self._update()

        scale = self.loss_scale.scale
        self.loss_scale.update(torch.isfinite(norm))
        return StepStats(terms, means, norm, scale, self.phases.read())

    def _update(self) -> Tensor:
        """Take the optimizer step if the gradient is finite.

        Returns:
            the gradient's norm before clipping, 0-dim, on the device; not finite if refused.
        """
        raise NotImplementedError

    def _collect_weights(self) -> dict[str, Tensor] | None:
        """Return all weights as `export` does; None on ranks other than 0."""
        raise NotImplementedError

    def _adopt_weights(
        self, weights: dict[str, Tensor], optimizer_state: OptimizerState, source: str
    ) -> None:
        """Load whole weights and moments; here for an engine that holds whole parameters."""
        load_model_weights(self.model, weights, source)
        load_whole_state(
            optimizer_state, self.model, self.optimizer, int(self.loss_scale.applied_steps)
        )

    def _start_ema(self, config: Config, weights: Mapping[str, Tensor]) -> None:
        """Begin the moving average of tensors that are updated in place, if the run keeps one."""
        if config.train.ema is not None:
            self.ema = Ema(weights, config.train.ema.decay)

    def _load_ema(self, directory: Path) -> None:
        if self.ema is None:
            return
        file = directory / AVERAGES
        averages = read_weights(file)
        shares = {}
        for name, live in self.ema.live.items():
            if name not in averages:
                raise InputError(f"{file}: {name} is missing. Take another checkpoint of this run")
            shares[name] = self._own_share(averages[name], live)
            if shares[name].shape != live.shape:
                raise InputError(
                    f"{file}: {name} is that of another model. Take another checkpoint of this run"
                )
        self.ema.restore(shares)

    def _own_share(self, whole: Tensor, share: Tensor) -> Tensor:
        """Cut this rank's share out of a whole tensor; here it is the whole tensor."""
        return whole

    def _forget_gathered_weights(self) -> None:
        """Drop copies of weights that would hide a change of the originals; here there are none."""


class MixedPrecision(nn.Module):
    """Run a model under autocast.

    Weights, gradients and their exchange stay fp32, so DDP and every ZeRO stage agree.
    """

    def __init__(self, model: nn.Module, precision: str):
        super().__init__()
        self.model = model
        self.dtype = DTYPES[precision]

    def forward(self, *inputs: Any) -> Any:
        with torch.autocast(inputs[0].device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.model(*inputs)


@torch.no_grad()
def infer_logits(net: nn.Module, batch: Batch) -> Tensor:
    """Return the logits, float32 [B, S, S], of a network that is in evaluation mode."""
    return net(batch.image, batch.words, batch.word_mask).float()


@contextmanager
def preserved_buffers(net: nn.Module) -> Iterator[None]:
    """Restore the buffers of `net` on exit, so that BatchNorm forgets what it saw inside."""
    before = [(buffer, buffer.clone()) for buffer in net.buffers()]
    yield
    for buffer, value in before:
        buffer.copy_(value)


class Phases:
    """Add up the seconds of each phase of a step.

        with phases("forward"):
            ...
        phases.read()  # {"forward": 0.21}

    On a GPU, this is the time of its stream, measured by events without waiting for it.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.marks: list[tuple[str, Any, Any]] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Count what runs inside as the phase `name`."""
        begin = self._mark()
        yield
        self.marks.append((name, begin, self._mark()))

    def read(self) -> dict[str, float]:
        """Return seconds by phase since the last call.

        Work that the GPU has not finished yet counts in the next call.
        """
        seconds: dict[str, float] = {}
        unfinished = []
        for name, begin, end in self.marks:
            if self.device.type == "cuda" and not end.query():
                unfinished.append((name, begin, end))
            else:
                seconds[name] = seconds.get(name, 0.0) + self.between(begin, end)
        self.marks = unfinished
        return seconds

    def between(self, begin: Any, end: Any) -> float:
        """Return the seconds between two marks that the device has reached."""
        return begin.elapsed_time(end) / 1e3 if self.device.type == "cuda" else end - begin

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class LossScale:
    """Count applied updates on the device, and adapt fp16's loss scale.

    The scale halves on overflow and doubles after 2,000 good steps. For the other precisions it
    is 1. It is a number on the host, so only fp16 waits for each step.

    Attributes:
        applied_steps: updates that changed the weights; int64, 0-dim, on the device.
        scale: current factor on the loss.
        good_steps: consecutive steps without overflow.
    """

    def __init__(self, precision: str, device: torch.device | str = "cpu"):
        self.is_dynamic = precision == "fp16"
        self.applied_steps = torch.zeros((), dtype=torch.int64, device=device)
        self.scale = 65536.0 if self.is_dynamic else 1.0
        self.good_steps = 0

    def update(self, applied: Tensor) -> None:
        """Count a step whose update was applied or refused; bool, 0-dim."""
        self.applied_steps += applied
        if not self.is_dynamic:
            return
        self.good_steps = self.good_steps + 1 if applied else 0
        if not self.good_steps:
            self.scale = max(1.0, self.scale / 2)
        elif self.good_steps % 2000 == 0:
            self.scale *= 2

    def state(self) -> dict[str, float]:
        """Return plain numbers for a checkpoint."""
        return {
            "applied": int(self.applied_steps),
            "scale": self.scale,
            "good_steps": self.good_steps,
        }

    def restore(self, state: dict[str, float]) -> None:
        """Continue from what `state` returned."""
        self.applied_steps.fill_(int(state["applied"]))
        self.scale, self.good_steps = state["scale"], int(state["good_steps"])


def backward_loss(losses: dict[str, Tensor]) -> Tensor:
    """Return the loss to differentiate.

    A loss that is not finite becomes NaN in every gradient, so no engine can apply it.
    """
    loss = losses["loss"]
    return loss * torch.where(torch.isfinite(loss), 1.0, math.nan)


def held_bytes(
    model: nn.Module, optimizer: torch.optim.Optimizer, averages: Iterable[Tensor]
) -> dict[str, int]:
    """Count bytes by kind, as `Engine.held_bytes`; memory that two kinds share counts once."""
    shares = [p.ds_tensor for p in model.parameters() if hasattr(p, "ds_tensor")]
    groups = [group["params"] for group in optimizer.param_groups]
    leaves_by_kind = {
        "weights": [*model.parameters(), *model.buffers(), *shares],
        "optimizer": tree_leaves([groups, *optimizer.state.values()]),
        "average": list(averages),
    }

    counted: set[int] = set()
    total = {}
    for kind, leaves in leaves_by_kind.items():
        storages = [leaf.untyped_storage() for leaf in leaves if isinstance(leaf, Tensor)]
        sizes = {storage._cdata: storage.nbytes() for storage in storages}
        total[kind] = sum(size for storage, size in sizes.items() if storage not in counted)
        counted |= sizes.keys()
    return total


def average_norm_statistics(model: nn.Module, world: World) -> None:
    """Average the running statistics of trainable BatchNorms over the ranks; collective.

    Each rank has seen other samples. Without this, the ranks would score different models, and
    rank 0 would save its own.
    """
    for module in model.modules():
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            continue
        if not module.track_running_stats or not module.weight.requires_grad:
            continue
        for statistic in (module.running_mean, module.running_var):
            sum_over_ranks(statistic, world)
            statistic /= world.size


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch as a function of (seed, step, rank), for dropout and stochastic depth.

    So there is no generator state to save, and nothing to lose on resume.
    """
    mixed = 0x9E3779B97F4A7C15  # the increment and multipliers of splitmix64
    for number in (seed, step, rank):
        mixed = ((mixed ^ number) * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) & (2**64 - 1)
        mixed ^= mixed >> 31
    torch.manual_seed(mixed & (2**63 - 1))
