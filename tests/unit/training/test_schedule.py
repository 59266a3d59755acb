"""The learning rate is a pure function of the step."""

from __future__ import annotations

import pytest

from coupalign.config.schema import ScheduleConfig, TrainConfig
from coupalign.training.schedule import lr_scale, steps_per_epoch, total_steps


@pytest.mark.parametrize("kind", ["poly", "cosine"])
def test_lr_scale_rises_to_one_and_falls_to_zero(kind: str) -> None:
    schedule = ScheduleConfig(kind=kind, warmup_steps=10)

    scales = [lr_scale(step, 110, schedule) for step in range(111)]

    assert scales[:10] == [(step + 1) / 10 for step in range(10)]
    assert scales[10] == 1.0
    assert all(later <= earlier for earlier, later in zip(scales[10:], scales[11:]))
    assert scales[110] == pytest.approx(0.0)


def test_poly_schedule_is_lavts() -> None:
    scale = lr_scale(250, 1000, ScheduleConfig(kind="poly", power=0.9))

    assert scale == pytest.approx((1 - 250 / 1000) ** 0.9)


def test_run_length_counts_batches_that_straddle_epochs() -> None:
    assert total_steps(TrainConfig(global_batch=32, epochs=2), 100) == 7
    assert total_steps(TrainConfig(global_batch=32, epochs=2, steps=5), 100) == 5

    assert steps_per_epoch(TrainConfig(global_batch=32), 100) == 4
    assert steps_per_epoch(TrainConfig(global_batch=32), 3) == 1
