"""Adam's state of whole parameters, by the model's own names, whichever engine wrote it.

Every engine can load this form on any number of ranks. DDP and ZeRO 0 write it themselves, as
optimizer.pt. ZeRO 1 to 3 write one file per rank with its share. When a run resumes with another
engine or number of ranks, DeepSpeed's converter makes whole tensors of the shares, once per
checkpoint:

    step-00000200/
      deepspeed/    the shares, as DeepSpeed wrote them
      universal/    zero/<parameter>/{fp32,exp_avg,exp_avg_sq}.pt, as its converter wrote them
"""

from __future__ import annotations

import contextlib
import io
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coupalign.compat import package_hidden
from coupalign.distributed.world import World
from coupalign.engine.layout import WHOLE_STATE
from coupalign.engine.manifest import find_damage, write_manifest
from coupalign.engine.shares import SHARES_FOLDER, check_shares, restricted_loading
from coupalign.errors import InputError, RunError, describe_error
from coupalign.files import whole_directory

OptimizerState = Callable[[str], dict[str, Tensor] | None]
"""Maps a parameter's name to its moments `exp_avg` and `exp_avg_sq`, fp32 on the CPU, perhaps flat
and padded at the end. None: the parameter never had a gradient."""

MOMENTS = ("exp_avg", "exp_avg_sq")
UNIVERSAL_FOLDER = "universal"

# engine.base.MixedPrecision, which DeepSpeed wraps, puts this in front of a parameter's name.
_NAME_PREFIX = "model."


def write_whole_state(directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write the state of an optimizer that holds whole parameters."""
    states = {}
    for name, parameter in model.named_parameters():
        if parameter in optimizer.state:
            state = optimizer.state[parameter]
            states[name] = {moment: state[moment] for moment in MOMENTS}
    torch.save(states, directory / WHOLE_STATE)


def load_whole_state(
    optimizer_state: OptimizerState,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
) -> None:
    """Fill an optimizer that holds whole parameters with their moments after `steps` updates.

    Raises:
        InputError: the moments are those of another model.
    """
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        moments = optimizer_state(name)
        if moments is None:
            continue
        optimizer.state[parameter] = zero_state(parameter, steps)
        for moment in MOMENTS:
            whole = cut_padding(moments[moment], parameter.shape, name)
            optimizer.state[parameter][moment].copy_(whole)

    # NVIDIA's apex counts steps per group.
    for group in optimizer.param_groups:
        if "step" in group:
            group["step"] = steps


def cut_padding(moment: Tensor, shape: torch.Size, name: str) -> Tensor:
    """Give a moment, which may be flat and padded at the end, the shape of its parameter.

    Raises:
        InputError: it is too short, or has another shape.
    """
    is_flat = moment.dim() == 1 and moment.numel() >= shape.numel()
    if moment.shape != shape and not is_flat:
        raise InputError(
            f"the optimizer state of {name} has the shape {tuple(moment.shape)} instead of "
            f"{tuple(shape)}: it is that of another model. Take another checkpoint of this run"
        )
    return moment.flatten()[: shape.numel()].view(shape)


def zero_state(parameter: Tensor, steps: int) -> dict[str, Tensor]:
    """Return the state of torch's fused AdamW after `steps` updates, with moments of zero."""
    state = {"step": torch.tensor(float(steps), dtype=torch.float32, device=parameter.device)}
    for moment in MOMENTS:
        state[moment] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return state


def open_optimizer_state(checkpoint: Path) -> OptimizerState:
    """Open the moments of whole parameters in a checkpoint.

    DDP and ZeRO 0 write them. For ZeRO 1 to 3, call `make_universal` first.

    Raises:
        InputError: there are none, or the file holds anything else.
    """
    if (checkpoint / WHOLE_STATE).is_file():
        return _read_whole_state(checkpoint / WHOLE_STATE).get

    folder = checkpoint / UNIVERSAL_FOLDER / "zero"
    if not folder.is_dir():
        raise InputError(
            f"{checkpoint}: there is neither {WHOLE_STATE} nor {UNIVERSAL_FOLDER}/zero. Take "
            "another checkpoint of this run"
        )

    def read(name: str) -> dict[str, Tensor] | None:
        files = {moment: folder / f"{_NAME_PREFIX}{name}" / f"{moment}.pt" for moment in MOMENTS}
        if not any(file.is_file() for file in files.values()):
            return None
        return {moment: _read_tensor(file) for moment, file in files.items()}

    return read


def make_universal(checkpoint: Path, report: Callable[[str], None]) -> None:
    """Let DeepSpeed convert its shares to whole tensors, next to them, unless that was done before.

    Call it on one rank. The folder appears whole or not at all; a conversion that was killed
    starts again.

    Args:
        report: receives a message if the conversion takes place.

    Raises:
        InputError: DeepSpeed cannot read its own files, or they could run code.
        RunError: the result could not be written.
    """
    alone = World(0, 1, 0, 1, torch.device("cpu"))
    universal, shares = checkpoint / UNIVERSAL_FOLDER, checkpoint / SHARES_FOLDER
    if (checkpoint / WHOLE_STATE).is_file():
        return
    if universal.is_dir() and not find_damage(universal, alone, uses=lambda name: True):
        return

    check_shares(shares)
    report(f"{checkpoint}: converting it to DeepSpeed's universal format, once")
    with package_hidden("mlflow"):  # see _import_deepspeed in engine/zero.py
        from deepspeed.checkpoint import ds_to_universal

    options = Namespace(
        input_folder=str(shares),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    # The converter prints a page of progress.
    printed = io.StringIO()
    try:
        with (
            whole_directory(universal) as folder,
            restricted_loading(),
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(printed),
        ):
            options.output_folder = str(folder)
            ds_to_universal.main(options)
            write_manifest(folder, alone)
    except OSError as error:
        raise RunError(
            f"{universal}: the universal checkpoint could not be written ({error}). Free some "
            "space (it takes about as much as the checkpoint), then start again"
        ) from error
    except Exception as error:
        raise InputError(
            f"{shares}: DeepSpeed cannot convert this checkpoint ({describe_error(error)})."
            " Resume with the number of ranks and the ZeRO stage that wrote it"
        ) from error


def _read_whole_state(file: Path) -> dict[str, dict[str, Tensor]]:
    """Read what `write_whole_state` wrote."""
    states = _load(file)
    if not isinstance(states, dict):
        raise _not_ours(file, f"it holds a {type(states).__name__}")
    for name, moments in states.items():
        is_ours = isinstance(moments, dict) and moments.keys() == {*MOMENTS}
        if not is_ours or not all(_is_moment(value) for value in moments.values()):
            raise _not_ours(file, f"it does not hold the moments of {str(name)[:80]!r}")
    return states


def _read_tensor(file: Path) -> Tensor:
    """Read a file that DeepSpeed's converter wrote."""
    content = _load(file)
    value = content.get("param") if isinstance(content, dict) else content
    if not _is_moment(value):
        raise _not_ours(file, "it holds no tensor")
    return value


def _load(file: Path) -> Any:
    """Load tensors and containers; nothing else, and no code, comes from the file."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # damaged pickles raise almost any type
        raise _not_ours(file, describe_error(error)) from error


def _is_moment(value: Any) -> bool:
    is_dense = isinstance(value, Tensor) and value.layout == torch.strided
    return is_dense and value.dtype == torch.float32


def _not_ours(file: Path, reason: str) -> InputError:
    return InputError(
        f"{file}: cannot be read as optimizer state: {reason}. Take another checkpoint of this run"
    )
