"""The engine seam: everything that differs between DDP and DeepSpeed, at the level where they agree, one optimizer step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from coupalign.data.batch import Batch
from coupalign.distributed.world import World, gather_on_device, sum_over_ranks
from coupalign.engine.optimizer_state import Moments

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class TrainState:
    """All that a run needs, besides weights and optimizer, to go on exactly: the data order is a function of the step."""

    step: int = 0  # optimizer steps done, skipped ones included: the place in the data
    bad_steps: int = 0  # consecutive steps skipped up to here
    best: float | None = None  # best score on the first evaluated split
    best_step: int | None = None
    evaluated: int | None = (
        None  # after which step the scores were last taken; one that was cut short is taken again
    )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class StepStats:
    """What one optimizer step did, averaged over all ranks and micro-batches.

    The numbers stay on the device until somebody asks for one of them: a step itself makes nobody wait.
    """

    terms: tuple[str, ...]  # "loss" is the weighted sum; the others are unweighted
    means: Tensor  # float64 [ranks, terms]: each rank's means over its micro-batches
    norm: Tensor  # of the whole gradient, before clipping; 0-dim
    loss_scale: float = 1.0
    # Of this rank, seconds: "forward" (which no other rank delays but under ZeRO 3), "backward" (with the exchange of gradients that
    # runs beside it), "losses" (averaged over the ranks), "optimizer" (clipping, update, moving average).
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def losses(self) -> dict[str, float]:
        """By term."""
        return dict(zip(self.terms, self.means.mean(0).tolist()))

    @property
    def bad_ranks(self) -> tuple[int, ...]:
        """Ranks whose loss was not finite."""
        finite = torch.isfinite(self.means[:, self.terms.index("loss")]).tolist()
        return tuple(rank for rank, is_finite in enumerate(finite) if not is_finite)

    @property
    def applied(self) -> bool:
        """False: the weights did not change, since the loss or the gradient was not finite."""
        return math.isfinite(self.norm.item())

    @property
    def grad_norm(self) -> float:
        """Of the whole gradient, before clipping; nan where it is not finite."""
        return self.norm.item() if self.applied else math.nan


class Engine(Protocol):
    """Every method is collective: all ranks call it, in the same order."""

    device: torch.device
    model: nn.Module  # the bare one, whatever wraps it

    def train_step(self, micro_batches: Sequence[Batch], lr_scale: float) -> StepStats:
        """One optimizer step over this rank's micro-batches; learning rates are their peaks times `lr_scale`."""

    def infer(self, batch: Batch) -> Tensor:
        """Logits float32 [B, S, S] in evaluation mode, without gradients."""

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the weights are their moving average, where the run keeps one."""

    def save(self, directory: Path) -> None:
        """Write the optimizer state into an existing directory, each rank its share."""

    def load(self, directory: Path, counters: dict[str, float]) -> None:
        """Take weights, moving average and optimizer state from a directory that `save` and `export` of the same kind of engine
        and the same number of ranks filled."""

    def adopt(self, directory: Path, moments: Moments, counters: dict[str, float]) -> None:
        """The same from the checkpoint of any engine on any number of ranks, with its moments whole."""

    def counters(self) -> dict[str, float]:
        """The few numbers of the optimizer that are the same on every rank, for `load` and `adopt`."""

    def held_bytes(self) -> dict[str, int]:
        """What this rank keeps between steps: "weights", "optimizer", "average"."""

    def export(self, averaged: bool = False) -> dict[str, Tensor] | None:
        """All weights, fp32 on the CPU, by the model's own names, on rank 0; None elsewhere, or without a moving average."""


