"""Describe a model without allocating it: parameters and FLOPs by part, and intermediate shapes.

The model is on torch's `meta` device, where tensors have shapes but no data. No weights are read.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from coupalign.config.schema import Config
from coupalign.model.base import ReferringModel, called_modules
from coupalign.model.build import build_model
from coupalign.model.coupalign import CoupAlign
from coupalign.model.text import vocabulary_size


@dataclass(frozen=True)
class Part:
    """One part of a model. `flops` are of one forward pass of one sample; a multiply-add is 2."""

    parameters: int
    trainable: int
    flops: int


@dataclass(frozen=True)
class Description:
    """Numbers of one model for one image and one sentence.

    Attributes:
        parts: the model's children, in its order.
        shapes: (name, shape) in the order of the forward pass.
    """

    image_size: int
    words: int
    vocabulary: int
    parts: dict[str, Part]
    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def total(self) -> Part:
        """The sum over the parts."""
        parts = self.parts.values()
        return Part(
            parameters=sum(part.parameters for part in parts),
            trainable=sum(part.trainable for part in parts),
            flops=sum(part.flops for part in parts),
        )

    def to_json(self) -> dict[str, Any]:
        """Convert to values that JSON can hold."""
        return {
            "image_size": self.image_size,
            "words": self.words,
            "vocabulary": self.vocabulary,
            "parts": {name: vars(part) for name, part in self.parts.items()},
            "total": vars(self.total),
            "shapes": [{"name": name, "shape": list(shape)} for name, shape in self.shapes],
        }

    def table(self) -> str:
        """Format for a terminal."""
        total = self.total
        rows = []
        for name, part in [*self.parts.items(), ("total", total)]:
            row = [
                name,
                f"{part.parameters:,}",
                f"{part.trainable:,}",
                f"{part.flops / 1e9:.2f}",
                f"{part.flops / max(total.flops, 1):.1%}",
            ]
            rows.append(row)
        parts = tabulate(
            rows,
            ["part", "parameters", "trainable", "GFLOP", "share"],
            tablefmt="plain",
            disable_numparse=True,
            colalign=("left", "right", "right", "right", "right"),
        )

        conditions = (
            f"one image of {self.image_size} x {self.image_size}, {self.words} words, "
            f"a vocabulary of {self.vocabulary:,}; "
            "GFLOP of one forward pass, a multiply-add is 2 FLOP"
        )
        shapes = [[name, " x ".join(map(str, shape))] for name, shape in self.shapes]
        listing = tabulate(shapes, tablefmt="plain", disable_numparse=True)
        return f"{parts}\n\n{conditions}\n\n{listing}"


def describe(config: Config, vocabulary: int | None = None) -> Description:
    """Measure the model of a configuration.

    Args:
        config: reads model, data.image_size and data.max_tokens.
        vocabulary: number of tokens. Default: the published encoder's, or 30522 for one of our own.

    Raises:
        InputError: the configuration makes no model. The message names the field.
    """
    if vocabulary is None:
        vocabulary = vocabulary_size(config.model.text)
    size, words = config.data.image_size, config.data.max_tokens

    with torch.device("meta"):
        model = build_model(config.model, vocabulary, size).eval()
        inputs = (
            torch.empty(1, 3, size, size, dtype=torch.uint8),
            torch.empty(1, words, dtype=torch.int64),
            torch.empty(1, words, dtype=torch.bool),
        )

    shapes: list[tuple[str, tuple[int, ...]]] = [
        ("image", (1, 3, size, size)),
        ("words", (1, words)),
    ]
    _record_shapes(model, shapes)
    with FlopCounterMode(display=False) as counter:
        logits = model(*inputs)
    shapes.append(("logits", tuple(logits.shape)))

    flops = {name: sum(count.values()) for name, count in counter.get_flop_counts().items()}
    parts = {name: _measure_part(model, flops, name) for name, _ in model.named_children()}
    return Description(
        image_size=size,
        words=words,
        vocabulary=vocabulary,
        parts=parts,
        shapes=tuple(shapes),
    )


def _measure_part(model: ReferringModel, flops: dict[str, int], name: str) -> Part:
    parameters = list(getattr(model, name).parameters())
    prefix = type(model).__name__
    return Part(
        parameters=sum(p.numel() for p in parameters),
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        flops=sum(flops.get(f"{prefix}.{called}", 0) for called in called_modules(model, name)),
    )


# The paper's names for what CoupAlign's parts return.
_OUTPUT_NAMES = {
    "decoder": "pixel embedding Y",
    "proposals": "mask embeddings Q_o",
    "sma": "sentence-mask aligned Y'",
    "head": "logits at stride 4",
}


def _record_shapes(model: ReferringModel, shapes: list[tuple[str, tuple[int, ...]]]) -> None:
    """Append the shape of every intermediate value as it appears."""
    for child, _ in model.named_children():
        for called, module in called_modules(model, child).items():
            name = called
            if isinstance(model, CoupAlign):
                name = _OUTPUT_NAMES.get(called, called)
            module.register_forward_hook(partial(_record_output, shapes, name))


def _record_output(
    shapes: list[tuple[str, tuple[int, ...]]],
    name: str,
    _: nn.Module,
    args: tuple,
    out: Tensor | tuple[Tensor, ...],
) -> None:
    """A forward hook: append the shapes of a module's outputs."""
    if name in ("image", "text"):
        name = f"{name} stage {args[0] + 1}"

    if isinstance(out, Tensor):
        outputs = {name: out}
    elif name == "refine":
        outputs = dict(zip((f"{name}, logits", f"{name}, places of its points"), out))
    else:
        outputs = dict(zip((f"{name}, pixels", f"{name}, words"), out))

    for label, value in outputs.items():
        shapes.append((label, tuple(value.shape)))
