"""Build everything that a training run needs, and say when each of its events is due."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from coupalign.compat import garbage_collection_paused
from coupalign.config.schema import Config, CoupAlignConfig
from coupalign.data.build import build_train_loader, evaluation_bytes, open_tokenizer
from coupalign.data.leak import TrainedOn, read_trained_on
from coupalign.data.loader import TrainLoader
from coupalign.data.tokenizer import Tokenizer
from coupalign.data.workers import require_shared_memory
from coupalign.distributed.watchdog import doing
from coupalign.distributed.world import World
from coupalign.engine.base import Engine, TrainState
from coupalign.engine.build import build_engine, engine_name
from coupalign.engine.checkpoint import Checkpoints, finished_checkpoints
from coupalign.engine.optimizer import build_optimizer
from coupalign.kernels import describe_choice
from coupalign.model.base import ReferringModel
from coupalign.model.build import build_model
from coupalign.model.weights.load import load_pretrained
from coupalign.scoring.sets import name_own_sets
from coupalign.training.schedule import steps_per_epoch, total_steps
from coupalign.version import __version__, git_revision


@dataclass(frozen=True, kw_only=True)
class Run:
    """The resources of a training run on this rank.

    Attributes:
        total_steps: optimizer steps of the whole run.
        trained_on: the photographs that the model will have seen.
    """

    config: Config
    world: World
    tokenizer: Tokenizer
    loader: TrainLoader
    engine: Engine
    checkpoints: Checkpoints
    total_steps: int
    trained_on: TrainedOn

    def log_due(self, step: int) -> bool:
        """Whether metrics are logged after `step` steps."""
        return self._is_due(self.config.train.log_every, step)

    def save_due(self, step: int) -> bool:
        """Whether a checkpoint is saved after `step` steps."""
        train = self.config.train
        return self._is_due(train.save_every or train.evaluate_every, step)

    def evaluation_due(self, step: int) -> bool:
        """Whether the model is scored after `step` steps."""
        has_splits = bool(self.config.data.evaluate)
        return has_splits and self._is_due(self.config.train.evaluate_every, step)

    def anything_due(self, step: int) -> bool:
        """Whether the loop has anything to do after `step` steps except the next step."""
        return self.log_due(step) or self.save_due(step) or self.evaluation_due(step)

    def evaluation_overdue(self, state: TrainState) -> bool:
        """Whether the scores after the step of `state` are due but were not taken."""
        return 0 < state.step != state.evaluated and self.evaluation_due(state.step)

    def final_scores_due(self, state: TrainState) -> bool:
        """Whether the run is finished and has scores to show."""
        return bool(self.config.data.evaluate) and state.step >= self.total_steps

    def least_checkpoint_bytes(self) -> int:
        """The least that a checkpoint takes on disk: fp32 weights and their two moments."""
        size = 0
        for parameter in self.engine.model.parameters():
            # ZeRO 3 keeps the whole size here.
            values = getattr(parameter, "ds_numel", parameter.numel())
            size += 4 * values * (3 if parameter.requires_grad else 1)
        return size

    def _is_due(self, every: int | None, step: int) -> bool:
        """Whether an event of this interval (None: an epoch) happens after `step` steps."""
        interval = every or steps_per_epoch(self.config.train, self.loader.samples)
        return step % interval == 0 or step == self.total_steps


@garbage_collection_paused()
def prepare_run(config: Config, world: World) -> Run:
    """Build everything that a run needs, so that wrong input fails before the first step."""
    doing("opening the data", alone=True)
    name_own_sets(config.data.evaluate)  # refuses a set that is listed twice
    torch.manual_seed(config.seed)
    tokenizer = open_tokenizer(config.data)
    loader = build_train_loader(
        config.data,
        seed=config.seed,
        global_batch=config.train.global_batch,
        max_micro_batch=config.train.max_micro_batch,
        world=world,
        tokenizer=tokenizer,
    )
    # The evaluation comes after hours of training.
    if config.data.evaluate:
        evaluation_batch = min(
            config.evaluate.batch, config.evaluate.limit or config.evaluate.batch
        )
        needed = evaluation_bytes(config.data, evaluation_batch)
        require_shared_memory(needed, config.data.workers)

    doing("building the model", alone=True)
    model = build_model(config.model, len(tokenizer), config.data.image_size).to(world.device)
    trained_on = loader.trained_on
    # A resumed run takes its weights, and what they have seen, from its checkpoint.
    if not finished_checkpoints(config.directory / "checkpoints"):
        trained_on = _load_pretrained(model, config, loader, world)

    doing("building the engine")
    engine = build_engine(model, build_optimizer(model, config.optim), config, world)
    run = Run(
        config=config,
        world=world,
        tokenizer=tokenizer,
        loader=loader,
        engine=engine,
        checkpoints=Checkpoints(config, world, loader.fingerprint),
        total_steps=total_steps(config.train, loader.samples),
        trained_on=trained_on,
    )
    if world.is_main:
        print(_describe(run), flush=True)
    return run


def run_tags(run: Run) -> dict[str, str]:
    """Describe the run for the tracker: data, leaks, method, versions, engine."""
    # Only the session that loaded the pretrained weights knows them; later ones read the file.
    trained_on = read_trained_on(run.config.directory) or run.trained_on
    return {
        "data_fingerprint": run.loader.fingerprint,
        "leaks": run.config.data.leaks,
        "leak": "; ".join([*run.loader.leaks, *trained_on.weights]) or "none found",
        "method": run.config.model.kind,
        "git": git_revision(Path(__file__).parents[1]),
        "coupalign": __version__,
        "torch": torch.__version__,
        "engine": engine_name(run.config.engine),
        "world_size": str(run.world.size),
        "precision": run.config.precision,
    }


def _load_pretrained(
    model: ReferringModel, config: Config, loader: TrainLoader, world: World
) -> TrainedOn:
    """Load the pretrained encoders and print reports; returns what the whole model has seen."""
    reports = load_pretrained(model, config.model)
    trained_on = loader.trained_on.including(
        [Path(report.source) for report in reports if not report.random],
        [report.leak for report in reports if report.leak],
        [Path(report.source) for report in reports if report.is_ours],
    )
    if world.is_main:
        print("\n".join([*(report.text() for report in reports), *loader.leaks]), flush=True)
        if trained_on.unlisted:
            print(
                f"leaks unknown: {', '.join(trained_on.unlisted)}: from a run, but its "
                "trained_on.json is not next to it, so no score can rule out leaks. Copy it there",
                flush=True,
            )
        seen_before = len(trained_on.photos) - len(loader.trained_on.photos)
        if seen_before:
            print(
                f"the encoders come from an earlier run that trained on {seen_before:,} "
                "photographs outside data.train: every score counts them as trained on",
                flush=True,
            )
    return trained_on


def _describe(run: Run) -> str:
    """Describe the run in a few lines, as printed at its start."""
    config, loader, world = run.config, run.loader, run.world
    parameters = sum(p.numel() for p in run.engine.model.parameters()) / 1e6
    facts = [
        config.model.kind,
        f"{loader.samples:,} samples",
        f"{run.total_steps:,} steps of {config.train.global_batch} "
        f"({world.size} ranks x {loader.micro_batches} micro-batches)",
        engine_name(config.engine),
        f"{config.precision} on {world.device.type}",
        f"{parameters:.2f} M parameters",
    ]
    text = f"{config.name}: {', '.join(facts)} -> {config.directory}"
    if isinstance(config.model, CoupAlignConfig):
        wpa = config.model.wpa
        text += f"\nword-pixel alignment: {describe_choice(wpa.impl, wpa.heads)}"
    if config.data.augment.flip > 0:
        left_alone, total = loader.count_not_mirrored()
        share = 100 * left_alone / max(1, total)
        text += (
            f"\nflip: {share:.1f} % of {total:,} sentences are never mirrored, because they may "
            "name a side in a way that cannot be exchanged"
        )
    return text
