"""How published weights name their tensors: which names mean the same, which do not matter, what a file looks like."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from coupalign.model.weights.detectors import detector_of

_OURS = "image.net."  # where a model of ours keeps its image encoder
Renaming = tuple[
    dict[str, str], str | None
]  # name in the file -> name in the model; what was done, in words


@dataclass(frozen=True)
class NameMap:
    """How the files of one kind of encoder differ from the module in names that carry no information.

    Attributes:
        prefixes: components before the encoder's own names that may be taken off ("module.backbone." has two).
        rename: from the file's names without prefix to the module's.
        optional: (pattern, what it is): tensors that one side may have without the other.
        resizable: pattern of the tensors that `resize_bias_table` fits to another window.
    """

    prefixes: tuple[str, ...]
    rename: Callable[[Collection[str]], Renaming]
    optional: tuple[tuple[str, str], ...]
    resizable: str | None = None

    def why_optional(self, name: str) -> str | None:
        """What an optional tensor is; None: the tensor is required."""
        return next((why for pattern, why in self.optional if re.search(pattern, name)), None)

    def can_resize(self, name: str, old: Tensor, new: Tensor) -> bool:
        """Whether `old` of the file is a table of another window size than `new` of the model."""
        return bool(
            self.resizable
            and re.search(self.resizable, name)
            and old.ndim == new.ndim == 2
            and old.shape[1] == new.shape[1]
            and _side(old)
            and _side(new)
        )


def swin_names(names: Collection[str]) -> Renaming:
    """Official Swin names to timm's.

    Official code ends stage i with its PatchMerging (`layers.i.downsample`), timm begins stage i + 1 with it; everything
    else but the head has the same name. Only the official naming has a `layers.0.downsample`, so it tells itself.
    """
    if "layers.0.downsample.reduction.weight" not in names:
        return {name: name for name in names}, None
    shifted = {
        name: re.sub(
            r"^layers\.(\d+)\.downsample\.",
            lambda found: f"layers.{int(found[1]) + 1}.downsample.",
            name,
        )
        for name in names
    }
    return (
        shifted,
        "official Swin names translated to timm's (each downsample belongs to the next stage)",
    )


def bert_names(names: Collection[str]) -> Renaming:
    """BERT names of the first releases (LayerNorm.gamma, LayerNorm.beta) to today's (weight, bias)."""
    today = {
        name: name.replace("LayerNorm.gamma", "LayerNorm.weight").replace(
            "LayerNorm.beta", "LayerNorm.bias"
        )
        for name in names
    }
    old = any(before != now for before, now in today.items())
    return today, "LayerNorm gamma and beta translated to weight and bias" if old else None


IMAGE_NAMING = NameMap(
    # "body." is of torchvision's detectors, "0.body." of DETR
    prefixes=("module.", "model.", "backbone.", "encoder.", _OURS, "body.", "0.body."),
    rename=swin_names,
    optional=(
        (r"(^|\.)(relative_position_index|attn_mask)$", "derived"),
        (r"\.num_batches_tracked$", "a step counter"),
        (r"^(head|fc|classifier)\.", "the classifier"),
        (r"^detector\.", "the detector behind the encoder"),
        (r"^norm\d?\.(weight|bias)$", "the norm after the last stage"),
    ),
    resizable=r"relative_position_bias_table$",
)

TEXT_NAMING = NameMap(
    prefixes=("module.", "model.", "text.", "bert."),  # "text.bert." is ours
    rename=bert_names,
    optional=(
        (r"^embeddings\.(position_ids|token_type_ids)$", "derived"),
        (r"^pooler\.", "the pooler"),
        (r"^(cls|classifier|qa_outputs)\.", "a pretraining or task head"),
    ),
)


def resize_bias_table(table: Tensor, entries: int) -> Tensor:
    """Bicubic resize of a relative position bias table to another window size, as official Swin fine-tuning does it
    (microsoft/Swin-Transformer, issue 58).

    Args:
        table: float [(2w - 1)^2, heads] of a w x w window, offsets row by row.
        entries: (2v - 1)^2 of the wanted v x v window.

    Returns:
        float [entries, heads]; `table` itself where the sizes agree.
    """
    old, new = _side(table), round(entries**0.5)
    assert old and new * new == entries, f"not square tables: {table.shape[0]}, {entries}"
    if old == new:
        return table
    grid = table.float().T.reshape(1, -1, old, old)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return grid.reshape(-1, entries).T.contiguous().to(table.dtype)


