"""Adam's state of whole parameters, by the model's own names, from whichever engine wrote a checkpoint.

It is what every engine can take over on any number of ranks. DDP and ZeRO 0 write it themselves (optimizer.pt). ZeRO 1 to 3
write shares, one file a rank; DeepSpeed's converter to its universal format makes whole tensors of them, once a checkpoint:

    step-00000200/
      deepspeed/            the shares, as DeepSpeed wrote them
      universal/            zero/<parameter>/{fp32,exp_avg,exp_avg_sq}.pt, as DeepSpeed's converter wrote them
"""

from __future__ import annotations

import contextlib
import io
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from coupalign.compat import package_hidden
from coupalign.distributed.world import World
from coupalign.engine.manifest import find_damage, write_manifest
from coupalign.errors import InputError
from coupalign.files import whole_directory

Moments = Callable[[str], dict[str, Tensor] | None]
"""Name of a parameter -> its `exp_avg` and `exp_avg_sq`, fp32 on the CPU, perhaps flat and padded at the end; none where the
parameter never had a gradient."""

KEYS = ("exp_avg", "exp_avg_sq")
WHOLE = "optimizer.pt"
SHARES, UNIVERSAL = "deepspeed", "universal"
PREFIX = (
    "model."  # of a parameter's name inside engine.base.MixedPrecision, which DeepSpeed is given
)


def write_whole(directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write the state of an optimizer that holds whole parameters."""
    states = {
        name: optimizer.state[p] for name, p in model.named_parameters() if p in optimizer.state
    }
    torch.save(
        {name: {key: state[key] for key in KEYS} for name, state in states.items()},
        directory / WHOLE,
    )


def adopt_whole(
    moments: Moments, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int
) -> None:
    """Give an optimizer that holds whole parameters their moments after `steps` updates."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and (found := moments(name)) is not None:
            optimizer.state[parameter] = fresh_state(parameter, steps)
            for key in KEYS:
                optimizer.state[parameter][key].copy_(
                    found[key].flatten()[: parameter.numel()].view_as(parameter)
                )
    for group in optimizer.param_groups:
        if "step" in group:  # NVIDIA apex counts once a group
            group["step"] = steps


def fresh_state(parameter: Tensor, steps: int) -> dict[str, Tensor]:
    """The state of torch's fused AdamW after `steps` updates, with zeros for moments."""
    step = torch.tensor(float(steps), dtype=torch.float32, device=parameter.device)
    return {"step": step} | {
        key: torch.zeros_like(parameter, memory_format=torch.preserve_format) for key in KEYS
    }


def open_optimizer_state(checkpoint: Path) -> Moments:
    """The moments that a checkpoint holds whole: those of DDP and ZeRO 0, or those that `make_universal` put there."""
    if (checkpoint / WHOLE).is_file():
        return torch.load(checkpoint / WHOLE, map_location="cpu", weights_only=True, mmap=True).get
    folder = checkpoint / UNIVERSAL / "zero"

    def read(name: str) -> dict[str, Tensor] | None:
        files = {key: folder / f"{PREFIX}{name}" / f"{key}.pt" for key in KEYS}
        if not all(file.is_file() for file in files.values()):
            return None
        return {key: _tensor(file) for key, file in files.items()}

    return read


def make_universal(checkpoint: Path, said: Callable[[str], None]) -> None:
    """Let DeepSpeed convert its shares to whole tensors, beside them; nothing to do where that was done before.

    To be called on one rank. The folder appears whole or not at all; a conversion that was killed is started again.

    Raises:
        InputError: DeepSpeed cannot read its own files.
    """
    alone = World(0, 1, 0, 1, torch.device("cpu"))
    made_before = (checkpoint / UNIVERSAL).is_dir() and not find_damage(
        checkpoint / UNIVERSAL, alone
    )
    if made_before or (checkpoint / WHOLE).is_file():
        return
    said(f"{checkpoint}: making DeepSpeed's universal checkpoint of it, once")
    with package_hidden("mlflow"):  # as in engine/zero.py
        from deepspeed.checkpoint import ds_to_universal

    words = io.StringIO()  # it prints a page
    try:
        with (
            whole_directory(checkpoint / UNIVERSAL) as folder,
            contextlib.redirect_stdout(words),
            contextlib.redirect_stderr(words),
        ):
            ds_to_universal.main(
                Namespace(
                    input_folder=str(checkpoint / SHARES),
                    output_folder=str(folder),
                    num_extract_workers=1,
                    num_merge_workers=1,
                    keep_temp_folder=False,
                    strict=True,
                    inject_missing_state=True,
                )
            )
            write_manifest(folder, alone)
    except OSError as error:
        raise InputError(
            f"{checkpoint / UNIVERSAL}: the universal checkpoint could not be written ({error}). Make room (it takes "
            "about as much as the checkpoint), then start again"
        ) from error
    except Exception as error:
        raise InputError(
            f"{checkpoint / SHARES}: DeepSpeed cannot convert this checkpoint ({type(error).__name__}: {error}). Go on "
            "with the number of ranks and the ZeRO stage that wrote it"
        ) from error


def _tensor(file: Path) -> Tensor:
    found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    return found["param"] if isinstance(found, dict) else found
