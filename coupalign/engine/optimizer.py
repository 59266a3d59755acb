"""AdamW with the method's parameter groups, from torch or from NVIDIA apex."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import torch
from torch import nn

from coupalign.config.schema import OptimConfig
from coupalign.errors import InputError

# A parameter with one of these in its name has no weight decay. Neither has a vector, such as a
# bias or the scale of a norm.
NO_DECAY_NAMES = ("position", "pos_embed", "queries", "gate")

# A block of Swin, ResNet, Darknet, the small encoder or BERT in a parameter's name. Swin's
# downsampling between two stages counts as a block, too.
_BLOCK = re.compile(
    r"(layers\.\d+\.(blocks\.\d+|downsample)"
    r"|layer\d\.\d+"
    r"|stages\.\d+(\.blocks\.\d+)?"
    r"|encoder\.layer\.\d+)\."
)


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Build AdamW over all trainable parameters, in the groups of `parameter_groups`.

    Raises:
        InputError: `impl: apex`, but NVIDIA's apex or its CUDA part is not installed.
    """
    groups = parameter_groups(model, config)
    if config.impl == "apex":
        _require_apex()
        from apex.optimizers import FusedAdam

        return FusedAdam(groups, betas=config.betas, eps=config.eps, adam_w_mode=True)
    return torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, fused=True)


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, object]]:
    """Sort the trainable parameters into groups by learning rate and weight decay.

    There are groups for the image encoder, the text encoder and the rest, each with and without
    decay. With `lr_proposals`, the mask generator and sentence-mask alignment have their own. With
    `layer_decay`, each block of an encoder has: its peak is `layer_decay` times that of the next
    (deeper) block.

    Returns:
        groups with `name`, `params`, `lr` (the peak) and `weight_decay`. Every trainable parameter
        is in exactly one of them.
    """
    peak_lrs = {"image": config.lr_image, "text": config.lr_text, "rest": config.lr}
    rates = {"image": "image", "text": "text"}
    if config.lr_proposals is not None:
        peak_lrs["proposals"] = config.lr_proposals
        rates |= {"proposals": "proposals", "sma": "proposals"}

    deeper_blocks = _count_deeper_blocks(model) if config.layer_decay < 1 else {}
    members: dict[tuple[str, int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = rates.get(name.partition(".")[0], "rest")
            key = (rate, deeper_blocks.get(name, 0), _has_decay(name, parameter))
            members.setdefault(key, []).append(parameter)

    groups: list[dict[str, object]] = []
    for (rate, deeper, has_decay), parameters in sorted(members.items()):
        depth = f" -{deeper}" if deeper else ""
        decay = "" if has_decay else " (no decay)"
        groups.append(
            {
                "name": f"{rate}{depth}{decay}",
                "params": parameters,
                "lr": peak_lrs[rate] * config.layer_decay**deeper,
                "weight_decay": config.weight_decay if has_decay else 0.0,
            }
        )
    return groups


def installed_apex() -> str:
    """Tell which package `apex` is installed, without importing it.

    Returns:
        "nvidia", "nvidia without CUDA kernels", "unrelated" (PyPI's web toolkit of the same name)
        or "absent".
    """
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return "absent"
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if not any((folder / "optimizers" / "fused_adam.py").is_file() for folder in folders):
        return "unrelated"
    return "nvidia" if importlib.util.find_spec("amp_C") else "nvidia without CUDA kernels"


def _count_deeper_blocks(model: nn.Module) -> dict[str, int]:
    """Count the blocks of its encoder that follow each parameter's own, by the parameter's name.

    A stem precedes the first block.
    """
    deeper: dict[str, int] = {}
    for encoder in ("image", "text"):
        # Names are in the order of the forward pass, so the first match of a block numbers it.
        block_numbers: dict[str, int] = {}
        own_numbers: dict[str, int] = {}
        for name, _ in model.named_parameters():
            if name.startswith(f"{encoder}."):
                block = _BLOCK.search(name)
                own_numbers[name] = -1
                if block:
                    own_numbers[name] = block_numbers.setdefault(block[0], len(block_numbers))

        for name, number in own_numbers.items():
            deeper[name] = len(block_numbers) - 1 - number
    return deeper


def _has_decay(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim > 1 and not any(exempt in name for exempt in NO_DECAY_NAMES)


def _require_apex() -> None:
    installed = installed_apex()
    if installed == "nvidia":
        return
    reasons = {
        "absent": "it is not installed",
        "unrelated": "the installed package `apex` is PyPI's unrelated web toolkit",
        "nvidia without CUDA kernels": "it lacks its CUDA extensions (there is no module amp_C)",
    }
    raise InputError(
        f"optim.impl: apex needs NVIDIA's apex, but {reasons[installed]}. Build it from NVIDIA's "
        "sources with --cpp_ext --cuda_ext (never `pip install apex`), or set optim.impl: torch, "
        "which is as fast"
    )
