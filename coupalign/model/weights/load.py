"""Load weights into a model: pretrained encoders from local files and the hub, our own checkpoints.

Every loader takes the same five steps, and raises before the last one if anything is wrong:

    locate          find the file: a path, a folder, or a name on the hub      files.py
    read_tensors    read it: {name in the file: tensor}                        files.py, darknet.py
    match_tensors   translate the names, pair the tensors by name and shape    names.py, match.py
    check           refuse missing, unexpected, reshaped and damaged tensors   load.py
    copy            fill the model, and return a LoadReport                    load.py, report.py

Only names may differ between a file and an encoder. Every tensor that the encoder needs must be in
the file in its shape, and nothing else that matters. Published weights come through the Hugging
Face hub, where timm and transformers keep theirs, so this package needs neither of them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from coupalign.config.schema import BertText, ModelConfig, TimmBackbone
from coupalign.errors import InputError
from coupalign.model.weights.darknet import adapt_to_normalized_pixels, is_darknet
from coupalign.model.weights.detectors import describe_leak
from coupalign.model.weights.files import locate, read_tensors, read_weights, write_weights
from coupalign.model.weights.match import TensorMatch, match_tensors
from coupalign.model.weights.names import (
    EXACT_NAMES,
    IMAGE_NAMES,
    OUR_IMAGE_PREFIX,
    TEXT_NAMES,
    guess_contents,
)
from coupalign.model.weights.report import LoadReport, random_report

if TYPE_CHECKING:
    from coupalign.model.base import ReferringModel

__all__ = [
    "LoadReport",
    "load_image_weights",
    "load_model_weights",
    "load_pretrained",
    "load_text_weights",
    "random_shape_source",
    "read_weights",
    "write_weights",
]

_IMAGE_FIELD, _TEXT_FIELD = "model.image.weights", "model.text.weights"
_WORD_EMBEDDINGS = "embeddings.word_embeddings.weight"
_RANDOM_PREFIX = "random:"
_NOT_PUBLISHED = "there are no published weights for the small encoder"


def load_pretrained(model: ReferringModel, config: ModelConfig) -> list[LoadReport]:
    """Load the pretrained weights of both encoders that the config names.

    Returns:
        one report per encoder, for the caller to print.

    Raises:
        InputError: the config names weights that cannot be loaded. There is never a silent random
            start.
    """
    match config.image:
        case TimmBackbone(weights=str(source), name=name):
            image = load_image_weights(model.image.net, name, source)
        case TimmBackbone(name=name):
            remedy = f"set it to a file, or to 'hub' for timm's weights of {name}"
            image = random_report("image", f"{_IMAGE_FIELD} is empty: {remedy}")
        case _:
            image = random_report("image", _NOT_PUBLISHED)

    match config.text:
        case BertText(weights=source) if random_shape_source(source):
            text = random_report("text", f"asked for by {_TEXT_FIELD}={source}")
        case BertText(weights=source):
            text = load_text_weights(model.text.bert, source)
        case _:
            text = random_report("text", _NOT_PUBLISHED)

    return [image, text]


def random_shape_source(weights: str) -> str | None:
    """Return the folder or hub name of "random:FOLDER_OR_NAME", or None without that prefix.

    That BERT gives the shape of the encoder, but not the weights.
    """
    if not weights.startswith(_RANDOM_PREFIX):
        return None
    return weights.removeprefix(_RANDOM_PREFIX)


def load_image_weights(net: nn.Module, name: str, source: str) -> LoadReport:
    """Load a timm encoder from an official Swin, timm, torchvision or Darknet file, or one of ours.

    Args:
        net: timm model, with or without its classifier and final norm.
        name: its timm name, for messages.
        source: a local file or folder, "hub" for timm's own weights of this model, or a hub name
            ("timm/resnet101.tv_in1k").

    Raises:
        InputError: the weights do not exist, or belong to another model. The message names the
            first differing tensors.
    """
    if source == "hub":
        source = _hub_name(net, name)
    path = locate(source, _IMAGE_FIELD)
    tensors = read_tensors(path)

    # Refuse the weights of another model, and say which one they look like.
    match = match_tensors(net.state_dict(), tensors, IMAGE_NAMES)
    if match.has_differences:
        guess = guess_contents(tensors)
        same_architecture = guess == name.split(".")[0]
        likeness = "" if same_architecture else _describe_guess(guess)
        raise InputError(
            f"{path}: these are not the weights of {name}{likeness}.\n"
            f"{match.differences()}\n"
            f"Nothing was loaded. Set {_IMAGE_FIELD} to weights of {name}, "
            "or model.image.name to the model in the file."
        )

    if is_darknet(path):
        match.notes += adapt_to_normalized_pixels(match.values, net)

    return _copy(match, "image", path, tensors)


def load_text_weights(bert: nn.Module, source: str) -> LoadReport:
    """Load a Hugging Face BERT from its folder, one of its files, or by its hub name.

    Args:
        bert: `Bert` or `transformers.BertModel`, with or without pooler.
        source: folder with model.safetensors or pytorch_model.bin, such a file, weights of ours, or
            a hub name.

    Raises:
        InputError: the weights do not exist, or belong to another vocabulary or another model.
    """
    path = locate(source, _TEXT_FIELD)
    tensors = read_tensors(path)

    match = match_tensors(bert.state_dict(), tensors, TEXT_NAMES)

    # If only the vocabulary differs, the tokenizer is wrong and not the weights.
    if _WORD_EMBEDDINGS in match.reshaped:
        old_shape, new_shape = match.reshaped[_WORD_EMBEDDINGS]
        if old_shape[1:] == new_shape[1:]:
            raise InputError(
                f"{path}: its vocabulary has {old_shape[0]} words, "
                f"the tokenizer's has {new_shape[0]}. Nothing was loaded. Set data.tokenizer "
                "to the tokenizer of these weights (the same folder or hub name)."
            )

    if match.has_differences:
        likeness = _describe_guess(guess_contents(tensors))
        raise InputError(
            f"{path}: these are not the weights of this BERT{likeness}.\n"
            f"{match.differences()}\n"
            f"Nothing was loaded. Set {_TEXT_FIELD} to the folder of a BERT."
        )

    return _copy(match, "text", path, tensors)


def load_model_weights(
    model: nn.Module, state: Mapping[str, Tensor], source: str = "checkpoint"
) -> None:
    """Load a whole model from its own weights: the same names and shapes, nothing more or less.

    Args:
        model: the model to fill.
        state: its tensors by name.
        source: where they are from, for messages.

    Raises:
        InputError: the weights belong to another model. The message names the first differing
            tensors, and nothing is loaded.
    """
    match = match_tensors(model.state_dict(), state, EXACT_NAMES)
    if match.has_differences:
        raise InputError(
            f"{source}: these weights belong to another model than the config describes.\n"
            f"{match.differences()}\n"
            "Nothing was loaded. Use the config next to the weights."
        )
    _fill(match)


def _hub_name(net: nn.Module, name: str) -> str:
    """Return the hub name of timm's own weights for a model."""
    pretrained = getattr(net, "pretrained_cfg", None) or {}
    hub_name = pretrained.get("hf_hub_id")
    if not hub_name:
        raise InputError(
            f"{_IMAGE_FIELD}=hub: timm publishes no weights for {name}; give a local file"
        )
    return hub_name


def _describe_guess(guess: str | None) -> str:
    return f"; they look like {guess}" if guess else ""


def _copy(match: TensorMatch, part: str, path: Path, names: Collection[str]) -> LoadReport:
    """Check every tensor for NaN or infinity, then copy all of them. Returns a report."""
    for name, value in match.values.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise InputError(
                f"{path}: {name} holds NaN or infinity; the file is damaged. Nothing was loaded."
            )
    _fill(match)

    resized = {name for name, _, _ in match.interpolated}
    copied = match.values.keys() - resized
    return LoadReport(
        part=part,
        source=str(path),
        loaded=tuple(name for name in match.target if name in copied),
        interpolated=tuple(match.interpolated),
        left_out=tuple(match.left_out),
        missing=tuple(match.not_in_file),
        notes=tuple(match.notes),
        leak=describe_leak(names),
        is_ours=any(name.startswith(OUR_IMAGE_PREFIX) for name in names),
    )


def _fill(match: TensorMatch) -> None:
    """Copy the matching tensors into the model."""
    with torch.no_grad():
        for name, value in match.values.items():
            match.target[name].copy_(value)
