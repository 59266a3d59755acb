"""The training loop: batches in, optimizer steps through the engine, metrics and checkpoints out.

It can be stopped anywhere. The same command resumes with the same numbers.
"""

from __future__ import annotations

import logging
import resource
from contextlib import closing
from dataclasses import dataclass, field, replace

import torch
from tqdm import tqdm

from coupalign.config.load import flatten
from coupalign.config.schema import Config
from coupalign.distributed.stop import StopRequest
from coupalign.distributed.watchdog import doing
from coupalign.distributed.world import (
    AgreedFlag,
    from_main,
    max_over_ranks,
    on_main,
    rank_session,
)
from coupalign.engine.base import StepStats, TrainState, average_norm_statistics, seed_step
from coupalign.errors import InputError, RunError
from coupalign.evaluation.evaluator import Stopped
from coupalign.evaluation.metrics import Score
from coupalign.limits import explain_shortage
from coupalign.model.compile import describe_compilation
from coupalign.scoring.splits import score_splits
from coupalign.tracking.journal import Tracker
from coupalign.tracking.open import open_tracker
from coupalign.training.directory import claim_directory, only_trainer
from coupalign.training.meter import Meter, RankTimes
from coupalign.training.run import Run, prepare_run, run_tags
from coupalign.training.schedule import lr_scale

logger = logging.getLogger("coupalign.training")

_SECONDS_BETWEEN_AGREEMENTS = 1.0


@dataclass(frozen=True)
class Outcome:
    """How a training session ended.

    Attributes:
        finished: whether the run is complete. False: the same command resumes it.
        is_main: whether this is rank 0.
        scores: of the last evaluation in this session, by split; on rank 0 only.
    """

    state: TrainState
    finished: bool
    is_main: bool
    scores: dict[str, Score] = field(default_factory=dict)


def train(config: Config, stop: StopRequest) -> Outcome:
    """Train or resume the run that `config` describes, to its end or until any rank is to stop.

    Call it on every rank.

    Raises:
        InputError: the user must change something; before the first step, if possible.
        RunError: the run failed although its input was right.
    """
    with (
        rank_session(hang_minutes=config.train.hang_minutes) as world,
        only_trainer(config.directory, world),
    ):
        run = prepare_run(config, world)
        try:
            state = run.checkpoints.resume(run.engine, run.tokenizer) or TrainState()
            is_complete = state.step >= run.total_steps
            needed = 0 if is_complete else run.least_checkpoint_bytes()
            on_main(lambda: claim_directory(config, run.trained_on, needed), world)
            with open_tracker(
                config.tracking,
                config.directory,
                config.name,
                rank=world.rank,
                params=flatten(config),
                tags=run_tags(run),
            ) as tracker:
                tracker.artifact(config.directory / "config.yaml")
                outcome = train_until_done(run, state, tracker, stop)
                if not outcome.finished:
                    tracker.close("SCHEDULED")
            return outcome
        finally:
            run.loader.close()


def train_until_done(run: Run, state: TrainState, tracker: Tracker, stop: StopRequest) -> Outcome:
    """Train from `state` to the last step, or until any rank was asked to stop."""
    session = Session(run, state, tracker, stop)
    # An error message begins on a line of its own.
    with closing(session.bar):
        return _train_until_done(session, state)


def _train_until_done(session: Session, state: TrainState) -> Outcome:
    run = session.run
    session.agree_whether_to_stop(state)

    # Catch up: a checkpoint may be older than its scores, and a finished run shows them again.
    if run.evaluation_overdue(state) or run.final_scores_due(state):
        state = session.evaluate(state)
        if run.save_due(state.step) or _is_new_best(state):
            session.save(state)

    while state.step < run.total_steps and not session.stopping:
        state, stats = session.advance(state)

        if run.log_due(state.step):
            session.log(state, stats)

        session.agree_whether_to_stop(state)
        if run.evaluation_due(state.step):
            state = session.evaluate(state)
        if run.save_due(state.step) or _is_new_best(state) or session.stopping:
            session.save(state)

    return session.end(state)


