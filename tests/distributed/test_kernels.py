"""The fused kernels inside the engines: the same training as with the reference."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from coupalign.config.schema import Config
from coupalign.distributed.world import World
from coupalign.kernels import plan
from tests.distributed.jobs import make_engine, steps, tiny
from tests.distributed.ranks import run_ranks

pytest.importorskip("triton", reason="Triton is not installed")
ON_GPU = torch.cuda.is_available()
pytestmark = pytest.mark.gpu if ON_GPU else []
DDP, ZERO3 = ["engine.kind=ddp"], ["engine.kind=deepspeed", "engine.stage=3"]


def two_steps(
    world: World, configs: Sequence[Config]
) -> list[tuple[list[tuple[float, float]], int]]:
    """Loss and norm of two steps of each engine, and how many kernels they launched; the second has seen the first one's update."""
    from coupalign.kernels import fused

    if not ON_GPU:
        plan.PROGRAMS = 4  # the interpreter runs programs one after the other
    launched, launch = [], fused._launch
    fused._launch = lambda kernel, *arguments: launched.append(kernel) or launch(kernel, *arguments)
    found = []
    for config in configs:
        numbers = steps(make_engine(config, world), config, world, range(2))
        found.append((numbers, len(launched)))
        launched.clear()
    return found


def test_the_engines_train_to_the_same_losses() -> None:
    """Sums in another order differ by the rounding of float32, which grows a little with every step, or happens not to."""
    configs = [
        tiny(*DDP, "model.wpa.impl=reference"),
        tiny(*DDP, "model.wpa.impl=fused"),
        tiny(*ZERO3, "model.wpa.impl=fused"),
    ]
    (plain, none), *results = run_ranks(two_steps, 1 if ON_GPU else 2, configs, gpu=ON_GPU)[0]
    assert none == 0
    for engine, (fused, launched) in zip(("DDP", "ZeRO 3"), results):
        assert launched > 0, f"{engine}: the kernels did not run"
        for expected, found in zip(plain, fused):
            assert found == pytest.approx(expected, rel=1e-4 if ON_GPU else 1e-5), engine
