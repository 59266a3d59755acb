"""Bert against the BertModel of transformers, StagedText against both, padding, frozen groups, bad sizes."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from transformers import BertConfig, BertModel

from coupalign.config.schema import BertText, SmallText
from coupalign.errors import InputError
from coupalign.model.bert import Bert, BertShape
from coupalign.model.text import StagedText, _bounds, bert_config, write_shape

SMALL = SmallText(width=16, layers=5, heads=2)


def run(text: StagedText, words, mask):
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
    want = oracle(input_ids=words, attention_mask=mask.long()).last_hidden_state
    got = run(text, words, mask)
    torch.testing.assert_close(got[mask], want[mask], rtol=1e-5, atol=1e-6)
    assert not got[~mask].any()


def test_the_start_the_numbers_and_the_gradients_are_those_of_transformers_bit_for_bit():
    """Dropout included: whatever a seed gave with `transformers.BertModel` it gives with `Bert`."""
    shape = BertShape(
        vocab_size=70,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=32,
    )
    nets = []
    for build in (
        lambda: Bert(shape),
        lambda: BertModel(
            BertConfig(**asdict(shape), attn_implementation="sdpa"), add_pooling_layer=False
        ),
    ):
        torch.manual_seed(3)
        nets.append(build().train())
    ours, theirs = nets
    assert all(
        a == b and torch.equal(p, q)
        for (a, p), (b, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True)
    )
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    words, bias = torch.randint(0, 70, (3, 9)), torch.zeros(3, 1, 1, 9)
    bias[1, :, :, 4:] = -1e4
    torch.manual_seed(5)
    got = ours(words, bias)
    torch.manual_seed(5)
    want = theirs.embeddings(input_ids=words)
    for layer in theirs.encoder.layer:
        want = layer(want, bias)
    assert torch.equal(got, want)
    for out in (got, want):
        out.square().sum().backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(ours.parameters(), theirs.parameters()))


def test_a_sentence_of_padding_stays_finite_in_every_type():
    text = StagedText(SMALL, 50)
    words, mask = torch.randint(0, 50, (2, 5)), torch.zeros(2, 5, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16):
        out = run(text, words, mask)
    assert not out.any()
    out.sum().backward()
    assert all(p.grad.isfinite().all() for p in text.parameters())


@pytest.mark.parametrize("checkpointing", [True, "selective"])
def test_checkpointing_changes_nothing(checkpointing):
    torch.manual_seed(0)
    plain = StagedText(SMALL, 50)
    saving = StagedText(SMALL.model_copy(update={"checkpointing": checkpointing}), 50)
    saving.load_state_dict(plain.state_dict())
    words, mask = torch.randint(0, 50, (2, 5)), torch.ones(2, 5, dtype=torch.bool)
    for text in (plain, saving):
        run(text, words, mask).square().sum().backward()
    for a, b in zip(plain.parameters(), saving.parameters()):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize(
    "layers, bounds", [(12, [0, 3, 6, 9, 12]), (4, [0, 1, 2, 3, 4]), (6, [0, 2, 4, 5, 6])]
)
def test_groups_are_as_equal_as_possible(layers, bounds):
    assert _bounds(layers) == bounds


def test_layers_that_nothing_reads_are_frozen():
    text = StagedText(SMALL, 50, groups=2)
    frozen = {name.split(".")[3] for name, p in text.named_parameters() if not p.requires_grad}
    assert frozen == {"3", "4"}


def test_bert_base_needs_no_network():
    sizes = bert_config(BertText(dropout=0.2), 30522)
    assert (sizes.num_hidden_layers, sizes.hidden_size, sizes.hidden_dropout_prob) == (12, 768, 0.2)


def test_a_folder_gives_the_sizes(tmp_path):
    sizes = BertConfig(
        vocab_size=70,
        hidden_size=12,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=8,
    )
    sizes.save_pretrained(tmp_path)
    text = StagedText(BertText(weights=str(tmp_path)), 70)
    assert text.width == 12 and text.bert.config.intermediate_size == 8
    write_shape(text_config := BertText(weights=str(tmp_path)), 70, tmp_path / "again")
    assert BertConfig.from_pretrained(tmp_path / "again").hidden_size == 12, (
        "transformers reads what we write"
    )
    assert bert_config(BertText(weights=f"random:{tmp_path / 'again'}"), 70) == bert_config(
        text_config, 70
    )


def test_the_defaults_are_those_of_transformers():
    theirs = BertConfig()
    assert {name: getattr(theirs, name) for name in asdict(BertShape())} == asdict(BertShape())


def test_bad_sizes_are_named(tmp_path):
    with pytest.raises(InputError, match="30522 tokens, the tokenizer has 99"):
        bert_config(BertText(), 99)
    with pytest.raises(InputError, match="multiple of model.text.heads"):
        bert_config(SmallText(width=18, heads=4), 99)
    with pytest.raises(InputError, match="no BERT configuration there"):
        bert_config(BertText(weights=str(tmp_path)), 99)
    (tmp_path / "config.json").write_text('{"model_type": "roberta", "hidden_size": 12}')
    with pytest.raises(InputError, match="model_type roberta"):
        bert_config(BertText(weights=str(tmp_path)), 99)
    (tmp_path / "config.json").write_text(
        '{"model_type": "bert", "hidden_size": 12, "hidden_act": "relu"}'
    )
    with pytest.raises(InputError, match="no BERT configuration there.*'relu' is not gelu"):
        bert_config(BertText(weights=str(tmp_path)), 99)
    (tmp_path / "config.json").write_text(
        '{"model_type": "bert", "hidden_size": 12, "position_embedding_type": "relative_key"}'
    )
    with pytest.raises(InputError, match="'relative_key' is not absolute"):
        bert_config(BertText(weights=str(tmp_path)), 99)
    (tmp_path / "config.json").write_text(
        '{"model_type": "bert", "hidden_size": 12, "num_attention_heads": 5}'
    )
    with pytest.raises(InputError, match="12 is not a multiple of num_attention_heads 5"):
        bert_config(BertText(weights=str(tmp_path)), 99)
