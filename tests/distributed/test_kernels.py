"""The fused kernels inside the engines: the same training as with the reference."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from coupalign.config.schema import Config
from coupalign.dist import World
from coupalign.kernels import plan
from tests.distributed.jobs import curves, tiny
from tests.distributed.ranks import run_ranks

pytest.importorskip("triton", reason="Triton is not installed")
ON_GPU = torch.cuda.is_available()
pytestmark = pytest.mark.gpu if ON_GPU else []
DDP, ZERO3 = ["engine.kind=ddp"], ["engine.kind=deepspeed", "engine.stage=3"]


def curves_in_few_programs(world: World, configs: Sequence[Config]) -> list[dict[str, Any]]:
    """The interpreter runs programs one after the other. A step, and two more after it."""
    if not ON_GPU:
        plan.PROGRAMS = 4
    return curves(world, configs, 1)


def test_the_engines_train_to_the_same_losses() -> None:
    """Sums in another order differ by the rounding of float32, which grows a little with every step."""
    configs = [tiny(*DDP, "model.wpa.impl=reference"), tiny(*DDP, "model.wpa.impl=fused"), tiny(*ZERO3, "model.wpa.impl=fused")]
    plain, *results = run_ranks(curves_in_few_programs, 1 if ON_GPU else 2, configs, gpu=ON_GPU)[0]
    for engine, fused in zip(("DDP", "ZeRO 3"), results):
        for expected, found in zip(plain["numbers"], fused["numbers"]):
            assert found == pytest.approx(expected, rel=1e-4 if ON_GPU else 1e-5), engine
        assert plain["numbers"] != fused["numbers"], f"{engine}: equal to the last bit: the kernels did not run"
