"""StagedText: a BERT that runs in four consecutive groups of layers, one per image stage.

Shape legend: B batch, T words, D text width.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coupalign.config.schema import BertText, SmallText
from coupalign.errors import InputError
from coupalign.files import read_json, write_json
from coupalign.model.bert import Bert, BertShape
from coupalign.model.recompute import run_checkpointed

GROUPS = 4

# The score of a padded word. Its exponential is 0 in every type; unlike finfo.min, it stays finite
# when autocast rounds it to half precision.
MASKED_SCORE = -1e4


class StagedText(nn.Module):
    """BERT's layers in four groups, as equal as possible.

    12 layers become 3-3-3-3; earlier groups take the remainder. Padded words are zero after every
    group. The parameters keep the names of Hugging Face's files, in `self.bert`.

    Args:
        config: a published BERT or a small one. Weights are random here and loaded elsewhere.
        vocabulary: number of tokens of the tokenizer.
        groups: how many groups will ever run. The layers of the others are frozen, because nothing
            reads them.

    Raises:
        InputError: the tokenizer's vocabulary is not the encoder's, the folder or hub name cannot
            be read, or the width is not a multiple of the heads.
    """

    def __init__(self, config: BertText | SmallText, vocabulary: int, groups: int = GROUPS):
        super().__init__()
        self.bert = Bert(bert_shape(config, vocabulary))
        self.width: int = self.bert.config.hidden_size
        self.checkpointing = config.checkpointing

        bounds = _group_bounds(len(self.bert.encoder.layer))
        self.spans = list(zip(bounds[:-1], bounds[1:]))
        for layer in self.bert.encoder.layer[bounds[groups] :]:
            layer.requires_grad_(False)

    def embed(self, words: Tensor, word_mask: Tensor) -> Tensor:
        """Embed token ids, int64 [B, T] -> states [B, T, D], zero where `word_mask` is false."""
        return self.bert.embeddings(words) * word_mask[..., None]

    def forward(self, group: int, words: Tensor, word_mask: Tensor) -> Tensor:
        """Run the layers of one group.

        Args:
            group: 0 to 3.
            words: states [B, T, D].
            word_mask: bool [B, T], true at real tokens.

        Returns:
            states [B, T, D], zero where padded.
        """
        return run_checkpointed(
            self._run, group, words, word_mask, checkpointing=self.training and self.checkpointing
        )

    def _run(self, group: int, words: Tensor, word_mask: Tensor) -> Tensor:
        bias = torch.zeros_like(word_mask, dtype=words.dtype)
        bias = bias.masked_fill(~word_mask, MASKED_SCORE)[:, None, None]  # [B, 1, 1, T]

        first, last = self.spans[group]
        for layer in self.bert.encoder.layer[first:last]:
            words = layer(words, bias)
        return words * word_mask[..., None]


def bert_shape(config: BertText | SmallText, vocabulary: int) -> BertShape:
    """Return the sizes of the text encoder.

    `bert-base-uncased` needs no file and no network, because its sizes are the defaults.

    Raises:
        InputError: see `StagedText`.
    """
    match config:
        case SmallText():
            shape = _small_shape(config, vocabulary)
        case BertText():
            shape = _published_shape(config.weights)
            _check_published_shape(shape, config.weights, vocabulary)
    return replace(
        shape, hidden_dropout_prob=config.dropout, attention_probs_dropout_prob=config.dropout
    )


def vocabulary_size(config: BertText | SmallText) -> int:
    """Return how many tokens a published encoder knows.

    A small encoder takes its vocabulary from the data, so this assumes that of bert-base-uncased.
    """
    if isinstance(config, BertText):
        return _published_shape(config.weights).vocab_size
    return BertShape().vocab_size


def write_bert_config(config: BertText, vocabulary: int, folder: Path) -> None:
    """Write config.json of a published encoder to a folder.

    `weights: random:<folder>` then builds the encoder on machines without the original.
    """
    shape = bert_shape(config, vocabulary)
    values = {"model_type": "bert", "architectures": ["BertModel"], **asdict(shape)}
    write_json(folder / "config.json", values)


def _small_shape(config: SmallText, vocabulary: int) -> BertShape:
    if config.width % config.heads:
        raise InputError(
            f"model.text.width = {config.width} is not a multiple of "
            f"model.text.heads = {config.heads}"
        )
    return BertShape(
        vocab_size=vocabulary,
        hidden_size=config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        intermediate_size=4 * config.width,
    )


def _check_published_shape(shape: BertShape, weights: str, vocabulary: int) -> None:
    if shape.vocab_size != vocabulary:
        raise InputError(
            f"model.text.weights = {weights} has {shape.vocab_size} tokens, the tokenizer has "
            f"{vocabulary}; set data.tokenizer to the tokenizer of that encoder"
        )
    if shape.num_hidden_layers < GROUPS:
        raise InputError(
            f"model.text.weights = {weights} has {shape.num_hidden_layers} layers; "
            f"at least {GROUPS} are needed"
        )


def _published_shape(weights: str) -> BertShape:
    """Read the sizes of the encoder in a folder, or under a hub name."""
    weights = weights.removeprefix("random:")
    if weights == "bert-base-uncased" and not Path(weights).is_dir():
        return BertShape()

    try:
        values = _read_bert_config(weights)
        # Without these fields the defaults would turn any JSON file into bert-base.
        model_type = values.get("model_type", "bert")
        if model_type != "bert" or "hidden_size" not in values:
            raise ValueError(
                f"config.json: model_type {model_type}, hidden_size "
                f"{values.get('hidden_size', 'missing')}"
            )
        return BertShape.from_config(values)
    except (OSError, ValueError) as error:
        raise InputError(
            f"model.text.weights = {weights}: no BERT configuration found ({error}). Give a folder "
            f"with config.json, or a hub name that is cached or can be reached"
        ) from error


def _read_bert_config(weights: str) -> dict[str, Any]:
    path = Path(weights) / "config.json"
    if not Path(weights).is_dir():
        from huggingface_hub import hf_hub_download  # here, because its import is slow

        path = Path(hf_hub_download(weights, "config.json"))
    return read_json(path, "the configuration of a BERT")


def _group_bounds(layers: int) -> list[int]:
    """Return where the groups begin and end: 12 -> [0, 3, 6, 9, 12], 6 -> [0, 2, 4, 5, 6]."""
    size, rest = divmod(layers, GROUPS)
    return [size * group + min(group, rest) for group in range(GROUPS + 1)]
