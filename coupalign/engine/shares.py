"""Read the files of shares that DeepSpeed writes, without running code from them.

DeepSpeed loads its files with `torch.load(weights_only=False)`, which runs any code that a pickle
names. A checkpoint may come from somebody else, and its manifest proves nothing about who wrote it.
So two barriers stand before every such load:

- `check_shares` lists what the pickles name, without unpickling, and refuses all but the classes
  that DeepSpeed itself stores.
- `restricted_loading` makes torch.load use its restricted unpickler, whatever its caller asks for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from coupalign.compat import package_hidden
from coupalign.errors import InputError, describe_error

SHARES_FOLDER = "deepspeed"

# What the optimizer states of ZeRO 1 to 3 hold besides tensors, numbers and containers.
STORED_CLASSES = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)

# torch reads both at each load. The first overrides `weights_only=False`.
_FORCE_RESTRICTED = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_FORCE_UNRESTRICTED = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"

_MAX_NAMES_LISTED = 3


def check_shares(folder: Path) -> None:
    """Refuse a folder of shares if any file could run code, or is no file of torch's.

    Only the list of names in each file is read, so this takes milliseconds.

    Raises:
        InputError: names the file and what it holds.
    """
    for file in sorted(folder.glob("*.pt")):
        try:
            named = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        except Exception as error:  # damaged files raise almost any type
            raise InputError(
                f"{file}: not a file that DeepSpeed wrote ({describe_error(error)}). Take another "
                "checkpoint of this run"
            ) from error

        foreign = sorted(set(named) - set(STORED_CLASSES))
        if foreign:
            listed = ", ".join(f"{name[:80]!r}" for name in foreign[:_MAX_NAMES_LISTED])
            raise InputError(
                f"{file}: holds {listed}, which DeepSpeed does not store. Loading the file could "
                "run code, so nothing was loaded. Take another checkpoint, from a source you trust"
            )


@contextmanager
def restricted_loading() -> Iterator[None]:
    """Enter a context in which torch.load makes only tensors, containers and DeepSpeed's classes.

    That holds for calls with `weights_only=False` as well; torch raises an UnpicklingError for
    anything else.
    """
    from torch.serialization import safe_globals

    before = {name: os.environ.pop(name, None) for name in (_FORCE_RESTRICTED, _FORCE_UNRESTRICTED)}
    os.environ[_FORCE_RESTRICTED] = "1"
    try:
        with safe_globals(_import_stored_classes()):
            yield
    finally:
        del os.environ[_FORCE_RESTRICTED]
        os.environ |= {name: value for name, value in before.items() if value is not None}


def _import_stored_classes() -> list[type]:
    with package_hidden("mlflow"):  # see _import_deepspeed in engine/zero.py
        from deepspeed.runtime.fp16.loss_scaler import LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, ZeroStageEnum, fragment_address]
