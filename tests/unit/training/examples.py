"""A run whose loader, engine and checkpoints are small fakes that record what the loop does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from coupalign.config.load import override
from coupalign.config.schema import Config, Source
from coupalign.distributed.world import World
from coupalign.engine.base import StepStats, TrainState
from coupalign.training.run import Run

ALONE = World(0, 1, 0, 1, torch.device("cpu"))


class FakeLoader:
    samples = 40
    bad: dict[str, str] = {}

    def steps_from(self, step: int) -> Iterator[tuple[int, list[Any]]]:
        while True:
            yield step, []
            step += 1


class FakeEngine:
    def __init__(self) -> None:
        self.device = ALONE.device
        self.model = torch.nn.Linear(1, 1)
        self.refused_steps: set[int] = set()
        self.steps = 0

    def train_step(self, micro_batches: list[Any], lr_scale: float) -> StepStats:
        norm = float("nan") if self.steps in self.refused_steps else 1.0
        self.steps += 1
        means = torch.tensor([[norm]], dtype=torch.float64)
        return StepStats(("loss",), means, torch.tensor(norm))

    def averaged(self) -> nullcontext:
        return nullcontext()

    def infer(self, batch: Any) -> None:
        raise AssertionError("the tests replace the scoring")


class FakeCheckpoints:
    folder = Path("checkpoints")

    def __init__(self) -> None:
        self.saved: list[TrainState] = []

    def save(self, engine: FakeEngine, state: TrainState, tokenizer: object) -> None:
        self.saved.append(state)


class FakeTracker:
    def __init__(self) -> None:
        self.logged: dict[int, dict[str, float]] = {}

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.logged.setdefault(step, {}).update(metrics)

    def tag(self, tags: dict[str, str]) -> None: ...

    def artifact(self, path: Path, folder: str = "") -> None: ...


def fake_run(folder: Path, *changes: str, total_steps: int = 10) -> Run:
    """A run of 10 steps: logs every step, evaluates after 4, 8 and 10, and saves with it."""
    config = override(
        Config(run_dir=folder), ["train.log_every=1", "train.evaluate_every=4", *changes]
    )
    sources = (Source(index=str(folder), split="val"),)
    config = config.model_copy(
        update={"data": config.data.model_copy(update={"evaluate": sources})}
    )
    return Run(
        config=config,
        world=ALONE,
        tokenizer=None,
        loader=FakeLoader(),
        engine=FakeEngine(),
        checkpoints=FakeCheckpoints(),
        total_steps=total_steps,
        trained_on=None,
    )
