"""What a micro-batch takes, memory and FLOPs, counted on fake tensors: shapes without numbers, no GPU, no weights.

Every allocation of a forward and a backward pass is noted when it is made and when it is freed, so that recomputation
(checkpointing), views and tensors that share memory count as what they are. Gradients of parameters are thrown away as
they arrive: they are no activations. What the count does not see: workspaces of cuDNN and cuBLAS, rounding to blocks of
the caching allocator. Word-pixel alignment is counted on its reference path; the fused kernels keep less.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from coupalign.config.schema import Config
from coupalign.costs.traffic import one_operator_attention  # registers the FLOPs of attention, too
from coupalign.engine.base import DTYPES

# Functions of the models here that CUDA's autocast runs in float32 and the CPU's does not:
# pytorch.org/docs/stable/amp.html, "CUDA Ops that can autocast to float32".
FLOAT32 = ("layer_norm", "group_norm", "softmax")


class Line(NamedTuple):
    """Something that grows evenly with the images of a micro-batch: slope * images + base."""

    slope: float
    base: float

    def at(self, images: float) -> float:
        """The value for a micro-batch of `images`."""
        return self.slope * images + self.base


@dataclass(frozen=True)
class Footprint:
    """Forward and backward of one micro-batch, as lines over its images."""

    saved: Line  # bytes alive when the forward pass ends, kept for the backward pass
    peak: Line  # the most bytes alive at once in either pass
    flops: Line  # of both passes, recomputation included; a multiply-add is 2


class Alive(TorchDispatchMode):
    """Bytes of the memory allocated inside it, `now` and the most there ever was, `peak`; and the FLOPs of what runs."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.flops = 0
        self.known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if count := flop_registry.get(func._overloadpacket):
            self.flops += count(*args, **kwargs, out_val=out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.note(tensor, tensor.untyped_storage().nbytes())
        return out

    def note(self, tensor: Tensor, size: int) -> None:
        """Count a tensor's memory as `size` bytes, once, until it is freed."""
        storage = tensor.untyped_storage()
        if storage._cdata in self.known:
            return
        self.now += size
        self.peak = max(self.peak, self.now)
        self.known[storage._cdata] = weakref.ref(storage, self._freed(storage._cdata, size))

    def _freed(self, place: int, size: int) -> Callable[[Any], None]:
        def forget(_: Any) -> None:
            self.now -= size
            self.known.pop(place, None)

        return forget


def footprint(model: nn.Module, config: Config, sizes: tuple[int, int] = (1, 2)) -> Footprint:
    """Count two micro-batches and draw the lines through them.

    Args:
        model: on the meta device, in training mode; it is left on fake memory.
        config: precision, data.image_size and data.max_tokens are read; checkpointing is the model's own.
        sizes: images of the two micro-batches.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        few, many = (count_step(model, config, images) for images in sizes)
    slopes = [(more - less) / (sizes[1] - sizes[0]) for less, more in zip(few, many)]
    return Footprint(*(Line(slope, less - slope * sizes[0]) for slope, less in zip(slopes, few)))


def count_step(model: nn.Module, config: Config, images: int) -> tuple[int, int, int]:
    """(saved bytes, peak bytes, FLOPs) of one forward and backward pass; inside a FakeTensorMode, or on real memory of the CPU."""
    size, words = config.data.image_size, config.data.max_tokens
    inputs = (
        torch.zeros(images, 3, size, size, dtype=torch.uint8),
        torch.zeros(images, words, dtype=torch.int64),
        torch.ones(images, words, dtype=torch.bool),
        torch.ones(images, size, size, dtype=torch.bool),
    )
    with ExitStack() as stack:
        alive = stack.enter_context(Alive())
        stack.enter_context(_without_gradients(model))
        for tensor in (*model.parameters(), *model.buffers(), *inputs):
            alive.note(tensor, 0)
        stack.enter_context(
            on_gpu_rules()
        )  # around the backward pass as well, for what it recomputes
        with torch.autocast("cpu", DTYPES[config.precision], enabled=config.precision != "fp32"):
            loss = model(*inputs)["loss"]
        saved = alive.now
        loss.backward()
    return saved, alive.peak, alive.flops


@contextmanager
def on_gpu_rules() -> Iterator[None]:
    """Inside, attention is one operator, and autocast gives the functions of FLOAT32 float32."""
    originals = {name: getattr(F, name) for name in FLOAT32}
    for name, function in originals.items():
        setattr(F, name, _in_float32(function))
    try:
        with one_operator_attention():
            yield
    finally:
        for name, function in originals.items():
            setattr(F, name, function)


def _in_float32(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        wide = torch.is_autocast_enabled("cpu") and tensor.dtype in (torch.bfloat16, torch.float16)
        return function(tensor.float() if wide else tensor, *args, **kwargs)

    return run


@contextmanager
def _without_gradients(model: nn.Module) -> Iterator[None]:
    """Inside, a parameter's gradient is dropped as soon as it is complete."""

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    hooks = [
        p.register_post_accumulate_grad_hook(drop) for p in model.parameters() if p.requires_grad
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
