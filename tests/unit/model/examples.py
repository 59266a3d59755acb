"""A small batch, and measurements of a model, shared by the tests of the methods."""

from __future__ import annotations

import torch
from torch import Tensor, nn

VOCABULARY = 40


def model_inputs(
    batch: int = 2, side: int = 32, words: int = 5
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw image, words, word mask and target. The last sample has three words, the rest padded."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (batch, 3, side, side), generator=generator, dtype=torch.uint8)
    tokens = torch.randint(1, VOCABULARY, (batch, words), generator=generator)

    mask = torch.ones(batch, words, dtype=torch.bool)
    mask[-1, 3:] = False

    target = torch.zeros(batch, side, side, dtype=torch.bool)
    target[:, 4:16, 8:20] = True

    return image, tokens * mask, mask, target


def parameters_without_gradient(model: nn.Module) -> list[str]:
    """Name the trainable parameters whose gradient is missing or not finite."""
    return [
        name
        for name, p in model.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())
    ]


def gradients_in_micro_batches(
    model: nn.Module, inputs: tuple[Tensor, ...], size: int
) -> list[Tensor]:
    """Accumulate the gradients of the mean loss over micro-batches of `size` samples."""
    model.zero_grad()
    batch = len(inputs[0])
    for first in range(0, batch, size):
        micro_batch = [x[first : first + size] for x in inputs]
        loss = model(*micro_batch)["loss"] * size / batch
        loss.backward()
    return [p.grad.clone() for p in model.parameters()]
