"""The training loop: data order in, optimizer steps through the engine, numbers out; it can stop and go on anywhere."""

from __future__ import annotations

import logging
import resource
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from tqdm import tqdm

import coupalign
from coupalign.compat import garbage_collection_paused
from coupalign.config.load import dump, flatten
from coupalign.config.schema import Config, CoupAlignConfig
from coupalign.costs.utilization import Utilization
from coupalign.data.batch import Batch
from coupalign.data.build import build_train_loader, open_tokenizer
from coupalign.data.leak import TrainedOn, read_trained_on
from coupalign.data.loader import TrainLoader
from coupalign.data.tokenizer import Tokenizer
from coupalign.distributed.stop import StopRequest
from coupalign.distributed.watchdog import doing
from coupalign.distributed.world import (
    AgreedFlag,
    World,
    from_main,
    max_over_ranks,
    on_main,
    rank_session,
)
from coupalign.engine.base import Engine, StepStats, TrainState, agree_on_statistics, seed_step
from coupalign.engine.build import build_engine
from coupalign.engine.checkpoint import Checkpoints, finished_checkpoints
from coupalign.engine.optimizer import build_optimizer
from coupalign.errors import InputError
from coupalign.evaluation.evaluator import Stopped
from coupalign.evaluation.metrics import Score
from coupalign.files import remove_debris, whole_file, write_json
from coupalign.kernels import describe_choice
from coupalign.model.build import build_model
from coupalign.model.compile import explain_compilation
from coupalign.model.weights.load import load_pretrained
from coupalign.scoring.splits import score_splits
from coupalign.tracking.journal import Tracker
from coupalign.tracking.open import open_tracker
from coupalign.training.meter import Meter, RankTimes
from coupalign.training.schedule import lr_scale, steps_per_epoch, total_steps
from coupalign.version import git_revision

logger = logging.getLogger("coupalign.training")
_ASK_EVERY_S = 1.0  # the ranks agree whether to stop


