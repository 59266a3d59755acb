"""BERT's encoder, with the parameter names of Hugging Face's files.

The layers are those of Devlin et al. (2019, section 3, https://arxiv.org/abs/1810.04805). They are
few, and `transformers.BertModel` takes longer to import than torch itself, so they are here.
Numbers and random start equal those of `transformers` bit for bit, which a test checks.

Shape legend: B batch, T words, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class BertShape:
    """The fields of a BERT's config.json that decide what it computes.

    The defaults are those of bert-base-uncased.

    Raises:
        ValueError: this encoder does not support a value.
    """

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
        if self.hidden_act != "gelu":
            raise ValueError(f"hidden_act {self.hidden_act!r} is not gelu")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )

    @classmethod
    def from_config(cls, values: dict[str, Any]) -> BertShape:
        """Take the shape from the content of a config.json, and ignore its other fields."""
        positions = values.get("position_embedding_type", "absolute")
        if positions != "absolute":
            raise ValueError(f"position_embedding_type {positions!r} is not absolute")

        names = [field.name for field in fields(cls)]
        return cls(**{name: values[name] for name in names if name in values})


class Bert(nn.Module):
    """Embeddings and layers, without pooler and heads.

    `forward` runs all layers; `StagedText` runs them group by group.
    """

    def __init__(self, config: BertShape):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.apply(self._initialize)

    def forward(self, words: Tensor, bias: Tensor | None = None) -> Tensor:
        """Encode token ids.

        Args:
            words: token ids, int64 [B, T].
            bias: added to the attention scores, [B, 1, 1, T].

        Returns:
            states [B, T, D].
        """
        states = self.embeddings(words)
        for layer in self.encoder.layer:
            states = layer(states, bias)
        return states

    def _initialize(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            nn.init.zeros_(module.weight[module.padding_idx])


class Embeddings(nn.Module):
    """Sum of token, token type (always the first) and position embeddings, normalized."""

    def __init__(self, config: BertShape):
        super().__init__()
        width, positions = config.hidden_size, config.max_position_embeddings
        self.word_embeddings = nn.Embedding(
            config.vocab_size, width, padding_idx=config.pad_token_id
        )
        self.position_embeddings = nn.Embedding(positions, width)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, width)
        self.LayerNorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.register_buffer("position_ids", torch.arange(positions)[None], persistent=False)

    def forward(self, words: Tensor) -> Tensor:
        """[B, T] -> [B, T, D]."""
        positions = self.position_ids[:, : words.shape[1]]  # [1, T]
        states = self.word_embeddings(words) + self.token_type_embeddings(torch.zeros_like(words))
        states = states + self.position_embeddings(positions)
        return self.dropout(self.LayerNorm(states))


class Encoder(nn.Module):
    """The list of layers. It exists because Hugging Face's names are `encoder.layer.0…`."""

    def __init__(self, config: BertShape):
        super().__init__()
        self.layer = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))


class Layer(nn.Module):
    """Self-attention, then a feed-forward network with GELU, each post-norm."""

    def __init__(self, config: BertShape):
        super().__init__()
        self.attention = SelfAttention(config)
        self.intermediate = nn.Module()
        self.intermediate.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.output = AddNorm(config, config.intermediate_size)

    def forward(self, states: Tensor, bias: Tensor | None = None) -> Tensor:
        """[B, T, D] -> the same shape."""
        states = self.attention(states, bias)
        hidden = F.gelu(self.intermediate.dense(states))
        return self.output(hidden, states)


class SelfAttention(nn.Module):
    """Multi-head self-attention with its residual and norm."""

    def __init__(self, config: BertShape):
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.dropout = config.attention_probs_dropout_prob
        # Hugging Face calls these projections `attention.self.query` and so on.
        self.self = nn.Module()
        self.self.query = nn.Linear(width, width)
        self.self.key = nn.Linear(width, width)
        self.self.value = nn.Linear(width, width)
        self.output = AddNorm(config, width)

    def forward(self, states: Tensor, bias: Tensor | None) -> Tensor:
        """[B, T, D] -> the same shape."""
        # Project the input to queries, keys and values, and move the heads next to the batch.
        query = self._split_heads(self.self.query(states))  # [B, heads, T, D / heads]
        key = self._split_heads(self.self.key(states))
        value = self._split_heads(self.self.value(states))

        dropout = self.dropout if self.training else 0.0
        read = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout)

        read = read.transpose(1, 2).flatten(2)  # [B, T, D]
        return self.output(read, states)

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


class AddNorm(nn.Module):
    """The end of a sublayer: a linear map, the residual, LayerNorm."""

    def __init__(self, config: BertShape, inputs: int):
        super().__init__()
        self.dense = nn.Linear(inputs, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """[B, T, inputs] and [B, T, D] -> [B, T, D]."""
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)
