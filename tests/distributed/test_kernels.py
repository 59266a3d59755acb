"""The fused kernels inside the engines: the same training as with the reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from coupalign.config.schema import Config
from coupalign.distributed.world import World
from coupalign.kernels import plan
from tests.distributed.jobs import Numbers, make_engine, tiny, train_steps
from tests.distributed.ranks import run_ranks

pytest.importorskip("triton", reason="Triton is not installed")
ON_GPU = torch.cuda.is_available()
pytestmark = pytest.mark.gpu if ON_GPU else []
DDP, ZERO3 = ["engine.kind=ddp"], ["engine.kind=deepspeed", "engine.stage=3"]


def train_two_steps(world: World, configs: Sequence[Config]) -> list[tuple[Numbers, int]]:
    """Train each engine; returns its numbers and how many kernels it launched.

    The second step shows the update of the first.
    """
    from coupalign.kernels import fused

    if not ON_GPU:
        # Triton's interpreter runs the programs one after another.
        plan.PROGRAMS = 4

    launches: list[Any] = []
    launch = fused._launch

    def count_and_launch(kernel: Any, *arguments: Any, **options: Any) -> None:
        launches.append(kernel)
        launch(kernel, *arguments, **options)

    fused._launch = count_and_launch
    results = []
    for config in configs:
        launches.clear()
        numbers = train_steps(make_engine(config, world), config, world, range(2))
        results.append((numbers, len(launches)))
    return results


def test_engines_train_to_the_same_losses_with_fused_kernels() -> None:
    """Sums in another order differ by float32's rounding, which grows a little with each step."""
    tolerance = 1e-4 if ON_GPU else 1e-5
    configs = [
        tiny(*DDP, "model.wpa.impl=reference"),
        tiny(*DDP, "model.wpa.impl=fused"),
        tiny(*ZERO3, "model.wpa.impl=fused"),
    ]

    (expected, launched), *results = run_ranks(
        train_two_steps, 1 if ON_GPU else 2, configs, gpu=ON_GPU
    )[0]

    assert launched == 0, "the reference launched kernels"
    for engine, (numbers, launches) in zip(("DDP", "ZeRO 3"), results):
        assert launches > 0, f"{engine}: the kernels did not run"
        for step, expected_step in zip(numbers, expected):
            assert step == pytest.approx(expected_step, rel=tolerance), engine
