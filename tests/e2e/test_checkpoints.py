"""What a checkpoint holds, which ones stay, and what a resume takes from them."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch

from coupalign.cli.parser import main
from coupalign.data.build import open_tokenizer
from coupalign.engine.base import LossScale, TrainState
from coupalign.engine.checkpoint import Checkpoints
from coupalign.errors import RunError
from coupalign.model.weights.load import read_weights
from tests.e2e.scored_run import (
    ALONE,
    CHANGES,
    best_step,
    build_fresh_engine,
    config_of,
    scores_of,
    state_of,
    train_loader_of,
)


def test_resume_loads_the_weights(scored_run: Path) -> None:
    """CGFormer restores optimizer and schedule, but never the model."""
    config = config_of(scored_run)
    saved = read_weights(scored_run / "checkpoints" / "step-00000006" / "weights.safetensors")
    engine = build_fresh_engine(config)
    before = engine.export()
    assert not all(torch.equal(before[name], saved[name]) for name in saved)

    checkpoints = Checkpoints(config, ALONE, train_loader_of(config).fingerprint)
    state = checkpoints.resume(engine, open_tokenizer(config.data))

    after = engine.export()
    assert state.step == 6
    assert all(torch.equal(after[name], saved[name]) for name in saved)


def test_best_checkpoint_is_kept_however_late_it_comes(scored_run: Path, tmp_path: Path) -> None:
    """CGFormer saves the best model below epoch 50 only."""
    config = config_of(scored_run, f"run_dir={tmp_path}")
    engine, checkpoints = build_fresh_engine(config), Checkpoints(config, ALONE, "data")
    late = 10**7

    for step in (late, late + 1, late + 2):
        state = TrainState(step, best=0.9, best_step=late, evaluated=step)
        checkpoints.save(engine, state, open_tokenizer(config.data))

    best = tmp_path / "checkpoints" / "best"
    assert best.resolve().name == f"step-{late:08d}"
    assert (best / "weights.safetensors").is_file()


def test_checkpoint_holds_its_own_best_score(scored_run: Path) -> None:
    """CRIS, ETRIS, DETRIS and CGFormer store the best score of before the epoch."""
    scores = scores_of(scored_run)

    for step in {best_step(scores), 6}:
        best = best_step({at: score for at, score in scores.items() if at <= step})
        state = state_of(scored_run, step)["state"]
        assert (state["best"], state["best_step"]) == (scores[best], best)
        assert state["evaluated"] == step


def test_checkpoint_holds_the_loss_scale(scored_run: Path) -> None:
    """CRIS, ETRIS, DETRIS and CGFormer do not store the scaler."""
    scale, restored = LossScale("fp16"), LossScale("fp16")
    for applied in (False, False, True):
        scale.update(torch.tensor(applied))

    restored.restore(json.loads(json.dumps(scale.state())))

    assert state_of(scored_run, 6)["counters"].keys() == scale.state().keys()
    assert restored.state() == scale.state()
    assert restored.scale == 16384.0


def test_newest_is_kept_next_to_the_best_and_a_resumed_run_knows_its_best(
    run: Path, config: Path
) -> None:
    """LAVT saves the best only. A resumed LAVT starts at -0.1, so its first epoch replaces it."""
    kept = {path.name for path in (run / "checkpoints").iterdir()}
    assert kept == {f"step-{best_step(scores_of(run)):08d}", "step-00000006", "best"}

    assert main(["train", str(config), *CHANGES, f"run_dir={run}", "train.steps=8"]) == 0

    scores = scores_of(run)
    best = best_step(scores)
    assert sorted(scores) == [2, 4, 6, 8]
    assert (run / "checkpoints" / "best").resolve().name == f"step-{best:08d}"
    state = state_of(run, 8)["state"]
    assert (state["best"], state["best_step"]) == (scores[best], best)


def test_nothing_is_removed_before_the_new_checkpoint_is_whole(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LISA removes the old checkpoint before it writes the new one."""
    config = config_of(run)
    engine, before = build_fresh_engine(config), contents(run / "checkpoints")

    def disk_full(directory: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(directory))

    monkeypatch.setattr(engine, "save", disk_full)
    message = "step-00000007: the checkpoint could not be written .*there: .*step-00000006"
    with pytest.raises(RunError, match=message):
        Checkpoints(config, ALONE, "data").save(engine, TrainState(7), open_tokenizer(config.data))

    assert contents(run / "checkpoints") == before


def contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
