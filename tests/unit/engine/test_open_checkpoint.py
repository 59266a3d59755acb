"""Opening a checkpoint for prediction: which one is taken, and every way in which it is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from coupalign.config.load import dump, override
from coupalign.engine.manifest import write_manifest
from coupalign.engine.open_checkpoint import find_checkpoint, open_checkpoint
from coupalign.errors import InputError
from coupalign.model.weights.load import write_weights
from tests.unit.predict.conftest import ALONE, tiny_config, write_checkpoint


def test_find_checkpoint_prefers_the_best_then_the_newest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
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

    # The newest, where the best is gone, with a warning.
    assert not caplog.messages
    (folder / "best").unlink()
    (folder / "best").symlink_to("step-00000001")
    assert find_checkpoint(run).resolve().name == "step-00000100"
    [warning] = caplog.messages
    assert "best leads to no checkpoint" in warning and "step-00000100 is taken" in warning


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
    write_manifest(folder, ALONE)

    message = r"(?s)weights\.safetensors.*another model.*decoder\..*32.*48"
    with pytest.raises(InputError, match=message):
        open_checkpoint(folder)


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c", tiny_config())
    state = load_file(folder / "weights.safetensors")
    missing = sorted(state)[3]
    del state[missing]
    write_weights(folder / "weights.safetensors", state)
    write_manifest(folder, ALONE)

    with pytest.raises(InputError, match=missing.replace(".", r"\.")):
        open_checkpoint(folder)


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c", tiny_config())
    weights = folder / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])

    with pytest.raises(InputError, match="weights.safetensors"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "part",
    [
        "config.yaml",
        "weights.safetensors",
        "ema.safetensors",
        "tokenizer/tokenizer.json",
        "tokenizer/vocab.txt",
    ],
)
def test_every_file_that_is_used_is_checked(tmp_path: Path, part: str) -> None:
    folder = write_checkpoint(tmp_path / "c", tiny_config(), average=0.5)
    data = bytearray((folder / part).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / part).write_bytes(data)

    with pytest.raises(InputError, match=rf"{part} has another sha256.*the checkpoint is damaged"):
        open_checkpoint(folder)


def test_optimizer_state_is_not_read(tmp_path: Path) -> None:
    """It is twice as large as the weights, and a model does not need it."""
    folder = write_checkpoint(tmp_path / "c", tiny_config())
    (folder / "optimizer.pt").write_bytes(b"moments")
    write_manifest(folder, ALONE)
    (folder / "optimizer.pt").unlink()

    open_checkpoint(folder)


def test_manifest_must_be_readable_and_list_what_is_used(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c", tiny_config())
    manifest = folder / "manifest.json"
    whole = manifest.read_bytes()

    manifest.write_bytes(whole[:-40])
    with pytest.raises(InputError, match=r"manifest\.json is unreadable or damaged"):
        open_checkpoint(folder)

    tree = json.loads(whole)
    del tree["files"]["weights.safetensors"]
    manifest.write_text(json.dumps(tree))
    with pytest.raises(InputError, match=r"weights\.safetensors is not in manifest\.json"):
        open_checkpoint(folder)

    manifest.unlink()
    with pytest.raises(InputError, match=r"manifest\.json is missing"):
        open_checkpoint(folder)


def test_average_that_somebody_added_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c", tiny_config())
    shutil.copyfile(folder / "weights.safetensors", folder / "ema.safetensors")

    with pytest.raises(InputError, match=r"ema\.safetensors is not in manifest\.json"):
        open_checkpoint(folder)


def test_average_that_is_gone_is_missed(tmp_path: Path) -> None:
    """The weights without their average would score differently, without a word."""
    config = override(tiny_config(), ["train.ema.decay=0.9"])
    folder = write_checkpoint(tmp_path / "c", config, average=0.5)
    (folder / "ema.safetensors").unlink()
    write_manifest(folder, ALONE)

    with pytest.raises(InputError, match=r"ema\.safetensors is not in manifest\.json"):
        open_checkpoint(folder)


def test_files_of_others_are_no_damage(tmp_path: Path) -> None:
    """`eval` of a checkpoint outside a run writes its scores into it."""
    folder = write_checkpoint(tmp_path / "c", tiny_config())
    (folder / "scores").mkdir()
    (folder / "scores" / "val-lavt.csv").touch()
    (folder / ".DS_Store").touch()

    open_checkpoint(folder)


def test_configuration_is_not_expanded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A variable of this machine in somebody's address would be sent there."""
    monkeypatch.setenv("SECRET", "hunter2")
    folder = write_checkpoint(tmp_path / "c", tiny_config())
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("name: tiny", "name: tiny$SECRET"))
    write_manifest(folder, ALONE)

    try:
        config, _, _ = open_checkpoint(folder)
    except InputError as error:
        assert "hunter2" not in str(error)
    else:
        assert "hunter2" not in dump(config)


def test_folders_that_are_no_checkpoints_are_not_taken(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    write_checkpoint(folder / "step-00000009", tiny_config())
    for name in ("step-keep", "step-1", "step-00000099", "step-00000100"):
        write_checkpoint(folder / name, tiny_config())
    (folder / "step-00000099" / "manifest.json").unlink()
    (folder / "step-00000100").rename(tmp_path / "elsewhere")
    (folder / "step-00000100").symlink_to(tmp_path / "elsewhere")

    assert find_checkpoint(tmp_path / "run").name == "step-00000009"


def test_directory_without_checkpoint_is_refused_with_its_content(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()

    with pytest.raises(InputError, match=r"no checkpoint here.*notes\.txt"):
        open_checkpoint(tmp_path)
    with pytest.raises(InputError, match="no such directory"):
        open_checkpoint(tmp_path / "none")
