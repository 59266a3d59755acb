"""A checkpoint back into a model, without any engine: for scoring, predicting and whatever users build on it."""

from __future__ import annotations

from pathlib import Path

import torch

from coupalign.config.load import override, read_config
from coupalign.config.schema import BertText, Config, CoupAlignConfig
from coupalign.data.tokenizer import Tokenizer
from coupalign.engine.manifest import damaged_alone
from coupalign.errors import InputError
from coupalign.model.base import ReferringModel
from coupalign.model.build import build_model
from coupalign.model.weights.load import load_model_weights, read_weights


def open_checkpoint(
    path: str | Path, device: torch.device | str = "cpu"
) -> tuple[Config, ReferringModel, Tokenizer]:
    """Read a run or checkpoint directory: configuration, model (with averaged weights where there are any), tokenizer.

    Raises:
        InputError: no checkpoint there, a part of it is missing or damaged, or the weights are another model's.
    """
    folder = find_checkpoint(Path(path))
    config = _portable(read_config(folder / "config.yaml"), folder)
    tokenizer = Tokenizer.open(str(folder / "tokenizer"))
    for name in ("weights.safetensors", "ema.safetensors"):
        if (folder / name).is_file() and (problem := damaged_alone(folder, name)):
            raise InputError(
                f"{problem}: the file is damaged. Give another checkpoint of this run, such as {folder.parent}/step-…"
            )
    weights = read_weights(folder / "weights.safetensors")
    averaged = folder / "ema.safetensors"
    source = averaged if averaged.is_file() else folder / "weights.safetensors"
    if source is averaged:
        weights |= read_weights(averaged)  # which may leave out what is not averaged
    model = build_model(config.model, len(tokenizer), config.data.image_size)
    load_model_weights(model, weights, str(source))
    return config, model.to(device), tokenizer


def find_checkpoint(path: Path) -> Path:
    """The checkpoint directory that `path` is or, in a run directory, the best one, else the newest.

    Raises:
        InputError: there is none; says what is there instead.
    """
    if not path.is_dir():
        raise InputError(
            f"{path}: no such directory; give a run (runs/NAME) or a checkpoint (runs/NAME/checkpoints/best)"
        )
    folders = [path]
    for parent in (path / "checkpoints", path):
        folders += [parent / "best", *sorted(parent.glob("step-*"), reverse=True)]
    for folder in folders:
        if (folder / "weights.safetensors").is_file() and (folder / "config.yaml").is_file():
            return folder
    there = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
    raise InputError(
        f"{path}: no checkpoint here (config.yaml, weights.safetensors; or checkpoints/ with them); found {there}"
    )


def _portable(config: Config, folder: Path) -> Config:
    """The same model where neither the pretrained files of its training nor its GPU kernels are at hand."""
    changes = (
        ["model.wpa.impl=auto"]
        if isinstance(config.model, CoupAlignConfig) and config.model.wpa.impl == "fused"
        else []
    )
    if isinstance(config.model.text, BertText) and (folder / "text").is_dir():
        text = config.model.text.model_copy(update={"weights": f"random:{folder / 'text'}"})
        config = config.model_copy(update={"model": config.model.model_copy(update={"text": text})})
    return override(config, changes)