class Session:
    """The actions of `train_until_done`, with the clocks, iterator and progress bar they share.

    Attributes:
        stopping: whether the ranks have agreed to stop.
        agree_at: the step after which the ranks agree again.
        saved: the state that the newest checkpoint holds.
        scores: of the last evaluation, by split; on rank 0 only.
    """

    def __init__(self, run: Run, state: TrainState, tracker: Tracker, stop: StopRequest) -> None:
        self.run, self.tracker, self.stop = run, tracker, stop
        self.stopping = False
        self.agree_at = state.step
        self.saved = state
        self.scores: dict[str, Score] = {}

        self.bar = tqdm(
            total=run.total_steps,
            initial=state.step,
            desc=run.config.name,
            unit="step",
            disable=not run.world.is_main,
            mininterval=1.0,
            dynamic_ncols=True,
        )
        self.meter = Meter()
        self.rank_times = RankTimes(run.config.directory, run.world)
        self.first_step = state.step
        self.batches = run.loader.steps_from(state.step)

    def agree_whether_to_stop(self, state: TrainState) -> None:
        """Agree with the other ranks whether to stop; collective.

        Also choose the step to ask at again: about one second later on the slowest rank.
        """
        doing(f"step {state.step}: agreeing whether to stop")

        # One exchange answers both questions.
        requested = float(self.stop.name is not None)
        any_requested, slowest_s = max_over_ranks(
            [requested, self.meter.step_seconds], self.run.world
        )

        steps_between = int(_SECONDS_BETWEEN_AGREEMENTS / slowest_s) if slowest_s else 1
        self.stopping = any_requested > 0
        self.agree_at = state.step + max(1, steps_between)

    def advance(self, state: TrainState) -> tuple[TrainState, StepStats]:
        """Train until anything is due or the ranks agree again; returns the last step's stats.

        The host waits for no step in between. It checks at the end whether each was applied.
        """
        run, step = self.run, state.step
        is_first = step == self.first_step
        stats_of_steps: list[StepStats] = []
        while not stats_of_steps or (step < self.agree_at and not run.anything_due(step)):
            stats_of_steps.append(self._train_step(step))
            step += 1

        for stats in stats_of_steps:
            state = _count_step(state, stats, run.config)

        if is_first and run.config.compile:
            self._print(describe_compilation())
        return state, stats_of_steps[-1]

    def log(self, state: TrainState, stats: StepStats) -> None:
        """Log losses, times and the comparison of the ranks since the last call; collective."""
        config = self.run.config

        # Read the clocks before the losses, which wait for the device.
        slowest_rank = self.rank_times.compare(state.step, self.meter.local_seconds())
        rates = self.meter.read()
        peak_share = lr_scale(state.step - 1, self.run.total_steps, config.schedule)
        metrics = {
            **_step_metrics(stats, lr=peak_share * config.optim.lr),
            **slowest_rank,
            **rates,
            "data/bad_samples": len(self.run.loader.bad),
        }
        self.tracker.log(state.step, metrics)

        self.meter.restart()
        self.bar.set_postfix(
            loss=f"{stats.losses['loss']:.3f}", data_wait=f"{self.meter.last_wait_share:.0%}"
        )

    def evaluate(self, state: TrainState) -> TrainState:
        """Score every evaluation split, unless a stop comes first; collective.

        Returns:
            `state` with the scores taken, or unchanged if the ranks are stopping: the evaluation
            then stays due, and the next session begins with it.
        """
        if self.stopping:
            return state
        try:
            with self.meter.pausing():
                self.scores = self._score_splits(state)
                self._publish_scores(state)
        except Stopped:
            self.stopping = True
            return state

        # The first split decides which checkpoint is the best.
        first, best_of = from_main(_first_score(self.scores), self.run.world)
        state = replace(state, evaluated=state.step)
        if first is not None:
            state = self._compare_with_best(state, first, best_of)
        return state

    def save(self, state: TrainState) -> None:
        """Save a checkpoint, unless the newest one holds this state already; collective."""
        if state == self.saved:
            return
        run = self.run

        doing(f"step {state.step}: saving a checkpoint")
        with self.meter.saving():
            average_norm_statistics(run.engine.model, run.world)
            run.checkpoints.save(run.engine, state, run.tokenizer)
        self.tracker.log(
            state.step,
            {"save/seconds": self.meter.last_save_s, "save/share": self.meter.saving_share},
        )
        self.saved = state

    def end(self, state: TrainState) -> Outcome:
        """Print and return how the session ended."""
        run, meter = self.run, self.meter
        self.bar.close()
        finished = state.step >= run.total_steps and not run.evaluation_overdue(state)
        if finished:
            self._print(
                f"{meter.saves} checkpoints were saved in {meter.saving_s:.1f} s, "
                f"{meter.saving_share:.1%} of this session"
            )
        else:
            self._print(
                f"stopped by {self.stop.name or 'another rank'} after step {state.step:,}; "
                f"the same command resumes from {run.checkpoints.folder}"
            )
        return Outcome(state, finished, run.world.is_main, self.scores)

    def _compare_with_best(self, state: TrainState, score: float, best_of: str) -> TrainState:
        """Return the state after a score; `best_of` says what it was measured on."""
        if state.best is not None and state.best_of not in (None, best_of):
            if self.run.world.is_main:
                logger.warning(
                    "step %d: the best score until now, %.4f after step %d, was measured on %s, "
                    "this one on %s: they are not compared, and this checkpoint is the best",
                    state.step,
                    state.best,
                    state.best_step,
                    state.best_of,
                    best_of,
                )
        elif state.best is not None and score <= state.best:
            return state
        return replace(state, best=score, best_step=state.step, best_of=best_of)

    def _train_step(self, step: int) -> StepStats:
        run = self.run
        doing(f"step {step + 1}: reading data", alone=True)
        with self.meter.waiting():
            batch_step, micro_batches = next(self.batches)
        assert batch_step == step

        doing(f"step {step + 1}: forward, backward, update")
        seed_step(run.config.seed, step, run.world.rank)
        try:
            stats = run.engine.train_step(
                [batch.to(run.world.device) for batch in micro_batches],
                lr_scale(step, run.total_steps, run.config.schedule),
            )
        except (MemoryError, RuntimeError) as error:
            shortage = explain_shortage(error)
            if shortage is None:
                raise
            raise self._step_failure(step, shortage) from error

        global_batch = run.config.train.global_batch
        self.meter.add(global_batch, micro_batches, stats.seconds.get("forward", 0.0))
        self.bar.update()
        return stats

    def _score_splits(self, state: TrainState) -> dict[str, Score]:
        run, config = self.run, self.run.config
        average_norm_statistics(run.engine.model, run.world)
        # Pictures are drawn once, after the last step.
        with run.engine.averaged():
            return score_splits(
                run.engine.infer,
                config,
                step=state.step,
                tokenizer=run.tokenizer,
                world=run.world,
                pictures=config.evaluate.pictures if state.step == run.total_steps else 0,
                stopped=AgreedFlag(lambda: self.stop.name is not None, run.world),
            )

    def _publish_scores(self, state: TrainState) -> None:
        """Track and print the scores; on rank 0, the only one that has any."""
        for split, score in self.scores.items():
            metrics = {f"eval/{split}/{name}": value for name, value in score.metrics.items()}
            self.tracker.log(state.step, metrics)
            self.tracker.tag(
                {f"protocol/{split}": score.protocol, f"samples/{split}": str(score.samples)}
            )

            percent = {name: 100 * score.metrics[name] for name in ("oIoU", "mIoU", "P@0.5")}
            values = "  ".join(f"{name} {value:.2f}" for name, value in percent.items())
            tqdm.write(
                f"step {state.step:,}  {split}: {values}  "
                f"({score.protocol}, {score.samples:,} samples)"
            )
        if self.scores:
            self.tracker.artifact(self.run.config.directory / "scores", "scores")

    def _step_failure(self, step: int, shortage: str) -> InputError | RunError:
        """Say what was short in a step. In the first one of a session the input is at fault."""
        what = f"step {step + 1}, rank {self.run.world.rank}: {shortage}"
        if step == self.first_step:
            return InputError(what)
        return RunError(f"{what}. The same command resumes from the newest checkpoint")

    def _print(self, text: str) -> None:
        if self.run.world.is_main:
            print(text, flush=True)


