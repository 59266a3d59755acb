"""Bidirectional word-pixel attention as a function of tensors; the spec and the fast paths share one signature.

Shape legend: B batch, P pixels, H heads, T words, C channels.
"""
from __future__ import annotations

from typing import Literal

from torch import Tensor

from coupalign.errors import InputError
from coupalign.kernels import reference

Impl = Literal["auto", "reference", "fused"]


def choose(impl: str) -> Literal["reference"]:
    """The path that `impl` means in this build.

    Raises:
        InputError: `impl` is unknown, or a path that this build does not have.
    """
    match impl:
        case "auto" | "reference":
            return "reference"
        case "fused":
            raise InputError("wpa.impl = fused: this build has no fused kernel; use auto or reference")
        case _:
            raise InputError(f"wpa.impl = {impl!r} is unknown; use auto, reference, plain or fused")


def bidirectional_attention(pixels: Tensor, keys: Tensor, values: Tensor, bias: Tensor, impl: str = "auto",
                            heads: int = 1) -> tuple[Tensor, Tensor]:
    """Let every pixel read the words and every word read the pixels, from one matrix of scores.

        S = pixels @ keys^T + bias
        pixels_from_words = softmax_words(S) @ values         one softmax per head, the heads are summed
        words_from_pixels = softmax_pixels(S)^T @ pixels

    The projections are absorbed into `keys` and `values` by the caller; several heads lie side by side on the word
    axis, head h in columns h*T .. (h+1)*T-1.

    Args:
        pixels: [B, P, C] floating point.
        keys: [B, H*T, C], already scaled.
        values: [B, H*T, C].
        bias: [B, H*T], added to the scores; -inf marks padding, the same words in every head.
        impl: "auto", "reference" or "fused".
        heads: H.

    Returns:
        pixels_from_words [B, P, C] in the type of `pixels`, and words_from_pixels [B, H*T, C] in float32 (float64 for
        float64 input). Padded words get zeros, the pixels of an image without words get zeros; gradients are finite.

    Raises:
        InputError: the path is not in this build.
    """
    choose(impl)
    batch, _, channels = pixels.shape
    columns = keys.shape[1]
    assert keys.shape == values.shape == (batch, columns, channels), (pixels.shape, keys.shape, values.shape)
    assert bias.shape == (batch, columns) and columns % heads == 0, (bias.shape, columns, heads)
    return reference.bidirectional_attention(pixels, keys, values, bias, heads)
