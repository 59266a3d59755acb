"""The engines on one GPU: the same curve as on the CPU, and bf16 near fp32."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.jobs import curves, engines
from tests.distributed.ranks import run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
KINDS = ("ddp", "zero0", "zero1", "zero2", "zero3")


def test_every_engine_follows_the_cpu_curve() -> None:
    """fp32 on a GPU may use TF32 in convolutions: three decimal digits."""
    cpu = run_ranks(curves, 1, engines("ddp"), 5)[0][0]
    for kind, result in zip(KINDS, run_ranks(curves, 1, engines(*KINDS), 5, gpu=True)[0]):
        for (expected, _), (found, _) in zip(cpu["numbers"], result["numbers"]):
            assert found == pytest.approx(expected, rel=5e-3), kind


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_stays_near(precision: str) -> None:
    configs = [config.model_copy(update={"precision": precision}) for config in engines(*KINDS)]
    exact = run_ranks(curves, 1, engines("ddp"), 5, gpu=True)[0][0]
    for kind, result in zip(KINDS, run_ranks(curves, 1, configs, 5, gpu=True)[0]):
        for (expected, _), (found, _) in zip(exact["numbers"], result["numbers"]):
            assert found == pytest.approx(expected, rel=5e-2), kind
