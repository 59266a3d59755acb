"""Learning rate as a pure function of the step."""

from __future__ import annotations

import math

from coupalign.config.schema import ScheduleConfig, TrainConfig


def lr_scale(step: int, total: int, schedule: ScheduleConfig) -> float:
    """Share of the peak learning rate in optimizer step `step` (from 0) of `total`.

    Linear warm-up from 1/warmup_steps, then (1 - t)^power (poly, the LAVT recipe with power 0.9) or half a cosine,
    with t running from 0 to 1.
    """
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    t = min(1.0, (step - schedule.warmup_steps) / max(1, total - schedule.warmup_steps))
    curve = (
        (1 - t) ** schedule.power if schedule.kind == "poly" else (1 + math.cos(math.pi * t)) / 2
    )
    return curve


def total_steps(train: TrainConfig, samples: int) -> int:
    """Optimizer steps of the whole run over a training set of `samples`."""
    if train.steps is not None:
        return train.steps
    assert train.epochs is not None
    return math.ceil(train.epochs * samples / train.global_batch)


def steps_per_epoch(train: TrainConfig, samples: int) -> int:
    """Optimizer steps until every sample was seen about once; a batch may straddle two epochs."""
    return max(1, math.ceil(samples / train.global_batch))
