"""Bidirectional word-pixel attention as a function of tensors; the spec and the fast paths share one signature.

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
from coupalign.kernels.plan import refusal

Impl = Literal["auto", "reference", "fused"]
OLDEST_GPU = (8, 0)  # Ampere: the first with bfloat16 tensor cores and asynchronous copies

F = TypeVar("F", bound=Callable)

log = logging.getLogger("coupalign.kernels")
_said: set[str] = set()


def _constant(function: F) -> F:
    """Mark for torch.compile that the answer never changes. `torch.compiler.assume_constant_result` does the same, but it imports the
    compiler, half as long as all of torch, where nothing is compiled."""
    function._dynamo_marked_constant = True
    return function


@_constant
def choose(impl: str) -> Literal["reference", "fused"]:
    """The path that `impl` means on this machine; a shape that it cannot run takes the reference all the same.

    Raises:
        InputError: `impl` is unknown, or "fused" where nothing can run it; the message says why.
    """
    match impl:
        case "reference":
            return "reference"
        case "auto":
            return "reference" if obstacle() or interpreting() else "fused"
        case "fused":
            if why := obstacle():
                raise InputError(f"model.wpa.impl = fused: {why}; use auto or reference")
            return "fused"
        case _:
            raise InputError(
                f"model.wpa.impl = {impl!r} is unknown; use auto, reference, plain or fused"
            )


def describe_choice(impl: str) -> str:
    """What `choose` takes and why, for people."""
    if impl == "plain":
        return "plain PyTorch with the pixel-side projections, the oracle"
    if choose(impl) == "fused":
        return (
            "fused kernels in Triton's interpreter"
            if interpreting()
            else f"fused kernels on {torch.cuda.get_device_name()}"
        )
    return (
        "plain PyTorch"
        if impl == "reference"
        else f"plain PyTorch ({obstacle() or 'the interpreter is only for impl = fused'})"
    )


def obstacle() -> str | None:
    """Why this machine and this installation cannot run the fused kernels; none if they can."""
    if not importlib.util.find_spec("triton"):
        return "Triton is not installed"
    if interpreting():
        return None
    if not torch.cuda.is_available() or torch.version.hip:
        return "there is no NVIDIA GPU here"
    if torch.cuda.get_device_capability() < OLDEST_GPU:
        return f"{torch.cuda.get_device_name()} is older than compute capability {OLDEST_GPU[0]}.{OLDEST_GPU[1]}"
    return None


@_constant
def interpreting() -> bool:
    """Whether Triton runs kernels on the CPU, step by step: TRITON_INTERPRET=1, for tests and debugging."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def bidirectional_attention(
    pixels: Tensor, keys: Tensor, values: Tensor, bias: Tensor, impl: str = "auto", heads: int = 1
) -> tuple[Tensor, Tensor]:
    """Let every pixel read the words and every word read the pixels, from one matrix of scores.

        S = pixels @ keys^T + bias
        pixels_from_words = softmax_words(S) @ values         one softmax per head, the heads are summed
        words_from_pixels = softmax_pixels(S)^T @ pixels

    The projections are absorbed into `keys` and `values` by the caller; several heads lie side by side on the word
    axis, head h in columns h*T .. (h+1)*T-1.

    Args:
        pixels: [B, P, C] floating point. Under autocast they are rounded to its type, as for any matrix product.
        keys: [B, H*T, C], already scaled.
        values: [B, H*T, C].
        bias: [B, H*T], added to the scores; -inf marks padding, the same words in every head.
        impl: "auto": the fused kernels where the machine and the shape allow, else the reference; "reference";
            "fused": like "auto", also in Triton's interpreter, and an error where no kernel can run at all.
        heads: H.

    Returns:
        pixels_from_words [B, P, C] in the (rounded) type of `pixels`, and words_from_pixels [B, H*T, C] in float32
        (float64 for float64 input). Padded words get zeros, the pixels of an image without words get zeros; gradients
        are finite.

    Raises:
        InputError: see `choose`.
    """
    path = choose(impl)
    batch, _, channels = pixels.shape
    columns = keys.shape[1]
    assert keys.shape == values.shape == (batch, columns, channels), (
        pixels.shape,
        keys.shape,
        values.shape,
    )
    assert bias.shape == (batch, columns) and columns % heads == 0, (bias.shape, columns, heads)
    pixels = _rounded(pixels)
    if path == "fused" and _fits(pixels, columns // heads, heads, impl):
        from coupalign.kernels import fused

        return fused.bidirectional_attention(pixels, keys, values, bias, heads)
    return reference.bidirectional_attention(pixels, keys, values, bias, heads)


def _rounded(pixels: Tensor) -> Tensor:
    """In autocast's type, where it is on; float64 is left alone, as autocast does."""
    place = pixels.device.type
    if (
        not torch.amp.is_autocast_available(place)
        or not torch.is_autocast_enabled(place)
        or pixels.dtype == torch.float64
    ):
        return pixels
    return pixels.to(torch.get_autocast_dtype(place))


def _fits(pixels: Tensor, words: int, heads: int, impl: str) -> bool:
    """Whether the fused kernels can run this call; why not is said once."""
    here, place = pixels.device.type, "cpu" if interpreting() else "cuda"
    if here == "meta" or (
        here != place and impl == "auto"
    ):  # only measured, or as `auto` promises: nothing to tell
        return False
    why = refusal(tuple(pixels.shape), words, heads, pixels.dtype)
    if here != place:
        why = f"the tensors are on {here}"
    elif place == "cpu" and pixels.dtype == torch.bfloat16:
        why = "Triton's interpreter multiplies bfloat16 wrongly"
    if why and why not in _said and not torch.compiler.is_compiling():
        _said.add(why)
        log.warning(
            "word-pixel alignment runs in plain PyTorch where the fused kernel cannot: %s", why
        )
    return why is None
