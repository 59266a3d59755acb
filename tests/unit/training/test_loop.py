"""The order of events in the training loop: steps, scores, checkpoints, requests to stop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from coupalign.distributed.stop import StopRequest
from coupalign.engine.base import TrainState
from coupalign.errors import InputError, RunError
from coupalign.evaluation.evaluator import Stopped
from coupalign.training import loop
from coupalign.training.loop import Outcome, train_until_done
from coupalign.training.run import Run
from tests.unit.training.examples import FakeTracker, fake_run


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many times the splits were scored, in place of really scoring them."""
    calls: list[int] = []

    def score_splits(*_: object, **__: object) -> dict:
        calls.append(1)
        oiou = 0.5 if len(calls) == 2 else 0.4
        return {"val": FakeScore(oiou)}

    monkeypatch.setattr(loop, "score_splits", score_splits)
    return calls


class FakeScore:
    protocol, sentences, samples, fingerprint = "ris-v1", "each", 10, "0123456789abcdef0"

    def __init__(self, oiou: float) -> None:
        self.metrics = {"oIoU": oiou, "mIoU": oiou, "P@0.5": oiou}

    def to_json(self) -> dict:
        return self.metrics


def train(run: Run, state: TrainState | None = None, stop: StopRequest | None = None) -> Outcome:
    return train_until_done(run, state or TrainState(), FakeTracker(), stop or StopRequest())


def saved_steps(run: Run) -> list[int]:
    return [state.step for state in run.checkpoints.saved]


def stop_after(run: Run, step: int, stop: StopRequest) -> None:
    """Request a stop in the middle of a step."""
    train_step = run.engine.train_step

    def train_step_and_stop(*arguments: object) -> object:
        if run.engine.steps + 1 == step:
            stop.name = "SIGTERM"
        return train_step(*arguments)

    run.engine.train_step = train_step_and_stop


def test_run_scores_and_saves_at_its_interval_and_at_the_end(
    tmp_path: Path, scored: list[int]
) -> None:
    run = fake_run(tmp_path)

    outcome = train(run)

    assert outcome.finished and outcome.state.step == 10
    assert saved_steps(run) == [4, 8, 10] and len(scored) == 3
    assert all(state.evaluated == state.step for state in run.checkpoints.saved)
    assert (outcome.state.best, outcome.state.best_step) == (0.5, 8)
    assert outcome.scores["val"].metrics["oIoU"] == 0.4


def test_new_best_is_saved_although_no_checkpoint_is_due(tmp_path: Path, scored: list[int]) -> None:
    """Otherwise a score would be remembered as the best whose weights nobody has."""
    run = fake_run(tmp_path, "train.save_every=5", total_steps=15)

    train(run)

    # Scores after 4 (the first), 8 (the best), 12 and 15; checkpoints are due after 5, 10, 15.
    assert saved_steps(run) == [4, 5, 8, 10, 15]
    assert run.checkpoints.saved[-1].best_step == 8


