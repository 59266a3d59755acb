"""How many bytes and FLOPs an eager training step moves and computes, part by part, counted operator by operator.

The model runs on fake tensors, which have shapes and no numbers: no GPU, no weights and no time are needed. The model of
memory: every operator reads each of its operands once and writes its result once, views are free, and no cache helps. A
GPU's L2 can do better than that on small tensors; nothing can do better without fusing operators.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, register_flop_formula
from torch.utils.module_tracker import ModuleTracker

from coupalign.config.schema import Config
from coupalign.model.build import build_model
from coupalign.model.text import vocabulary_of

BYTES_PER_S, FLOP_PER_S = (
    4.3e12,
    790e12,
)  # an H200: copy bandwidth and dense bfloat16 products, both measured ones


@dataclass
class Cost:
    """What operators cost; seconds are a floor, each operator at the speed of memory or of the tensor cores."""

    operators: int = 0
    bytes: int = 0
    flops: int = 0
    seconds: float = 0.0

    def __iadd__(self, other: Cost) -> Cost:
        self.operators += other.operators
        self.bytes += other.bytes
        self.flops += other.flops
        self.seconds += other.seconds
        return self


class Traffic(TorchDispatchMode):
    """Counts what runs inside it; `label` names what the next operator belongs to."""

    def __init__(self, label: Callable[[], str] = lambda: "all"):
        super().__init__()
        self.costs: defaultdict[str, Cost] = defaultdict(Cost)
        self.label = label

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.costs[self.label()] += cost_of(func, args, kwargs, out)
        return out

    @property
    def total(self) -> Cost:
        """The sum over all labels."""
        total = Cost()
        for cost in self.costs.values():
            total += cost
        return total


def cost_of(func: Any, args: tuple, kwargs: dict, out: Any) -> Cost:
    """One operator. Views and allocations cost nothing; what is written in place counts as read and written."""
    read = _tensors((args, kwargs))
    written = [x for x in _tensors(out) if not any(_same_memory(x, y) for y in read)]
    changed = [
        value
        for value, argument in zip(args, func._schema.arguments)
        if argument.alias_info and argument.alias_info.is_write
    ]
    written += _tensors(changed)
    if (
        not written
        or (not read and "empty" in func.__name__)
        or func.__name__.startswith(("empty", "new_empty", "detach"))
    ):
        return Cost()
    count = flop_registry.get(func._overloadpacket)
    flops = count(*args, **kwargs, out_val=out) if count else 0
    size = sum(map(_bytes, read)) + sum(map(_bytes, written))
    return Cost(1, size, flops, max(size / BYTES_PER_S, flops / FLOP_PER_S))


def _tensors(tree: Any) -> list[Tensor]:
    found = {id(x): x for x in tree_leaves(tree) if isinstance(x, Tensor)}
    return list(found.values())


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


def _bytes(x: Tensor) -> int:
    """What an expanded tensor spans in memory, not what it shows."""
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())


def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """scaled_dot_product_attention as one operator, the way a GPU runs it; here it is only counted."""
    return torch.empty_like(query)


def _attention_backward(
    grad: Tensor, out: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return tuple(
        torch.empty_like(x) for x in (query, key, value, query[:0] if mask is None else mask)
    )


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    gradients = _backward_operator(grad, *ctx.saved_tensors)
    return *gradients[:3], gradients[3] if ctx.needs_input_grad[3] else None


_operator = torch.library.custom_op("coupalign_bench::attention", _attention, mutates_args=())
_backward_operator = torch.library.custom_op(
    "coupalign_bench::attention_backward", _attention_backward, mutates_args=()
)
_operator.register_fake(_attention)
_backward_operator.register_fake(_attention_backward)
_operator.register_autograd(
    _differentiate, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(output, *inputs)
)
register_flop_formula(torch.ops.coupalign_bench.attention)(
    lambda q, k, *_, **__: 4 * q.numel() * k[-2]
)
# Five products: the scores once more, and one for each gradient of weights, queries, keys and values.
register_flop_formula(torch.ops.coupalign_bench.attention_backward)(
    lambda _, __, q, k, *___, **____: 10 * q.numel() * k[-2]
)


@contextmanager
def one_operator_attention() -> Iterator[None]:
    """On a CPU scaled_dot_product_attention may fall apart into matrix products; inside this it stays whole, as on a GPU."""
    original = F.scaled_dot_product_attention

    def whole(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        *_: Any,
        **__: Any,
    ) -> Tensor:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
        return _operator(query.to(dtype), key.to(dtype), value.to(dtype), attn_mask)

    F.scaled_dot_product_attention = whole
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


def step_traffic(config: Config, batch: int) -> dict[str, Cost]:
    """Forward and backward of one micro-batch under bfloat16 autocast, by part of the model; the optimizer is not in it.

    Args:
        config: model, data.image_size and data.max_tokens are read.
        batch: images.
    """
    vocabulary = vocabulary_of(config.model.text)
    size, words = config.data.image_size, config.data.max_tokens
    with torch.device("meta"):  # building asks for a few numbers, which fake tensors do not have
        model = build_model(config.model, vocabulary, size).train()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        inputs = (
            torch.zeros(batch, 3, size, size, dtype=torch.uint8),
            torch.zeros(batch, words, dtype=torch.int64),
            torch.ones(batch, words, dtype=torch.bool),
            torch.ones(batch, size, size, dtype=torch.bool),
        )
        with ModuleTracker() as tracker, Traffic(lambda: _part(tracker.parents, model)) as traffic:
            with torch.autocast("cpu", torch.bfloat16), one_operator_attention():
                loss = model(*inputs)["loss"]
            loss.backward()
    return {name: traffic.costs[name] for name in (*dict(model.named_children()), "rest")}


def traffic_table(costs: dict[str, Cost], batch: int) -> str:
    """For people: every part, its bytes and products, and its share of the floor of the whole step."""
    total = Cost()
    for cost in costs.values():
        total += cost
    lines = [
        f"{'part':<10}{'operators':>10}{'GB':>9}{'share':>8}{'TFLOP':>9}{'floor ms':>10}{'share':>8}"
    ]
    lines += [
        f"{name:<10}{cost.operators:>10,}{cost.bytes / 1e9:>9.2f}{cost.bytes / total.bytes:>8.1%}{cost.flops / 1e12:>9.2f}"
        f"{cost.seconds * 1e3:>10.2f}{cost.seconds / total.seconds:>8.1%}"
        for name, cost in {**costs, "total": total}.items()
    ]
    return "\n".join(
        [
            *lines,
            "",
            f"forward and backward of {batch} images, bfloat16 autocast, eager; counted, not measured: each operator reads",
            "its operands and writes its result once; floor: each at "
            f"{BYTES_PER_S / 1e12} TB/s or {FLOP_PER_S / 1e12:.0f} TFLOP/s (an H200)",
        ]
    )


def _part(parents: Iterable[str], model: nn.Module) -> str:
    """The part of the model that runs; losses, and sums of gradients between parts, belong to none."""
    above = f"{type(model).__name__}."
    inside = {name.removeprefix(above).split(".")[0] for name in parents if name.startswith(above)}
    return next((name for name, _ in model.named_children() if name in inside), "rest")
