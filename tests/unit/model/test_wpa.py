"""Word-pixel alignment: the absorbed form against the plain one, the gates at the start, padding."""

from __future__ import annotations

import pytest
import torch

from coupalign.errors import InputError
from coupalign.model.wpa import WordPixelAlignment


def module(
    heads: int = 1,
    impl: str = "reference",
    update_words: bool = True,
    pixel_width: int = 16,
    word_width: int = 24,
):
    """With gates that are open: at the start of training the messages are multiplied by zero."""
    torch.manual_seed(0)
    wpa = WordPixelAlignment(pixel_width, word_width, heads, impl, update_words)
    with torch.no_grad():
        for parameter in wpa.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return wpa.double()


def inputs(
    batch: int = 3, pixels: int = 37, words: int = 6, pixel_width: int = 16, word_width: int = 24
):
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(batch, words, dtype=torch.bool)
    mask[1, words // 2 :] = False
    v = torch.randn(batch, pixels, pixel_width, generator=generator, dtype=torch.float64)
    words = (
        torch.randn(batch, words, word_width, generator=generator, dtype=torch.float64)
        * mask[..., None]
    )
    return v.requires_grad_(), words.requires_grad_(), mask


@pytest.mark.parametrize("update_words", [True, False])
@pytest.mark.parametrize("heads", [1, 2, 4, 8])
def test_absorbed_equals_plain_with_all_gradients(heads, update_words):
    v, words, mask = inputs()
    results = []
    for impl in ("reference", "plain"):
        wpa = module(heads, impl, update_words)
        out = [x for x in wpa(v, words, mask) if x is not words]
        upstream = [
            torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
            for x in out
        ]
        results.append(
            [
                *out,
                *torch.autograd.grad(
                    out, [v, words, *wpa.parameters()], upstream, allow_unused=not update_words
                ),
            ]
        )
    names = ["pixels", "words", "d pixels", "d words", *dict(module(heads).named_parameters())]
    for name, a, b in zip(names if update_words else names[:1] + names[2:], *results):
        # The bias of the keys does not change a softmax over words: without the other softmax its gradient is exactly 0.
        assert (a - b).abs().max() <= 1e-10 * max(b.abs().max().item(), 1e-3), name


def test_step_zero_leaves_both_encoders_as_they_were_and_opens_the_gates():
    v, words, mask = inputs()
    wpa = WordPixelAlignment(16, 24).double()
    out = wpa(v, words, mask)
    assert torch.equal(out[0], v) and torch.equal(out[1], words)
    sum((x * torch.randn_like(x)).sum() for x in out).backward()
    assert wpa.gate_pixels[2].weight.grad.any() and wpa.gate_words[2].weight.grad.any()
    assert all(p.grad is not None for p in wpa.parameters())


@pytest.mark.parametrize("impl", ["reference", "plain"])
def test_padded_words_stay_zero_and_change_nothing(impl):
    v, words, mask = inputs()
    wpa = module(impl=impl)
    pixels, after = wpa(v, words, mask)
    assert not after[~mask].any()
    shorter = wpa(v[1:2], words[1:2, :3], mask[1:2, :3])
    torch.testing.assert_close(pixels[1:2], shorter[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(after[1:2, :3], shorter[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", ["reference", "plain"])
def test_an_image_without_words_is_not_changed(impl):
    v, words, mask = inputs()
    mask[0] = False
    wpa = module(impl=impl)
    pixels, after = wpa(v, words, mask)
    message_of_zero = torch.zeros(16, dtype=torch.float64)
    assert (
        torch.equal(pixels[0], v[0] + torch.tanh(wpa.gate_pixels(message_of_zero)) * 0)
        and not (after - words)[0].any()
    )
    (pixels.sum() + after.sum()).backward()
    assert v.grad.isfinite().all() and all(p.grad.isfinite().all() for p in wpa.parameters())


def test_the_word_side_is_float32_under_autocast():
    wpa = module().float()
    v, words, mask = (x.float() if x.is_floating_point() else x for x in inputs())
    seen = {}
    original = wpa.absorb
    wpa.absorb = lambda *args: seen.setdefault("out", original(*args))
    with torch.autocast("cpu", torch.bfloat16):
        pixels, after = wpa(v, words, mask)
    assert [x.dtype for x in seen["out"]] == [torch.float32] * 3
    assert pixels.dtype == v.dtype and after.dtype == words.dtype


def test_bad_heads_and_paths_are_refused(monkeypatch):
    with pytest.raises(InputError, match="heads = 3"):
        WordPixelAlignment(16, 24, heads=3)
    monkeypatch.setattr("coupalign.kernels.obstacle", lambda: "out of order")
    with pytest.raises(InputError, match="impl = fused: out of order"):
        WordPixelAlignment(16, 24, impl="fused")