@dataclass(frozen=True)
class Run:
    """The resources of a training run on this rank."""

    config: Config
    world: World
    tokenizer: Tokenizer
    loader: TrainLoader
    engine: Engine
    checkpoints: Checkpoints
    total: int  # optimizer steps of the whole run
    trained_on: TrainedOn

    def logs(self, step: int) -> bool:
        """Whether numbers are logged after `step` steps."""
        return self._due(self.config.train.log_every, step)

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is due after `step` steps."""
        return self._due(self.config.train.save_every or self.config.train.evaluate_every, step)

    def evaluates(self, step: int) -> bool:
        """Whether scores are due after `step` steps."""
        return bool(self.config.data.evaluate) and self._due(self.config.train.evaluate_every, step)

    def halts(self, step: int) -> bool:
        """Whether anything is due after `step` steps."""
        return self.logs(step) or self.saves(step) or self.evaluates(step)

    def owes_evaluation(self, state: TrainState) -> bool:
        """Whether the scores after the step of `state` are due and were not taken."""
        return 0 < state.step != state.evaluated and self.evaluates(state.step)

    def _due(self, every: int | None, step: int) -> bool:
        """Whether something that happens every so many steps (none: every epoch) happens after `step` steps."""
        return (
            step % (every or steps_per_epoch(self.config.train, self.loader.samples)) == 0
            or step == self.total
        )


@dataclass(frozen=True)
class Outcome:
    """How a training session ended. `scores` of the last evaluation, by split, on rank 0."""

    state: TrainState
    finished: bool
    is_main: bool
    scores: dict[str, Score] = field(default_factory=dict)


def train(config: Config, stop: StopRequest) -> Outcome:
    """Train, or go on training, the run that `config` describes, until its end or until `stop` on any rank; call it on every rank.

    Raises:
        InputError: for everything the user can mend, before the first step where that is possible.
    """
    with rank_session(hang_minutes=config.train.hang_minutes) as world:
        run = _prepare(config, world)
        try:
            state = run.checkpoints.resume(run.engine) or TrainState()
            on_main(lambda: _claim(run), world)
            with open_tracker(
                config.tracking,
                config.directory,
                config.name,
                world.rank,
                flatten(config),
                _tags(run),
            ) as tracker:
                tracker.artifact(config.directory / "config.yaml")
                outcome = _steps(run, state, tracker, stop)
                if not outcome.finished:
                    tracker.close("SCHEDULED")
            return outcome
        finally:
            run.loader.close()


@garbage_collection_paused()
def _prepare(config: Config, world: World) -> Run:
    """Everything that is built once; wrong input shows here, before any time is spent."""
    doing("opening the data", alone=True)
    torch.manual_seed(config.seed)
    tokenizer = open_tokenizer(config.data)
    loader = build_train_loader(
        config.data,
        config.seed,
        config.train.global_batch,
        config.train.max_micro_batch,
        world.rank,
        world.size,
        tokenizer,
    )
    doing("building the model", alone=True)
    trained_on = loader.trained_on
    model = build_model(config.model, len(tokenizer), config.data.image_size).to(world.device)
    if not finished_checkpoints(config.directory / "checkpoints"):
        reports = load_pretrained(model, config.model)
        trained_on = trained_on.after(
            [Path(report.source) for report in reports if not report.random],
            [report.leak for report in reports if report.leak],
        )
        if world.is_main:
            print("\n".join([*(report.text() for report in reports), *loader.leaks]), flush=True)
            if before := len(trained_on.photos - loader.trained_on.photos):
                print(
                    f"the encoders were trained by a run of ours before, on {before:,} photographs that are not in data.train: every "
                    "score counts them as trained on",
                    flush=True,
                )
    doing("building the engine")
    engine = build_engine(model, build_optimizer(model, config.optim), config, world)
    total = total_steps(config.train, loader.samples)
    if world.is_main:
        print(
            f"{config.name}: {config.model.kind}, {loader.samples:,} samples, {total:,} steps of {config.train.global_batch} "
            f"({world.size} ranks x {loader.micro_batches} micro-batches), {_engine_name(config)}, {config.precision} on "
            f"{world.device.type}, {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters "
            f"-> {config.directory}",
            flush=True,
        )
        if isinstance(config.model, CoupAlignConfig):
            print(f"word-pixel alignment: {describe_choice(config.model.wpa.impl)}", flush=True)
    return Run(
        config,
        world,
        tokenizer,
        loader,
        engine,
        Checkpoints(config, world, loader.fingerprint),
        total,
        trained_on,
    )


def _claim(run: Run) -> None:
    """Make the run directory this session's: nothing half-written of a killed one, and the configuration as it is now."""
    config = run.config
    try:
        remove_debris(config.directory)
        with whole_file(config.directory / "config.yaml", "w") as file:
            file.write(dump(config))
        # A checkpoint knows what it was trained on; a file of an older run under this name does not.
        known = [
            read_trained_on(checkpoint)
            for checkpoint in finished_checkpoints(config.directory / "checkpoints")
        ]
        (next(filter(None, reversed(known)), None) or run.trained_on).write(config.directory)
    except OSError as error:
        raise InputError(
            f"{config.directory}: the run directory cannot be written ({error}). Make it writable, make room, or choose "
            "another run_dir"
        ) from error


