"""The reference of word-pixel attention: its definition as loops, and its rules for padding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from coupalign.errors import InputError
from coupalign.kernels import bidirectional_attention

# B, P, T, C, H
SHAPES = [
    (1, 1, 1, 4, 1),
    (2, 63, 7, 8, 1),
    (3, 111, 20, 16, 2),
    (2, 225, 5, 12, 4),
]


def make_operands(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float64, pad: bool = True
) -> list[Tensor]:
    """Draw pixels, keys, values and bias that need gradients; the first image has padded words."""
    batch, pixels, words, channels, heads = shape
    generator = torch.Generator().manual_seed(pixels)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    bias = draw(batch, heads, words)
    if pad and words > 2:
        bias[0, :, words // 2 :] = -torch.inf
    v = draw(batch, pixels, channels)
    k = draw(batch, heads * words, channels)
    u = draw(batch, heads * words, channels)
    return [x.requires_grad_() for x in (v, k, u, bias.flatten(1))]


def attend_by_definition(
    v: Tensor, k: Tensor, u: Tensor, bias: Tensor, heads: int
) -> tuple[Tensor, Tensor]:
    """Attend image by image and head by head, over the real words only."""
    from_words, from_pixels = torch.zeros_like(v), torch.zeros_like(u)
    words = k.shape[1] // heads

    for image in range(len(v)):
        for head in range(heads):
            columns = range(head * words, (head + 1) * words)
            real = [t for t in columns if bias[image, t] > -torch.inf]
            if not real:
                continue
            scores = v[image] @ k[image, real].T + bias[image, real]
            from_words[image] = from_words[image] + scores.softmax(1) @ u[image, real]
            from_pixels[image, real] = scores.softmax(0).T @ v[image]

    return from_words, from_pixels


@pytest.mark.parametrize("shape", SHAPES)
def test_reference_equals_its_definition_with_all_gradients(shape):
    inputs = make_operands(shape)

    got = bidirectional_attention(*inputs, heads=shape[-1])
    want = attend_by_definition(*inputs, shape[-1])

    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    upstream = [torch.randn_like(x) for x in want]
    got_gradients = torch.autograd.grad(got, inputs, upstream)
    want_gradients = torch.autograd.grad(want, inputs, upstream)
    for a, b in zip(got_gradients, want_gradients):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_image_without_words_gives_zeros_and_finite_gradients():
    v, k, u, bias = make_operands((3, 33, 6, 8, 1))
    with torch.no_grad():
        bias[1] = -torch.inf

    from_words, from_pixels = bidirectional_attention(v, k, u, bias)

    assert not from_words[1].any() and not from_pixels[1].any() and from_words[2].any()
    upstream = [torch.ones_like(v), torch.ones_like(u)]
    gradients = torch.autograd.grad([from_words, from_pixels], [v, k, u, bias], upstream)
    assert all(g.isfinite().all() for g in gradients)
    assert not any(g[1].any() for g in gradients)


def test_contents_of_padded_words_have_no_influence():
    v, k, u, bias = make_operands((2, 50, 8, 8, 1))
    other_k, other_u = k.detach().clone(), u.detach().clone()
    other_k[0, 4:], other_u[0, 4:] = 1e4, -1e4

    got = bidirectional_attention(v, other_k, other_u, bias)

    for a, b in zip(got, bidirectional_attention(v, k, u, bias)):
        assert torch.equal(a, b)


def test_large_scores_do_not_overflow():
    v, k, u, bias = make_operands((1, 40, 5, 8, 1), torch.float32, pad=False)

    outputs = bidirectional_attention(v * 1e3, k * 1e3, u, bias)

    assert all(x.isfinite().all() for x in outputs)


def test_scores_are_float32_under_autocast():
    v, k, u, bias = make_operands((2, 60, 6, 16, 1), torch.float32)
    half = [v.detach().bfloat16(), k.detach().bfloat16(), u.detach().bfloat16(), bias]
    want = bidirectional_attention(*[x.float() for x in half])

    with torch.autocast("cpu", torch.bfloat16):
        from_words, from_pixels = bidirectional_attention(*half)

    assert from_words.dtype == torch.bfloat16 and from_pixels.dtype == torch.float32
    assert torch.equal(from_words, want[0].bfloat16()) and torch.equal(from_pixels, want[1])


def test_unknown_path_is_refused():
    with pytest.raises(InputError, match="wpa.impl = 'fast' is unknown"):
        bidirectional_attention(*make_operands((1, 4, 3, 4, 1)), impl="fast")
