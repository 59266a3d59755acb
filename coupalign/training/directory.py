"""The run directory: one training at a time, in a folder of its own."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from coupalign.config.load import dump, read_yaml
from coupalign.config.schema import Config
from coupalign.data.leak import TrainedOn, read_trained_on
from coupalign.distributed.world import World, job_attempt, on_main
from coupalign.engine.checkpoint import finished_checkpoints
from coupalign.errors import InputError
from coupalign.files import locked, remove_debris, whole_file

LOCK = "train.lock"

# As earlier versions named a checkpoint that was being written.
_HALF_CHECKPOINT = re.compile(r"\.step-\d+\.partial")
# Every config.yaml that a run writes has these sections.
_SECTIONS = {"name", "data", "model", "train"}
# Checkpoints, scores and pictures of a small run.
_FILES_WANTED = 100


@contextmanager
def only_trainer(directory: Path, world: World) -> Iterator[None]:
    """Hold the run directory as its only training, until the block or the process ends; collective.

    The directory is created if it is missing. Nothing in it is changed before the lock is held.

    Raises:
        InputError: on every rank, if another process trains there, the folder is not one of a run,
            or it cannot be written.
    """
    with ExitStack() as stack:
        on_main(lambda: stack.enter_context(_only_trainer(directory)), world)
        yield


@contextmanager
def _only_trainer(directory: Path) -> Iterator[None]:
    _refuse_foreign(directory)
    is_new = not directory.exists()
    try:
        with ExitStack() as stack:
            with _write_failures_explained(directory):
                directory.mkdir(parents=True, exist_ok=True)
                lock = locked(
                    directory / LOCK,
                    "is being trained",
                    "Wait until that has ended, or choose another name or run_dir",
                    job=job_attempt(),
                )
                stack.enter_context(lock)
            yield
    finally:
        # A run that was refused leaves nothing; rmdir spares a folder that holds something.
        if is_new:
            with suppress(OSError):
                directory.rmdir()


def claim_directory(config: Config, trained_on: TrainedOn, checkpoint_bytes: int) -> None:
    """Make the directory this session's: remove debris, write config.yaml and trained_on.json.

    Call it on rank 0, as the only trainer.

    Args:
        trained_on: what the model of this session was trained on, if it has no checkpoint yet.
        checkpoint_bytes: the least that a checkpoint takes.

    Raises:
        InputError: the directory cannot be written, or a checkpoint does not fit on its disk.
    """
    directory = config.directory
    checkpoints = directory / "checkpoints"
    with _write_failures_explained(directory):
        # A session that was killed may have left partial files.
        for folder in (directory, directory / "scores", directory / "pictures", checkpoints):
            remove_debris(folder)
        for partial in checkpoints.glob(".step-*.partial"):
            if _HALF_CHECKPOINT.fullmatch(partial.name):
                shutil.rmtree(partial)

        _refuse_full_disk(directory, checkpoint_bytes)
        with whole_file(directory / "config.yaml", "w") as file:
            file.write(dump(config))

        # The newest checkpoint knows what it was trained on. A trained_on.json in the run directory
        # may belong to an older run of the same name.
        for checkpoint in finished_checkpoints(checkpoints):
            trained_on = read_trained_on(checkpoint) or trained_on
        trained_on.write(directory)


def _refuse_foreign(directory: Path) -> None:
    """Refuse a folder that belongs to something else.

    Raises:
        InputError: its config.yaml is not one of a run; or it is the working directory, a folder
            above it or the home folder, and no run is in it yet.
    """
    file = directory / "config.yaml"
    if file.exists():
        if not _is_config_of_a_run(file):
            raise InputError(
                f"{file}: is not the configuration of a run, and training would replace it. "
                "Choose another name or run_dir"
            )
        return

    here = Path.cwd()
    places = {here, *here.parents, Path(os.path.expanduser("~")).resolve()}
    if directory.resolve() in places and any(directory.iterdir()):
        raise InputError(
            f"{directory}: this folder, {directory.resolve()}, holds other files than those of a "
            "run. Choose another name or run_dir"
        )


def _is_config_of_a_run(file: Path) -> bool:
    try:
        return _SECTIONS <= read_yaml(file).keys()
    except InputError:
        return False


def _refuse_full_disk(directory: Path, checkpoint_bytes: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < checkpoint_bytes:
        raise InputError(
            f"{directory}: a checkpoint takes at least {checkpoint_bytes / 1e9:.3f} GB, and "
            f"{free / 1e9:.3f} GB are free. Free some space, or choose another run_dir"
        )

    # Some file systems do not count their files.
    status = os.statvfs(directory)
    if status.f_files and status.f_favail < _FILES_WANTED:
        raise InputError(
            f"{directory}: the file system has room for {status.f_favail} more files (inodes), a "
            f"run writes about {_FILES_WANTED}. Remove some files, or choose another run_dir"
        )


@contextmanager
def _write_failures_explained(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{directory}: the run directory cannot be written ({error}). Make it writable, "
            "free some space, or choose another run_dir"
        ) from error
