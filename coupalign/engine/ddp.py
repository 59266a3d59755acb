"""The plain engine: DistributedDataParallel and torch's own optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from coupalign.config.schema import Config, DdpEngine
from coupalign.data.batch import Batch, random_batch
from coupalign.data.order import micro_batches
from coupalign.distributed.world import World
from coupalign.engine.base import (
    EngineBase,
    MixedPrecision,
    StepStats,
    backward_loss,
    preserved_buffers,
)
from coupalign.engine.graphs import RecordedStep, zero_gradients
from coupalign.engine.optimizer_state import write_whole_state


class Ddp(EngineBase):
    """Engine over DDP. With one rank it is plain PyTorch."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, config: Config, world: World
    ):
        assert isinstance(config.engine, DdpEngine)
        super().__init__(model, optimizer, config, world)

        net: nn.Module = MixedPrecision(model, config.precision)
        self.is_recorded = config.cuda_graphs
        if self.is_recorded:
            # DDP requires that the graph is recorded before it wraps the network.
            net = RecordedStep(net, _example_batch(config, world))

        # Inference runs the inner network, as ranks may have different numbers of batches.
        self.inference_net = self.net = net
        if world.size > 1:
            self.net = _wrap(net, world, config.engine.bucket_mb)
        if world.size > 2:
            self._settle_buckets(_example_batch(config, world))

        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._start_ema(config, trainable)

    def train_step(self, micro_batches: Sequence[Batch], lr_scale: float) -> StepStats:
        self.net.train()
        self._set_learning_rates(lr_scale)
        if self.is_recorded:
            zero_gradients(self.parameters)

        micro_losses = []
        for index, batch in enumerate(micro_batches):
            is_last = index == len(micro_batches) - 1
            with self._gradient_exchange(is_last):
                with self.phases("forward"):
                    losses = self.net(batch.image, batch.words, batch.word_mask, batch.target)
                with self.phases("backward"):
                    share = self.loss_scale.scale / len(micro_batches)
                    (backward_loss(losses) * share).backward()
            micro_losses.append(losses)

        return self._end_step(micro_losses)

    def save(self, directory: Path) -> None:
        if self.world.is_main:
            write_whole_state(directory, self.model, self.optimizer)

    def _update(self) -> Tensor:
        """Clip and step if the gradient is finite. Gradients are equal on every rank.

        torch's fused AdamW decides on the device. apex's optimizer cannot, so there the host waits.
        """
        norm = self._clip_gradients()
        finite = torch.isfinite(norm)

        if isinstance(self.optimizer, torch.optim.AdamW):
            self.optimizer.found_inf = (~finite).float()
            self.optimizer.step()
        elif finite:
            self.optimizer.step()

        if self.ema:
            self.ema.update(self.loss_scale.applied_steps + 1, finite)
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _collect_weights(self) -> dict[str, Tensor] | None:
        if not self.world.is_main:
            return None
        weights = {}
        for name, value in self.model.state_dict().items():
            if value.is_floating_point():
                value = value.detach().float()
            weights[name] = value.cpu().clone()
        return weights

    def _settle_buckets(self, batch: Batch) -> None:
        """Make DDP choose its final buckets, by a pass that changes nothing.

        DDP reorders its buckets after the first pass, by the order in which gradients arrive. A
        sum over three or more ranks is rounded according to its position in a bucket. Without
        this, the first step of a resumed run would differ from that of an uninterrupted one.
        """
        with preserved_buffers(self.net):
            losses = self.net(batch.image, batch.words, batch.word_mask, batch.target)
            backward_loss(losses).backward()
        self.optimizer.zero_grad(set_to_none=True)

    def _gradient_exchange(self, is_last: bool) -> AbstractContextManager[None]:
        """Let the ranks exchange gradients only in the last micro-batch of a step."""
        if is_last or not isinstance(self.net, DistributedDataParallel):
            return nullcontext()
        return self.net.no_sync()


def _wrap(net: nn.Module, world: World, bucket_mb: int) -> DistributedDataParallel:
    # Its successor is not in torch 2.11.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    return DistributedDataParallel(
        net,
        device_ids=[world.device.index] if world.device.type == "cuda" else None,
        bucket_cap_mb=bucket_mb,
        gradient_as_bucket_view=True,
        broadcast_buffers=False,
    )


def _example_batch(config: Config, world: World) -> Batch:
    """Make a batch with the shapes of a rank's micro-batches, on its device."""
    _, samples = micro_batches(config.train.global_batch, config.train.max_micro_batch, world.size)
    batch = random_batch(samples, config.data.image_size, config.data.max_tokens, vocabulary=1)
    return batch.to(world.device)
