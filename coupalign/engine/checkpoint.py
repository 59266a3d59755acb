"""Checkpoints of a run: whole or absent, the newest few and the best.

checkpoints/
  step-00000200/
    config.yaml           the run's whole configuration
    state.json            step, best score, engine, number of ranks, data fingerprint
    weights.safetensors   all weights, fp32, by the model's names: readable without any engine
    ema.safetensors       their moving average, where the run keeps one
    tokenizer/            what turns sentences into the model's words
    text/                 the shape of a published text encoder
    optimizer.pt          optimizer state of DDP and ZeRO 0 …
    deepspeed/            … and of ZeRO 1 to 3, in shares
    universal/            those made whole by DeepSpeed's converter, where the run went on with other ranks or another stage
    manifest.json         sha256 of every file but those in universal/
  damaged-step-00000400/  one whose files no longer have their sha256
  best -> step-00000200
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coupalign.config.load import dump, read_config, resume_diff
from coupalign.config.schema import BertText, Config, DeepSpeedEngine
from coupalign.data.leak import TRAINED_ON
from coupalign.data.tokenizer import Tokenizer
from coupalign.distributed.watchdog import doing
from coupalign.distributed.world import World, on_main, wait_for_all
from coupalign.engine.base import Engine, TrainState
from coupalign.engine.manifest import find_damage, write_manifest
from coupalign.engine.optimizer_state import make_universal, open_optimizer_state
from coupalign.errors import InputError
from coupalign.files import publish_directory, write_json
from coupalign.model.text import write_shape
from coupalign.model.weights.load import write_weights
from coupalign.version import __version__

logger = logging.getLogger("coupalign.checkpoints")


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
        with self._explained(partial, final):
            on_main(lambda: _empty(partial), self.world)
            self._fill(partial, engine, state, tokenizer)
            wait_for_all(self.world)
            write_manifest(partial, self.world)
            on_main(lambda: self._publish(partial, final, state), self.world)
        return final

    def resume(self, engine: Engine) -> TrainState | None:
        """Load the newest checkpoint that is whole; None where there is none; collective.

        A damaged one is renamed to damaged-step-…, aloud, and the one before it is taken. One that another engine, or another
        number of ranks, wrote is taken over with everything it holds.

        Raises:
            InputError: it belongs to another configuration or data set, named field by field, or all of them are damaged.
        """
        found = on_main(lambda: recovered(self.folder), self.world)
        for path in reversed(found):
            doing(f"checking {path.name}")
            damage = find_damage(path, self.world)
            if damage:
                on_main(lambda: self._set_aside(path, damage), self.world)  # noqa: B023, called at once
                continue
            meta = json.loads((path / "state.json").read_text("utf-8"))
            self._check(path, meta)
            doing(f"loading {path.name}")
            self._load(path, meta, engine)
            return TrainState(**meta["state"])
        if found:
            raise InputError(
                f"{self.folder}: every checkpoint is damaged. Start a new run under another name, or remove "
                "the folder to begin anew"
            )
        return None

    def _load(self, path: Path, meta: dict[str, Any], engine: Engine) -> None:
        was, now = meta["engine"], self._engine()
        if was == now:
            engine.load(path, meta["counters"])
            return
        if self.world.is_main:
            logger.warning("%s was written by %s; %s takes it over", path, _named(was), _named(now))
        on_main(lambda: make_universal(path, logger.warning), self.world)
        engine.adopt(path, open_optimizer_state(path), meta["counters"])

    def _fill(self, partial: Path, engine: Engine, state: TrainState, tokenizer: Tokenizer) -> None:
        weights, averages = engine.export(), engine.export(averaged=True)

        def write_all_but_the_optimizer() -> None:
            assert weights is not None
            write_weights(partial / "weights.safetensors", weights)
            if averages is not None:
                write_weights(partial / "ema.safetensors", averages)
            tokenizer.save(partial / "tokenizer")
            if isinstance(self.config.model.text, BertText):
                write_shape(self.config.model.text, len(tokenizer), partial / "text")
            (partial / "config.yaml").write_text(dump(self.config), encoding="utf-8")
            if (seen := self.config.directory / TRAINED_ON).is_file():
                shutil.copyfile(seen, partial / TRAINED_ON)
            write_json(
                partial / "state.json",
                {
                    "format": 2,
                    "tool": f"coupalign {__version__}",
                    "state": state.to_json(),
                    "engine": self._engine(),
                    "counters": engine.counters(),
                    "data": self.data_fingerprint,
                },
            )

        on_main(write_all_but_the_optimizer, self.world)
        engine.save(partial)

    def _engine(self) -> dict[str, Any]:
        stage = (
            self.config.engine.stage if isinstance(self.config.engine, DeepSpeedEngine) else None
        )
        return {"kind": self.config.engine.kind, "stage": stage, "ranks": self.world.size}

    def _check(self, path: Path, meta: dict[str, Any]) -> None:
        old = read_config(path / "config.yaml")
        changed = resume_diff(old, self.config)
        moved = [
            key for key in changed if key.startswith("data.train") and key.endswith(".index")
        ]  # the fingerprint decides
        problems = [
            f"{key} was {before!r}, is {after!r}"
            for key, (before, after) in changed.items()
            if key not in moved
        ]
        if meta["data"] != self.data_fingerprint:
            problems.append("the training data have another fingerprint")
        if problems:
            raise InputError(
                f"{path}: cannot go on from this checkpoint: {'; '.join(problems)}. "
                "Go back to the old setting, or start a new run under another name"
            )

    def _set_aside(self, path: Path, damage: list[str]) -> None:
        aside = path.with_name(f"damaged-{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        try:
            path.rename(aside)
            now = f"is now called {aside.name}"
        except OSError as error:
            now = f"could not be renamed ({error})"
        logger.warning(
            "%s is damaged: %s. It %s; the checkpoint before it is taken",
            path,
            "; ".join(damage),
            now,
        )

    @contextmanager
    def _explained(self, partial: Path, final: Path) -> Iterator[None]:
        """Say of a file that cannot be written what the run still has and how to go on."""
        try:
            yield
        except (OSError, RuntimeError) as error:
            if not _about_writing(error):
                raise
            free = shutil.disk_usage(self.config.directory).free / 1e9
            shutil.rmtree(partial, ignore_errors=True)
            kept = ", ".join(path.name for path in finished_checkpoints(self.folder)) or "none"
            raise InputError(
                f"{final}: the checkpoint could not be written ({error}; {free:.3f} GB free). Whole checkpoints there: "
                f"{kept}. Make room or choose another run_dir, then start again: the run goes on from the newest"
            ) from error

    def _publish(self, partial: Path, final: Path, state: TrainState) -> None:
        publish_directory(partial, final)
        self._point_to_best(state)
        self._prune()

    def _point_to_best(self, state: TrainState) -> None:
        if state.best_step is not None and state.best_step == state.step:
            beside = self.folder / ".best.partial"
            beside.unlink(missing_ok=True)
            beside.symlink_to(f"step-{state.step:08d}")
            os.replace(beside, self.folder / "best")

    def _prune(self) -> None:
        best = (self.folder / "best").resolve()
        for old in finished_checkpoints(self.folder)[: -self.config.train.keep_last]:
            if old.resolve() != best:
                shutil.rmtree(old)


def finished_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints below a checkpoint folder, oldest first."""
    return sorted(folder.glob("step-*"))


def recovered(folder: Path) -> list[Path]:
    """`finished`, after a checkpoint that was being replaced when its run was killed got its name back."""
    for old in folder.glob(".step-*.old"):
        place = folder / old.name.removeprefix(".").removesuffix(".old")
        if place.exists():
            shutil.rmtree(old)
        else:
            old.rename(place)
    return finished_checkpoints(folder)


def _about_writing(error: BaseException | None) -> bool:
    """Whether a file could not be written: torch's own writer reports a full disk as a RuntimeError, as a lost rank is, too."""
    while error is not None:
        if isinstance(error, OSError) or any(
            sign in str(error) for sign in ("inline_container.cc", "iostream error")
        ):
            return True
        error = error.__context__
    return False


def _empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _named(engine: dict[str, Any]) -> str:
    stage = "" if engine["stage"] is None else f" ZeRO {engine['stage']}"
    return (
        f"{engine['kind']}{stage} with {engine['ranks']} rank{'s' if engine['ranks'] != 1 else ''}"
    )
