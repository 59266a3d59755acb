"""AdamW with the method's parameter groups, from torch or from NVIDIA apex."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import torch
from torch import nn

from coupalign.config.schema import OptimConfig
from coupalign.errors import InputError

# Parts of a parameter's name that exempt it from weight decay besides being a vector: METHOD section 3, "Parameters".
UNDECAYED = ("position", "pos_embed", "queries", "gate")
# A block of Swin, ResNet, Darknet, the small encoder or BERT in a parameter's name; what joins two stages is a block, too.
_BLOCK = re.compile(
    r"(layers\.\d+\.(blocks\.\d+|downsample)|layer\d\.\d+|stages\.\d+(\.blocks\.\d+)?|encoder\.layer\.\d+)\."
)


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW over all trainable parameters, in groups: image, text and rest, each with and without decay.

    Raises:
        InputError: `impl: apex` where NVIDIA's apex, or its CUDA part, is not installed.
    """
    groups = parameter_groups(model, config)
    if config.impl == "apex":
        _require_apex()
        from apex.optimizers import FusedAdam

        return FusedAdam(groups, betas=config.betas, eps=config.eps, adam_w_mode=True)
    return torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, fused=True)


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, object]]:
    """Groups with `name`, `params`, `lr` (the peak) and `weight_decay`; every trainable parameter in exactly one.

    With `lr_proposals` the mask generator and sentence-mask alignment have groups of their own. With `layer_decay` each block of an
    encoder has: its peak is `layer_decay` times that of the block behind it.
    """
    peaks = {
        "image": config.lr_image,
        "text": config.lr_text,
        "rest": config.lr,
        "proposals": config.lr_proposals,
    }
    parts = {"image": "image", "text": "text"} | (
        {} if config.lr_proposals is None else {"proposals": "proposals", "sma": "proposals"}
    )
    below_top = _blocks_below_top(model) if config.layer_decay < 1 else {}
    groups: dict[tuple[str, int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = parts.get(name.partition(".")[0], "rest")
            key = (part, below_top.get(name, 0), _decays(name, parameter))
            groups.setdefault(key, []).append(parameter)
    return [
        {
            "name": f"{part}{f' -{below}' if below else ''}{'' if decays else ' (no decay)'}",
            "params": parameters,
            "lr": peaks[part] * config.layer_decay**below,
            "weight_decay": config.weight_decay if decays else 0.0,
        }
        for (part, below, decays), parameters in sorted(groups.items())
    ]


def _blocks_below_top(model: nn.Module) -> dict[str, int]:
    """How many blocks of its encoder come after the one that a parameter belongs to; the stem comes before the first block."""
    places: dict[str, int] = {}
    for part in ("image", "text"):
        blocks: dict[str, int] = {}
        of_part = {
            name: _BLOCK.search(name)
            for name, _ in model.named_parameters()
            if name.startswith(f"{part}.")
        }
        for found in of_part.values():
            if found:
                blocks.setdefault(found[0], len(blocks))
        places |= {
            name: len(blocks) - (blocks[found[0]] if found else -1) - 1
            for name, found in of_part.items()
        }
    return places


def which_apex() -> str:
    """ "nvidia", "nvidia without CUDA kernels", "unrelated" (PyPI's web toolkit of the same name) or "absent"; imports neither."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return "absent"
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if not any((folder / "optimizers" / "fused_adam.py").is_file() for folder in folders):
        return "unrelated"
    return "nvidia" if importlib.util.find_spec("amp_C") else "nvidia without CUDA kernels"


def _decays(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim > 1 and not any(part in name for part in UNDECAYED)


def _require_apex() -> None:
    found = which_apex()
    if found == "nvidia":
        return
    reason = {
        "absent": "it is not installed",
        "unrelated": "the installed package `apex` is PyPI's unrelated web toolkit",
        "nvidia without CUDA kernels": "it was built without its CUDA extensions (amp_C is missing)",
    }[found]
    raise InputError(
        f"optim.impl: apex asks for NVIDIA's apex, but {reason}. Build it from NVIDIA's sources with "
        "--cpp_ext --cuda_ext (never `pip install apex`), or set optim.impl: torch, which is as fast"
    )
