"""Mask generator, sentence-mask alignment and pixel decoder: shapes, definitions, symmetries."""

from __future__ import annotations

import pytest
import torch

from coupalign.config.schema import ProposalsConfig
from coupalign.errors import InputError
from coupalign.model.decoder import MaskHead, PixelDecoder
from coupalign.model.proposals import MaskProposals, sine_positions
from coupalign.model.sma import SentenceMaskAlignment, sentence_state

SIZES = ProposalsConfig(count=5, layers=2, heads=2, ffn=16)


@pytest.mark.parametrize("channels", [(12,), (8, 12)])
def test_proposals_follow_a_permutation_of_the_queries(channels):
    torch.manual_seed(0)
    proposals = MaskProposals(channels, 16, SIZES).double()
    maps = [torch.randn(2, 3 + i, 3 + i, c, dtype=torch.float64) for i, c in enumerate(channels)]
    before = proposals(maps)
    with torch.no_grad():
        proposals.queries.copy_(proposals.queries.flip(0))
    assert before.shape == (2, 5, 16)
    torch.testing.assert_close(proposals(maps), before.flip(1))


def test_proposals_see_where_pixels_are():
    torch.manual_seed(0)
    proposals = MaskProposals((12,), 16, SIZES)
    pixels = torch.randn(1, 4, 4, 12)
    assert not torch.allclose(proposals([pixels]), proposals([pixels.flip(2)]), atol=1e-3)


def test_sine_positions_are_distinct_and_separable():
    grid = sine_positions(6, 7, 16, torch.device("cpu")).view(6, 7, 16)
    assert torch.equal(grid[:, :1, :8].expand(-1, 7, -1), grid[..., :8])
    assert torch.equal(grid[:1, :, 8:].expand(6, -1, -1), grid[..., 8:])
    assert torch.cdist(grid.flatten(0, 1), grid.flatten(0, 1)).add(torch.eye(42) * 9).min() > 0.05


def test_widths_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="multiple of 4"):
        MaskProposals((12,), 18, SIZES)


@pytest.mark.parametrize("scaled", [False, True])
def test_sma_equals_its_formula(scaled: bool):
    torch.manual_seed(0)
    sma = SentenceMaskAlignment(6, 10, scaled).double()
    q, sentence, y = (
        torch.randn(*s, dtype=torch.float64) for s in ((2, 5, 6), (2, 10), (2, 6, 3, 4))
    )
    want = y.clone()
    for b in range(2):
        a = torch.stack(
            [q[b, n] @ sma.project_sentence(sentence[b]) / 6**0.5 for n in range(5)]
        ).softmax(0)
        for n in range(5):
            signal = torch.sigmoid(
                torch.einsum("d,dhw->hw", q[b, n], y[b]) / (6**0.5 if scaled else 1)
            )
            want[b] += a[n] * signal * sma.project_masks(q[b, n])[:, None, None]
    torch.testing.assert_close(sma(q, sentence, y), want, check_stride=False)


def test_sentence_state_of_cls_and_mean():
    words = torch.randn(2, 4, 3)
    mask = torch.tensor([[True, True, False, False], [False] * 4])
    words = words * mask[..., None]
    assert torch.equal(sentence_state(words, mask, "cls"), words[:, 0])
    mean = sentence_state(words, mask, "mean")
    torch.testing.assert_close(mean[0], words[0, :2].mean(0))
    assert not mean[1].any()


def test_decoder_and_head_do_not_depend_on_the_batch():
    torch.manual_seed(0)
    decoder, head = PixelDecoder((8, 12, 16, 20), 16), MaskHead(16)
    maps = [torch.randn(3, 16 >> i, 16 >> i, c) for i, c in enumerate((8, 12, 16, 20))]
    y = decoder(maps)
    logits = head(y)
    assert y.shape == (3, 16, 16, 16) and logits.shape == (3, 1, 16, 16)
    torch.testing.assert_close(
        head(decoder([m[1:2] for m in maps])), logits[1:2], rtol=1e-4, atol=1e-5
    )
    assert (y < 0).any(), "the mask signals need both signs"
