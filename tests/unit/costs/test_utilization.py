"""The measured peak that utilization (MFU) is compared with."""

from __future__ import annotations

import torch

from coupalign.costs.utilization import matmul_peak


def test_matmul_peak_is_plausible() -> None:
    assert 1e9 < matmul_peak(torch.float32, torch.device("cpu")) < 1e15