def _is_new_best(state: TrainState) -> bool:
    """Whether the scores after this step were the best: its weights are saved, due or not."""
    return state.best_step == state.step > 0


def _first_score(scores: dict[str, Score]) -> tuple[float | None, str]:
    """Return the score on the first set and what it was measured on, for `TrainState`."""
    if not scores:
        return None, ""

    name, score = next(iter(scores.items()))
    best_of = f"{name}, {score.protocol}, {score.sentences}, {score.samples} samples"
    if score.fingerprint:
        best_of += f", data {score.fingerprint[:16]}"
    return score.metrics["oIoU"], best_of


def _count_step(state: TrainState, stats: StepStats, config: Config) -> TrainState:
    """Return the state after a step, whose update may have been refused.

    Raises:
        RunError: too many updates in a row were refused.
    """
    if stats.applied:
        return replace(state, step=state.step + 1, bad_steps=0)

    bad_steps = state.bad_steps + 1
    culprit = f"the loss on ranks {list(stats.bad_ranks)}" if stats.bad_ranks else "the gradient"
    logger.warning(
        "step %d: %s was not finite; the weights were left as they were (%d in a row)",
        state.step,
        culprit,
        bad_steps,
    )

    # fp16 finds its loss scale by overflowing: from 65536 down to 1 takes up to 16 steps.
    allowed = config.train.max_bad_steps
    if config.precision == "fp16" and not stats.bad_ranks:
        allowed += 16
    if bad_steps >= allowed:
        raise RunError(
            f"step {state.step}: {culprit} was not finite {bad_steps} times in a row. Start a run "
            "of another name with a lower optim.lr, with optim.clip_norm, or with precision: fp32. "
            "This run can resume from its last checkpoint, with its own settings only"
        )
    return replace(state, step=state.step + 1, bad_steps=bad_steps)


def _step_metrics(stats: StepStats, lr: float) -> dict[str, float]:
    metrics = {f"train/{name}": value for name, value in stats.losses.items()}
    metrics |= {
        "train/lr": lr,
        "train/grad_norm": stats.grad_norm,
        "train/skipped": float(not stats.applied),
        "train/peak_memory_gb": _peak_memory_gb(),
    }
    if stats.loss_scale != 1.0:
        metrics["train/loss_scale"] = stats.loss_scale
    return metrics


def _peak_memory_gb() -> float:
    """Return the most memory ever held, in GB (1e9 bytes): on the GPU, or else by this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
