"""Word-pixel alignment: the absorbed form against the plain one, the gates' start, padding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from coupalign.errors import InputError
from coupalign.model.wpa import WordPixelAlignment

PIXEL_WIDTH, WORD_WIDTH = 16, 24


def build_open(
    heads: int = 1, impl: str = "reference", update_words: bool = True
) -> WordPixelAlignment:
    """Build an alignment with open gates: at the start of training they multiply by zero."""
    torch.manual_seed(0)
    wpa = WordPixelAlignment(PIXEL_WIDTH, WORD_WIDTH, heads, impl=impl, update_words=update_words)
    with torch.no_grad():
        for parameter in wpa.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return wpa.double()


def draw_inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Draw pixels, words and the word mask of three images; the second has three words."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[1, 3:] = False
    pixels = torch.randn(3, 37, PIXEL_WIDTH, generator=generator, dtype=torch.float64)
    words = torch.randn(3, 6, WORD_WIDTH, generator=generator, dtype=torch.float64)
    words = words * mask[..., None]
    return pixels.to(dtype).requires_grad_(), words.to(dtype).requires_grad_(), mask


def outputs_and_gradients(wpa: WordPixelAlignment) -> dict[str, Tensor]:
    """Run an alignment, and backpropagate fixed gradients to its inputs and parameters."""
    pixels, words, mask = draw_inputs()
    outputs = dict(zip(("pixels", "words"), wpa(pixels, words, mask)))
    if not wpa.update_words:
        assert outputs.pop("words") is words

    upstream = [
        torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
        for x in outputs.values()
    ]
    inputs = {"d pixels": pixels, "d words": words, **dict(wpa.named_parameters())}
    gradients = torch.autograd.grad(
        list(outputs.values()),
        list(inputs.values()),
        upstream,
        allow_unused=not wpa.update_words,
    )
    return {**outputs, **dict(zip(inputs, gradients))}


@pytest.mark.parametrize("update_words", [True, False])
@pytest.mark.parametrize("heads", [1, 2, 4, 8])
def test_absorbed_form_equals_plain_form_with_all_gradients(heads, update_words):
    absorbed = outputs_and_gradients(build_open(heads, "reference", update_words))
    plain = outputs_and_gradients(build_open(heads, "plain", update_words))

    assert absorbed.keys() == plain.keys()
    for name, expected in plain.items():
        # The bias of the keys does not change a softmax over words. Without the other softmax its
        # gradient is exactly 0, hence the floor.
        tolerance = 1e-10 * max(expected.abs().max().item(), 1e-3)
        assert (absorbed[name] - expected).abs().max() <= tolerance, name


def test_step_zero_leaves_pixels_and_words_unchanged_and_opens_the_gates():
    pixels, words, mask = draw_inputs()
    wpa = WordPixelAlignment(PIXEL_WIDTH, WORD_WIDTH).double()

    outputs = wpa(pixels, words, mask)
    sum((x * torch.randn_like(x)).sum() for x in outputs).backward()

    assert torch.equal(outputs[0], pixels) and torch.equal(outputs[1], words)
    assert wpa.gate_pixels[2].weight.grad.any() and wpa.gate_words[2].weight.grad.any()
    assert all(p.grad is not None for p in wpa.parameters())


@pytest.mark.parametrize("impl", ["reference", "plain"])
def test_padded_words_stay_zero_and_change_nothing(impl):
    pixels, words, mask = draw_inputs()
    wpa = build_open(impl=impl)

    new_pixels, new_words = wpa(pixels, words, mask)
    short_pixels, short_words = wpa(pixels[1:2], words[1:2, :3], mask[1:2, :3])

    assert not new_words[~mask].any()
    torch.testing.assert_close(new_pixels[1:2], short_pixels, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(new_words[1:2, :3], short_words, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", ["reference", "plain"])
def test_image_without_words_is_unchanged_and_has_finite_gradients(impl):
    pixels, words, mask = draw_inputs()
    mask[0] = False
    wpa = build_open(impl=impl)

    new_pixels, new_words = wpa(pixels, words, mask)
    (new_pixels.sum() + new_words.sum()).backward()

    assert torch.equal(new_pixels[0], pixels[0])
    assert not (new_words - words)[0].any()
    assert pixels.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in wpa.parameters())


def test_word_side_is_float32_under_autocast():
    wpa = build_open().float()
    pixels, words, mask = draw_inputs(torch.float32)
    recorded = []
    absorb = wpa.absorb

    def absorb_and_record(*args):
        recorded.extend(absorb(*args))
        return tuple(recorded)

    wpa.absorb = absorb_and_record
    with torch.autocast("cpu", torch.bfloat16):
        new_pixels, new_words = wpa(pixels, words, mask)

    assert [x.dtype for x in recorded] == [torch.float32] * 3
    assert new_pixels.dtype == pixels.dtype and new_words.dtype == words.dtype


def test_heads_that_do_not_divide_the_widths_are_refused():
    with pytest.raises(InputError, match="heads = 3"):
        WordPixelAlignment(PIXEL_WIDTH, WORD_WIDTH, heads=3)


def test_fused_kernels_that_cannot_run_are_refused(monkeypatch):
    monkeypatch.setattr("coupalign.kernels.obstacle", lambda: "out of order")

    with pytest.raises(InputError, match="impl = fused: out of order"):
        WordPixelAlignment(PIXEL_WIDTH, WORD_WIDTH, impl="fused")


def test_fused_kernels_refuse_several_heads_when_the_model_is_built(monkeypatch):
    monkeypatch.setattr("coupalign.kernels.obstacle", lambda: None)

    with pytest.raises(InputError, match="impl = fused.*head"):
        WordPixelAlignment(PIXEL_WIDTH, WORD_WIDTH, heads=2, impl="fused")
