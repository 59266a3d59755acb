"""SentenceMaskAlignment against its formula."""

from __future__ import annotations

import pytest
import torch

from coupalign.model.sma import SentenceMaskAlignment


@pytest.mark.parametrize("scaled", [False, True])
def test_sma_equals_its_formula(scaled: bool):
    torch.manual_seed(0)
    sma = SentenceMaskAlignment(6, 10, scaled).double()
    q = torch.randn(2, 5, 6, dtype=torch.float64)
    sentence = torch.randn(2, 10, dtype=torch.float64)
    y = torch.randn(2, 6, 3, 4, dtype=torch.float64)

    # One sample and one mask at a time.
    root = 6**0.5
    expected = y.clone()
    for b in range(2):
        agreement = [q[b, n] @ sma.project_sentence(sentence[b]) / root for n in range(5)]
        a = torch.stack(agreement).softmax(0)
        for n in range(5):
            product = torch.einsum("d,dhw->hw", q[b, n], y[b])
            signal = torch.sigmoid(product / (root if scaled else 1))
            expected[b] += a[n] * signal * sma.project_masks(q[b, n])[:, None, None]

    torch.testing.assert_close(sma(q, sentence, y), expected, check_stride=False)