def _steps(run: Run, state: TrainState, tracker: Tracker, stop: StopRequest) -> Outcome:
    """Train from `state` to the end, or until a stop is agreed on. A checkpoint may owe its evaluation, which then comes first."""
    config, world = run.config, run.world
    scores: dict[str, Score] | None = None  # none: not evaluated yet; empty on ranks other than 0
    bar = tqdm(
        total=run.total,
        initial=state.step,
        desc=config.name,
        unit="step",
        disable=not world.is_main,
        mininterval=1.0,
        dynamic_ncols=True,
    )
    meter, ranks, utilization = (
        Meter(),
        RankTimes(config.directory, world),
        Utilization(config, world),
    )
    batches = run.loader.steps_from(state.step)
    saved, first = state, True
    while True:
        stopping, pause = _agreed(stop, state, meter, world)
        shown = scores is not None or not config.data.evaluate or state.step < run.total
        if not stopping and (run.owes_evaluation(state) or not shown):
            try:
                scores, state = _evaluate(run, state, tracker, stop)
            except Stopped:
                stopping = True
            meter.restart()
        if state != saved and (stopping or run.saves(state.step)):
            saved = _save(run, state, tracker, meter)
        if stopping and (state.step < run.total or run.owes_evaluation(state)):
            bar.close()
            _say(
                world,
                f"stopped by {stop.name or 'another rank'} after step {state.step:,}; the same command goes on from "
                f"{run.checkpoints.folder}",
            )
            return Outcome(state, False, world.is_main, scores or {})
        if state.step >= run.total:
            break
        state, stats = _advance(run, state, batches, meter, bar, state.step + pause)
        if config.compile and first:
            _say(world, explain_compilation())
        first = False
        if run.logs(state.step):
            lr = lr_scale(state.step - 1, run.total, config.schedule) * config.optim.lr
            ranks_row = ranks.note(state.step, meter.own_seconds())
            times = meter.read()
            times |= utilization.of(times["train/samples_per_second"])
            tracker.log(
                state.step,
                {**_row(stats, lr), **ranks_row, **times, "data/bad_samples": len(run.loader.bad)},
            )
            meter.restart()
            bar.set_postfix(loss=f"{stats.losses['loss']:.3f}", data_wait=f"{meter.last_wait:.0%}")
    bar.close()
    _say(
        world,
        f"{meter.saves} checkpoints were saved in {meter.saving_s:.1f} s, {meter.saving_share:.1%} of this session",
    )
    return Outcome(state, True, world.is_main, scores or {})


def _agreed(stop: StopRequest, state: TrainState, meter: Meter, world: World) -> tuple[bool, int]:
    """Whether to stop, and after how many steps to ask again: as many as the slowest rank does in a second."""
    doing(f"step {state.step}: agreeing whether to stop")
    asked, slowest_s = max_over_ranks([float(stop.name is not None), meter.step_seconds], world)
    return asked > 0, max(1, int(_ASK_EVERY_S / slowest_s)) if slowest_s else 1


def _advance(
    run: Run,
    state: TrainState,
    batches: Iterator[tuple[int, list[Batch]]],
    meter: Meter,
    bar: tqdm,
    until: int,
) -> tuple[TrainState, StepStats]:
    """Train up to step `until`, or to an earlier one after which something is due; the stats of the last step.

    The host waits for no step in between, and looks only then whether each of them was applied.
    """
    done: list[StepStats] = []
    step = state.step
    while not done or (step < until and not run.halts(step)):
        stats, micro_batches = _step(run, step, batches, meter)
        meter.add(run.config.train.global_batch, micro_batches, stats.seconds.get("forward", 0.0))
        bar.update()
        done.append(stats)
        step += 1
    for stats in done:
        state = _judged(state, stats, run.config)
    return state, done[-1]


def _step(
    run: Run, step: int, batches: Iterator[tuple[int, list[Batch]]], meter: Meter
) -> tuple[StepStats, list[Batch]]:
    doing(f"step {step + 1}: reading data", alone=True)
    with meter.waiting():
        place, micro_batches = next(batches)
    assert place == step
    doing(f"step {step + 1}: forward, backward, update")
    seed_step(run.config.seed, step, run.world.rank)
    scale = lr_scale(step, run.total, run.config.schedule)
    return run.engine.train_step(
        [batch.to(run.world.device) for batch in micro_batches], scale
    ), micro_batches


def _save(run: Run, state: TrainState, tracker: Tracker, meter: Meter) -> TrainState:
    """Save; what was saved."""
    doing(f"step {state.step}: saving a checkpoint")
    with meter.saving():
        agree_on_statistics(run.engine.model, run.world)
        run.checkpoints.save(run.engine, state, run.tokenizer)
    tracker.log(state.step, {"save/seconds": meter.last_save_s, "save/share": meter.saving_share})
    return state


