"""StagedText: equality with the whole BERT, padding, frozen groups, sizes and their errors."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertModel

from coupalign.config.schema import BertText, SmallText
from coupalign.errors import InputError
from coupalign.model.text import (
    StagedText,
    _group_bounds,
    bert_shape,
    vocabulary_size,
    write_bert_config,
)

SMALL = SmallText(width=16, layers=5, heads=2)


def run_groups(text: StagedText, words: Tensor, mask: Tensor) -> Tensor:
    state = text.embed(words, mask)
    for group in range(4):
        state = text(group, state, mask)
    return state


def test_four_groups_equal_the_whole_model():
    torch.manual_seed(0)
    text = StagedText(SMALL, 50).eval()
    words, mask = torch.randint(0, 50, (3, 9)), torch.ones(3, 9, dtype=torch.bool)
    mask[1, 4:] = False
    oracle = BertModel(BertConfig(**asdict(text.bert.config)), add_pooling_layer=False).eval()
    oracle.load_state_dict(text.bert.state_dict())

    actual = run_groups(text, words, mask)
    expected = oracle(input_ids=words, attention_mask=mask.long()).last_hidden_state

    torch.testing.assert_close(actual[mask], expected[mask], rtol=1e-5, atol=1e-6)
    assert not actual[~mask].any()


def test_sentence_of_padding_stays_finite_under_autocast():
    text = StagedText(SMALL, 50)
    words, mask = torch.randint(0, 50, (2, 5)), torch.zeros(2, 5, dtype=torch.bool)

    with torch.autocast("cpu", torch.bfloat16):
        out = run_groups(text, words, mask)
    out.sum().backward()

    assert not out.any()
    assert all(p.grad.isfinite().all() for p in text.parameters())


@pytest.mark.parametrize("checkpointing", [True, "selective"])
def test_checkpointing_keeps_gradients(checkpointing):
    torch.manual_seed(0)
    plain = StagedText(SMALL, 50)
    saving = StagedText(SMALL.model_copy(update={"checkpointing": checkpointing}), 50)
    saving.load_state_dict(plain.state_dict())
    words, mask = torch.randint(0, 50, (2, 5)), torch.ones(2, 5, dtype=torch.bool)

    for text in (plain, saving):
        run_groups(text, words, mask).square().sum().backward()

    for a, b in zip(plain.parameters(), saving.parameters()):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize(
    "layers, bounds", [(12, [0, 3, 6, 9, 12]), (4, [0, 1, 2, 3, 4]), (6, [0, 2, 4, 5, 6])]
)
def test_groups_are_as_equal_as_possible(layers, bounds):
    assert _group_bounds(layers) == bounds


def test_layers_of_unused_groups_are_frozen():
    text = StagedText(SMALL, 50, groups=2)

    frozen = {name.split(".")[3] for name, p in text.named_parameters() if not p.requires_grad}

    assert frozen == {"3", "4"}


def test_bert_base_shape_needs_no_network():
    shape = bert_shape(BertText(dropout=0.2), 30522)

    assert (shape.num_hidden_layers, shape.hidden_size, shape.hidden_dropout_prob) == (12, 768, 0.2)


def test_vocabulary_size_is_that_of_the_published_encoder(tmp_path):
    BertConfig(vocab_size=70).save_pretrained(tmp_path)

    assert vocabulary_size(BertText(weights=str(tmp_path))) == 70
    assert vocabulary_size(SMALL) == 30522, "as many as bert-base-uncased are assumed"


def test_bert_shape_is_read_from_a_folder_and_written_for_transformers(tmp_path):
    sizes = BertConfig(
        vocab_size=70,
        hidden_size=12,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=8,
    )
    sizes.save_pretrained(tmp_path)
    config = BertText(weights=str(tmp_path))
    copy = tmp_path / "copy"

    text = StagedText(config, 70)
    write_bert_config(config, 70, copy)

    assert text.width == 12 and text.bert.config.intermediate_size == 8
    assert BertConfig.from_pretrained(copy).hidden_size == 12
    assert bert_shape(BertText(weights=f"random:{copy}"), 70) == bert_shape(config, 70)


@pytest.mark.parametrize(
    "config, message",
    [
        (BertText(), "30522 tokens, the tokenizer has 99"),
        (SmallText(width=18, heads=4), "multiple of model.text.heads"),
    ],
)
def test_bert_shape_refuses_other_vocabularies_and_bad_widths(config, message):
    with pytest.raises(InputError, match=message):
        bert_shape(config, 99)


def test_bert_shape_refuses_a_folder_without_config(tmp_path):
    with pytest.raises(InputError, match="no BERT configuration found.*config.json: no such file"):
        bert_shape(BertText(weights=str(tmp_path)), 99)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"model_type": "roberta"}, "no BERT configuration found.*model_type roberta"),
        ({"hidden_act": "relu"}, "no BERT configuration found.*'relu' is not gelu"),
        ({"position_embedding_type": "relative_key"}, "'relative_key' is not absolute"),
        ({"num_attention_heads": 5}, "12 is not a multiple of num_attention_heads 5"),
    ],
)
def test_bert_shape_refuses_models_that_are_not_this_bert(values, message, tmp_path: Path):
    config = {"model_type": "bert", "hidden_size": 12, **values}
    (tmp_path / "config.json").write_text(json.dumps(config))

    with pytest.raises(InputError, match=message):
        bert_shape(BertText(weights=str(tmp_path)), 99)
