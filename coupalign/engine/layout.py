"""The names in a run's folder of checkpoints, and which of the folders there are checkpoints.

See checkpoint.py for what each file holds.
"""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path, PurePosixPath

from coupalign.engine.manifest import MANIFEST
from coupalign.engine.shares import SHARES_FOLDER
from coupalign.files import remove_debris

logger = logging.getLogger("coupalign.checkpoints")

CONFIG = "config.yaml"
STATE = "state.json"
WEIGHTS = "weights.safetensors"
AVERAGES = "ema.safetensors"
TOKENIZER = "tokenizer"
TEXT = "text"
WHOLE_STATE = "optimizer.pt"

BEST = "best"
DAMAGED_PREFIX = "damaged-"

_STEP = re.compile(r"step-(?P<step>[0-9]{8,18})")
_MODEL_PARTS = {CONFIG, STATE, WEIGHTS, AVERAGES, TOKENIZER, TEXT, "trained_on.json"}
_OPTIMIZER_PARTS = {WHOLE_STATE, SHARES_FOLDER}
_MODEL_FILES = (CONFIG, WEIGHTS, f"{TOKENIZER}/tokenizer.json")


def checkpoint_name(step: int) -> str:
    """Return the name of the checkpoint after `step` steps."""
    return f"step-{step:08d}"


def step_of(checkpoint: Path) -> int | None:
    """Return the step in a checkpoint's name. None: it has another name than we give."""
    match = _STEP.fullmatch(checkpoint.name)
    if match is None or checkpoint_name(int(match["step"])) != checkpoint.name:
        return None
    return int(match["step"])


def is_model_part(name: str) -> bool:
    """Whether scoring and prediction read a file of a checkpoint: "tokenizer/vocab.txt"."""
    return PurePosixPath(name).parts[0] in _MODEL_PARTS


def is_part(name: str) -> bool:
    """Whether a resumed run reads a file of a checkpoint."""
    return PurePosixPath(name).parts[0] in _MODEL_PARTS | _OPTIMIZER_PARTS


def missing_model_parts(names: set[str]) -> list[str]:
    """Name what every model needs and a checkpoint with files of these names lacks."""
    return [name for name in _MODEL_FILES if name not in names]


def missing_states(names: set[str], stage: int | None) -> list[str]:
    """Name the optimizer state that an engine has written and that is not among `names`.

    Args:
        stage: of ZeRO; None for DDP.
    """
    if not stage:
        return [] if WHOLE_STATE in names else [WHOLE_STATE]
    has_shares = any(name.startswith(f"{SHARES_FOLDER}/") for name in names)
    return [] if has_shares else [f"{SHARES_FOLDER}/"]


def finished_checkpoints(folder: Path) -> list[Path]:
    """List the finished checkpoints of a checkpoint folder, oldest first.

    Anything else is not ours: links, other names, folders without a manifest.
    """
    return [path for path in _step_folders(folder) if (path / MANIFEST).is_file()]


def unfinished_checkpoints(folder: Path) -> list[Path]:
    """List the folders that hold parts of a checkpoint, but have lost their manifest."""
    return [
        path
        for path in _step_folders(folder)
        if not (path / MANIFEST).is_file() and any((path / name).exists() for name in _MODEL_FILES)
    ]


def recover_checkpoints(folder: Path) -> None:
    """Remove what killed processes left, and undo replacements that were interrupted.

    A checkpoint that is being replaced has a temporary name. If the run is killed in that moment,
    this gives it its old name back.
    """
    remove_debris(folder)
    for old in folder.glob(".step-*.old"):
        original = folder / old.name.removeprefix(".").removesuffix(".old")
        if step_of(original) is None or old.is_symlink():
            continue
        if original.exists():
            shutil.rmtree(old)
        else:
            old.rename(original)


def _step_folders(folder: Path) -> list[Path]:
    """List the folders with a checkpoint's name, by their step."""
    steps = {path: step_of(path) for path in folder.glob("step-*")}
    ours = [
        (step, path)
        for path, step in steps.items()
        if step is not None and path.is_dir() and not path.is_symlink()
    ]
    return [path for _, path in sorted(ours)]
