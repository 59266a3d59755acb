"""The checkpoint folder of a run: recovery, retention and errors; see also tests/e2e."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from coupalign.config.schema import Config
from coupalign.distributed.world import World
from coupalign.engine.base import TrainState
from coupalign.engine.checkpoint import Checkpoints, finished_checkpoints, recover_checkpoints
from coupalign.errors import InputError

ALONE = World(0, 1, 0, 1, torch.device("cpu"))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_interrupted_replacement_gets_its_name_back(tmp_path: Path) -> None:
    (tmp_path / "step-00000002").mkdir()
    # Its replacement is there.
    (tmp_path / ".step-00000002.old").mkdir()
    # Its replacement was never renamed.
    (tmp_path / ".step-00000004.old").mkdir()

    found = recover_checkpoints(tmp_path)

    assert names(tmp_path) == ["step-00000002", "step-00000004"]
    assert found == finished_checkpoints(tmp_path)


def test_publishing_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    config = Config(run_dir=tmp_path)
    config = config.model_copy(update={"train": config.train.model_copy(update={"keep_last": 2})})
    checkpoints = Checkpoints(config, ALONE, "data")
    checkpoints.folder.mkdir()

    for step in (2, 4, 6, 8):
        partial = checkpoints.folder / ".partial"
        partial.mkdir()
        state = TrainState(step=step, best=0.5, best_step=2)
        checkpoints._publish(partial, checkpoints.folder / f"step-{step:08d}", state)

    kept = ["best", "step-00000002", "step-00000006", "step-00000008"]
    assert names(checkpoints.folder) == kept
    assert (checkpoints.folder / "best").resolve().name == "step-00000002"


def test_resume_refuses_if_every_checkpoint_is_damaged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(Config(run_dir=tmp_path), ALONE, "data")
    (checkpoints.folder / "step-00000002").mkdir(parents=True)

    with pytest.raises(InputError, match="every checkpoint is damaged"):
        checkpoints.resume(engine=None)

    assert names(checkpoints.folder) == ["damaged-step-00000002"]
    assert "manifest.json is missing" in caplog.text

    # A requeued job must not start from scratch either.
    with pytest.raises(InputError, match="every checkpoint is damaged"):
        checkpoints.resume(engine=None)


def test_run_without_checkpoints_has_nothing_to_resume(tmp_path: Path) -> None:
    assert Checkpoints(Config(run_dir=tmp_path), ALONE, "data").resume(engine=None) is None