def test_best_of_another_protocol_is_not_compared(
    tmp_path: Path, scored: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    run = fake_run(tmp_path, total_steps=4)
    before = TrainState(step=3, evaluated=3, best=0.9, best_step=3, best_of="val, cris, each")

    state = train(run, before).state

    assert (state.best, state.best_step) == (0.4, 4)
    assert state.best_of == "val, ris-v1, each, 10 samples, data 0123456789abcdef"
    assert "was measured on val, cris, each" in caplog.text


def test_best_of_the_same_protocol_stays(tmp_path: Path, scored: list[int]) -> None:
    run = fake_run(tmp_path, total_steps=4)
    best_of = "val, ris-v1, each, 10 samples, data 0123456789abcdef"

    for said in (best_of, None):
        before = TrainState(step=3, evaluated=3, best=0.9, best_step=3, best_of=said)
        state = train(run, before).state
        assert (state.best, state.best_step, state.best_of) == (0.9, 3, said)


def test_stop_saves_and_leaves_the_evaluation_due(
    tmp_path: Path, scored: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    run, stop = fake_run(tmp_path), StopRequest()
    stop_after(run, 8, stop)

    outcome = train(run, stop=stop)

    assert not outcome.finished and outcome.state.step == 8
    assert saved_steps(run) == [4, 8], "a stop that meets a due save saves once"
    assert outcome.state.evaluated == 4 and run.evaluation_overdue(outcome.state)
    assert "stopped by SIGTERM after step 8; the same command resumes" in capsys.readouterr().out


def test_stop_between_events_saves(tmp_path: Path, scored: list[int]) -> None:
    run, stop = fake_run(tmp_path), StopRequest()
    stop_after(run, 6, stop)

    outcome = train(run, stop=stop)

    assert not outcome.finished and saved_steps(run) == [4, 6]


def test_stop_during_an_evaluation_leaves_it_due(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def score_splits(*_: object, **__: object) -> dict:
        raise Stopped

    monkeypatch.setattr(loop, "score_splits", score_splits)
    run = fake_run(tmp_path)

    outcome = train(run)

    assert not outcome.finished and outcome.state == TrainState(step=4)
    assert run.checkpoints.saved == [TrainState(step=4)]


def test_resume_begins_with_the_overdue_evaluation(tmp_path: Path, scored: list[int]) -> None:
    run = fake_run(tmp_path, total_steps=5)

    outcome = train(run, TrainState(step=4))

    assert outcome.finished and len(scored) == 2
    assert saved_steps(run) == [4, 5]
    assert run.checkpoints.saved[0].evaluated == 4


def test_stop_before_the_overdue_evaluation_trains_and_saves_nothing(
    tmp_path: Path, scored: list[int]
) -> None:
    run, stop = fake_run(tmp_path), StopRequest()
    stop.name = "SIGTERM"

    outcome = train(run, TrainState(step=4), stop)

    assert not outcome.finished and outcome.state == TrainState(step=4)
    assert not scored and not run.checkpoints.saved and run.engine.steps == 0


def test_finished_run_shows_its_scores_and_saves_nothing(tmp_path: Path, scored: list[int]) -> None:
    run = fake_run(tmp_path)

    outcome = train(run, TrainState(step=10, evaluated=10, best=0.5, best_step=8))

    assert outcome.finished and len(scored) == 1 and outcome.scores
    assert not run.checkpoints.saved and run.engine.steps == 0


def test_stop_at_the_last_step_leaves_the_run_unfinished(tmp_path: Path, scored: list[int]) -> None:
    run, stop = fake_run(tmp_path), StopRequest()
    stop_after(run, 10, stop)

    outcome = train(run, stop=stop)

    assert not outcome.finished and saved_steps(run) == [4, 8, 10]
    assert run.evaluation_overdue(outcome.state)


def test_refused_steps_are_counted_and_forgiven(tmp_path: Path, scored: list[int]) -> None:
    run = fake_run(tmp_path, "train.max_bad_steps=3")
    run.engine.refused_steps = {1, 2, 5}

    outcome = train(run)

    assert outcome.finished and outcome.state.bad_steps == 0


def test_too_many_refused_steps_in_a_row_end_the_run(tmp_path: Path, scored: list[int]) -> None:
    run = fake_run(tmp_path, "train.max_bad_steps=3")
    run.engine.refused_steps = {1, 2, 3}

    with pytest.raises(RunError, match=r"step 3: the loss on ranks \[0\] was not finite 3 times"):
        train(run)


def test_first_step_without_memory_is_wrong_input(tmp_path: Path, scored: list[int]) -> None:
    run = fake_run(tmp_path)
    run.engine.train_step = fail_at(0, run, MemoryError())

    with pytest.raises(InputError, match="step 1, rank 0: out of memory.*train.max_micro_batch"):
        train(run)


def test_later_step_without_memory_is_a_failed_run(tmp_path: Path, scored: list[int]) -> None:
    run = fake_run(tmp_path)
    run.engine.train_step = fail_at(5, run, torch.OutOfMemoryError("CUDA out of memory."))

    with pytest.raises(RunError, match="step 6, rank 0: the GPU has too little.*resumes"):
        train(run)


def test_other_errors_of_a_step_are_not_explained(tmp_path: Path, scored: list[int]) -> None:
    run = fake_run(tmp_path)
    run.engine.train_step = fail_at(0, run, RuntimeError("a bug"))

    with pytest.raises(RuntimeError, match="^a bug$"):
        train(run)


def fail_at(step: int, run: Run, error: Exception) -> Callable:
    """A step of the engine that fails once `step` steps were done."""
    train_step = run.engine.train_step

    def train_step_or_fail(*arguments: object) -> object:
        if run.engine.steps == step:
            raise error
        return train_step(*arguments)

    return train_step_or_fail


def test_scores_are_filed_with_their_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []

    def score_splits(*_: object, step: int, **__: object) -> dict:
        steps.append(step)
        return {}

    monkeypatch.setattr(loop, "score_splits", score_splits)
    train(fake_run(tmp_path))

    assert steps == [4, 8, 10]
