"""Checkpoints of a run: whole or absent, the newest few and the best.

    checkpoints/
      step-00000200/
        config.yaml           the run's whole configuration
        state.json            step, best score, engine, number of ranks, data fingerprint
        weights.safetensors   all weights, fp32, by the model's names: readable without any engine
        ema.safetensors       their moving average, where the run keeps one
        tokenizer/            what turns sentences into the model's words
        text/                 the shape of a published text encoder
        ddp.pt | deepspeed/   optimizer state
      best -> step-00000200
"""
from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coupalign import __version__, dist
from coupalign.config.load import diff, dump, read_config
from coupalign.config.schema import BertText, Config, DeepSpeedEngine
from coupalign.data.tokenizer import Tokenizer
from coupalign.dist import World
from coupalign.engine.base import Engine, TrainState
from coupalign.errors import InputError
from coupalign.files import publish_directory, write_json
from coupalign.model.text import write_shape
from coupalign.model.weights import write_weights

# What may differ between the run that wrote a checkpoint and the run that goes on from it: nothing that changes a number.
FREE = ("name", "run_dir", "tracking.", "evaluate.", "data.evaluate", "data.workers", "data.cache", "data.tokenizer",
        "train.steps", "train.epochs", "train.max_micro_batch", "train.max_bad_steps", "train.log_every", "train.evaluate_every",
        "train.save_every", "train.keep_last", "engine.bucket_mb", "model.wpa.impl", "model.image.weights", "model.text.weights",
        "model.image.checkpointing", "model.text.checkpointing")


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoint folder of one run."""

    config: Config
    world: World
    data_fingerprint: str

    @property
    def folder(self) -> Path:
        return self.config.directory / "checkpoints"

    def save(self, engine: Engine, state: TrainState, tokenizer: Tokenizer) -> Path:
        """Write a checkpoint beside the others, then rename it into place; collective.

        Raises:
            InputError: it could not be written (disk full, no permission); the ones before are whole.
        """
        final = self.folder / f"step-{state.step:08d}"
        partial = self.folder / f".{final.name}.partial"
        try:
            if self.world.is_main:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            dist.wait_for_all(self.world)
            self._fill(partial, engine, state, tokenizer)
            dist.wait_for_all(self.world)
            if self.world.is_main:
                publish_directory(partial, final)
                self._point_to_best(state)
                self._prune()
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            kept = ", ".join(path.name for path in finished(self.folder)) or "none"
            raise InputError(f"{final}: the checkpoint could not be written ({error}). Whole checkpoints there: {kept}. "
                             "Make room or choose another run_dir, then start again: the run goes on from the newest") from error
        dist.wait_for_all(self.world)
        return final

    def resume(self, engine: Engine) -> TrainState | None:
        """Load the newest checkpoint; None where there is none; collective.

        Raises:
            InputError: it belongs to another configuration, data set, engine or number of ranks, named one by one.
        """
        newest = dist.from_main(next(iter(reversed(finished(self.folder))), None), self.world)
        if newest is None:
            return None
        meta = json.loads((newest / "state.json").read_text())
        self._check(newest, meta)
        engine.load(newest)
        return TrainState(**meta["state"])

    def _fill(self, partial: Path, engine: Engine, state: TrainState, tokenizer: Tokenizer) -> None:
        weights, averages = engine.export(), engine.export(averaged=True)
        if self.world.is_main:
            assert weights is not None
            write_weights(partial / "weights.safetensors", weights)
            if averages is not None:
                write_weights(partial / "ema.safetensors", averages)
            tokenizer.save(partial / "tokenizer")
            if isinstance(self.config.model.text, BertText):
                write_shape(self.config.model.text, len(tokenizer), partial / "text")
            (partial / "config.yaml").write_text(dump(self.config), encoding="utf-8")
            write_json(partial / "state.json", {"format": 1, "tool": f"coupalign {__version__}", "state": state.to_json(),
                                                "engine": self._engine(), "data": self.data_fingerprint})
        engine.save(partial)

    def _engine(self) -> dict[str, Any]:
        stage = self.config.engine.stage if isinstance(self.config.engine, DeepSpeedEngine) else None
        return {"kind": self.config.engine.kind, "stage": stage, "ranks": self.world.size}

    def _check(self, path: Path, meta: dict[str, Any]) -> None:
        old = read_config(path / "config.yaml")
        changed = {key: values for key, values in diff(old, self.config).items() if not key.startswith(FREE)}
        moved = [key for key in changed if key.startswith("data.train") and key.endswith(".index")]        # the fingerprint decides
        problems = [f"{key} was {before!r}, is {after!r}" for key, (before, after) in changed.items()
                    if key not in moved and not key.startswith("engine.")]
        if meta["data"] != self.data_fingerprint:
            problems.append("the training data have another fingerprint")
        was, now = meta["engine"], self._engine()
        free_ranks = {was["kind"], now["kind"]} == {"ddp"}
        if (was["kind"], was["stage"]) != (now["kind"], now["stage"]) or (was["ranks"] != now["ranks"] and not free_ranks):
            problems.append(f"it was written by {_named(was)}, this is {_named(now)}")
        if problems:
            raise InputError(f"{path}: cannot go on from this checkpoint: {'; '.join(problems)}. "
                             "Go back to the old setting, or start a new run under another name")

    def _point_to_best(self, state: TrainState) -> None:
        if state.best_step is not None and state.best_step == state.step:
            beside = self.folder / ".best.partial"
            beside.unlink(missing_ok=True)
            beside.symlink_to(f"step-{state.step:08d}")
            os.replace(beside, self.folder / "best")

    def _prune(self) -> None:
        best = (self.folder / "best").resolve()
        for old in finished(self.folder)[:-self.config.train.keep_last]:
            if old.resolve() != best:
                shutil.rmtree(old)


def finished(folder: Path) -> list[Path]:
    """Whole checkpoints below a checkpoint folder, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / "state.json").is_file())


def _named(engine: dict[str, Any]) -> str:
    stage = "" if engine["stage"] is None else f" ZeRO {engine['stage']}"
    return f"{engine['kind']}{stage} with {engine['ranks']} rank{'s' if engine['ranks'] != 1 else ''}"
