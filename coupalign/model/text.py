"""StagedText: a BERT run in four consecutive groups of layers, one beside each image stage.

Shape legend: B batch, T words, D text width.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coupalign.config.schema import BertText, SmallText
from coupalign.errors import InputError
from coupalign.files import write_json
from coupalign.model import recompute
from coupalign.model.bert import Bert, BertShape

GROUPS = 4
_ASSUMED = 30522  # tokens, bert-base-uncased's
_MASKED = -1e4  # exp() of it is 0 in every type; unlike finfo.min it stays finite when autocast rounds it to half precision


class StagedText(nn.Module):
    """BERT's layers in four groups, as equal as possible (12 layers: 3-3-3-3; earlier groups take the remainder).

    Padded words are zero after every group. The module keeps the names of Hugging Face's files below `self.bert`.

    Args:
        config: a published BERT or a small one with a random start; weights are loaded elsewhere.
        vocabulary: number of tokens of the tokenizer.
        groups: how many groups will ever be run; the layers of the others are frozen, since nothing reads them.

    Raises:
        InputError: the tokenizer's vocabulary is not the encoder's, the folder or name cannot be read, or the width
            is not a multiple of the heads.
    """

    def __init__(self, config: BertText | SmallText, vocabulary: int, groups: int = GROUPS):
        super().__init__()
        self.bert = Bert(bert_config(config, vocabulary))
        self.width: int = self.bert.config.hidden_size
        self.checkpointing = config.checkpointing
        bounds = _bounds(len(self.bert.encoder.layer))
        self.spans = list(zip(bounds[:-1], bounds[1:]))
        for layer in self.bert.encoder.layer[bounds[groups] :]:
            layer.requires_grad_(False)

    def embed(self, words: Tensor, word_mask: Tensor) -> Tensor:
        """Token numbers int64 [B, T] -> states [B, T, D], zero where `word_mask` (bool [B, T]) is false."""
        return self.bert.embeddings(words) * word_mask[..., None]

    def forward(self, group: int, words: Tensor, word_mask: Tensor) -> Tensor:
        """Run the layers of one group on states [B, T, D]; padded words neither act nor change from zero."""
        return recompute.run(
            self._run, group, words, word_mask, checkpointing=self.training and self.checkpointing
        )

    def _run(self, group: int, words: Tensor, word_mask: Tensor) -> Tensor:
        bias = torch.zeros_like(word_mask, dtype=words.dtype).masked_fill(~word_mask, _MASKED)[
            :, None, None
        ]  # [B, 1, 1, T]
        first, last = self.spans[group]
        for layer in self.bert.encoder.layer[first:last]:
            words = layer(words, bias)
        return words * word_mask[..., None]


def bert_config(config: BertText | SmallText, vocabulary: int) -> BertShape:
    """The sizes of the encoder; `bert-base-uncased` needs no file or network, because it is the default.

    Raises:
        InputError: see `StagedText`.
    """
    match config:
        case SmallText():
            if config.width % config.heads:
                raise InputError(
                    f"model.text.width = {config.width} is not a multiple of model.text.heads = {config.heads}"
                )
            sizes = BertShape(
                vocab_size=vocabulary,
                hidden_size=config.width,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                intermediate_size=4 * config.width,
            )
        case BertText():
            sizes = _published_config(config.weights)
            if sizes.vocab_size != vocabulary:
                raise InputError(
                    f"model.text.weights = {config.weights} has {sizes.vocab_size} tokens, "
                    f"the tokenizer has {vocabulary}; set data.tokenizer to the tokenizer of that encoder"
                )
            if sizes.num_hidden_layers < GROUPS:
                raise InputError(
                    f"model.text.weights = {config.weights} has {sizes.num_hidden_layers} layers; "
                    f"at least {GROUPS} are needed"
                )
    return replace(
        sizes, hidden_dropout_prob=config.dropout, attention_probs_dropout_prob=config.dropout
    )


def vocabulary_of(config: BertText | SmallText) -> int:
    """How many tokens a published encoder knows; of one of our own, whose tokenizer is made from the data, as many are assumed."""
    return (
        _published_config(config.weights).vocab_size if isinstance(config, BertText) else _ASSUMED
    )


def write_shape(config: BertText, vocabulary: int, folder: Path) -> None:
    """Write config.json of a published encoder, so that `weights: random:<folder>` builds it where the original is absent."""
    write_json(
        folder / "config.json",
        {
            "model_type": "bert",
            "architectures": ["BertModel"],
            **asdict(bert_config(config, vocabulary)),
        },
    )


def _published_config(weights: str) -> BertShape:
    weights = weights.removeprefix("random:")
    if weights == "bert-base-uncased" and not Path(weights).is_dir():
        return BertShape()
    try:
        sizes = _read_config(weights)
        # An empty folder gives no error but an empty configuration, which would mean bert-base.
        if sizes.get("model_type", "bert") != "bert" or "hidden_size" not in sizes:
            raise ValueError(f"config.json: model_type {sizes.get('model_type', 'none')}")
        return BertShape.of(sizes)
    except (OSError, ValueError) as error:
        raise InputError(
            f"model.text.weights = {weights}: no BERT configuration there; give a folder with config.json, "
            f"or a hub name that can be reached or is cached ({error})"
        ) from error


def _read_config(weights: str) -> dict[str, Any]:
    """What a folder's config.json says, or that of a hub name."""
    if Path(weights).is_dir():
        return json.loads((Path(weights) / "config.json").read_text(encoding="utf-8"))
    from huggingface_hub import hf_hub_download  # here, since its import takes long

    return json.loads(Path(hf_hub_download(weights, "config.json")).read_text(encoding="utf-8"))


def _bounds(layers: int) -> list[int]:
    """Where the groups begin and end: 12 -> [0, 3, 6, 9, 12], 6 -> [0, 2, 4, 5, 6]."""
    size, rest = divmod(layers, GROUPS)
    return [size * group + min(group, rest) for group in range(GROUPS + 1)]
