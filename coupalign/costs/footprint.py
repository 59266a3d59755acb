"""Count the memory and FLOPs of a micro-batch on fake tensors, without a GPU or weights.

Every allocation of a forward and a backward pass is recorded when it is made and when it is freed.
So recomputation (checkpointing), views and tensors that share memory count correctly. Gradients of
parameters are dropped as they arrive, because they are no activations. The count does not see the
workspaces of cuDNN and cuBLAS, or rounding to blocks of the caching allocator. Word-pixel alignment
is counted on its reference path; the fused kernels keep less."""

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

# This import also registers the FLOPs of attention.
from coupalign.costs.traffic import one_operator_attention
from coupalign.engine.base import DTYPES

# Functions of the models here that CUDA's autocast runs in float32 and the CPU's does not:
# pytorch.org/docs/stable/amp.html, "CUDA Ops that can autocast to float32".
FLOAT32 = ("layer_norm", "group_norm", "softmax")


class Line(NamedTuple):
    """A quantity that grows linearly with the images of a micro-batch: slope * images + base."""

    slope: float
    base: float

    def at(self, images: float) -> float:
        """Return the value for a micro-batch of `images`."""
        return self.slope * images + self.base


@dataclass(frozen=True)
class Footprint:
    """Forward and backward of one micro-batch, as lines over its number of images.

    Attributes:
        saved: bytes alive when the forward pass ends, kept for the backward pass.
        peak: most bytes alive at once in either pass.
        flops: of both passes, with recomputation; a multiply-add is 2.
    """

    saved: Line
    peak: Line
    flops: Line


class LiveMemory(TorchDispatchMode):
    """Tracks the bytes allocated inside it, `now` and at the `peak`, and the FLOPs of what runs."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.flops = 0
        self._storages: dict[int, weakref.ref] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)

        count_flops = flop_registry.get(func._overloadpacket)
        if count_flops:
            self.flops += count_flops(*args, **kwargs, out_val=out)

        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.record(tensor, tensor.untyped_storage().nbytes())
        return out

    def record(self, tensor: Tensor, size: int) -> None:
        """Count a tensor's memory as `size` bytes, once, until it is freed."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._storages:
            return

        self.now += size
        self.peak = max(self.peak, self.now)

        def free(_: Any) -> None:
            self.now -= size
            self._storages.pop(address, None)

        self._storages[address] = weakref.ref(storage, free)


def footprint(model: nn.Module, config: Config, sizes: tuple[int, int] = (1, 2)) -> Footprint:
    """Count two micro-batches and fit lines through them.

    Args:
        model: on the meta device, in training mode. It is left on fake memory.
        config: reads precision, data.image_size and data.max_tokens. The model knows its
            checkpointing.
        sizes: numbers of images of the two micro-batches.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        small = count_step(model, config, sizes[0])
        large = count_step(model, config, sizes[1])

    lines = []
    for few, many in zip(small, large):
        slope = (many - few) / (sizes[1] - sizes[0])
        lines.append(Line(slope, few - slope * sizes[0]))
    return Footprint(*lines)


def count_step(model: nn.Module, config: Config, images: int) -> tuple[int, int, int]:
    """Count one forward and backward pass, in a FakeTensorMode or on real memory of the CPU.

    Returns:
        saved bytes, peak bytes, FLOPs.
    """
    size, words = config.data.image_size, config.data.max_tokens
    inputs = (
        torch.zeros(images, 3, size, size, dtype=torch.uint8),
        torch.zeros(images, words, dtype=torch.int64),
        torch.ones(images, words, dtype=torch.bool),
        torch.ones(images, size, size, dtype=torch.bool),
    )
    with ExitStack() as stack:
        memory = stack.enter_context(LiveMemory())
        stack.enter_context(_without_gradients(model))

        # What is there before the step is no activation.
        for tensor in (*model.parameters(), *model.buffers(), *inputs):
            memory.record(tensor, 0)

        # Around the backward pass as well, for what it recomputes.
        stack.enter_context(on_gpu_rules())
        with torch.autocast("cpu", DTYPES[config.precision], enabled=config.precision != "fp32"):
            loss = model(*inputs)["loss"]
        saved = memory.now
        loss.backward()
    return saved, memory.peak, memory.flops


@contextmanager
def on_gpu_rules() -> Iterator[None]:
    """Count as on a GPU: attention is one operator, autocast gives FLOAT32's functions float32."""
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
        if torch.is_autocast_enabled("cpu") and tensor.dtype in (torch.bfloat16, torch.float16):
            tensor = tensor.float()
        return function(tensor, *args, **kwargs)

    return run


@contextmanager
def _without_gradients(model: nn.Module) -> Iterator[None]:
    """Drop a parameter's gradient as soon as it is complete."""

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    hooks = [parameter.register_post_accumulate_grad_hook(drop) for parameter in trainable]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