class MixedPrecision(nn.Module):
    """Runs a model under autocast. Weights, gradients and their exchange stay fp32, so that DDP and every ZeRO stage agree."""

    def __init__(self, model: nn.Module, precision: str):
        super().__init__()
        self.model = model
        self.dtype = DTYPES[precision]

    def forward(self, *inputs: Any) -> Any:
        with torch.autocast(inputs[0].device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.model(*inputs)


@contextmanager
def same_statistics(net: nn.Module) -> Iterator[None]:
    """What BatchNorm has seen inside is forgotten afterwards."""
    kept = [(buffer, buffer.clone()) for buffer in net.buffers()]
    yield
    for buffer, value in kept:
        buffer.copy_(value)


class Phases:
    """Adds up the time of each phase of a step: on a GPU that of its stream, which nobody waits for.

    with phases("forward"):
        ...
    phases.read()             # {"forward": 0.21}
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.marks: list[tuple[str, Any, Any]] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """What runs inside belongs to the phase."""
        begin = self._mark()
        yield
        self.marks.append((name, begin, self._mark()))

    def read(self) -> dict[str, float]:
        """Seconds by phase since the last reading. What the GPU has not got through yet counts in the next one."""
        seconds: dict[str, float] = {}
        later = []
        for name, begin, end in self.marks:
            if self.device.type == "cuda" and not end.query():
                later.append((name, begin, end))
            else:
                seconds[name] = seconds.get(name, 0.0) + self.between(begin, end)
        self.marks = later
        return seconds

    def between(self, begin: Any, end: Any) -> float:
        """Seconds between two marks that have been reached."""
        return begin.elapsed_time(end) / 1e3 if self.device.type == "cuda" else end - begin

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class LossScale:
    """Counts the updates that were applied, on the device, and follows fp16's loss scale.

    The scale halves on overflow and doubles after 2,000 good steps; it is 1 and constant for the other types. It is a number of the
    host, so fp16 alone waits for each step.
    """

    def __init__(self, precision: str, device: torch.device | str = "cpu"):
        self.follows = precision == "fp16"
        self.applied = torch.zeros((), dtype=torch.int64, device=device)
        self.scale = 65536.0 if self.follows else 1.0
        self.good_steps = 0

    def count(self, applied: Tensor) -> None:
        """Note a step whose update was applied or refused; bool, 0-dim."""
        self.applied += applied
        if not self.follows:
            return
        self.good_steps = self.good_steps + 1 if applied else 0
        if not self.good_steps:
            self.scale = max(1.0, self.scale / 2)
        elif self.good_steps % 2000 == 0:
            self.scale *= 2

    def state(self) -> dict[str, float]:
        return {"applied": int(self.applied), "scale": self.scale, "good_steps": self.good_steps}

    def restore(self, state: dict[str, float]) -> None:
        self.applied.fill_(int(state["applied"]))
        self.scale, self.good_steps = state["scale"], int(state["good_steps"])


def backward_loss(losses: dict[str, Tensor]) -> Tensor:
    """The loss to differentiate. One that is not finite becomes NaN in every gradient, so that no engine can apply it."""
    loss = losses["loss"]
    return loss * torch.where(torch.isfinite(loss), 1.0, math.nan)


def end_step(
    micro_losses: Sequence[dict[str, Tensor]],
    world: World,
    phases: Phases,
    updates: LossScale,
    update: Callable[[], Tensor],
) -> StepStats:
    """What is the same for every engine once the gradients are there.

    Args:
        update: takes the step where the gradient is finite; the norm of the gradient before clipping, 0-dim, on the device.
    """
    terms = tuple(micro_losses[0])
    with phases("losses"):
        mine = torch.stack(
            [
                torch.stack([losses[name].detach().float() for name in terms])
                for losses in micro_losses
            ]
        ).mean(0)
        means = gather_on_device(mine, world)
    with phases("optimizer"):
        norm = update()
    scale = updates.scale
    updates.count(torch.isfinite(norm))
    return StepStats(terms, means, norm, scale, phases.read())


def held_bytes(
    model: nn.Module, optimizer: torch.optim.Optimizer, average: Iterable[Tensor]
) -> dict[str, int]:
    """Bytes by kind. Under ZeRO the optimizer has copies of a rank's share of the weights, too; they count as its own."""
    shares = [p.ds_tensor for p in model.parameters() if hasattr(p, "ds_tensor")]
    kinds = {
        "weights": [*model.parameters(), *model.buffers(), *shares],
        "optimizer": tree_leaves(
            [[group["params"] for group in optimizer.param_groups], *optimizer.state.values()]
        ),
        "average": list(average),
    }
    counted: set[int] = set()
    found = {}
    for kind, tensors in kinds.items():
        storages = {
            x.untyped_storage()._cdata: x.untyped_storage().nbytes()
            for x in tensors
            if isinstance(x, Tensor)
        }
        found[kind] = sum(size for place, size in storages.items() if place not in counted)
        counted |= storages.keys()
    return found


def agree_on_statistics(model: nn.Module, world: World) -> None:
    """Running statistics of BatchNorms that learn become their mean over the ranks, each of which has seen other samples; collective.

    Without it the ranks would score, and rank 0 save, models that differ.
    """
    for module in model.modules():
        if (
            isinstance(module, nn.modules.batchnorm._BatchNorm)
            and module.track_running_stats
            and module.weight.requires_grad
        ):
            for statistic in (module.running_mean, module.running_var):
                sum_over_ranks(statistic, world)
                statistic /= world.size


def seed_step(seed: int, step: int, rank: int) -> None:
    """Dropout and stochastic depth become a function of (seed, step, rank): nothing to save, nothing to lose on resume."""
    mixed = 0x9E3779B97F4A7C15  # the increment and multipliers of splitmix64
    for word in (seed, step, rank):
        mixed = ((mixed ^ word) * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) & (2**64 - 1)
        mixed ^= mixed >> 31
    torch.manual_seed(mixed & (2**63 - 1))
