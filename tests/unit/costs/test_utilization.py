"""The measured peak that utilization (MFU) is compared with."""

from __future__ import annotations

import pytest
import torch

from coupalign.costs.utilization import matmul_peak, model_flops_utilization


def test_matmul_peak_is_plausible() -> None:
    assert 1e9 < matmul_peak(torch.float32, torch.device("cpu")) < 1e15


def test_mfu_is_the_share_of_the_peak_that_a_rank_reaches() -> None:
    # 3 TFLOP per step at 4 steps per second are 6 TFLOP/s on each of 2 ranks.
    mfu = model_flops_utilization(flop_per_step=3e12, steps_per_second=4.0, ranks=2, peak=1e13)

    assert mfu == pytest.approx(0.6)
