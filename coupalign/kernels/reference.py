"""Word-pixel attention in plain PyTorch: the specification that every other path must match.

Shape legend: B batch, P pixels, H heads, T words, C channels.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def bidirectional_attention(
    pixels: Tensor, keys: Tensor, values: Tensor, bias: Tensor, heads: int = 1
) -> tuple[Tensor, Tensor]:
    """Compute `coupalign.kernels.bidirectional_attention` in plain PyTorch.

    Scores and both softmaxes are at least float32, also under autocast.
    """
    dtype = torch.promote_types(pixels.dtype, torch.float32)
    words = keys.shape[1] // heads

    with without_autocast(pixels.device):
        v, k, u = pixels.to(dtype), keys.to(dtype), values.to(dtype)

        # An image without words reads padding only: its values must be zero.
        bias, padding = finite_bias(bias.to(dtype))
        u = u.masked_fill(padding[..., None], 0.0)

        # One matrix of scores, [B, P, H*T], normalized over the words and over the pixels.
        scores = torch.baddbmm(bias[:, None], v, k.transpose(1, 2))
        over_words = scores.unflatten(2, (heads, words)).softmax(-1).flatten(2)
        over_pixels = scores.softmax(1)

        pixels_from_words = over_words @ u  # [B, P, C]
        words_from_pixels = over_pixels.transpose(1, 2) @ v  # [B, H*T, C]
        words_from_pixels = words_from_pixels.masked_fill(padding[..., None], 0.0)

    return pixels_from_words.to(pixels.dtype), words_from_pixels


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Disable autocast on the device, if it has autocast at all (`meta` does not)."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def finite_bias(bias: Tensor) -> tuple[Tensor, Tensor]:
    """Replace -inf by a large negative number, and return where it was.

    A column of -inf has no softmax. Its NaN would survive every later mask, at least in the
    gradient. With a finite number a padded word gets weight 0 next to real words, and uniform
    weights in an image without words. The caller must replace those results by zeros.

    Args:
        bias: [B, H*T].

    Returns:
        the finite bias and the bool padding, both [B, H*T].
    """
    padding = torch.isneginf(bias)
    return bias.masked_fill(padding, torch.finfo(bias.dtype).min / 2), padding
