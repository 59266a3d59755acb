"""The spec of word-pixel attention against its definition written as loops, and its rules for padding."""

from __future__ import annotations

import pytest
import torch

from coupalign.errors import InputError
from coupalign.kernels import bidirectional_attention

SHAPES = [
    (1, 1, 1, 4, 1),
    (2, 63, 7, 8, 1),
    (3, 111, 20, 16, 2),
    (2, 225, 5, 12, 4),
]  # B, P, T, C, H


def operands(
    batch: int,
    pixels: int,
    words: int,
    channels: int,
    heads: int,
    dtype: torch.dtype = torch.float64,
    pad: bool = True,
):
    generator = torch.Generator().manual_seed(pixels)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    bias = draw(batch, heads, words)
    if pad and words > 2:
        bias[0, :, words // 2 :] = -torch.inf
    v, k, u = (
        draw(batch, pixels, channels),
        draw(batch, heads * words, channels),
        draw(batch, heads * words, channels),
    )
    return [x.requires_grad_() for x in (v, k, u, bias.flatten(1))]


def by_definition(v, k, u, bias, heads):
    """Image by image and head by head, over the real words only."""
    from_words, from_pixels = torch.zeros_like(v), torch.zeros_like(u)
    words = k.shape[1] // heads
    for b in range(len(v)):
        for h in range(heads):
            real = [t for t in range(h * words, (h + 1) * words) if bias[b, t] > -torch.inf]
            if real:
                scores = v[b] @ k[b, real].T + bias[b, real]
                from_words[b] = from_words[b] + scores.softmax(1) @ u[b, real]
                from_pixels[b, real] = scores.softmax(0).T @ v[b]
    return from_words, from_pixels


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_definition_with_all_gradients(shape):
    inputs = operands(*shape)
    got = bidirectional_attention(*inputs, heads=shape[-1])
    want = by_definition(*inputs, shape[-1])
    upstream = [torch.randn_like(x) for x in want]
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(got, inputs, upstream), torch.autograd.grad(want, inputs, upstream)
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_an_image_without_words_gives_zeros_and_finite_gradients():
    v, k, u, bias = operands(3, 33, 6, 8, 1)
    with torch.no_grad():
        bias[1] = -torch.inf
    from_words, from_pixels = bidirectional_attention(v, k, u, bias)
    assert not from_words[1].any() and not from_pixels[1].any() and from_words[2].any()
    gradients = torch.autograd.grad(
        [from_words, from_pixels], [v, k, u, bias], [torch.ones_like(v), torch.ones_like(u)]
    )
    assert all(g.isfinite().all() for g in gradients)
    assert not any(g[1].any() for g in gradients)


def test_padding_has_no_influence_whatever_it_holds():
    v, k, u, bias = operands(2, 50, 8, 8, 1)
    other_k, other_u = k.detach().clone(), u.detach().clone()
    other_k[0, 4:], other_u[0, 4:] = 1e4, -1e4
    for a, b in zip(
        bidirectional_attention(v, k, u, bias), bidirectional_attention(v, other_k, other_u, bias)
    ):
        assert torch.equal(a, b)


def test_large_scores_do_not_overflow():
    v, k, u, bias = operands(1, 40, 5, 8, 1, torch.float32, pad=False)
    out = bidirectional_attention(v * 1e3, k * 1e3, u, bias)
    assert all(x.isfinite().all() for x in out)


def test_scores_are_float32_under_autocast():
    exact = operands(2, 60, 6, 16, 1, torch.float32)
    half = [x.detach().bfloat16() if i < 3 else x for i, x in enumerate(exact)]
    want = bidirectional_attention(*[x.float() for x in half])
    with torch.autocast("cpu", torch.bfloat16):
        from_words, from_pixels = bidirectional_attention(*half)
    assert from_words.dtype == torch.bfloat16 and from_pixels.dtype == torch.float32
    assert torch.equal(from_words, want[0].bfloat16()) and torch.equal(from_pixels, want[1])


def test_an_unknown_path_is_refused():
    with pytest.raises(InputError, match="wpa.impl = 'fast' is unknown"):
        bidirectional_attention(*operands(1, 4, 3, 4, 1), impl="fast")
