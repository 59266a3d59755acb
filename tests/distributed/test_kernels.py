"""The fused kernels inside the engines: the same training as with the reference."""
from __future__ import annotations

import pytest
import torch

from tests.distributed.jobs import curves, tiny
from tests.distributed.ranks import run_ranks

pytest.importorskip("triton", reason="Triton is not installed")
ON_GPU = torch.cuda.is_available()
pytestmark = pytest.mark.gpu if ON_GPU else []
KINDS = {"ddp": ["engine.kind=ddp"], "zero3": ["engine.kind=deepspeed", "engine.stage=3"]}
STEPS = 1         # and two more after it, see curves


def test_the_engines_train_to_the_same_losses() -> None:
    """Every kind twice: float32 sums in another order differ by its rounding, which grows a little with every step."""
    configs = [tiny(*changes, f"model.wpa.impl={impl}") for changes in KINDS.values() for impl in ("reference", "fused")]
    results = run_ranks(curves, 1 if ON_GPU else 2, configs, STEPS, gpu=ON_GPU)[0]
    for kind, plain, fused in zip(KINDS, results[::2], results[1::2]):
        for expected, found in zip(plain["numbers"], fused["numbers"]):
            assert found == pytest.approx(expected, rel=1e-4 if ON_GPU else 1e-5), kind
        assert plain["numbers"] != fused["numbers"], f"{kind}: equal to the last bit: the kernels did not run"