def looks_like(found: Mapping[str, Tensor]) -> str | None:
    """What the tensors of a file seem to be, by a timm name where there is one; None: nothing known."""
    if ours := {
        name.removeprefix(_OURS): tensor for name, tensor in found.items() if name.startswith(_OURS)
    }:
        return f"a run of ours with {_encoder_of(ours) or 'a small encoder'}"
    detector, encoder = detector_of(found), _encoder_of(found)
    return f"the {encoder or 'unknown encoder'} of {detector}" if detector else encoder


def _encoder_of(found: Mapping[str, Tensor]) -> str | None:
    prefixes = re.compile(r"^((module|model|backbone|bert|(0\.)?body|encoder(?!\.layer\.))\.)+")
    found = {prefixes.sub("", name): tensor for name, tensor in found.items()}
    if "embeddings.word_embeddings.weight" in found:
        words, width = found["embeddings.word_embeddings.weight"].shape
        return f"a BERT of {_count(found, 'encoder.layer.')} layers, width {width}, {words} words"
    if (
        "layers.0.blocks.0.attn.relative_position_bias_table" in found
        and "patch_embed.proj.weight" in found
    ):
        return _which_swin(found)
    if "layer1.0.conv1.weight" in found:
        return _which_resnet(found)
    if "stem.conv1.conv.weight" in found and "stages.0.blocks.0.conv1.conv.weight" in found:
        blocks = tuple(_count(found, f"stages.{stage}.blocks.") for stage in range(5))
        return "darknet53" if blocks == (1, 2, 8, 8, 4) else f"a Darknet of {blocks} blocks"
    if "cls_token" in found and "blocks.0.attn.qkv.weight" in found:
        return f"a ViT of width {found['cls_token'].shape[-1]}"
    return None


def _which_swin(found: Mapping[str, Tensor]) -> str:
    width = found["patch_embed.proj.weight"].shape[0]
    stages = _count(found, "layers.")
    depths = tuple(_count(found, f"layers.{stage}.blocks.") for stage in range(stages))
    window = ((_side(found["layers.0.blocks.0.attn.relative_position_bias_table"]) or 1) + 1) // 2
    sizes = {
        (96, (2, 2, 6, 2)): "tiny",
        (96, (2, 2, 18, 2)): "small",
        (128, (2, 2, 18, 2)): "base",
        (192, (2, 2, 18, 2)): "large",
    }
    pixels = {7: 224, 12: 384}.get(window)
    if (width, depths) in sizes and pixels:
        return f"swin_{sizes[width, depths]}_patch4_window{window}_{pixels}"
    return f"a Swin of width {width}, depths {depths}, window {window}"


def _which_resnet(found: Mapping[str, Tensor]) -> str:
    blocks = tuple(_count(found, f"layer{stage}.") for stage in range(1, 5))
    kind = "Bottleneck" if "layer1.0.conv3.weight" in found else "BasicBlock"
    known = {
        ("BasicBlock", (2, 2, 2, 2)): 18,
        ("BasicBlock", (3, 4, 6, 3)): 34,
        ("Bottleneck", (3, 4, 6, 3)): 50,
        ("Bottleneck", (3, 4, 23, 3)): 101,
        ("Bottleneck", (3, 8, 36, 3)): 152,
    }
    return (
        f"resnet{known[kind, blocks]}"
        if (kind, blocks) in known
        else f"a ResNet of {blocks} blocks"
    )


def _count(names: Collection[str], before: str) -> int:
    """How many different numbers follow `before` in the names."""
    return len(
        {found[1] for name in names if (found := re.match(re.escape(before) + r"(\d+)\.", name))}
    )


def _side(table: Tensor) -> int | None:
    side = round(table.shape[0] ** 0.5)
    return side if side * side == table.shape[0] else None
