"""Selective checkpointing: which results are kept, and that dropout repeats its draws.

test_backbone.py and test_text.py check that it changes no gradient of the encoders.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy

from coupalign.config.schema import SmallText
from coupalign.model.recompute import _policy
from coupalign.model.text import StagedText

aten = torch.ops.aten
EFFICIENT_ATTENTION = aten._scaled_dot_product_efficient_attention.default
FLASH_ATTENTION = aten._scaled_dot_product_flash_attention.default
QKV = (torch.zeros(1, 1, 2, 8),) * 3


@pytest.mark.parametrize(
    "operator, inputs, options, kept",
    [
        (aten.mm.default, (), {}, True),
        (aten.convolution.default, (), {}, True),
        (aten.gelu.default, (), {}, False),
        (aten.native_layer_norm.default, (), {}, False),
        (aten.bernoulli.default, (), {}, False),
        (EFFICIENT_ATTENTION, (*QKV, None, True), {}, True),
        (EFFICIENT_ATTENTION, (*QKV, None, True, 0.1), {}, False),
        (FLASH_ATTENTION, QKV, {}, True),
        (FLASH_ATTENTION, QKV, {"dropout_p": 0.1}, False),
    ],
)
def test_selective_keeps_products_and_recomputes_what_draws_random_numbers(
    operator, inputs, options, kept
):
    expected = CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    assert _policy(None, operator, *inputs, **options) is expected


def test_selective_recomputation_repeats_dropout():
    gradients = []
    for checkpointing in (False, "selective"):
        config = SmallText(width=16, heads=2, dropout=0.3, checkpointing=checkpointing)
        torch.manual_seed(0)
        text = StagedText(config, 50).train()
        words, mask = torch.randint(0, 50, (2, 5)), torch.ones(2, 5, dtype=torch.bool)

        torch.manual_seed(1)
        states = text.embed(words, mask)
        for group in range(4):
            states = text(group, states, mask)
        states.square().sum().backward()
        gradients.append([p.grad for p in text.parameters() if p.grad is not None])

    torch.testing.assert_close(*gradients)
