"""Activation checkpointing: recompute results in the backward pass instead of storing them."""

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

_MATRIX_PRODUCTS = ("mm", "addmm", "bmm", "convolution")


def run_checkpointed(
    function: Callable[..., Tensor], *inputs: Any, checkpointing: Checkpointing
) -> Tensor:
    """Run `function(*inputs)`, and choose which of its results the backward pass keeps.

    Args:
        checkpointing: False keeps all results, True none, and "selective" those that are expensive
            to compute.
    """
    if not checkpointing or not torch.is_grad_enabled():
        return function(*inputs)

    options: dict[str, Any] = {}
    if checkpointing == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(function, *inputs, use_reentrant=False, **options)


def _policy(_: Any, operator: Any, *inputs: Any, **options: Any) -> CheckpointPolicy:
    """Keep matrix products, convolutions and attention. Recompute norms, activations and copies.

    Attention with dropout is recomputed too. An operator whose result is kept does not draw random
    numbers the second time, so every dropout after it would draw others than in the forward pass.
    """
    name = operator.overloadpacket.__name__ if hasattr(operator, "overloadpacket") else ""
    is_product = name in _MATRIX_PRODUCTS
    is_plain_attention = "attention" in name and not _drops(operator, inputs, options)
    if is_product or is_plain_attention:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _drops(operator: Any, inputs: tuple, options: dict[str, Any]) -> bool:
    """Tell whether this call of an operator applies dropout."""
    names = [argument.name for argument in operator._schema.arguments]
    arguments = dict(zip(names, inputs)) | options
    return arguments.get("dropout_p", 0.0) > 0
