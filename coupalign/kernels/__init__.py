"""Bidirectional attention between words and pixels, in plain PyTorch and as fused Triton kernels.

`bidirectional_attention` chooses the path. `reference` is the specification in plain PyTorch,
`fused` the kernels, `plan` how a shape is cut for them; README.md has the derivation.

Shape legend: B batch, P pixels, H heads, T words, C channels.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable
from typing import Literal, TypeVar

import torch
from torch import Tensor

from coupalign.errors import InputError
from coupalign.kernels import reference
from coupalign.kernels.plan import heads_refusal, refusal

# Ampere, the first with bfloat16 tensor cores and asynchronous copies.
MIN_CAPABILITY = (8, 0)

F = TypeVar("F", bound=Callable)

log = logging.getLogger("coupalign.kernels")
_logged_reasons: set[str] = set()


def _constant_when_compiled(function: F) -> F:
    """Tell torch.compile that the function's result never changes.

    `torch.compiler.assume_constant_result` does the same. But it imports the compiler, which takes
    half as long as importing all of torch, even if nothing is compiled.
    """
    function._dynamo_marked_constant = True
    return function


@_constant_when_compiled
def choose(impl: str, heads: int = 1) -> Literal["reference", "fused"]:
    """Choose the path for `impl` on this machine.

    A call whose shape the fused kernels cannot run still takes the reference.

    Raises:
        InputError: `impl` is unknown, or it is "fused" and this machine, this installation or this
            number of heads rules the kernels out.
    """
    match impl:
        case "reference":
            return "reference"
        case "auto":
            unavailable = obstacle() or heads_refusal(heads) or interpreting()
            return "reference" if unavailable else "fused"
        case "fused":
            if reason := obstacle() or heads_refusal(heads):
                raise InputError(f"model.wpa.impl = fused: {reason}; use auto or reference")
            return "fused"
        case _:
            raise InputError(
                f"model.wpa.impl = {impl!r} is unknown; use auto, reference, plain or fused"
            )


def describe_choice(impl: str, heads: int = 1) -> str:
    """Describe the path that `choose` takes, and why, in words for a log."""
    if impl == "plain":
        return "plain PyTorch with the pixel-side projections, the oracle"

    if choose(impl, heads) == "fused":
        if interpreting():
            return "fused kernels in Triton's interpreter"
        return f"fused kernels on {torch.cuda.get_device_name()}"

    if impl == "reference":
        return "plain PyTorch"
    reason = obstacle() or heads_refusal(heads) or "the interpreter is only for impl = fused"
    return f"plain PyTorch ({reason})"


def obstacle() -> str | None:
    """Say why this machine or installation cannot run the fused kernels, or return None."""
    if not importlib.util.find_spec("triton"):
        return "Triton is not installed"
    if interpreting():
        return None
    if not torch.cuda.is_available() or torch.version.hip:
        return "there is no NVIDIA GPU here"
    if torch.cuda.get_device_capability() < MIN_CAPABILITY:
        oldest = ".".join(map(str, MIN_CAPABILITY))
        return f"{torch.cuda.get_device_name()} is older than compute capability {oldest}"
    return None


@_constant_when_compiled
def interpreting() -> bool:
    """Tell whether Triton interprets kernels on the CPU (TRITON_INTERPRET=1), for tests."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def bidirectional_attention(
    pixels: Tensor, keys: Tensor, values: Tensor, bias: Tensor, impl: str = "auto", heads: int = 1
) -> tuple[Tensor, Tensor]:
    """Let every pixel read the words and every word read the pixels, from one matrix of scores.

        S = pixels @ keys^T + bias
        pixels_from_words = softmax_words(S) @ values         one softmax per head, then a sum
        words_from_pixels = softmax_pixels(S)^T @ pixels

    The caller absorbs the projections into `keys` and `values`. Heads are adjacent on the word
    axis: head h has the columns h*T .. (h+1)*T-1.

    Args:
        pixels: [B, P, C] floating point. Autocast rounds them to its type, as in a matrix product.
        keys: [B, H*T, C], already scaled.
        values: [B, H*T, C].
        bias: [B, H*T], added to the scores. -inf marks padding, the same words in every head.
        impl: "auto": the fused kernels on a GPU that has them, the reference elsewhere.
            "reference": plain PyTorch. "fused": the fused kernels, also in Triton's interpreter, or
            an error if they cannot run at all. A shape that the kernels do not support takes the
            reference, and the log says so once.
        heads: H. With more than one head, "auto" takes the reference and "fused" is an error.

    Returns:
        pixels_from_words [B, P, C] in the (rounded) type of `pixels`, and words_from_pixels
        [B, H*T, C] in float32 (float64 for float64 input). Padded words get zeros, and so do the
        pixels of an image without words. Gradients are finite.

    Raises:
        InputError: see `choose`.
    """
    path = choose(impl, heads)
    batch, _, channels = pixels.shape
    columns = keys.shape[1]
    shapes = (pixels.shape, keys.shape, values.shape, bias.shape, heads)
    assert keys.shape == values.shape == (batch, columns, channels), shapes
    assert bias.shape == (batch, columns) and columns % heads == 0, shapes

    pixels = _round_to_autocast_dtype(pixels)
    if path == "fused" and _kernels_can_run(pixels, columns, impl):
        from coupalign.kernels import fused

        return fused.bidirectional_attention(pixels, keys, values, bias)
    return reference.bidirectional_attention(pixels, keys, values, bias, heads)


def _round_to_autocast_dtype(pixels: Tensor) -> Tensor:
    """Round to autocast's type if autocast is on; like autocast, leave float64 alone."""
    device = pixels.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return pixels
    if pixels.dtype == torch.float64:
        return pixels
    return pixels.to(torch.get_autocast_dtype(device))


def _kernels_can_run(pixels: Tensor, words: int, impl: str) -> bool:
    """Tell whether the kernels can run this call with one head; log each reason once if not."""
    device = pixels.device.type
    kernel_device = "cpu" if interpreting() else "cuda"

    # Nothing to log: on `meta` a model is only measured, and `auto` follows the tensors anywhere.
    if device == "meta" or (device != kernel_device and impl == "auto"):
        return False

    if device != kernel_device:
        reason = f"the tensors are on {device}"
    elif device == "cpu" and pixels.dtype == torch.bfloat16:
        reason = "Triton's interpreter multiplies bfloat16 wrongly"
    else:
        reason = refusal(tuple(pixels.shape), words, heads=1, dtype=pixels.dtype)

    if reason and reason not in _logged_reasons and not torch.compiler.is_compiling():
        _logged_reasons.add(reason)
        log.warning("word-pixel alignment runs in plain PyTorch: %s", reason)
    return reason is None
