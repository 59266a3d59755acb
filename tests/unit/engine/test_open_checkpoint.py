"""Opening a checkpoint for prediction: which one is taken, and every way in which it is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from coupalign.config.load import dump
from coupalign.engine.open_checkpoint import find_checkpoint, open_checkpoint
from coupalign.errors import InputError
from coupalign.model.weights.load import write_weights
from tests.unit.predict.conftest import tiny_config, write_checkpoint


def test_find_checkpoint_prefers_the_best_then_the_newest(tmp_path: Path) -> None:
    run = tmp_path / "run"
    folder = run / "checkpoints"
    for step in (9, 10, 100):
        write_checkpoint(folder / f"step-{step:08d}", tiny_config())
    (folder / ".step-00000200.partial").mkdir()

    # The newest, where none is marked as the best.
    assert find_checkpoint(run).resolve().name == "step-00000100"

    # The best, in a run directory and in its folder of checkpoints.
    (folder / "best").symlink_to("step-00000009")
    assert find_checkpoint(run).resolve().name == "step-00000009"
    assert find_checkpoint(folder).resolve().name == "step-00000009"

    # The one that was given.
    assert find_checkpoint(folder / "step-00000010").name == "step-00000010"

    # The newest, where the best is gone.
    (folder / "best").unlink()
    (folder / "best").symlink_to("step-00000001")
    assert find_checkpoint(run).resolve().name == "step-00000100"


def test_open_checkpoint_prefers_averaged_weights(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c", tiny_config(), average=0.5)
    plain = load_file(folder / "weights.safetensors")

    _, model, _ = open_checkpoint(folder)

    for name, value in model.state_dict().items():
        expected = plain[name]
        if value.is_floating_point():
            expected = expected * 0.5
        assert torch.equal(value, expected), name


def test_weights_of_another_model_are_refused_with_the_shapes(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c", tiny_config(width=32))
    (folder / "config.yaml").write_text(dump(tiny_config(width=48)))

    message = r"(?s)weights\.safetensors.*another model.*decoder\..*32.*48"
    with pytest.raises(InputError, match=message):
        open_checkpoint(folder)


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c", tiny_config())
    state = load_file(folder / "weights.safetensors")
    missing = sorted(state)[3]
    del state[missing]
    write_weights(folder / "weights.safetensors", state)

    with pytest.raises(InputError, match=missing.replace(".", r"\.")):
        open_checkpoint(folder)


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c", tiny_config())
    weights = folder / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])

    with pytest.raises(InputError, match="weights.safetensors"):
        open_checkpoint(folder)


def test_directory_without_checkpoint_is_refused_with_its_content(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()

    with pytest.raises(InputError, match=r"no checkpoint here.*notes\.txt"):
        open_checkpoint(tmp_path)
    with pytest.raises(InputError, match="no such directory"):
        open_checkpoint(tmp_path / "none")
