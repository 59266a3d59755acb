"""The DeepSpeed engine, ZeRO stages 0 to 3: DeepSpeed partitions, exchanges, clips and steps.

Autocast and the loss scale are ours. Two choices make every stage give DDP's numbers:

- Parameters stay fp32 and autocast runs inside the model. (DeepSpeed's own `bf16` takes a wrong
  first Adam step at stage 0, and its `torch_autocast` exchanges gradients in bf16.)
- A loss that is not finite becomes NaN in every gradient, which stages 1 to 3 refuse to apply.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coupalign.compat import package_hidden
from coupalign.config.schema import Config, DeepSpeedEngine
from coupalign.data.batch import Batch
from coupalign.data.order import micro_batches
from coupalign.distributed.world import World, is_lost_rank
from coupalign.engine.base import EngineBase, MixedPrecision, StepStats, backward_loss
from coupalign.engine.optimizer_state import (
    OptimizerState,
    cut_padding,
    write_whole_state,
    zero_state,
)
from coupalign.engine.shares import SHARES_FOLDER, restricted_loading
from coupalign.errors import InputError, describe_error
from coupalign.model.weights.load import load_model_weights


def deepspeed_config(config: Config, ranks: int) -> dict[str, Any]:
    """Derive DeepSpeed's dictionary, so that batch size and learning rate exist only once.

    It has no learning rate: the optimizer is ours, and each step sets its rates.
    """
    assert isinstance(config.engine, DeepSpeedEngine)
    stage = config.engine.stage
    accumulation, micro_batch = micro_batches(
        config.train.global_batch, config.train.max_micro_batch, ranks
    )

    bucket = config.engine.bucket_mb * 250_000  # elements of 4 bytes
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if stage == 3:
        # Keep no parameter whole, so that a rank's share is the only truth about it.
        zero |= {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": bucket}
    if config.engine.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}

    # At stage 0 the engine clips by itself.
    clip_norm = config.optim.clip_norm if stage > 0 else None
    return {
        "train_batch_size": config.train.global_batch,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip_norm or 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # torch's own fused AdamW updates offloaded states.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


class Zero(EngineBase):
    """Engine over DeepSpeed.

    Stage 0 holds whole parameters, as DDP does. Stages 1 and 2 share the optimizer state between
    the ranks. Stage 3 also shares the weights.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, config: Config, world: World
    ):
        assert isinstance(config.engine, DeepSpeedEngine)
        super().__init__(model, optimizer, config, world)
        self.stage = config.engine.stage
        self.deepspeed = _import_deepspeed(world)
        self.engine, *_ = self.deepspeed.initialize(
            model=MixedPrecision(model, config.precision),
            optimizer=optimizer,
            config=deepspeed_config(config, world.size),
            dist_init_required=False,
        )
        self.inference_net = self.engine

        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if self.stage == 3:
            trainable = {name: p.ds_tensor for name, p in trainable.items()}
        self._start_ema(config, trainable)

    def train_step(self, micro_batches: Sequence[Batch], lr_scale: float) -> StepStats:
        self.engine.train()
        self._set_learning_rates(lr_scale)
        if self.loss_scale.is_dynamic and self.stage > 0:
            self.engine.optimizer.override_loss_scale(self.loss_scale.scale)

        micro_losses = []
        for batch in micro_batches[:-1]:
            micro_losses.append(self._backward(batch))
            # This only counts the micro-batch; the last one's call, in `_update`, takes the step.
            self.engine.step()
        micro_losses.append(self._backward(micro_batches[-1]))

        return self._end_step(micro_losses)

    def save(self, directory: Path) -> None:
        if self.stage > 0:
            self.engine.save_checkpoint(str(directory), tag=SHARES_FOLDER, save_latest=False)
        elif self.world.is_main:
            write_whole_state(directory, self.model, self.optimizer)

    def load(self, directory: Path, counters: dict[str, float]) -> None:
        if self.stage == 0:
            super().load(directory, counters)
            return
        try:
            with restricted_loading():
                path, _ = self.engine.load_checkpoint(str(directory), tag=SHARES_FOLDER)
        except Exception as error:  # shares of another content raise almost any type
            if isinstance(error, OSError) or is_lost_rank(error):
                raise
            raise InputError(
                f"{directory / SHARES_FOLDER}: DeepSpeed cannot load these shares "
                f"({describe_error(error)}). Take another checkpoint of this run"
            ) from error
        assert path is not None, f"{directory}: DeepSpeed found no checkpoint of its own"
        self.loss_scale.restore(counters)
        self._load_ema(directory)

    def _backward(self, batch: Batch) -> dict[str, Tensor]:
        with self.phases("forward"):
            losses = self.engine(batch.image, batch.words, batch.word_mask, batch.target)
        with self.phases("backward"):
            loss = backward_loss(losses)
            if self.stage == 0:
                loss = loss * self.loss_scale.scale
            self.engine.backward(loss)
        return losses

    def _update(self) -> Tensor:
        norm = self._step_whole() if self.stage == 0 else self._step_shares()
        norm_on_device = torch.tensor(norm, device=self.device)
        if self.ema:
            step = self.loss_scale.applied_steps + 1
            self.ema.update(step, torch.isfinite(norm_on_device))
        return norm_on_device

    def _step_whole(self) -> float:
        norm = self._clip_gradients().item()
        if not norm < float("inf"):
            # AdamW skips parameters without a gradient.
            for parameter in self.parameters:
                parameter.grad = None
        self.engine.step()
        return norm

    def _step_shares(self) -> float:
        self.engine.step()
        if not self.engine.was_step_applied():
            return float("inf")
        return float(self.engine.get_global_grad_norm())

    def _collect_weights(self) -> dict[str, Tensor] | None:
        # Gathering is collective, so every rank goes through all parameters.
        weights = {name: self._gather(p) for name, p in self.model.named_parameters()}
        if not self.world.is_main:
            return None
        weights |= {name: buffer.cpu().clone() for name, buffer in self.model.named_buffers()}
        return {name: weights[name] for name in self.model.state_dict()}

    def _gather(self, parameter: nn.Parameter) -> Tensor | None:
        """Return a whole parameter, fp32 on the CPU, on rank 0; None elsewhere."""
        with self.deepspeed.zero.GatheredParameters([parameter], enabled=self.stage == 3):
            return parameter.detach().float().cpu().clone() if self.world.is_main else None

    def _adopt_weights(
        self, weights: dict[str, Tensor], optimizer_state: OptimizerState, source: str
    ) -> None:
        if self.stage == 0:
            super()._adopt_weights(weights, optimizer_state, source)
        elif self.stage == 3:
            self._adopt_shares(weights, optimizer_state, source)
        else:
            load_model_weights(self.model, weights, source)
            self._adopt_fragments(weights, optimizer_state)

    def _adopt_fragments(self, weights: dict[str, Tensor], optimizer_state: OptimizerState) -> None:
        """Load whole weights and moments at stages 1 and 2.

        There, each parameter group is one flat tensor. A rank keeps fp32 weights and moments of
        one contiguous fragment of it.
        """
        zero = self.engine.optimizer
        steps = int(self.loss_scale.applied_steps)
        for flat in zero.single_partition_of_fp32_groups:
            zero.optimizer.state[flat] = zero_state(flat, steps)

        # DeepSpeed does this after its first step: it maps parameters to places in the fragment.
        zero._lazy_init_hp_params_optimizer_state()

        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                continue
            whole = weights[name].to(parameter.device)
            self.deepspeed.utils.safe_set_full_fp32_param(parameter, whole)
            for moment, padded in (optimizer_state(name) or {}).items():
                value = cut_padding(padded, parameter.shape, name)
                self.deepspeed.utils.safe_set_full_optimizer_state(
                    parameter, value.to(parameter.device), moment
                )

    def _adopt_shares(
        self, weights: dict[str, Tensor], optimizer_state: OptimizerState, source: str
    ) -> None:
        """Load whole weights and moments at stage 3.

        There, a rank keeps its share of each parameter, of the fp32 copy and of the moments.
        """
        # A buffer that is not persistent is in no checkpoint.
        saved = self.model.state_dict().keys()
        shapes = {name: buffer.shape for name, buffer in self.model.named_buffers()}
        shapes |= {name: p.ds_shape for name, p in self.model.named_parameters()}
        for name, shape in shapes.items():
            if name in saved and (name not in weights or weights[name].shape != shape):
                raise InputError(
                    f"{source}: {name} is missing or has another shape: these weights belong to "
                    "another model. Take another checkpoint of this run"
                )

        zero = self.engine.optimizer
        self._forget_gathered_weights()
        steps = int(self.loss_scale.applied_steps)
        for flat in zero.fp32_partitioned_groups_flat:
            zero.optimizer.state[flat] = zero_state(flat, steps)

        for name, buffer in self.model.named_buffers():
            if name in weights:
                buffer.copy_(weights[name])

        for name, parameter in self.model.named_parameters():
            share = self._own_share(weights[name], parameter.ds_tensor)
            parameter.ds_tensor.copy_(share)
            if not parameter.requires_grad:
                continue
            self.deepspeed.utils.safe_set_local_fp32_param(parameter, share.to(self.device))
            for moment, padded in (optimizer_state(name) or {}).items():
                value = cut_padding(padded, parameter.ds_shape, name)
                share = self._own_share(value, parameter.ds_tensor)
                self.deepspeed.utils.safe_set_local_optimizer_state(
                    parameter, share.to(self.device), moment
                )

    def _own_share(self, whole: Tensor, share: Tensor) -> Tensor:
        """Cut out this rank's share in ZeRO 3's layout: flat, padded to equal parts."""
        if self.stage < 3:
            return whole
        size = share.numel()
        padding = size * self.world.size - whole.numel()
        if not 0 <= padding < self.world.size:
            raise InputError(
                f"a tensor of {whole.numel():,} values cannot be shared as {self.world.size} x "
                f"{size:,}: it is that of another model. Take another checkpoint of this run"
            )
        flat = torch.nn.functional.pad(whole.flatten(), (0, padding))
        return flat[self.world.rank * size : (self.world.rank + 1) * size]

    def _forget_gathered_weights(self) -> None:
        """Drop the whole parameters that ZeRO 3 keeps for reuse.

        They would hide a change of the shares from which they were gathered.
        """
        if self.stage == 3:
            self.engine.empty_partition_cache()


def _import_deepspeed(world: World) -> Any:
    """Import DeepSpeed, without letting it compile a C++ operator for shared-memory collectives.

    DeepSpeed requires its launcher's variables even if the process group exists already, so this
    sets them, whichever launcher started the process.
    """
    launcher_variables = {
        "RANK": world.rank,
        "WORLD_SIZE": world.size,
        "LOCAL_RANK": world.local_rank,
    }
    for name, value in launcher_variables.items():
        os.environ.setdefault(name, str(value))
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")

    # Its autotuner, which is not used here, would import mlflow: nearly half of the time.
    with package_hidden("mlflow"):
        import deepspeed
        import deepspeed.ops

    getattr(deepspeed.ops, "__compatible_ops__", {})["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed itself calls what torch deprecates.
    warnings.filterwarnings("ignore", "`torch.distributed.* is deprecated", FutureWarning)
    return deepspeed
