"""The spec of word-pixel attention in plain PyTorch: what every other path must agree with.

Shape legend: B batch, P pixels, H heads, T words, C channels.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def bidirectional_attention(
    pixels: Tensor, keys: Tensor, values: Tensor, bias: Tensor, heads: int = 1
) -> tuple[Tensor, Tensor]:
    """See `coupalign.kernels.bidirectional_attention`; scores and both softmaxes are float32 also under autocast."""
    columns = keys.shape[1]
    exact = torch.promote_types(pixels.dtype, torch.float32)
    with without_autocast(pixels.device):
        v, k, u = pixels.to(exact), keys.to(exact), values.to(exact)
        bias, padding = finite_bias(bias.to(exact))
        u = u.masked_fill(
            padding[..., None], 0.0
        )  # what pixels read where there is nothing but padding
        scores = torch.baddbmm(bias[:, None], v, k.transpose(1, 2))  # [B, P, H*T]
        over_words = (
            scores.unflatten(2, (heads, columns // heads)).softmax(-1).flatten(2)
        )  # [B, P, H*T]
        over_pixels = scores.softmax(1)  # [B, P, H*T]
        pixels_from_words = over_words @ u
        words_from_pixels = (over_pixels.transpose(1, 2) @ v).masked_fill(padding[..., None], 0.0)
    return pixels_from_words.to(pixels.dtype), words_from_pixels


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Leave autocast where the device knows it; `meta`, on which models are only measured, does not."""
    return (
        torch.autocast(device.type, enabled=False)
        if torch.amp.is_autocast_available(device.type)
        else nullcontext()
    )


def finite_bias(bias: Tensor) -> tuple[Tensor, Tensor]:
    """Replace -inf by a number whose exponential is exactly 0, and say where it stood.

    A column of -inf has no softmax: its NaN would survive every mask that is applied afterwards, in the gradient at
    least. With a finite number a padded word gets weight 0 beside real ones, and uniform weights where there is
    nothing else; the results of those are then replaced by zeros.

    Args:
        bias: [B, H*T].

    Returns:
        the finite bias and the bool padding, both [B, H*T].
    """
    padding = torch.isneginf(bias)
    return bias.masked_fill(padding, torch.finfo(bias.dtype).min / 2), padding
