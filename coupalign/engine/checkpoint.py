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
- layout.py has the names of all files and decides which folders are checkpoints.
- state_file.py reads and checks state.json.
- shares.py keeps DeepSpeed from running code that is in its files.
- optimizer_state.py reads and writes the moments of whole parameters, and makes universal/.
- manifest.py writes manifest.json and checks files against it.
- open_checkpoint.py opens a checkpoint for scoring and prediction, without an engine.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path

from coupalign.config.load import dump, read_stored_config, resume_diff
from coupalign.config.schema import BertText, Config, DdpEngine, DeepSpeedEngine
from coupalign.data.leak import TRAINED_ON
from coupalign.data.tokenizer import Tokenizer
from coupalign.distributed.watchdog import doing
from coupalign.distributed.world import World, from_main, gather_objects, on_main, wait_for_all
from coupalign.engine.base import Engine, TrainState
from coupalign.engine.build import engine_name
from coupalign.engine.layout import (
    AVERAGES,
    BEST,
    CONFIG,
    DAMAGED_PREFIX,
    STATE,
    TEXT,
    TOKENIZER,
    WEIGHTS,
    checkpoint_name,
    finished_checkpoints,
    is_part,
    missing_model_parts,
    missing_states,
    recover_checkpoints,
    step_of,
    unfinished_checkpoints,
)
from coupalign.engine.manifest import MANIFEST, find_damage, read_manifest, write_manifest
from coupalign.engine.optimizer_state import make_universal, open_optimizer_state
from coupalign.engine.shares import SHARES_FOLDER, check_shares
from coupalign.engine.state_file import BadState, EngineRecord, StateFile, read_state
from coupalign.errors import InputError, RunError, describe_error
from coupalign.files import partial_path, publish_directory, write_json
from coupalign.model.text import write_bert_config
from coupalign.model.weights.load import write_weights
from coupalign.version import __version__

