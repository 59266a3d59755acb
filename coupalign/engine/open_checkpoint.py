"""Open a checkpoint as a model, without any engine: for scoring, prediction and your own code."""

from __future__ import annotations

from pathlib import Path

import torch

from coupalign.config.load import override, read_stored_config
from coupalign.config.schema import BertText, Config, CoupAlignConfig
from coupalign.data.tokenizer import Tokenizer
from coupalign.engine.manifest import find_file_damage
from coupalign.errors import InputError
from coupalign.model.base import ReferringModel
from coupalign.model.build import build_model
from coupalign.model.weights.load import load_model_weights, read_weights

_MAX_ENTRIES_LISTED = 8


def open_checkpoint(
    path: str | Path, device: torch.device | str = "cpu"
) -> tuple[Config, ReferringModel, Tokenizer]:
    """Read the configuration, model and tokenizer of a run or checkpoint directory.

    The model gets the averaged weights if the checkpoint has them.

    Raises:
        InputError: there is no checkpoint, a part of it is missing or damaged, or the weights
            belong to another model.
    """
    folder = find_checkpoint(Path(path))
    config = _make_portable(read_stored_config(folder / "config.yaml"), folder)
    tokenizer = Tokenizer.open(str(folder / "tokenizer"))

    weights_file, ema_file = folder / "weights.safetensors", folder / "ema.safetensors"
    for file in (weights_file, ema_file):
        problem = find_file_damage(folder, file.name) if file.is_file() else None
        if problem:
            raise InputError(
                f"{problem}: the file is damaged. Give another checkpoint of this run, such as "
                f"{folder.parent}/step-…"
            )

    # The average leaves out frozen weights, so it goes on top of the others.
    weights, source = read_weights(weights_file), weights_file
    if ema_file.is_file():
        weights |= read_weights(ema_file)
        source = ema_file

    model = build_model(config.model, len(tokenizer), config.data.image_size)
    load_model_weights(model, weights, str(source))
    return config, model.to(device), tokenizer


def find_checkpoint(path: Path) -> Path:
    """Find the checkpoint directory: `path` itself or, in a run directory, the best or newest.

    Raises:
        InputError: there is none; the message lists what is there instead.
    """
    if not path.is_dir():
        raise InputError(
            f"{path}: no such directory. Give a run (runs/NAME) or a checkpoint "
            "(runs/NAME/checkpoints/best)"
        )

    candidates = [path]
    for parent in (path / "checkpoints", path):
        candidates += [parent / "best", *sorted(parent.glob("step-*"), reverse=True)]
    for folder in candidates:
        if (folder / "weights.safetensors").is_file() and (folder / "config.yaml").is_file():
            return folder

    entries = sorted(entry.name for entry in path.iterdir())
    raise InputError(
        f"{path}: no checkpoint here. Expected config.yaml and weights.safetensors, or a folder "
        f"checkpoints/ with them; found {', '.join(entries[:_MAX_ENTRIES_LISTED]) or 'nothing'}"
    )


def _make_portable(config: Config, folder: Path) -> Config:
    """Make the model independent of its pretrained files and of the GPU kernels of its training."""
    if isinstance(config.model.text, BertText) and (folder / "text").is_dir():
        text = config.model.text.model_copy(update={"weights": f"random:{folder / 'text'}"})
        config = config.model_copy(update={"model": config.model.model_copy(update={"text": text})})

    changes = []
    if isinstance(config.model, CoupAlignConfig) and config.model.wpa.impl == "fused":
        changes.append("model.wpa.impl=auto")
    return override(config, changes)
