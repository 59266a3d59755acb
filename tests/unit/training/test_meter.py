"""What a training says about its own speed."""

from __future__ import annotations

import pytest
import torch

from coupalign.config.load import override
from coupalign.config.schema import Config
from coupalign.costs.traffic import step_traffic
from coupalign.distributed.world import World
from coupalign.training import meter

TINY = override(
    Config(),
    [
        "precision=fp32",
        "data.image_size=32",
        "data.max_tokens=8",
        "model.image.kind=small",
        "model.image.widths=[8, 8, 16, 16]",
        "model.text.kind=small",
        "model.text.width=16",
        "model.text.heads=2",
        "model.decoder.width=16",
        "model.proposals.count=0",
    ],
)


def world(rank: int) -> World:
    return World(rank, 2, rank, 2, torch.device("cpu"))


def test_utilization_is_the_share_of_the_measured_peak_that_a_rank_reaches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []
    monkeypatch.setattr(
        meter, "matmul_peak", lambda dtype, device: asked.append((dtype, device.type)) or 1e9
    )
    utilization = meter.Utilization(TINY, world(0))
    assert utilization.of(100.0) == {} and not asked, "a short session does not pay for measuring"
    monkeypatch.setattr(meter, "_UTILIZATION_AFTER_S", 0.0)
    flop = sum(cost.flops for cost in step_traffic(TINY, 1).values())
    assert utilization.of(100.0) == {"train/mfu": pytest.approx(100 / 2 * flop / 1e9)}
    assert utilization.of(50.0)["train/mfu"] == pytest.approx(50 / 2 * flop / 1e9) and asked == [
        (torch.float32, "cpu")
    ]
    assert meter.Utilization(TINY, world(1)).of(100.0) == {}
