"""Activation checkpointing: what a part of the model does again in the backward pass instead of keeping its results."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from coupalign.config.schema import Checkpointing

_PRODUCTS = ("mm", "addmm", "bmm", "convolution")


def run(function: Callable[..., Tensor], *inputs: Any, checkpointing: Checkpointing) -> Tensor:
    """`function(*inputs)`, of whose results the backward pass keeps all, none (true), or those that are dear to compute (selective)."""
    if not checkpointing or not torch.is_grad_enabled():
        return function(*inputs)
    more = (
        {"context_fn": partial(create_selective_checkpoint_contexts, _policy)}
        if checkpointing == "selective"
        else {}
    )
    return checkpoint(function, *inputs, use_reentrant=False, **more)


def _policy(_: Any, operator: Any, *inputs: Any, **more: Any) -> CheckpointPolicy:
    """Matrix products, convolutions and attention are kept; norms, activations, sums and copies are computed again.

    So is attention that drops something: what is kept draws no random numbers the second time, and whatever drops behind it would draw
    others than it did.
    """
    name = operator.overloadpacket.__name__ if hasattr(operator, "overloadpacket") else ""
    keep = name in _PRODUCTS or "attention" in name and not _drops(operator, inputs, more)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def _drops(operator: Any, inputs: tuple, more: dict[str, Any]) -> bool:
    named = {
        argument.name: value for argument, value in zip(operator._schema.arguments, inputs)
    } | more
    return named.get("dropout_p", 0.0) > 0
