"""The learning rate and the length of a run, as pure functions of the step."""

from __future__ import annotations

import math

from coupalign.config.schema import ScheduleConfig, TrainConfig


def lr_scale(step: int, total: int, schedule: ScheduleConfig) -> float:
    """Return the share of the peak learning rate in optimizer step `step` (from 0) of `total`.

    A linear warm-up starts at 1/warmup_steps. Then t runs from 0 to 1, and the share follows
    (1 - t)^power (poly; LAVT's recipe has power 0.9) or half a cosine, down to `final`.
    """
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    t = min(1.0, (step - schedule.warmup_steps) / max(1, total - schedule.warmup_steps))
    if schedule.kind == "poly":
        curve = (1 - t) ** schedule.power
    else:
        curve = (1 + math.cos(math.pi * t)) / 2
    return schedule.final + (1 - schedule.final) * curve


def total_steps(train: TrainConfig, samples: int) -> int:
    """Return the optimizer steps of the whole run over a training set of `samples`."""
    if train.steps is not None:
        return train.steps
    assert train.epochs is not None
    return math.ceil(train.epochs * samples / train.global_batch)


def steps_per_epoch(train: TrainConfig, samples: int) -> int:
    """Return the optimizer steps until every sample was seen about once.

    A batch may straddle two epochs.
    """
    return max(1, math.ceil(samples / train.global_batch))
