"""The speed of this machine's fastest matrix product, and the share of it that training reaches."""

from __future__ import annotations

import time

import torch

_SIDES = {"cuda": (4096, 8192), "cpu": (1024, 2048)}
_SECONDS_PER_SIDE = 0.2
_REPEATS = 3


def model_flops_utilization(
    *, flop_per_step: float, steps_per_second: float, ranks: int, peak: float
) -> float:
    """Return the MFU: achieved FLOP/s per rank, divided by `peak`.

    Args:
        flop_per_step: of all ranks together.
        peak: FLOP/s of one rank's fastest matrix product, see `matmul_peak`.
    """
    return flop_per_step * steps_per_second / ranks / peak


def matmul_peak(dtype: torch.dtype, device: torch.device) -> float:
    """Measure the FLOP/s of the fastest square matrix product."""
    return max(_measure_matmul(side, dtype, device) for side in _SIDES[device.type])


def _measure_matmul(side: int, dtype: torch.dtype, device: torch.device) -> float:
    """Return the FLOP/s of multiplying two square matrices, the best of a few repeats."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))

    def measure_seconds(products: int) -> float:
        began = time.perf_counter()
        for _ in range(products):
            a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    # Warm up, then choose how many products take long enough to measure.
    measure_seconds(3)
    products = max(1, round(_SECONDS_PER_SIDE / measure_seconds(1)))
    best = min(measure_seconds(products) for _ in range(_REPEATS))
    return 2 * side**3 * products / best
