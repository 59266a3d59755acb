"""DeepSpeed ZeRO behind the same seam: it partitions, exchanges, clips and steps; autocast and the loss scale are ours.

Two choices make every stage give DDP's numbers. Parameters stay fp32 and autocast runs inside the model (DeepSpeed's own
`bf16` at stage 0 takes a wrong first Adam step, and its `torch_autocast` exchanges gradients in bf16). And a step whose loss
is not finite is turned into NaN gradients, which stages 1 to 3 refuse to apply by themselves.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coupalign.compat import package_hidden
from coupalign.config.schema import Config, DeepSpeedEngine
from coupalign.data.batch import Batch
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
)
from coupalign.engine.ema import Ema
from coupalign.engine.optimizer_state import (
    SHARES,
    Moments,
    adopt_whole,
    fresh_state,
    open_optimizer_state,
    write_whole,
)
from coupalign.model.weights.load import load_model_weights, read_weights


def deepspeed_config(config: Config, ranks: int) -> dict[str, Any]:
    """The dictionary that DeepSpeed is given: derived, so that batch size and learning rate exist once.

    Learning rates are not in it: the optimizer is ours and each step sets them.
    """
    assert isinstance(config.engine, DeepSpeedEngine)
    accumulation, micro_batch = micro_batches(
        config.train.global_batch, config.train.max_micro_batch, ranks
    )
    bucket = config.engine.bucket_mb * 250_000  # elements of 4 bytes
    zero: dict[str, Any] = {
        "stage": config.engine.stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if config.engine.stage == 3:
        # No parameter is kept whole on every rank, so that a rank's share is the only truth about it.
        zero |= {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": bucket}
    if config.engine.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_batch_size": config.train.global_batch,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.optim.clip_norm or 0.0
        if config.engine.stage
        else 0.0,  # at stage 0 we clip
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # offloaded states are updated by torch's own fused AdamW
        "steps_per_print": 10**9,
    }


class Zero:
    """Engine over DeepSpeed, stages 0 to 3."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, config: Config, world: World
    ):
        assert isinstance(config.engine, DeepSpeedEngine)
        self.deepspeed = _import_deepspeed(world)
        self.device, self.world, self.model, self.optimizer = world.device, world, model, optimizer
        self.stage, self.clip = config.engine.stage, config.optim.clip_norm or float("inf")
        self.updates = LossScale(config.precision, world.device)
        self.phases = Phases(world.device)
        self.peaks = [group["lr"] for group in optimizer.param_groups]
        self.engine, *_ = self.deepspeed.initialize(
            model=MixedPrecision(model, config.precision),
            optimizer=optimizer,
            config=deepspeed_config(config, world.size),
            dist_init_required=False,
        )
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.ema = config.train.ema and Ema(self._shares(), config.train.ema.decay)

    def train_step(self, micro_batches: Sequence[Batch], lr_scale: float) -> StepStats:
        self.engine.train()
        for group, peak in zip(self.optimizer.param_groups, self.peaks):
            group["lr"] = peak * lr_scale
        if self.updates.scale != 1.0 and self.stage > 0:
            self.engine.optimizer.override_loss_scale(self.updates.scale)
        micro_losses = []
        for batch in micro_batches[:-1]:
            micro_losses.append(self._backward(batch))
            self.engine.step()  # counts the micro-batch; updates nothing before the last
        micro_losses.append(self._backward(micro_batches[-1]))
        return end_step(micro_losses, self.world, self.phases, self.updates, self._update)

    @torch.no_grad()
    def infer(self, batch: Batch) -> Tensor:
        self.engine.eval()
        return self.engine(batch.image, batch.words, batch.word_mask).float()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        if not self.ema:
            yield
            return
        self._forget_gathered()
        with self.ema.swapped_in():
            yield
            self._forget_gathered()

    def save(self, directory: Path) -> None:
        if self.stage == 0:
            if self.world.is_main:
                write_whole(directory, self.model, self.optimizer)
        else:
            self.engine.save_checkpoint(str(directory), tag=SHARES, save_latest=False)

    def load(self, directory: Path, counters: dict[str, float]) -> None:
        if self.stage == 0:
            self.adopt(directory, open_optimizer_state(directory), counters)
            return
        path, _ = self.engine.load_checkpoint(str(directory), tag=SHARES)
        assert path is not None, f"{directory}: DeepSpeed found no checkpoint of its own"
        self.updates.restore(counters)
        self._load_average(directory)

    def adopt(self, directory: Path, moments: Moments, counters: dict[str, float]) -> None:
        self.updates.restore(counters)
        weights = read_weights(directory / "weights.safetensors")
        if self.stage == 0:
            load_model_weights(self.model, weights, str(directory))
            adopt_whole(moments, self.model, self.optimizer, int(self.updates.applied))
        elif self.stage == 3:
            self._adopt_shares(weights, moments)
        else:
            load_model_weights(self.model, weights, str(directory))
            self._adopt_fragments(weights, moments)
        self._load_average(directory)

    def counters(self) -> dict[str, float]:
        return self.updates.state()

    def held_bytes(self) -> dict[str, int]:
        return held_bytes(self.model, self.optimizer, self.ema.kept.values() if self.ema else ())

    def export(self, averaged: bool = False) -> dict[str, Tensor] | None:
        if averaged and not self.ema:
            return None
        with self.averaged() if averaged else nullcontext():
            weights = {name: self._whole(p) for name, p in self.model.named_parameters()}
        weights |= {name: buffer.cpu().clone() for name, buffer in self.model.named_buffers()}
        return (
            {name: weights[name] for name in self.model.state_dict()}
            if self.world.is_main
            else None
        )

    def _backward(self, batch: Batch) -> dict[str, Tensor]:
        with self.phases("forward"):
            losses = self.engine(batch.image, batch.words, batch.word_mask, batch.target)
        with self.phases("backward"):
            loss = backward_loss(losses)
            self.engine.backward(loss * self.updates.scale if self.stage == 0 else loss)
        return losses

    def _update(self) -> Tensor:
        """Take the step and return the gradient norm before clipping; inf or nan: the step was refused."""
        norm = torch.tensor(self._step(), device=self.device)
        if self.ema:
            self.ema.update(self.updates.applied + 1, torch.isfinite(norm))
        return norm

    def _step(self) -> float:
        if self.stage == 0:
            if self.updates.scale != 1.0:
                torch._foreach_div_([p.grad for p in self.parameters], self.updates.scale)
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.clip).item()
            if not norm < float("inf"):
                for parameter in self.parameters:
                    parameter.grad = None  # AdamW passes over parameters without a gradient
            self.engine.step()
            return norm
        self.engine.step()
        return (
            float(self.engine.get_global_grad_norm())
            if self.engine.was_step_applied()
            else float("inf")
        )

    def _forget_gathered(self) -> None:
        """Under ZeRO 3, drop whole parameters kept for reuse: they would hide a change of the shares they were gathered from."""
        if self.stage == 3:
            self.engine.empty_partition_cache()

    def _shares(self) -> dict[str, Tensor]:
        named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        return {name: p.ds_tensor if self.stage == 3 else p for name, p in named.items()}

    def _load_average(self, directory: Path) -> None:
        if self.ema:
            averages = read_weights(directory / "ema.safetensors")
            self.ema.restore(
                {
                    name: self._share_of(averages[name], share)
                    for name, share in self.ema.live.items()
                }
            )

    def _adopt_fragments(self, weights: dict[str, Tensor], moments: Moments) -> None:
        """ZeRO 1 and 2: each group of parameters is one flat tensor, of which a rank keeps fp32 weights and moments of a part."""
        zero = self.engine.optimizer
        for flat in zero.single_partition_of_fp32_groups:
            zero.optimizer.state[flat] = fresh_state(flat, int(self.updates.applied))
        zero._lazy_init_hp_params_optimizer_state()  # what DeepSpeed does after its first step: parameter -> place in the part
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                continue
            self.deepspeed.utils.safe_set_full_fp32_param(
                parameter, weights[name].to(parameter.device)
            )
            for key, value in (moments(name) or {}).items():
                self.deepspeed.utils.safe_set_full_optimizer_state(
                    parameter, value.to(parameter.device), key
                )

    def _adopt_shares(self, weights: dict[str, Tensor], moments: Moments) -> None:
        """ZeRO 3: a rank keeps its share of each parameter, of the fp32 copy and of the moments."""
        zero = self.engine.optimizer
        self._forget_gathered()
        for flat in zero.fp32_partitioned_groups_flat:
            zero.optimizer.state[flat] = fresh_state(flat, int(self.updates.applied))
        for name, buffer in self.model.named_buffers():
            if name in weights:
                buffer.copy_(weights[name])
        for name, parameter in self.model.named_parameters():
            share = self._share_of(weights[name], parameter.ds_tensor)
            parameter.ds_tensor.copy_(share)
            if not parameter.requires_grad:
                continue
            self.deepspeed.utils.safe_set_local_fp32_param(parameter, share.to(self.device))
            for key, value in (moments(name) or {}).items():
                part = self._share_of(value.flatten()[: parameter.ds_numel], parameter.ds_tensor)
                self.deepspeed.utils.safe_set_local_optimizer_state(
                    parameter, part.to(self.device), key
                )

    def _share_of(self, whole: Tensor, share: Tensor) -> Tensor:
        """This rank's part of a whole tensor, in the layout that ZeRO 3 uses: flat, padded to equal parts."""
        if self.stage < 3:
            return whole
        size = share.numel()
        flat = torch.nn.functional.pad(whole.flatten(), (0, size * self.world.size - whole.numel()))
        return flat[self.world.rank * size : (self.world.rank + 1) * size]

    def _whole(self, parameter: nn.Parameter) -> Tensor | None:
        gathered = self.deepspeed.zero.GatheredParameters([parameter], enabled=self.stage == 3)
        with gathered:
            return parameter.detach().float().cpu().clone() if self.world.is_main else None


def _import_deepspeed(world: World) -> Any:
    """Import DeepSpeed without its habit of compiling a C++ operator for shared-memory collectives at the first start.

    It insists on its launcher's variables even where the process group exists already, so whoever started us, it finds them.
    """
    for name, value in (
        ("RANK", world.rank),
        ("WORLD_SIZE", world.size),
        ("LOCAL_RANK", world.local_rank),
    ):
        os.environ.setdefault(name, str(value))
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with package_hidden(
        "mlflow"
    ):  # its autotuner, which nobody calls here, would import it: nearly half of the time
        import deepspeed
        import deepspeed.ops

    getattr(deepspeed.ops, "__compatible_ops__", {})["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings(
        "ignore", "`torch.distributed.* is deprecated", FutureWarning
    )  # DeepSpeed's own calls
    return deepspeed
