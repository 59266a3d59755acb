"""When the events of a run are due."""

from __future__ import annotations

from pathlib import Path

from coupalign.engine.base import TrainState
from tests.unit.training.examples import fake_run


def due_steps(predicate) -> list[int]:
    return [step for step in range(1, 11) if predicate(step)]


def test_events_are_due_at_their_interval_and_after_the_last_step(tmp_path: Path) -> None:
    run = fake_run(tmp_path, "train.log_every=5", "train.save_every=3")

    assert due_steps(run.log_due) == [5, 10]
    assert due_steps(run.save_due) == [3, 6, 9, 10]
    assert due_steps(run.evaluation_due) == [4, 8, 10]
    assert due_steps(run.anything_due) == [3, 4, 5, 6, 8, 9, 10]


def test_checkpoints_are_due_with_evaluations_by_default(tmp_path: Path) -> None:
    run = fake_run(tmp_path)

    assert due_steps(run.save_due) == due_steps(run.evaluation_due) == [4, 8, 10]


def test_events_without_an_interval_are_due_per_epoch(tmp_path: Path) -> None:
    run = fake_run(tmp_path, "train.evaluate_every=null", "train.global_batch=8")

    # 40 samples in batches of 8.
    assert due_steps(run.evaluation_due) == [5, 10]


def test_nothing_is_scored_without_evaluation_splits(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    run.config.data.__dict__["evaluate"] = ()

    assert due_steps(run.evaluation_due) == []
    assert not run.final_scores_due(TrainState(step=10))


def test_evaluation_is_overdue_if_its_step_was_not_scored(tmp_path: Path) -> None:
    run = fake_run(tmp_path)

    assert run.evaluation_overdue(TrainState(step=4))
    assert run.evaluation_overdue(TrainState(step=8, evaluated=4))
    assert not run.evaluation_overdue(TrainState(step=4, evaluated=4))
    assert not run.evaluation_overdue(TrainState(step=5))
    assert not run.evaluation_overdue(TrainState(step=0))
