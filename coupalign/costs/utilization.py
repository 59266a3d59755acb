"""Model FLOPs utilization: achieved FLOP/s divided by the measured matmul peak of this machine."""

from __future__ import annotations

import time

import torch

from coupalign.config.schema import Config
from coupalign.distributed.watchdog import doing
from coupalign.distributed.world import World
from coupalign.engine.base import DTYPES

_UTILIZATION_AFTER_S = (
    30.0  # of a session: shorter ones are not worth the seconds that measuring takes
)


_SIDES = {"cuda": (4096, 8192), "cpu": (1024, 2048)}


_SECONDS = 0.2  # that each side is multiplied for


class Utilization:
    """Which share of this machine's fastest matrix product a training reaches (MFU), from its samples per second; on rank 0.

    The FLOPs of a sample are counted and the product is measured once, some time into the session.
    """

    def __init__(self, config: Config, world: World) -> None:
        self.config, self.world = config, world
        self.began = time.perf_counter()
        self.samples_per_second_at_peak: float | None = None

    def of(self, samples_per_second: float) -> dict[str, float]:
        """{"train/mfu": share} of a rank; nothing before it is known."""
        if not self.world.is_main or time.perf_counter() - self.began < _UTILIZATION_AFTER_S:
            return {}
        if self.samples_per_second_at_peak is None:
            from coupalign.costs.traffic import step_traffic  # which takes its time to import

            doing("measuring this machine's fastest matrix product", alone=True)
            flop = sum(cost.flops for cost in step_traffic(self.config, 1).values())
            self.samples_per_second_at_peak = (
                self.world.size
                * matmul_peak(DTYPES[self.config.precision], self.world.device)
                / flop
            )
        return {"train/mfu": samples_per_second / self.samples_per_second_at_peak}


def matmul_peak(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of the fastest square matrix product: what a share of the machine's peak is measured against."""
    return max(_matmul(side, dtype, device) for side in _SIDES[device.type])


def _matmul(side: int, dtype: torch.dtype, device: torch.device) -> float:
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))

    def seconds(times: int) -> float:
        began = time.perf_counter()
        for _ in range(times):
            a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    seconds(3)
    times = max(1, round(_SECONDS / seconds(1)))
    return max(2 * side**3 * times / seconds(times) for _ in range(3))
