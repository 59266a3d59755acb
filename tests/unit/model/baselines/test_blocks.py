"""Blocks that VLT and LTS share, against their formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from coupalign.model.baselines.blocks import (
    MaskDecoder,
    SentenceFusion,
    average_words,
    enlarge_logits,
)


@pytest.mark.parametrize("act", [torch.tanh, torch.relu])
@torch.no_grad()
def test_sentence_is_multiplied_into_three_stages(act):
    torch.manual_seed(0)
    fusion = SentenceFusion((3, 4, 5), 6, 8, act=act)
    stages = [torch.randn(1, side, side, c) for side, c in ((8, 3), (4, 4), (2, 5))]
    sentence = torch.randn(1, 6)

    products = []
    for see, say, stage in zip(fusion.pixels, fusion.sentences, stages):
        pixels = act(F.layer_norm(stage @ see[0].weight.T + see[0].bias, (8,)))
        filters = act(F.layer_norm(say[0].weight @ sentence[0] + say[0].bias, (8,)))
        products.append((pixels * filters).permute(0, 3, 1, 2))
    halved = products[0].unflatten(2, (4, 2)).unflatten(4, (4, 2)).mean((3, 5))
    doubled = F.interpolate(products[2], scale_factor=2, mode="bilinear")
    merged = torch.cat([halved, products[1], doubled], 1)
    expected = F.relu(fusion.smooth(fusion.mix(merged)))

    assert torch.allclose(fusion(stages, sentence), expected, atol=1e-5)


def test_average_words_ignores_padding_and_is_zero_without_words():
    words = torch.randn(2, 4, 3)
    mask = torch.tensor([[True, True, False, False], [False] * 4])
    words = words * mask[..., None]

    sentence = average_words(words, mask)

    torch.testing.assert_close(sentence[0], words[0, :2].mean(0))
    assert not sentence[1].any()


def test_mask_decoder_and_enlarge_logits_give_full_size_float32_logits():
    decoder = MaskDecoder(6, 8)

    coarse = decoder(torch.randn(2, 6, 4, 4))
    logits = enlarge_logits(coarse.bfloat16(), 64)

    assert coarse.shape == (2, 1, 16, 16)
    assert logits.shape == (2, 64, 64) and logits.dtype == torch.float32
