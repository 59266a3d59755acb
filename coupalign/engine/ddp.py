"""The plain engine: DistributedDataParallel, torch's own optimizer, everything in sight."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from coupalign.config.schema import Config, DdpEngine
from coupalign.data.batch import Batch, random_batch
from coupalign.data.order import micro_batches
from coupalign.distributed.world import World
from coupalign.engine.base import (
    LossScale,
    MixedPrecision,
    Phases,
    StepStats,
    backward_loss,
    end_step,
    held_bytes,
    same_statistics,
)
from coupalign.engine.ema import Ema
from coupalign.engine.graphs import RecordedStep, zero_gradients
from coupalign.engine.optimizer_state import Moments, adopt_whole, open_optimizer_state, write_whole
from coupalign.model.weights.load import load_model_weights, read_weights


class Ddp:
    """Engine over DDP; with one rank it is plain PyTorch."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, config: Config, world: World
    ):
        assert isinstance(config.engine, DdpEngine)
        self.device, self.world, self.model, self.optimizer = world.device, world, model, optimizer
        self.clip = config.optim.clip_norm or float("inf")
        self.updates = LossScale(config.precision, world.device)
        self.phases = Phases(world.device)
        self.net: nn.Module = MixedPrecision(model, config.precision)
        self.recorded = config.cuda_graphs
        if self.recorded:
            self.net = RecordedStep(
                self.net, _some_batch(config, world)
            )  # DDP asks for that to come first
        if world.size > 1:
            warnings.filterwarnings(
                "ignore", "`broadcast_buffers` is deprecated", FutureWarning
            )  # its successor is not in torch 2.11
            ids = [world.device.index] if world.device.type == "cuda" else None
            self.net = DistributedDataParallel(
                self.net,
                device_ids=ids,
                bucket_cap_mb=config.engine.bucket_mb,
                gradient_as_bucket_view=True,
                broadcast_buffers=False,
            )
        if world.size > 2:
            self._settle_buckets(_some_batch(config, world))
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.peaks = [group["lr"] for group in optimizer.param_groups]
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.ema = config.train.ema and Ema(named, config.train.ema.decay)

    def train_step(self, micro_batches: Sequence[Batch], lr_scale: float) -> StepStats:
        self.net.train()
        for group, peak in zip(self.optimizer.param_groups, self.peaks):
            group["lr"] = peak * lr_scale
        if self.recorded:
            zero_gradients(self.parameters)
        micro_losses = []
        for place, batch in enumerate(micro_batches):
            with self._exchange(last=place == len(micro_batches) - 1):
                with self.phases("forward"):
                    losses = self.net(batch.image, batch.words, batch.word_mask, batch.target)
                with self.phases("backward"):
                    (backward_loss(losses) * (self.updates.scale / len(micro_batches))).backward()
            micro_losses.append(losses)
        return end_step(micro_losses, self.world, self.phases, self.updates, self._update)

    def _update(self) -> Tensor:
        """Clip and step, where the gradient is finite; its norm before clipping. Gradients are equal on every rank.

        The decision is taken on the device, by torch's fused AdamW itself; apex's must be told by the host.
        """
        if self.updates.scale != 1.0:
            torch._foreach_div_([p.grad for p in self.parameters], self.updates.scale)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
        finite = torch.isfinite(norm)
        if isinstance(self.optimizer, torch.optim.AdamW):
            self.optimizer.found_inf = (~finite).float()
            self.optimizer.step()
        elif finite:
            self.optimizer.step()
        if self.ema:
            self.ema.update(self.updates.applied + 1, finite)
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    @torch.no_grad()
    def infer(self, batch: Batch) -> Tensor:
        self.net.eval()
        net = (
            self.net.module if isinstance(self.net, DistributedDataParallel) else self.net
        )  # ranks may differ in batches
        return net(batch.image, batch.words, batch.word_mask).float()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        with self.ema.swapped_in() if self.ema else nullcontext():
            yield

    def save(self, directory: Path) -> None:
        if self.world.is_main:
            write_whole(directory, self.model, self.optimizer)

    def load(self, directory: Path, counters: dict[str, float]) -> None:
        self.adopt(directory, open_optimizer_state(directory), counters)

    def adopt(self, directory: Path, moments: Moments, counters: dict[str, float]) -> None:
        self.updates.restore(counters)
        load_model_weights(
            self.model, read_weights(directory / "weights.safetensors"), str(directory)
        )
        adopt_whole(moments, self.model, self.optimizer, int(self.updates.applied))
        if self.ema:
            averages = read_weights(directory / "ema.safetensors")
            self.ema.restore({name: averages[name] for name in self.ema.live})

    def counters(self) -> dict[str, float]:
        return self.updates.state()

    def held_bytes(self) -> dict[str, int]:
        return held_bytes(self.model, self.optimizer, self.ema.kept.values() if self.ema else ())

    def export(self, averaged: bool = False) -> dict[str, Tensor] | None:
        if not self.world.is_main or (averaged and not self.ema):
            return None
        with self.averaged() if averaged else nullcontext():
            return {
                name: value.detach().float().cpu().clone()
                if value.is_floating_point()
                else value.cpu().clone()
                for name, value in self.model.state_dict().items()
            }

    def _settle_buckets(self, batch: Batch) -> None:
        """Have DDP lay out its buckets for good, by a pass that changes nothing.

        After its first pass it sorts them by the order in which gradients came. A sum over three or more ranks is rounded by where it
        stands in a bucket, so the first step of a session would not be the one of a session that was never interrupted.
        """
        with same_statistics(self.net):
            backward_loss(
                self.net(batch.image, batch.words, batch.word_mask, batch.target)
            ).backward()
        self.optimizer.zero_grad(set_to_none=True)

    def _exchange(self, last: bool) -> object:
        accumulate_only = not last and isinstance(self.net, DistributedDataParallel)
        return self.net.no_sync() if accumulate_only else nullcontext()


def _some_batch(config: Config, world: World) -> Batch:
    """Of the shapes that a rank's micro-batches have, on its device."""
    _, samples = micro_batches(config.train.global_batch, config.train.max_micro_batch, world.size)
    return random_batch(samples, config.data.image_size, config.data.max_tokens, vocabulary=1).to(
        world.device
    )
