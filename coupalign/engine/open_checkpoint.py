"""Open a checkpoint as a model, without any engine: for scoring, prediction and your own code."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch

from coupalign.config.load import override, read_stored_config
from coupalign.config.schema import BertText, Config, CoupAlignConfig
from coupalign.data.tokenizer import Tokenizer
from coupalign.engine.layout import (
    AVERAGES,
    BEST,
    CONFIG,
    TEXT,
    TOKENIZER,
    WEIGHTS,
    finished_checkpoints,
    is_model_part,
    missing_model_parts,
)
from coupalign.engine.manifest import MANIFEST, find_damage_of, read_manifest
from coupalign.errors import InputError
from coupalign.model.base import ReferringModel
from coupalign.model.build import build_model
from coupalign.model.weights.load import load_model_weights, read_weights

_MAX_ENTRIES_LISTED = 8

logger = logging.getLogger("coupalign.engine")


def open_checkpoint(
    path: str | Path, device: torch.device | str = "cpu"
) -> tuple[Config, ReferringModel, Tokenizer]:
    """Read the configuration, model and tokenizer of a run or checkpoint directory.

    Every file that is used is compared with the manifest first. The model gets the averaged weights
    if the run kept an average.

    Raises:
        InputError: there is no checkpoint, a part of it is missing or damaged, or the weights
            belong to another model.
    """
    folder = find_checkpoint(Path(path))
    _refuse_damage(folder, find_damage_of(folder, is_model_part))
    names = {*read_manifest(folder)}
    _refuse_missing(folder, missing_model_parts(names))

    stored = read_stored_config(folder / CONFIG)
    if stored.train.ema is not None and AVERAGES not in names:
        _refuse_missing(folder, [AVERAGES])
    if isinstance(stored.model.text, BertText) and not (folder / TEXT).is_dir():
        _refuse_missing(folder, [f"{TEXT}/"])
    config = _make_portable(stored, folder)
    tokenizer = Tokenizer.open(folder / TOKENIZER)

    # The average leaves out frozen weights, so it goes on top of the others.
    source = folder / WEIGHTS
    weights = read_weights(source)
    if AVERAGES in names:
        source = folder / AVERAGES
        weights |= read_weights(source)

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
        candidates += [parent / BEST, *reversed(finished_checkpoints(parent))]
    broken_best = None
    for folder in candidates:
        if (folder / WEIGHTS).is_file() and (folder / CONFIG).is_file():
            if broken_best is not None:
                logger.warning(
                    "%s leads to no checkpoint; %s is taken instead, which may not be the best",
                    broken_best,
                    folder,
                )
            return folder
        if folder.name == BEST and os.path.lexists(folder):
            broken_best = folder

    entries = sorted(entry.name for entry in path.iterdir())
    raise InputError(
        f"{path}: no checkpoint here. Expected config.yaml and weights.safetensors, or a folder "
        f"checkpoints/ with them; found {', '.join(entries[:_MAX_ENTRIES_LISTED]) or 'nothing'}"
    )


def _refuse_missing(folder: Path, missing: list[str]) -> None:
    _refuse_damage(folder, [f"{name} is not in {MANIFEST}" for name in missing])


def _refuse_damage(folder: Path, problems: list[str]) -> None:
    if problems:
        raise InputError(
            f"{folder}: {problems[0]}: the checkpoint is damaged. Give another checkpoint of this "
            f"run, such as {folder.parent}/step-…, or copy this one again"
        )


def _make_portable(config: Config, folder: Path) -> Config:
    """Make the model independent of its pretrained files and of the GPU kernels of its training."""
    if isinstance(config.model.text, BertText) and (folder / TEXT).is_dir():
        text = config.model.text.model_copy(update={"weights": f"random:{folder / TEXT}"})
        config = config.model_copy(update={"model": config.model.model_copy(update={"text": text})})

    changes = []
    if isinstance(config.model, CoupAlignConfig) and config.model.wpa.impl == "fused":
        changes.append("model.wpa.impl=auto")
    return override(config, changes)