def _evaluate(
    run: Run, state: TrainState, tracker: Tracker, stop: StopRequest
) -> tuple[dict[str, Score], TrainState]:
    """Score every evaluation split; the first decides which checkpoint is the best. Raises Stopped where a stop is agreed on."""
    config, world = run.config, run.world
    agree_on_statistics(run.engine.model, world)
    try:
        with run.engine.averaged():
            scores = score_splits(
                run.engine.infer,
                config,
                config.data.evaluate,
                run.tokenizer,
                world,
                config.evaluate.pictures if state.step == run.total else 0,
                AgreedFlag(lambda: stop.name is not None, world),
            )
    except OSError as error:
        raise InputError(
            f"{config.directory}: the scores after step {state.step} could not be written ({error}). Make room, then call the "
            "same command: it goes on from the newest checkpoint"
        ) from error
    for split, score in scores.items():
        tracker.log(
            state.step, {f"eval/{split}/{name}": value for name, value in score.metrics.items()}
        )
        tracker.tag({f"protocol/{split}": score.protocol, f"samples/{split}": str(score.samples)})
        write_json(
            config.directory / "scores" / f"{split}.json", {"step": state.step, **score.to_json()}
        )
        tqdm.write(
            f"step {state.step:,}  {split}: oIoU {100 * score.metrics['oIoU']:.2f}  mIoU {100 * score.metrics['mIoU']:.2f}  "
            f"P@0.5 {100 * score.metrics['P@0.5']:.2f}  ({score.protocol}, {score.samples:,} samples)"
        )
    if scores:
        tracker.artifact(config.directory / "scores", "scores")
    first = from_main(next((score.metrics["oIoU"] for score in scores.values()), None), world)
    state = replace(state, evaluated=state.step)
    if state.best is None or (first is not None and first > state.best):
        state = replace(state, best=first, best_step=state.step)
    return scores, state


def _say(world: World, words: str) -> None:
    if world.is_main:
        print(words, flush=True)


def _judged(state: TrainState, stats: StepStats, config: Config) -> TrainState:
    """The state after a step, whose update may have been refused."""
    bad = 0 if stats.applied else state.bad_steps + 1
    if bad:
        where = f"the loss on ranks {list(stats.bad_ranks)}" if stats.bad_ranks else "the gradient"
        logger.warning(
            "step %d: %s was not finite; the weights were left as they were (%d in a row)",
            state.step,
            where,
            bad,
        )
    # fp16 finds its loss scale by overflowing: from 65536 down to 1 takes up to 16 steps.
    allowed = config.train.max_bad_steps + (
        16 if config.precision == "fp16" and not stats.bad_ranks else 0
    )
    if bad >= allowed:
        raise InputError(
            f"step {state.step}: {where} was not finite {bad} times in a row. Lower optim.lr, set optim.clip_norm, "
            "or train in precision: fp32; the run can go on from its last checkpoint"
        )
    return replace(state, step=state.step + 1, bad_steps=bad)


def _row(stats: StepStats, lr: float) -> dict[str, float]:
    row = {f"train/{name}": value for name, value in stats.losses.items()}
    row |= {
        "train/lr": lr,
        "train/grad_norm": stats.grad_norm,
        "train/skipped": float(not stats.applied),
        "train/peak_memory_gb": _peak_memory_gb(),
    }
    if stats.loss_scale != 1.0:
        row["train/loss_scale"] = stats.loss_scale
    return row


def _peak_memory_gb() -> float:
    """Most memory ever held, GB (1e9 bytes): on the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _tags(run: Run) -> dict[str, str]:
    weights = (
        read_trained_on(run.config.directory) or run.trained_on
    ).weights  # known to the session that loaded them
    return {
        "data_fingerprint": run.loader.fingerprint,
        "mix": run.config.data.mix or "leaks refused",
        "leak": "; ".join([*run.loader.leaks, *weights]) or "none found",
        "method": run.config.model.kind,
        "git": git_revision(Path(coupalign.__file__).parent),
        "coupalign": coupalign.__version__,
        "torch": torch.__version__,
        "engine": _engine_name(run.config),
        "world_size": str(run.world.size),
        "precision": run.config.precision,
    }


def _engine_name(config: Config) -> str:
    return f"deepspeed ZeRO {config.engine.stage}" if config.engine.kind == "deepspeed" else "ddp"
