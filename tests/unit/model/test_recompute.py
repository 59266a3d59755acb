"""What selective recomputation keeps; that it changes no number of the encoders is tested in test_backbone.py and test_text.py."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy

from coupalign.config.schema import SmallText
from coupalign.model.recompute import _policy
from coupalign.model.text import StagedText

aten = torch.ops.aten
QKV = (torch.zeros(1, 1, 2, 8),) * 3


@pytest.mark.parametrize(
    "operator, inputs, more, kept",
    [
        (aten.mm.default, (), {}, True),
        (aten.convolution.default, (), {}, True),
        (aten.gelu.default, (), {}, False),
        (aten.native_layer_norm.default, (), {}, False),
        (aten.bernoulli.default, (), {}, False),
        (aten._scaled_dot_product_efficient_attention.default, (*QKV, None, True), {}, True),
        (aten._scaled_dot_product_efficient_attention.default, (*QKV, None, True, 0.1), {}, False),
        (aten._scaled_dot_product_flash_attention.default, QKV, {}, True),
        (aten._scaled_dot_product_flash_attention.default, QKV, {"dropout_p": 0.1}, False),
    ],
)
def test_products_are_kept_and_what_draws_random_numbers_is_not(operator, inputs, more, kept):
    found = _policy(None, operator, *inputs, **more)
    assert found is (CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE)


def test_what_was_dropped_is_dropped_again():
    gradients = []
    for checkpointing in (False, "selective"):
        torch.manual_seed(0)
        text = StagedText(
            SmallText(width=16, heads=2, dropout=0.3, checkpointing=checkpointing), 50
        ).train()
        words, mask = torch.randint(0, 50, (2, 5)), torch.ones(2, 5, dtype=torch.bool)
        torch.manual_seed(1)
        states = text.embed(words, mask)
        for group in range(4):
            states = text(group, states, mask)
        states.square().sum().backward()
        gradients.append(
            [parameter.grad for parameter in text.parameters() if parameter.grad is not None]
        )
    torch.testing.assert_close(*gradients)
