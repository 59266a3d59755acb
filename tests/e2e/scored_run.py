"""Builds engines and loaders for the run that is trained once for the tests (`scored_run`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from coupalign.config.load import override, read_config
from coupalign.config.schema import Config
from coupalign.data.build import build_eval_loader, build_train_loader, open_tokenizer
from coupalign.data.loader import EvalLoader, TrainLoader
from coupalign.data.table import Rule
from coupalign.distributed.world import World
from coupalign.engine.base import Engine
from coupalign.engine.build import build_engine
from coupalign.engine.optimizer import build_optimizer
from coupalign.model.build import build_model
from coupalign.tracking import read_journal

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, 1, CPU)
# Six steps in this process. The learning rate is high, so that the scores move.
CHANGES = [
    "data.image_size=32",
    "data.workers=0",
    "train.steps=6",
    "train.evaluate_every=2",
    "train.save_every=2",
    "train.keep_last=1",
    "train.ema=null",
    "model.losses.foreground=40",
    "optim.lr=0.3",
    "schedule.warmup_steps=0",
    "evaluate.protocol=cris",
    "evaluate.bootstrap=0",
]


def scores_of(run: Path) -> dict[int, float]:
    """Return the score on the first split by step."""
    return {
        row.step: row.metrics["eval/val/oIoU"]
        for row, _ in read_journal(run / "metrics.jsonl")
        if "eval/val/oIoU" in row.metrics
    }


def best_step(scores: dict[int, float]) -> int:
    """Return the step with the best score."""
    return max(scores, key=scores.__getitem__)


def state_of(run: Path, step: int) -> dict[str, Any]:
    """Return what state.json of a checkpoint says."""
    return json.loads((run / "checkpoints" / f"step-{step:08d}" / "state.json").read_text())


def config_of(run: Path, *changes: str) -> Config:
    """Return the run's configuration, changed."""
    return override(read_config(run / "config.yaml"), [f"run_dir={run}", *changes])


def build_fresh_engine(config: Config, seed: int = 99) -> Engine:
    """Build an engine of one rank, whose weights are not those of the run."""
    torch.manual_seed(seed)
    model = build_model(config.model, len(open_tokenizer(config.data)), config.data.image_size)
    return build_engine(model, build_optimizer(model, config.optim), config, ALONE)


def train_loader_of(config: Config, **changes: Any) -> TrainLoader:
    """Build the loader of the training, with changes in `config.data`."""
    return build_train_loader(
        config.data.model_copy(update=changes),
        seed=config.seed,
        global_batch=config.train.global_batch,
        max_micro_batch=config.train.max_micro_batch,
        world=ALONE,
        tokenizer=open_tokenizer(config.data),
    )


def eval_loader_of(
    config: Config,
    *,
    world: World = ALONE,
    batch: int = 8,
    rule: Rule = "each",
    split: str = "val",
) -> EvalLoader:
    """Build the loader of a scoring."""
    source = config.data.evaluate[0].model_copy(update={"split": split})
    return build_eval_loader(
        config.data,
        [source],
        batch=batch,
        world=world,
        tokenizer=open_tokenizer(config.data),
        rules=[rule],
    )
