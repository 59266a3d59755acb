"""Bert against the BertModel of transformers."""

from __future__ import annotations

from dataclasses import asdict

import torch
from transformers import BertConfig, BertModel

from coupalign.model.bert import Bert, BertShape

SHAPE = BertShape(
    vocab_size=70,
    hidden_size=16,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=32,
)


def test_bert_equals_transformers_bit_for_bit_in_start_output_and_gradients():
    """Dropout included: a seed gives the same numbers as with `transformers.BertModel`."""
    torch.manual_seed(3)
    ours = Bert(SHAPE).train()
    torch.manual_seed(3)
    config = BertConfig(**asdict(SHAPE), attn_implementation="sdpa")
    theirs = BertModel(config, add_pooling_layer=False).train()

    # The random start.
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    named = zip(ours.named_parameters(), theirs.named_parameters(), strict=True)
    for (name, p), (their_name, q) in named:
        assert name == their_name and torch.equal(p, q)

    # The output.
    words = torch.randint(0, 70, (3, 9))
    bias = torch.zeros(3, 1, 1, 9)
    bias[1, :, :, 4:] = -1e4
    torch.manual_seed(5)
    actual = ours(words, bias)
    torch.manual_seed(5)
    expected = theirs.embeddings(input_ids=words)
    for layer in theirs.encoder.layer:
        expected = layer(expected, bias)
    assert torch.equal(actual, expected)

    # The gradients.
    actual.square().sum().backward()
    expected.square().sum().backward()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_bert_shape_defaults_equal_those_of_transformers():
    theirs = BertConfig()

    assert {name: getattr(theirs, name) for name in asdict(BertShape())} == asdict(BertShape())


def test_bert_shape_ignores_other_fields_of_a_config():
    values = {"hidden_size": 24, "num_attention_heads": 2, "architectures": ["BertModel"]}

    assert BertShape.from_config(values) == BertShape(hidden_size=24, num_attention_heads=2)
