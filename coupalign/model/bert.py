"""BERT's encoder: the layers of Devlin et al. (2019, section 3, https://arxiv.org/abs/1810.04805), under the names of Hugging Face's files.

Written here because it is small: `transformers.BertModel`, whose numbers and random start these are bit for bit (a test
compares them), takes longer to import than torch itself. Shape legend: B batch, T words, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class BertShape:
    """The fields of a BERT's config.json that say what it computes; the defaults are those of bert-base-uncased."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0

    def __post_init__(self) -> None:
        """Raises ValueError for what no encoder here computes."""
        if self.hidden_act != "gelu":
            raise ValueError(f"hidden_act {self.hidden_act!r} is not gelu")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )

    @classmethod
    def of(cls, values: dict[str, Any]) -> BertShape:
        """From the content of a config.json, whose other fields belong to other uses of BERT."""
        if (positions := values.get("position_embedding_type", "absolute")) != "absolute":
            raise ValueError(f"position_embedding_type {positions!r} is not absolute")
        return cls(
            **{field.name: values[field.name] for field in fields(cls) if field.name in values}
        )


class Bert(nn.Module):
    """Embeddings and layers, without pooler and heads; `forward` runs them all, `StagedText` some of them at a time."""

    def __init__(self, config: BertShape):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.apply(self._start)

    def forward(self, words: Tensor, bias: Tensor | None = None) -> Tensor:
        """Token numbers int64 [B, T], and what is added to the scores [B, 1, 1, T] -> states [B, T, D]."""
        states = self.embeddings(words)
        for layer in self.encoder.layer:
            states = layer(states, bias)
        return states

    def _start(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            nn.init.zeros_(module.weight[module.padding_idx])


class Embeddings(nn.Module):
    """Word + kind of sentence (always the first) + position, normalized."""

    def __init__(self, config: BertShape):
        super().__init__()
        self.word_embeddings = nn.Embedding(
            config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id
        )
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.register_buffer(
            "position_ids", torch.arange(config.max_position_embeddings)[None], persistent=False
        )

    def forward(self, words: Tensor) -> Tensor:
        """[B, T] -> [B, T, D]."""
        states = self.word_embeddings(words) + self.token_type_embeddings(torch.zeros_like(words))
        return self.dropout(
            self.LayerNorm(
                states + self.position_embeddings(self.position_ids[:, : words.shape[1]])
            )
        )


class Encoder(nn.Module):
    """The layers, for their names' sake."""

    def __init__(self, config: BertShape):
        super().__init__()
        self.layer = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))


class Layer(nn.Module):
    """Attention among the words, then two linear maps with a GELU between them."""

    def __init__(self, config: BertShape):
        super().__init__()
        self.attention = Attention(config)
        self.intermediate = nn.Module()
        self.intermediate.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.output = AddNorm(config, config.intermediate_size)

    def forward(self, states: Tensor, bias: Tensor | None = None) -> Tensor:
        """[B, T, D] -> the same shape."""
        states = self.attention(states, bias)
        return self.output(functional.gelu(self.intermediate.dense(states)), states)


class Attention(nn.Module):
    """Self-attention of several heads."""

    def __init__(self, config: BertShape):
        super().__init__()
        width = config.hidden_size
        self.heads, self.dropout = config.num_attention_heads, config.attention_probs_dropout_prob
        self.self = nn.Module()
        self.self.query, self.self.key, self.self.value = (
            nn.Linear(width, width) for _ in range(3)
        )
        self.output = AddNorm(config, width)

    def forward(self, states: Tensor, bias: Tensor | None) -> Tensor:
        """[B, T, D] -> the same shape."""
        query, key, value = (
            linear(states)
            .unflatten(2, (self.heads, -1))
            .transpose(1, 2)  # [B, heads, T, D / heads]
            for linear in (self.self.query, self.self.key, self.self.value)
        )
        read = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=bias, dropout_p=self.dropout if self.training else 0.0
        )
        return self.output(read.transpose(1, 2).flatten(2), states)


class AddNorm(nn.Module):
    """The end of a block: a linear map, added to what the block began with, normalized."""

    def __init__(self, config: BertShape, inputs: int):
        super().__init__()
        self.dense = nn.Linear(inputs, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        """[B, T, inputs] and [B, T, D] -> [B, T, D]."""
        return self.LayerNorm(self.dropout(self.dense(x)) + before)
