"""Build the engine that a configuration names."""

from __future__ import annotations

import torch

from coupalign.config.schema import Config, DdpEngine, DeepSpeedEngine
from coupalign.distributed.world import World
from coupalign.engine.base import Engine
from coupalign.errors import InputError
from coupalign.model.base import ReferringModel
from coupalign.model.compile import compile_regions


def build_engine(
    model: ReferringModel, optimizer: torch.optim.Optimizer, config: Config, world: World
) -> Engine:
    """Wrap a model on `world.device` and its optimizer in the engine that the config names.

    Raises:
        InputError: the config asks for what this device cannot do.
    """
    if config.cuda_graphs and world.device.type != "cuda":
        raise InputError(
            "cuda_graphs: true needs an NVIDIA GPU, but this process computes on the "
            f"{world.device.type}: set cuda_graphs: false"
        )
    if config.compile:
        compile_regions(model)

    match config.engine:
        case DdpEngine():
            from coupalign.engine.ddp import Ddp

            return Ddp(model, optimizer, config, world)
        case DeepSpeedEngine():
            from coupalign.engine.zero import Zero

            return Zero(model, optimizer, config, world)


def engine_name(engine: DdpEngine | DeepSpeedEngine) -> str:
    """Return an engine's name, for people: "ddp" or "deepspeed ZeRO 2"."""
    match engine:
        case DdpEngine():
            return "ddp"
        case DeepSpeedEngine(stage=stage):
            return f"deepspeed ZeRO {stage}"
