"""Weights into a model: pretrained encoders from local files and the hub, our own checkpoints.

Names in files differ (`weights_names.py`), never what must be in them: every tensor the encoder needs has to be there in
its shape, and nothing else that matters (`weights_match.py`). All of it is compared before the first number is copied, so
a wrong file changes nothing. Published weights are fetched through the Hugging Face hub, where timm and transformers
keep theirs (`weights_files.py`), so this part needs neither of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from coupalign.config.schema import BertText, ModelConfig, TimmBackbone
from coupalign.errors import InputError
from coupalign.model.weights.darknet import adapt, is_darknet
from coupalign.model.weights.detectors import leak_of
from coupalign.model.weights.files import locate, read_tensors, read_weights, write_weights
from coupalign.model.weights.match import TensorMatch, match_tensors
from coupalign.model.weights.names import IMAGE_NAMING, TEXT_NAMING, looks_like
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
_WORDS = "embeddings.word_embeddings.weight"
_RANDOM = "random:"


def load_pretrained(model: ReferringModel, config: ModelConfig) -> list[LoadReport]:
    """Load the encoders' weights that the config names; returns one report an encoder, for the caller to print.

    Raises:
        InputError: weights are named but cannot be loaded: never a silent random start.
    """
    match config.image:
        case TimmBackbone(weights=str(source), name=name):
            image = load_image_weights(model.image.net, name, source)
        case TimmBackbone(name=name):
            image = random_report(
                "image",
                f"{_IMAGE_FIELD} is empty: set it to a file, or to 'hub' for timm's weights of {name}",
            )
        case _:
            image = random_report("image", "there are no published weights for the small encoder")
    match config.text:
        case BertText(weights=source) if random_shape_source(source):
            text = random_report("text", f"asked for by {_TEXT_FIELD}={source}")
        case BertText(weights=source):
            text = load_text_weights(model.text.bert, source)
        case _:
            text = random_report("text", "there are no published weights for the small encoder")
    return [image, text]


def random_shape_source(weights: str) -> str | None:
    """The folder or hub name in "random:FOLDER_OR_NAME", whose BERT gives the shape but not the weights; None: no such prefix."""
    return weights.removeprefix(_RANDOM) if weights.startswith(_RANDOM) else None


def load_image_weights(net: nn.Module, name: str, source: str) -> LoadReport:
    """Load a timm encoder from an official Swin, timm, torchvision or Darknet file, or from weights of ours.

    Args:
        net: timm model; its classifier and final norm may be gone.
        name: its timm name, for messages.
        source: a local file or folder, "hub" for timm's own weights of this model, or a hub name ("timm/resnet101.tv_in1k").

    Raises:
        InputError: no such weights, or those of another model; the message names the first differing tensors.
    """
    if source == "hub":
        published = getattr(net, "pretrained_cfg", None) or {}
        source = published.get("hf_hub_id") or ""
        if not source:
            raise InputError(
                f"{_IMAGE_FIELD}=hub: timm publishes no weights for {name}; give a local file"
            )
    path = locate(source, _IMAGE_FIELD)
    found = read_tensors(path)
    fit = match_tensors(net.state_dict(), found, IMAGE_NAMING)
    if fit.wrong:
        raise InputError(
            f"{path}: these are not the weights of {name}{_likeness(found, name)}.\n{fit.differences()}\n"
            f"Nothing was loaded. Set {_IMAGE_FIELD} to weights of {name}, or model.image.name to what the file holds."
        )
    if is_darknet(path):
        fit.notes += adapt(fit.values, net)
    return _copy(fit, "image", path, leak_of(found))


def load_text_weights(bert: nn.Module, source: str) -> LoadReport:
    """Load a Hugging Face BERT from its folder, one of its files, or by its hub name.

    Args:
        bert: `Bert` or `transformers.BertModel`, with or without pooler.
        source: folder with model.safetensors or pytorch_model.bin, such a file, weights of ours, or a hub name.

    Raises:
        InputError: no such weights, another vocabulary, or another model.
    """
    path = locate(source, _TEXT_FIELD)
    found = read_tensors(path)
    fit = match_tensors(bert.state_dict(), found, TEXT_NAMING)
    words = fit.reshaped.get(_WORDS)
    if words and words[0][1:] == words[1][1:]:
        raise InputError(
            f"{path}: its vocabulary has {words[0][0]} words, the tokenizer's has {words[1][0]}. Nothing was loaded. "
            f"Set data.tokenizer to the tokenizer of these weights (the same folder or hub name)."
        )
    if fit.wrong:
        raise InputError(
            f"{path}: these are not the weights of this BERT{_likeness(found)}.\n{fit.differences()}\n"
            f"Nothing was loaded. Set {_TEXT_FIELD} to the folder of a BERT."
        )
    return _copy(fit, "text", path, leak_of(found))


def load_model_weights(
    model: nn.Module, state: Mapping[str, Tensor], source: str = "checkpoint"
) -> None:
    """Load a whole model from its own weights: every name, every shape, nothing else.

    Raises:
        InputError: the weights of another model; names the first differing tensors and loads nothing.
    """
    fit = match_tensors(model.state_dict(), state, naming=None)
    if fit.wrong:
        raise InputError(
            f"{source}: these are the weights of another model than the config describes.\n{fit.differences()}\n"
            f"Nothing was loaded. Use the config that lies beside the weights."
        )
    _assign(fit)


def _copy(fit: TensorMatch, part: str, path: Path, leak: str) -> LoadReport:
    """Copy what fits, after a look for numbers that are none; returns the report."""
    for name, value in fit.values.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise InputError(
                f"{path}: {name} holds NaN or infinity; the file is damaged. Nothing was loaded."
            )
    _assign(fit)
    resized = {name for name, _, _ in fit.interpolated}
    return LoadReport(
        part,
        str(path),
        tuple(name for name in fit.target if name in fit.values and name not in resized),
        tuple(fit.interpolated),
        tuple(fit.left_out),
        tuple(fit.kept),
        tuple(fit.notes),
        leak,
    )


def _assign(fit: TensorMatch) -> None:
    with torch.no_grad():
        for name, value in fit.values.items():
            fit.target[name].copy_(value)


def _likeness(found: Mapping[str, Tensor], name: str = "") -> str:
    likeness = looks_like(found)
    return f"; they look like {likeness}" if likeness and likeness != name.split(".")[0] else ""
