"""Explanations agree with the model that they explain, and leave it as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from coupalign.config.schema import CoupAlignConfig, LavtConfig
from coupalign.model.baselines.lavt import Lavt
from coupalign.model.coupalign import CoupAlign
from coupalign.model.explain import explain_prediction, mask_signals, word_pixel_attention
from coupalign.model.sma import SentenceMaskAlignment
from coupalign.model.wpa import WordPixelAlignment

SIZE, VOCABULARY, WORDS, COUNT = 64, 40, 7, 5


def shaken(module: nn.Module) -> nn.Module:
    """With weights that are nowhere zero: at the start of training the gates are closed."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module.eval()


ENCODERS = {
    "image": {"kind": "small", "widths": [16, 16, 32, 32]},
    "text": {"kind": "small", "width": 32, "layers": 4, "heads": 2},
    "decoder": {"width": 32},
}


def model_of(
    count: int = COUNT, stages: tuple[bool, ...] = (True, False, True, True), heads: int = 1
) -> CoupAlign:
    proposals = {"count": count, "layers": 1, "heads": 2, "ffn": 32}
    config = CoupAlignConfig.model_validate(
        {**ENCODERS, "wpa": {"stages": stages, "heads": heads}, "proposals": proposals}
    )
    return shaken(CoupAlign(config, VOCABULARY, SIZE))


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(2, WORDS, dtype=torch.bool)
    mask[1, 4:] = False
    words = torch.randint(5, VOCABULARY, (2, WORDS), generator=generator)
    return (
        torch.randint(0, 256, (2, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8),
        words,
        mask,
    )


@pytest.mark.parametrize("impl", ["reference", "plain"])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_the_messages_of_an_alignment_can_be_rebuilt_from_its_attention(heads: int, impl: str):
    wpa = shaken(WordPixelAlignment(16, 24, heads, impl)).double()
    generator = torch.Generator().manual_seed(2)
    v = torch.randn(2, 30, 16, generator=generator, dtype=torch.float64)
    mask = torch.ones(2, WORDS, dtype=torch.bool)
    mask[1, 3:] = False
    l = torch.randn(2, WORDS, 24, generator=generator, dtype=torch.float64) * mask[..., None]  # noqa: E741
    over_words, over_pixels = word_pixel_attention(wpa, v, l, mask)  # [B, h, T, P]
    value = nn.functional.linear(l, wpa.word_value_weight, wpa.word_value_bias).unflatten(
        2, (heads, -1)
    )
    pixel_value = nn.functional.linear(v, wpa.pixel_value_weight, wpa.pixel_value_bias).unflatten(
        2, (heads, -1)
    )
    expected = wpa.attend(v, l, mask)
    torch.testing.assert_close(
        torch.einsum("bhtp,bthe->bphe", over_words, value).flatten(2), expected[0]
    )
    torch.testing.assert_close(
        torch.einsum("bhtp,bphe->bthe", over_pixels, pixel_value).flatten(2) * mask[..., None],
        expected[1],
    )


@pytest.mark.parametrize("scaled", [False, True])
def test_the_pixels_of_the_sentence_mask_alignment_can_be_rebuilt_from_weights_and_signals(
    scaled: bool,
):
    sma = shaken(SentenceMaskAlignment(8, 6, scaled)).double()
    masks, sentence, pixels = (
        torch.randn(shape, dtype=torch.float64) for shape in ((2, 5, 8), (2, 6), (2, 8, 3, 4))
    )
    weights, signals = mask_signals(sma, masks, sentence, pixels)
    rebuilt = pixels + torch.einsum("bn,bnhw,bnd->bdhw", weights, signals, sma.project_masks(masks))
    torch.testing.assert_close(rebuilt, sma(masks, sentence, pixels))


@pytest.mark.parametrize("heads", [1, 2])
def test_an_explanation_has_maps_that_sum_to_one_and_leaves_the_model_as_it_was(batch, heads: int):
    model, mask = model_of(heads=heads), batch[2]
    before = model(*batch)
    found = explain_prediction(model, *batch, proposals=3)
    assert list(found.attention) == [0, 2, 3]
    for stage, attention in found.attention.items():
        side = SIZE // 4 >> stage
        assert attention.over_words.shape == attention.over_pixels.shape == (2, WORDS, side, side)
        torch.testing.assert_close(attention.over_words.sum(1), torch.ones(2, side, side))
        torch.testing.assert_close(attention.over_pixels.sum((2, 3)), mask.float())
        assert not attention.over_words[~mask].any()
    assert found.weights.shape == (2, 3) and found.signals.shape == (2, 3, SIZE // 4, SIZE // 4)
    assert (
        (found.weights.diff(dim=1) <= 0).all()
        and 0 <= found.signals.min()
        and found.signals.max() <= 1
    )
    everything = explain_prediction(model, *batch, proposals=99)
    assert everything.weights.shape == (2, COUNT)
    torch.testing.assert_close(everything.weights.sum(1), torch.ones(2))
    assert torch.equal(everything.signals[:, :3], found.signals)
    torch.testing.assert_close(
        found.spread, everything.signals.std(1, correction=0).flatten(1).mean(1)
    )
    assert torch.equal(model(*batch), before) and not any(
        module._forward_pre_hooks for module in model.modules()
    )


def test_the_whole_answer_follows_from_all_weights_and_signals(batch):
    """What the head receives is the decoder's embedding and the mask signals that the explanation shows."""
    model, heard = model_of(), {}
    model.sma.register_forward_hook(lambda module, given, out: heard.update(given=given, out=out))
    found = explain_prediction(model, *batch, proposals=COUNT)
    masks, sentence, pixels = heard["given"]
    weights, _ = mask_signals(model.sma, masks, sentence, pixels)
    order = weights.argsort(1, descending=True)
    values = model.sma.project_masks(masks).gather(
        1, order[..., None].expand(-1, -1, masks.shape[2])
    )
    rebuilt = pixels + torch.einsum("bn,bnhw,bnd->bdhw", found.weights, found.signals, values)
    torch.testing.assert_close(rebuilt, heard["out"], rtol=1e-4, atol=1e-4)


def test_half_precision_gives_nearly_the_same(batch):
    model = model_of()
    exact = explain_prediction(model, *batch)
    with torch.autocast("cpu", torch.bfloat16):
        rough = explain_prediction(model, *batch)
    assert rough.weights.dtype == rough.attention[0].over_words.dtype == torch.float32
    assert (rough.attention[0].over_words - exact.attention[0].over_words).abs().max() < 0.05


def test_a_model_without_these_parts_gives_what_it_has(batch):
    found = explain_prediction(model_of(count=0), *batch)
    assert found.weights is None and found.signals is None and list(found.attention) == [0, 2, 3]

    found = explain_prediction(
        Lavt(LavtConfig.model_validate({"kind": "lavt", **ENCODERS}), VOCABULARY, SIZE).eval(),
        *batch,
    )
    assert found.weights is None and not found.attention


def test_hooks_are_gone_after_a_failure(batch):
    model = model_of()
    with pytest.raises(AssertionError, match="image"):
        explain_prediction(model, batch[0][..., :32], *batch[1:])
    assert not any(module._forward_pre_hooks for module in model.modules())
