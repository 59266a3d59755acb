"""Save, resume and prune the checkpoints of a run. Each is whole or absent.

checkpoints/
  step-00000200/
    config.yaml           the run's whole configuration
    state.json            step, best score, engine, number of ranks, data fingerprint
    trained_on.json       the photographs that the weights have seen
    weights.safetensors   all weights, fp32, by the model's names: readable without any engine
    ema.safetensors       their moving average, if the run keeps one
    tokenizer/            turns sentences into the model's tokens
    text/                 the shape of a published text encoder
    optimizer.pt          optimizer state of DDP and ZeRO 0 …
    deepspeed/            … and of ZeRO 1 to 3, in shares
    universal/            those made whole by DeepSpeed's converter, once the run has resumed with
                          other ranks or another stage
    manifest.json         sha256 of every file except those in universal/
  damaged-step-00000400/  one whose files no longer have their sha256
  best -> step-00000200

Who writes what:

- This module decides when a checkpoint is whole, newest, best, damaged or due for removal. It
  writes config.yaml, state.json, trained_on.json and both safetensors files.
- `Engine.export` (base.py) collects the weights on rank 0. `Engine.save` (ddp.py, zero.py) writes
  optimizer.pt or deepspeed/.
- optimizer_state.py reads and writes the moments of whole parameters, and makes universal/.
- manifest.py writes manifest.json and checks files against it.
- open_checkpoint.py opens a checkpoint for scoring and prediction, without an engine.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from coupalign.config.load import dump, read_stored_config, resume_diff
from coupalign.config.schema import BertText, Config, DdpEngine, DeepSpeedEngine
from coupalign.data.leak import TRAINED_ON
from coupalign.data.tokenizer import Tokenizer
from coupalign.distributed.watchdog import doing
from coupalign.distributed.world import World, on_main, wait_for_all
from coupalign.engine.base import Engine, TrainState
from coupalign.engine.build import engine_name
from coupalign.engine.manifest import find_damage, write_manifest
from coupalign.engine.optimizer_state import make_universal, open_optimizer_state
from coupalign.engine.shares import SHARES_FOLDER, check_shares
from coupalign.errors import InputError, RunError
from coupalign.files import publish_directory, write_json
from coupalign.model.text import write_bert_config
from coupalign.model.weights.load import write_weights
from coupalign.version import __version__

logger = logging.getLogger("coupalign.checkpoints")

DAMAGED_PREFIX = "damaged-"


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoint folder of one run.

    Attributes:
        data_fingerprint: of the training data. Another one cannot resume the run.
    """

    config: Config
    world: World
    data_fingerprint: str

    @property
    def folder(self) -> Path:
        """The folder `checkpoints` in the run directory."""
        return self.config.directory / "checkpoints"

    def save(self, engine: Engine, state: TrainState, tokenizer: Tokenizer) -> Path:
        """Write a checkpoint under a temporary name, then rename it; collective.

        Raises:
            RunError: it could not be written (disk full, no permission). Older ones stay whole.
        """
        final = self.folder / f"step-{state.step:08d}"
        partial = self.folder / f".{final.name}.partial"
        with self._write_failures_explained(partial, final):
            on_main(lambda: _make_empty(partial), self.world)
            self._fill(partial, engine, state, tokenizer)
            wait_for_all(self.world)
            write_manifest(partial, self.world)
            on_main(lambda: self._publish(partial, final, state), self.world)
        return final

    def resume(self, engine: Engine) -> TrainState | None:
        """Load the newest checkpoint that is whole; collective. None: the run has none.

        A damaged one is renamed to damaged-step-… with a warning, and the one before it is loaded.
        If another engine or another number of ranks wrote the checkpoint, it is converted.

        Raises:
            InputError: it belongs to another configuration or data set (the message names each
                field), or all checkpoints are damaged.
        """
        paths = on_main(lambda: recover_checkpoints(self.folder), self.world)
        for path in reversed(paths):
            doing(f"checking {path.name}")
            damage = find_damage(path, self.world)
            if damage:
                on_main(partial(self._set_aside, path, damage), self.world)
                continue

            meta = json.loads((path / "state.json").read_text("utf-8"))
            self._check_compatible(path, meta)
            doing(f"loading {path.name}")
            self._load(path, meta, engine)
            return TrainState(**meta["state"])

        # The next start refuses as well, when all of them have been renamed.
        if paths or any(self.folder.glob(f"{DAMAGED_PREFIX}*")):
            raise InputError(
                f"{self.folder}: every checkpoint is damaged. Start a new run under another name, "
                "or remove the folder to start over"
            )
        return None

    def _load(self, path: Path, meta: dict[str, Any], engine: Engine) -> None:
        on_main(lambda: check_shares(path / SHARES_FOLDER), self.world)
        writer, reader = meta["engine"], self._engine_record()
        if writer == reader:
            engine.load(path, meta["counters"])
            return

        if self.world.is_main:
            logger.warning(
                "%s was written by %s; %s takes it over",
                path,
                _describe_engine(writer),
                _describe_engine(reader),
            )
        on_main(lambda: make_universal(path, logger.warning), self.world)
        engine.adopt(path, open_optimizer_state(path), meta["counters"])

    def _fill(self, folder: Path, engine: Engine, state: TrainState, tokenizer: Tokenizer) -> None:
        """Write everything except the manifest; each engine writes its optimizer state."""
        weights, averages = engine.export(), engine.export(averaged=True)

        def write_shared_files() -> None:
            assert weights is not None
            write_weights(folder / "weights.safetensors", weights)
            if averages is not None:
                write_weights(folder / "ema.safetensors", averages)

            tokenizer.save(folder / "tokenizer")
            if isinstance(self.config.model.text, BertText):
                write_bert_config(self.config.model.text, len(tokenizer), folder / "text")

            (folder / "config.yaml").write_text(dump(self.config), encoding="utf-8")
            trained_on = self.config.directory / TRAINED_ON
            if trained_on.is_file():
                shutil.copyfile(trained_on, folder / TRAINED_ON)
            meta = {
                "format": 2,
                "tool": f"coupalign {__version__}",
                "state": state.to_json(),
                "engine": self._engine_record(),
                "counters": engine.counters(),
                "data": self.data_fingerprint,
            }
            write_json(folder / "state.json", meta)

        on_main(write_shared_files, self.world)
        engine.save(folder)

    def _engine_record(self) -> dict[str, Any]:
        """Describe the engine as state.json does. Only an equal one can load without conversion."""
        engine = self.config.engine
        stage = engine.stage if isinstance(engine, DeepSpeedEngine) else None
        return {"kind": engine.kind, "stage": stage, "ranks": self.world.size}

    def _check_compatible(self, path: Path, meta: dict[str, Any]) -> None:
        """Refuse a checkpoint whose settings or data would change the run's numbers."""
        problems = []
        for key, (before, after) in resume_diff(
            read_stored_config(path / "config.yaml"), self.config
        ).items():
            # Shards may move; the fingerprint tells whether they are the same.
            if key.startswith("data.train") and key.endswith(".index"):
                continue
            problems.append(f"{key} was {before!r}, is {after!r}")
        if meta["data"] != self.data_fingerprint:
            problems.append("the training data have another fingerprint")

        if problems:
            raise InputError(
                f"{path}: cannot resume from this checkpoint: {'; '.join(problems)}. Restore the "
                "old setting, or start a new run under another name"
            )

    def _set_aside(self, path: Path, damage: list[str]) -> None:
        """Rename a damaged checkpoint and log what is wrong with it."""
        aside = path.with_name(f"{DAMAGED_PREFIX}{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        try:
            path.rename(aside)
            result = f"is now called {aside.name}"
        except OSError as error:
            result = f"could not be renamed ({error})"
        logger.warning(
            "%s is damaged: %s. It %s; resuming from the checkpoint before it",
            path,
            "; ".join(damage),
            result,
        )

    @contextmanager
    def _write_failures_explained(self, partial: Path, final: Path) -> Iterator[None]:
        """Turn a failed write into a RunError that says what the run still has."""
        try:
            yield
        except (OSError, RuntimeError) as error:
            if not _is_write_failure(error):
                raise
            free_gb = shutil.disk_usage(self.config.directory).free / 1e9
            shutil.rmtree(partial, ignore_errors=True)
            whole = ", ".join(path.name for path in finished_checkpoints(self.folder)) or "none"
            raise RunError(
                f"{final}: the checkpoint could not be written ({error}; {free_gb:.3f} GB free). "
                f"Whole checkpoints there: {whole}. Free some space or choose another run_dir, "
                "then start again: the run resumes from the newest"
            ) from error

    def _publish(self, partial: Path, final: Path, state: TrainState) -> None:
        publish_directory(partial, final)
        if state.best_step is not None and state.best_step == state.step:
            self._point_to_best(final)
        self._prune()

    def _point_to_best(self, checkpoint: Path) -> None:
        """Replace the link `best` in one operation."""
        link = self.folder / ".best.partial"
        link.unlink(missing_ok=True)
        link.symlink_to(checkpoint.name)
        os.replace(link, self.folder / "best")

    def _prune(self) -> None:
        best = (self.folder / "best").resolve()
        for old in finished_checkpoints(self.folder)[: -self.config.train.keep_last]:
            if old.resolve() != best:
                shutil.rmtree(old)


def finished_checkpoints(folder: Path) -> list[Path]:
    """List the finished checkpoints of a checkpoint folder, oldest first."""
    return sorted(folder.glob("step-*"))


def recover_checkpoints(folder: Path) -> list[Path]:
    """List like `finished_checkpoints`, after undoing replacements that were interrupted.

    A checkpoint that is being replaced has a temporary name. If the run is killed in that moment,
    this gives it its old name back.
    """
    for old in folder.glob(".step-*.old"):
        original = folder / old.name.removeprefix(".").removesuffix(".old")
        if original.exists():
            shutil.rmtree(old)
        else:
            old.rename(original)
    return finished_checkpoints(folder)


def _is_write_failure(error: BaseException | None) -> bool:
    """Whether a file could not be written.

    torch's own writer reports a full disk as a RuntimeError, but a lost rank is one, too.
    """
    while error is not None:
        message = str(error)
        if isinstance(error, OSError):
            return True
        if "inline_container.cc" in message or "iostream error" in message:
            return True
        error = error.__context__
    return False


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _describe_engine(record: dict[str, Any]) -> str:
    """Describe an engine record for people: "deepspeed ZeRO 2 with 2 ranks"."""
    if record["stage"] is None:
        engine = DdpEngine()
    else:
        engine = DeepSpeedEngine(stage=record["stage"])
    ranks = "1 rank" if record["ranks"] == 1 else f"{record['ranks']} ranks"
    return f"{engine_name(engine)} with {ranks}"
