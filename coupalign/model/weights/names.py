"""Translate the tensor names of published weights, and guess what a file holds from its names."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from coupalign.model.weights.detectors import find_detector

# Where our own models keep their image encoder.
OUR_IMAGE_PREFIX = "image.net."

# ({name in the file: name in the model}, a sentence on what was translated).
Renaming = tuple[dict[str, str], str | None]


@dataclass(frozen=True)
class NameMap:
    """How the names in one kind of file differ from the names in the model.

    Attributes:
        prefixes: components before the encoder's own names that may be taken off
            ("module.backbone." has two).
        rename: translates names without prefix into the model's.
        optional: (pattern, what it is) of tensors that one side may have without the other.
        resizable: pattern of the tensors that `resize_bias_table` fits to another window size.
    """

    prefixes: tuple[str, ...]
    rename: Callable[[Collection[str]], Renaming]
    optional: tuple[tuple[str, str], ...] = ()
    resizable: str | None = None

    def optional_reason(self, name: str) -> str | None:
        """Say what an optional tensor is, or return None if the tensor is required."""
        reasons = (what for pattern, what in self.optional if re.search(pattern, name))
        return next(reasons, None)

    def can_resize(self, name: str, old: Tensor, new: Tensor) -> bool:
        """Tell whether `old` in the file is the table of another window size for `new`."""
        if not self.resizable or not re.search(self.resizable, name):
            return False
        if not old.ndim == new.ndim == 2 or old.shape[1] != new.shape[1]:
            return False
        return bool(_table_side(old) and _table_side(new))


def keep_names(names: Collection[str]) -> Renaming:
    """Translate nothing."""
    return {name: name for name in names}, None


def rename_swin(names: Collection[str]) -> Renaming:
    """Translate official Swin names into timm's.

    Official code ends stage i with its PatchMerging (`layers.i.downsample`), timm begins stage
    i + 1 with it. Everything else but the head has the same name. Only the official naming has a
    `layers.0.downsample`, which is how this function recognizes it.
    """
    if "layers.0.downsample.reduction.weight" not in names:
        return keep_names(names)

    def next_stage(found: re.Match) -> str:
        return f"layers.{int(found[1]) + 1}.downsample."

    shifted = {name: re.sub(r"^layers\.(\d+)\.downsample\.", next_stage, name) for name in names}
    note = "official Swin names translated to timm's (each downsample belongs to the next stage)"
    return shifted, note


def rename_bert(names: Collection[str]) -> Renaming:
    """Translate BERT's first names (LayerNorm.gamma and beta) into today's (weight and bias)."""
    renamed = {}
    for name in names:
        weight = name.replace("LayerNorm.gamma", "LayerNorm.weight")
        renamed[name] = weight.replace("LayerNorm.beta", "LayerNorm.bias")

    if all(old == new for old, new in renamed.items()):
        return renamed, None
    return renamed, "LayerNorm gamma and beta translated to weight and bias"


# Our own checkpoints: the same names, all of them required.
EXACT_NAMES = NameMap(prefixes=(), rename=keep_names)

IMAGE_NAMES = NameMap(
    # "body." is from torchvision's detectors, "0.body." from DETR.
    prefixes=("module.", "model.", "backbone.", "encoder.", OUR_IMAGE_PREFIX, "body.", "0.body."),
    rename=rename_swin,
    optional=(
        (r"(^|\.)(relative_position_index|attn_mask)$", "derived"),
        (r"\.num_batches_tracked$", "a step counter"),
        (r"^(head|fc|classifier)\.", "the classifier"),
        (r"^detector\.", "the detector behind the encoder"),
        (r"^norm\d?\.(weight|bias)$", "the norm after the last stage"),
    ),
    resizable=r"relative_position_bias_table$",
)

TEXT_NAMES = NameMap(
    # "text.bert." is from our own checkpoints.
    prefixes=("module.", "model.", "text.", "bert."),
    rename=rename_bert,
    optional=(
        (r"^embeddings\.(position_ids|token_type_ids)$", "derived"),
        (r"^pooler\.", "the pooler"),
        (r"^(cls|classifier|qa_outputs)\.", "a pretraining or task head"),
    ),
)


def resize_bias_table(table: Tensor, entries: int) -> Tensor:
    """Resize a relative position bias table to another window size by bicubic interpolation.

    Official Swin fine-tuning does it this way (microsoft/Swin-Transformer, issue 58).

    Args:
        table: float [(2w - 1)^2, heads] of a w x w window, offsets row by row.
        entries: (2v - 1)^2 of the wanted v x v window.

    Returns:
        float [entries, heads]; `table` itself if the sizes agree.
    """
    old, new = _table_side(table), round(entries**0.5)
    assert old and new * new == entries, f"not square tables: {table.shape[0]}, {entries}"
    if old == new:
        return table

    grid = table.float().T.reshape(1, -1, old, old)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return grid.reshape(-1, entries).T.contiguous().to(table.dtype)


def guess_contents(tensors: Mapping[str, Tensor]) -> str | None:
    """Guess what the tensors of a file are, as a timm name if there is one, or return None."""
    ours = {
        name.removeprefix(OUR_IMAGE_PREFIX): tensor
        for name, tensor in tensors.items()
        if name.startswith(OUR_IMAGE_PREFIX)
    }
    if ours:
        return f"a run of ours with {_guess_encoder(ours) or 'a small encoder'}"

    # A detector contains an encoder, so name both.
    encoder = _guess_encoder(tensors)
    if detector := find_detector(tensors):
        return f"the {encoder or 'unknown encoder'} of {detector}"
    return encoder


def _guess_encoder(tensors: Mapping[str, Tensor]) -> str | None:
    prefixes = re.compile(r"^((module|model|backbone|bert|(0\.)?body|encoder(?!\.layer\.))\.)+")
    tensors = {prefixes.sub("", name): tensor for name, tensor in tensors.items()}

    # Each kind of encoder has tensors that no other kind has.
    if "embeddings.word_embeddings.weight" in tensors:
        return _guess_bert(tensors)
    if {_SWIN_TABLE, "patch_embed.proj.weight"} <= tensors.keys():
        return _guess_swin(tensors)
    if "layer1.0.conv1.weight" in tensors:
        return _guess_resnet(tensors)
    if {"stem.conv1.conv.weight", "stages.0.blocks.0.conv1.conv.weight"} <= tensors.keys():
        return _guess_darknet(tensors)
    if {"cls_token", "blocks.0.attn.qkv.weight"} <= tensors.keys():
        return f"a ViT of width {tensors['cls_token'].shape[-1]}"
    return None


def _guess_bert(tensors: Mapping[str, Tensor]) -> str:
    words, width = tensors["embeddings.word_embeddings.weight"].shape
    layers = _count_numbered(tensors, "encoder.layer.")
    return f"a BERT of {layers} layers, width {width}, {words} words"


_SWIN_TABLE = "layers.0.blocks.0.attn.relative_position_bias_table"
_SWIN_SIZES = {
    (96, (2, 2, 6, 2)): "tiny",
    (96, (2, 2, 18, 2)): "small",
    (128, (2, 2, 18, 2)): "base",
    (192, (2, 2, 18, 2)): "large",
}
# Image size that timm's model of a window size is for.
_SWIN_PIXELS = {7: 224, 12: 384}


def _guess_swin(tensors: Mapping[str, Tensor]) -> str:
    width = tensors["patch_embed.proj.weight"].shape[0]
    stages = range(_count_numbered(tensors, "layers."))
    depths = tuple(_count_numbered(tensors, f"layers.{stage}.blocks.") for stage in stages)
    window = ((_table_side(tensors[_SWIN_TABLE]) or 1) + 1) // 2

    size, pixels = _SWIN_SIZES.get((width, depths)), _SWIN_PIXELS.get(window)
    if size and pixels:
        return f"swin_{size}_patch4_window{window}_{pixels}"
    return f"a Swin of width {width}, depths {depths}, window {window}"


_RESNET_LAYERS = {
    ("BasicBlock", (2, 2, 2, 2)): 18,
    ("BasicBlock", (3, 4, 6, 3)): 34,
    ("Bottleneck", (3, 4, 6, 3)): 50,
    ("Bottleneck", (3, 4, 23, 3)): 101,
    ("Bottleneck", (3, 8, 36, 3)): 152,
}


def _guess_resnet(tensors: Mapping[str, Tensor]) -> str:
    blocks = tuple(_count_numbered(tensors, f"layer{stage}.") for stage in range(1, 5))
    kind = "Bottleneck" if "layer1.0.conv3.weight" in tensors else "BasicBlock"
    layers = _RESNET_LAYERS.get((kind, blocks))
    return f"resnet{layers}" if layers else f"a ResNet of {blocks} blocks"


def _guess_darknet(tensors: Mapping[str, Tensor]) -> str:
    blocks = tuple(_count_numbered(tensors, f"stages.{stage}.blocks.") for stage in range(5))
    return "darknet53" if blocks == (1, 2, 8, 8, 4) else f"a Darknet of {blocks} blocks"


def _count_numbered(names: Collection[str], prefix: str) -> int:
    """Count the different numbers that follow the prefix in the names."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    matches = [pattern.match(name) for name in names]
    return len({found[1] for found in matches if found})


def _table_side(table: Tensor) -> int | None:
    """Return the side of a square table, or None if its number of entries is not a square."""
    side = round(table.shape[0] ** 0.5)
    return side if side * side == table.shape[0] else None
