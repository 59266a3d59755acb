"""What a model consists of, without building it in memory: parameters and FLOPs by part, and the shapes on the way through.

The model lives on torch's `meta` device, where tensors have shapes and no numbers; no weights are read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from coupalign.config.schema import Config
from coupalign.model.base import ReferringModel, called_modules
from coupalign.model.build import build_model
from coupalign.model.coupalign import CoupAlign
from coupalign.model.text import vocabulary_of


@dataclass(frozen=True)
class Part:
    parameters: int
    trainable: int
    flops: int  # of one forward pass of one sample; a multiplication with its addition counts 2


@dataclass(frozen=True)
class Description:
    """Numbers of one model for one image and one sentence."""

    image_size: int
    words: int
    vocabulary: int
    parts: dict[str, Part]  # the model's children, in its order
    shapes: tuple[
        tuple[str, tuple[int, ...]], ...
    ]  # (name, shape) in the order of the forward pass

    @property
    def total(self) -> Part:
        """The sum over the parts."""
        parts = self.parts.values()
        return Part(
            sum(p.parameters for p in parts),
            sum(p.trainable for p in parts),
            sum(p.flops for p in parts),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain numbers for `--json`."""
        return {
            "image_size": self.image_size,
            "words": self.words,
            "vocabulary": self.vocabulary,
            "parts": {name: vars(part) for name, part in self.parts.items()},
            "total": vars(self.total),
            "shapes": [{"name": name, "shape": list(shape)} for name, shape in self.shapes],
        }

    def table(self) -> str:
        """The same for people."""
        total = self.total
        lines = [f"{'part':<10}{'parameters':>14}{'trainable':>14}{'GFLOP':>10}{'share':>8}"]
        for name, part in [*self.parts.items(), ("total", total)]:
            lines.append(
                f"{name:<10}{part.parameters:>14,}{part.trainable:>14,}{part.flops / 1e9:>10.2f}"
                f"{part.flops / max(total.flops, 1):>8.1%}"
            )
        lines += [
            "",
            f"one image of {self.image_size} x {self.image_size}, {self.words} words, "
            f"a vocabulary of {self.vocabulary:,}; GFLOP of one forward pass, a multiply-add is 2 FLOP",
            "",
        ]
        lines += [f"{name:<32}{' x '.join(map(str, shape))}" for name, shape in self.shapes]
        return "\n".join(lines)


def describe(config: Config, vocabulary: int | None = None) -> Description:
    """Measure the model of a configuration.

    Args:
        config: model, data.image_size and data.max_tokens are read.
        vocabulary: number of tokens; none: the published encoder's, or 30522 for one of our own.

    Raises:
        InputError: the configuration makes no model; the message names the field.
    """
    if vocabulary is None:
        vocabulary = vocabulary_of(config.model.text)
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
    _note_shapes(model, shapes)
    with FlopCounterMode(display=False) as counter:
        logits = model(*inputs)
    shapes.append(("logits", tuple(logits.shape)))
    flops = {name: sum(count.values()) for name, count in counter.get_flop_counts().items()}
    parts = {name: _measure(model, flops, name) for name, _ in model.named_children()}
    return Description(size, words, vocabulary, parts, tuple(shapes))


def _measure(model: ReferringModel, flops: dict[str, int], name: str) -> Part:
    parameters = list(getattr(model, name).parameters())
    return Part(
        sum(p.numel() for p in parameters),
        sum(p.numel() for p in parameters if p.requires_grad),
        sum(
            flops.get(f"{type(model).__name__}.{called}", 0)
            for called in called_modules(model, name)
        ),
    )


_NAMES = {
    "decoder": "pixel embedding Y",
    "proposals": "mask embeddings Q_o",
    "sma": "sentence-mask aligned Y'",
    "head": "logits at stride 4",
}
_PAIRS = {"refine": (", logits", ", places of its points")}


def _note_shapes(model: ReferringModel, shapes: list[tuple[str, tuple[int, ...]]]) -> None:
    """Append the shape of every intermediate value as it appears."""

    def noting(name: str):
        def note(_: nn.Module, args: tuple, out: Tensor | tuple[Tensor, ...]) -> None:
            stage = f" stage {args[0] + 1}" if name in ("image", "text") else ""
            results = (
                {"": out}
                if isinstance(out, Tensor)
                else dict(zip(_PAIRS.get(name, (", pixels", ", words")), out))
            )
            for what, value in results.items():
                shapes.append((f"{name}{stage}{what}", tuple(value.shape)))

        return note

    for child, _ in model.named_children():
        for called, module in called_modules(model, child).items():
            own = _NAMES.get(called, called) if isinstance(model, CoupAlign) else called
            module.register_forward_hook(noting(own))
