"""Count the bytes and FLOPs of an eager training step, operator by operator, by part of the model.

The model runs on fake tensors, which have shapes but no data, so no GPU, weights or time are
needed. Every operator reads each operand once and writes its result once, views are free, and no
cache helps. A GPU's L2 can do better on small tensors; nothing else can without fusing operators.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, register_flop_formula
from torch.utils.module_tracker import ModuleTracker

from coupalign.config.schema import Config
from coupalign.model.build import build_model
from coupalign.model.text import vocabulary_size

# An H200: copy bandwidth and dense bfloat16 products, both measured.
BYTES_PER_S = 4.3e12
FLOP_PER_S = 790e12


@dataclass
class Cost:
    """What operators cost.

    `seconds` is a lower bound: each operator at the speed of memory or of the tensor cores.
    """

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
    """Counts the operators that run inside it. `label` names the part of the next operator."""

    def __init__(self, label: Callable[[], str] = lambda: "all") -> None:
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
    """Count one operator.

    Views and allocations are free; in-place writes count as read and written.
    """
    read = _tensors((args, kwargs))
    written = [x for x in _tensors(out) if not any(_same_memory(x, y) for y in read)]
    for value, argument in zip(args, func._schema.arguments):
        if argument.alias_info and argument.alias_info.is_write:
            written += _tensors(value)

    allocates_only = func.__name__.startswith(("empty", "new_empty", "detach"))
    if not written or allocates_only or (not read and "empty" in func.__name__):
        return Cost()

    count_flops = flop_registry.get(func._overloadpacket)
    flops = count_flops(*args, **kwargs, out_val=out) if count_flops else 0
    size = sum(map(_bytes, read)) + sum(map(_bytes, written))
    seconds = max(size / BYTES_PER_S, flops / FLOP_PER_S)
    return Cost(operators=1, bytes=size, flops=flops, seconds=seconds)


def _tensors(tree: Any) -> list[Tensor]:
    """Return the tensors of a nested structure, each once."""
    by_id = {id(leaf): leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}
    return list(by_id.values())


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


def _bytes(x: Tensor) -> int:
    """Return the memory that a tensor spans. An expanded one spans less than its shape says."""
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())


def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Stand for scaled_dot_product_attention as one operator, as a GPU runs it.

    Only counted here.
    """
    return torch.empty_like(query)


def _attention_backward(
    grad: Tensor, out: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # A custom operator must return tensors, so an empty one stands for the gradient of no mask.
    bias = query[:0] if mask is None else mask
    return tuple(torch.empty_like(x) for x in (query, key, value, bias))


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


@register_flop_formula(torch.ops.coupalign_bench.attention)
def _attention_flops(query: torch.Size, key: torch.Size, *_: Any, **__: Any) -> int:
    """Count two products: scores, and weights times values."""
    return 4 * query.numel() * key[-2]


@register_flop_formula(torch.ops.coupalign_bench.attention_backward)
def _attention_backward_flops(
    grad: torch.Size, out: torch.Size, query: torch.Size, key: torch.Size, *_: Any, **__: Any
) -> int:
    """Count five products: the scores again, and gradients of weights, queries, keys and values."""
    return 10 * query.numel() * key[-2]


@contextmanager
def one_operator_attention() -> Iterator[None]:
    """Keep scaled_dot_product_attention one operator, as on a GPU.

    A CPU may split it into products.
    """
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
    """Count forward and backward of one micro-batch under bfloat16 autocast, by part of the model.

    The optimizer is not included.

    Args:
        config: reads model, data.image_size and data.max_tokens.
        batch: number of images.
    """
    vocabulary = vocabulary_size(config.model.text)
    size, words = config.data.image_size, config.data.max_tokens

    # Building reads a few numbers, which fake tensors do not have.
    with torch.device("meta"):
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
    """Format the costs by part, with their shares of the bytes and of the floor of a step."""
    total = Cost()
    for cost in costs.values():
        total += cost

    rows = []
    for name, cost in {**costs, "total": total}.items():
        row = [
            name,
            f"{cost.operators:,}",
            f"{cost.bytes / 1e9:.2f}",
            f"{cost.bytes / total.bytes:.1%}",
            f"{cost.flops / 1e12:.2f}",
            f"{cost.seconds * 1e3:.2f}",
            f"{cost.seconds / total.seconds:.1%}",
        ]
        rows.append(row)

    header = ["part", "operators", "GB", "share", "TFLOP", "floor ms", "share"]
    table = tabulate(
        rows,
        header,
        tablefmt="plain",
        disable_numparse=True,
        colalign=("left", *("right" for _ in header[1:])),
    )
    return (
        f"{table}\n\n"
        f"forward and backward of {batch} images, bfloat16 autocast, eager; counted, not measured: "
        "each operator reads\n"
        "its operands and writes its result once; floor: each at "
        f"{BYTES_PER_S / 1e12} TB/s or {FLOP_PER_S / 1e12:.0f} TFLOP/s (an H200)"
    )


def _part(parents: Iterable[str], model: nn.Module) -> str:
    """Name the part of the model that runs. Losses and sums of gradients belong to "rest"."""
    prefix = f"{type(model).__name__}."
    running = {
        name.removeprefix(prefix).split(".")[0] for name in parents if name.startswith(prefix)
    }
    return next((name for name, _ in model.named_children() if name in running), "rest")