logger = logging.getLogger("coupalign.checkpoints")


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

        The temporary name belongs to rank 0's process, and all ranks check that they wrote into the
        same folder. So a checkpoint never has parts of two runs.

        Raises:
            RunError: it could not be written (disk full, no permission). Older ones stay whole.
        """
        final = self.folder / checkpoint_name(state.step)
        partial = final.with_name(from_main(partial_path(final).name, self.world))
        session = from_main(secrets.token_hex(8), self.world)

        with self._write_failures_explained(partial, final):
            on_main(lambda: _make_empty(partial), self.world)
            self._fill(partial, engine, state, tokenizer, session)
            wait_for_all(self.world)
            self._check_owner(partial, session)
            write_manifest(partial, self.world)
            on_main(lambda: self._publish(partial, final, state), self.world)
        return final

    def resume(self, engine: Engine, tokenizer: Tokenizer) -> TrainState | None:
        """Load the newest checkpoint that is whole; collective. None: the run has none.

        A damaged one is renamed to damaged-step-… with a warning, and the one before it is loaded.
        If another engine or another number of ranks wrote the checkpoint, it is converted. The link
        `best` is set to what the checkpoint knows as the best.

        Raises:
            InputError: it belongs to another configuration, tokenizer or data set (the message
                names each field), all checkpoints are damaged, or the folder cannot be written.
        """
        candidates = self._list_candidates()
        for path in reversed(candidates):
            doing(f"checking {path.name}")
            damage, content = self._find_damage(path)
            if content is None:
                on_main(partial(self._set_aside, path, damage), self.world)
                continue

            on_main(partial(self._check_compatible, path, content, tokenizer), self.world)
            doing(f"loading {path.name}")
            self._load(path, content, engine)
            return on_main(partial(self._finish_publishing, path, content.train_state), self.world)

        # The next start refuses as well, when all of them have been renamed.
        if candidates or any(self.folder.glob(f"{DAMAGED_PREFIX}*")):
            raise InputError(
                f"{self.folder}: every checkpoint is damaged. Start a new run under another name, "
                "or remove the folder to start over"
            )
        return None

    def _list_candidates(self) -> list[Path]:
        """List what is or was a checkpoint, oldest first, and warn of what only looks like one."""

        def list_them() -> list[Path]:
            with self._must_be_writable():
                recover_checkpoints(self.folder)

            ours = {*finished_checkpoints(self.folder), *unfinished_checkpoints(self.folder)}
            for other in sorted({*self.folder.glob("step-*")} - ours):
                logger.warning("%s is no checkpoint of this program: it is left alone", other)
            return sorted(ours, key=lambda path: step_of(path) or 0)

        return on_main(list_them, self.world)

    def _find_damage(self, path: Path) -> tuple[list[str], StateFile | None]:
        """Check all files of a checkpoint; returns its damage, or what state.json says."""
        damage = find_damage(path, self.world, is_part)
        if damage:
            return damage, None

        def read() -> tuple[list[str], StateFile | None]:
            try:
                content = read_state(path / STATE)
            except BadState as error:
                return [str(error)], None
            if content.state.step != step_of(path):
                return [f"{STATE} is that of step {content.state.step}"], None

            names = {*read_manifest(path)}
            missing = [*missing_model_parts(names), *missing_states(names, content.engine.stage)]
            return [f"{name} is not in {MANIFEST}" for name in missing], content

        damage, content = on_main(read, self.world)
        return damage, None if damage else content

    def _load(self, path: Path, content: StateFile, engine: Engine) -> None:
        on_main(lambda: check_shares(path / SHARES_FOLDER), self.world)
        writer, reader = content.engine, self._engine_record()
        counters = content.counters.model_dump()
        if writer == reader:
            engine.load(path, counters)
            return

        if self.world.is_main:
            logger.warning(
                "%s was written by %s; %s takes it over",
                path,
                _describe_engine(writer),
                _describe_engine(reader),
            )
        on_main(lambda: make_universal(path, logger.warning), self.world)
        engine.adopt(path, open_optimizer_state(path), counters)

    def _fill(
        self,
        folder: Path,
        engine: Engine,
        state: TrainState,
        tokenizer: Tokenizer,
        session: str,
    ) -> None:
        """Write everything except the manifest; each engine writes its optimizer state."""
        weights, averages = engine.export(), engine.export(averaged=True)

        def write_shared_files() -> None:
            assert weights is not None
            write_weights(folder / WEIGHTS, weights)
            if averages is not None:
                write_weights(folder / AVERAGES, averages)

            tokenizer.save(folder / TOKENIZER)
            if isinstance(self.config.model.text, BertText):
                write_bert_config(self.config.model.text, len(tokenizer), folder / TEXT)

            (folder / CONFIG).write_text(dump(self.config), encoding="utf-8")
            trained_on = self.config.directory / TRAINED_ON
            if trained_on.is_file():
                shutil.copyfile(trained_on, folder / TRAINED_ON)

            content = StateFile.describe(
                state,
                tool=f"coupalign {__version__}",
                engine=self._engine_record(),
                counters=engine.counters(),
                data=self.data_fingerprint,
                session=session,
            )
            write_json(folder / STATE, content.to_json())

        on_main(write_shared_files, self.world)
        engine.save(folder)

    def _check_owner(self, folder: Path, session: str) -> None:
        """Check that every rank sees the folder into which this save has written; collective."""
        try:
            is_same = read_state(folder / STATE).session == session
        except BadState:
            is_same = False

        answers = gather_objects(is_same, self.world)
        strangers = [rank for rank, answer in enumerate(answers) if not answer]
        if strangers:
            raise RunError(
                f"{folder}: ranks {strangers} do not find there what rank 0 has written. All nodes "
                "must share the file system of run_dir, and nothing else may write or remove files "
                "there. Nothing was replaced; the same command resumes from the newest checkpoint"
            )

    def _engine_record(self) -> EngineRecord:
        """Describe this run's engine as state.json does."""
        engine = self.config.engine
        stage = engine.stage if isinstance(engine, DeepSpeedEngine) else None
        return EngineRecord(kind=engine.kind, stage=stage, ranks=self.world.size)

    def _check_compatible(self, path: Path, content: StateFile, tokenizer: Tokenizer) -> None:
        """Refuse a checkpoint whose settings or data would change the run's numbers."""
        problems = []
        changes = resume_diff(read_stored_config(path / CONFIG), self.config)
        for key, (before, after) in changes.items():
            # Shards may move; the fingerprint tells whether they are the same.
            if key.startswith("data.train") and key.endswith(".index"):
                continue
            problems.append(f"{key} was {before!r}, is {after!r}")

        if content.data != self.data_fingerprint:
            problems.append("the training data have another fingerprint")
        change = Tokenizer.open(path / TOKENIZER).first_difference(tokenizer)
        if change is not None:
            problems.append(f"the tokenizer is another one: {change}")

        if problems:
            raise InputError(
                f"{path}: cannot resume from this checkpoint: {'; '.join(problems)}. Restore the "
                "old setting, or start a new run under another name"
            )

    def _set_aside(self, path: Path, damage: list[str]) -> None:
        """Rename a damaged checkpoint and log what is wrong with it."""
        # Its step may have been damaged before.
        first = path.with_name(f"{DAMAGED_PREFIX}{path.name}")
        others = (first.with_name(f"{first.name}.{number}") for number in count(2))
        aside = first
        while aside.exists():
            aside = next(others)

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
    def _must_be_writable(self) -> Iterator[None]:
        """Explain a failure to tidy up the folder, before the first step."""
        try:
            yield
        except OSError as error:
            raise InputError(
                f"{self.folder}: cannot be written ({error}). Make it writable, or choose another "
                "run_dir"
            ) from error

    @contextmanager
    def _write_failures_explained(self, partial: Path, final: Path) -> Iterator[None]:
        """Turn a failed write into a RunError that says what the run still has."""
        try:
            yield
        except (OSError, RuntimeError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, RunError) or not _is_write_failure(error):
                raise

            # A disk with errors may not answer either.
            free, whole = "unknown", "unknown"
            with suppress(OSError):
                free = f"{shutil.disk_usage(self.config.directory).free / 1e9:.3f} GB"
                names = [path.name for path in finished_checkpoints(self.folder)]
                whole = ", ".join(names) or "none"
            raise RunError(
                f"{final}: the checkpoint could not be written ({describe_error(error)}; free: "
                f"{free}). Whole checkpoints there: {whole}. Free some space or choose another "
                "run_dir, then start again: the run resumes from the newest"
            ) from error

    def _publish(self, partial: Path, final: Path, state: TrainState) -> None:
        publish_directory(partial, final)
        if state.best_step is not None and state.best_step == state.step:
            self._point_to_best(final)
        self._prune(final, state)

    def _point_to_best(self, checkpoint: Path) -> None:
        """Replace the link `best` in one operation."""
        best = self.folder / BEST
        if best.is_dir() and not best.is_symlink():
            # A copy of the run that followed the link.
            aside = best.with_name(f"former-{BEST}-{secrets.token_hex(4)}")
            best.rename(aside)
            logger.warning("%s was a folder and no link: it is now called %s", best, aside.name)

        link = partial_path(best)
        link.unlink(missing_ok=True)
        link.symlink_to(checkpoint.name)
        os.replace(link, best)

    def _finish_publishing(self, loaded: Path, state: TrainState) -> TrainState:
        """Do what a run still owed that ended right after it published a checkpoint."""
        state = self._restore_best(state)
        self._prune(loaded, state)
        return state

    def _restore_best(self, state: TrainState) -> TrainState:
        """Set the link `best` to the checkpoint that `state` knows as the best.

        A run that is killed between publishing a checkpoint and linking it leaves another one.

        Returns:
            `state`, without its best score if the checkpoint with that score is gone.
        """
        if state.best_step is None:
            return state

        best, checkpoint = self.folder / BEST, self.folder / checkpoint_name(state.best_step)
        if checkpoint not in finished_checkpoints(self.folder):
            logger.warning(
                "%s, the best until now with a score of %s, is gone: the next score is the best",
                checkpoint,
                state.best,
            )
            if best.is_symlink() and not best.exists():
                with self._must_be_writable():
                    best.unlink()
            return replace(state, best=None, best_step=None, best_of=None)

        if not best.is_symlink() or os.readlink(best) != checkpoint.name:
            with self._must_be_writable():
                self._point_to_best(checkpoint)
        return state

    def _prune(self, newest: Path, state: TrainState) -> None:
        """Remove old checkpoints, except the newest, `best`, and what it should be."""
        kept = {newest.name}
        if state.best_step is not None:
            kept.add(checkpoint_name(state.best_step))
        if (self.folder / BEST).is_symlink():
            kept.add(Path(os.readlink(self.folder / BEST)).name)

        for old in finished_checkpoints(self.folder)[: -self.config.train.keep_last]:
            if old.name not in kept:
                _remove(old)


def _remove(old: Path) -> None:
    """Remove an old checkpoint; one that is half removed is debris and no checkpoint."""
    removed = partial_path(old)
    try:
        os.replace(old, removed)
        shutil.rmtree(removed)
    except OSError as error:
        logger.warning("%s could not be removed (%s); remove it yourself", old, error)


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


def _describe_engine(record: EngineRecord) -> str:
    """Describe an engine record for people: "deepspeed ZeRO 2 with 2 ranks"."""
    if record.stage is None:
        engine = DdpEngine()
    else:
        engine = DeepSpeedEngine(stage=record.stage)
    ranks = "1 rank" if record.ranks == 1 else f"{record.ranks} ranks"
    return f"{engine_name(engine)} with {ranks}"
