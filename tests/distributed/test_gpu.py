"""The engines on one GPU: the same curve as on the CPU, and bf16 near fp32."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.jobs import engine_configs, train_each
from tests.distributed.ranks import run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
KINDS = ("ddp", "zero0", "zero1", "zero2", "zero3")


def test_every_engine_follows_the_cpu_curve() -> None:
    """fp32 on a GPU may use TF32 in convolutions: three decimal digits."""
    cpu = run_ranks(train_each, 1, engine_configs("ddp"), 5)[0][0]

    results = run_ranks(train_each, 1, engine_configs(*KINDS), 5, gpu=True)[0]

    for kind, result in zip(KINDS, results):
        for (loss, _), (expected, _) in zip(result["numbers"], cpu["numbers"]):
            assert loss == pytest.approx(expected, rel=5e-3), kind


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_stays_near_fp32(precision: str) -> None:
    exact = run_ranks(train_each, 1, engine_configs("ddp"), 5, gpu=True)[0][0]

    configs = [
        config.model_copy(update={"precision": precision}) for config in engine_configs(*KINDS)
    ]
    results = run_ranks(train_each, 1, configs, 5, gpu=True)[0]

    for kind, result in zip(KINDS, results):
        for (loss, _), (expected, _) in zip(result["numbers"], exact["numbers"]):
            assert loss == pytest.approx(expected, rel=5e-2), kind
