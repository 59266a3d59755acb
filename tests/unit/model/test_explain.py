"""Explanations agree with the model that they explain, and do not change it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from coupalign.config.schema import CoupAlignConfig, LavtConfig
from coupalign.model.baselines.lavt import Lavt
from coupalign.model.coupalign import CoupAlign
from coupalign.model.explain import explain_prediction, mask_signals, word_pixel_attention
from coupalign.model.sma import SentenceMaskAlignment
from coupalign.model.wpa import WordPixelAlignment

SIZE, VOCABULARY, WORDS, COUNT = 64, 40, 7, 5
ENCODERS = {
    "image": {"kind": "small", "widths": [16, 16, 32, 32]},
    "text": {"kind": "small", "width": 32, "layers": 4, "heads": 2},
    "decoder": {"width": 32},
}


def shake(module: nn.Module) -> nn.Module:
    """Make all weights nonzero: at the start of training the gates are closed."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module.eval()


def build_coupalign(count: int = COUNT, heads: int = 1) -> CoupAlign:
    wpa = {"stages": (True, False, True, True), "heads": heads}
    proposals = {"count": count, "layers": 1, "heads": 2, "ffn": 32}
    config = CoupAlignConfig.model_validate({**ENCODERS, "wpa": wpa, "proposals": proposals})
    return shake(CoupAlign(config, VOCABULARY, SIZE))


def has_hooks(model: nn.Module) -> bool:
    return any(module._forward_pre_hooks for module in model.modules())


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(2, WORDS, dtype=torch.bool)
    mask[1, 4:] = False
    words = torch.randint(5, VOCABULARY, (2, WORDS), generator=generator)
    image = torch.randint(0, 256, (2, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8)
    return image, words, mask


@pytest.mark.parametrize("impl", ["reference", "plain"])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_messages_of_an_alignment_can_be_rebuilt_from_its_attention(heads: int, impl: str):
    wpa = shake(WordPixelAlignment(16, 24, heads, impl=impl)).double()
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randn(2, 30, 16, generator=generator, dtype=torch.float64)
    mask = torch.ones(2, WORDS, dtype=torch.bool)
    mask[1, 3:] = False
    words = torch.randn(2, WORDS, 24, generator=generator, dtype=torch.float64) * mask[..., None]

    over_words, over_pixels = word_pixel_attention(wpa, pixels, words, mask)  # [B, h, T, P]
    pixels_from_words, words_from_pixels = wpa.attend(pixels, words, mask)

    value = nn.functional.linear(words, wpa.word_value_weight, wpa.word_value_bias)
    value = value.unflatten(2, (heads, -1))
    rebuilt = torch.einsum("bhtp,bthe->bphe", over_words, value).flatten(2)
    torch.testing.assert_close(rebuilt, pixels_from_words)

    value = nn.functional.linear(pixels, wpa.pixel_value_weight, wpa.pixel_value_bias)
    value = value.unflatten(2, (heads, -1))
    rebuilt = torch.einsum("bhtp,bphe->bthe", over_pixels, value).flatten(2) * mask[..., None]
    torch.testing.assert_close(rebuilt, words_from_pixels)


@pytest.mark.parametrize("scaled", [False, True])
def test_pixels_of_sma_can_be_rebuilt_from_weights_and_signals(scaled: bool):
    sma = shake(SentenceMaskAlignment(8, 6, scaled)).double()
    masks = torch.randn(2, 5, 8, dtype=torch.float64)
    sentence = torch.randn(2, 6, dtype=torch.float64)
    pixels = torch.randn(2, 8, 3, 4, dtype=torch.float64)

    weights, signals = mask_signals(sma, masks, sentence, pixels)

    values = sma.project_masks(masks)
    rebuilt = pixels + torch.einsum("bn,bnhw,bnd->bdhw", weights, signals, values)
    torch.testing.assert_close(rebuilt, sma(masks, sentence, pixels))


@pytest.mark.parametrize("heads", [1, 2])
def test_explanation_attention_sums_to_one(batch, heads: int):
    model, mask = build_coupalign(heads=heads), batch[2]

    explanation = explain_prediction(model, *batch, proposals=3)

    assert list(explanation.attention) == [0, 2, 3]
    for stage, attention in explanation.attention.items():
        side = SIZE // 4 >> stage
        assert attention.over_words.shape == attention.over_pixels.shape == (2, WORDS, side, side)
        torch.testing.assert_close(attention.over_words.sum(1), torch.ones(2, side, side))
        torch.testing.assert_close(attention.over_pixels.sum((2, 3)), mask.float())
        assert not attention.over_words[~mask].any()


@pytest.mark.parametrize("heads", [1, 2])
def test_explanation_keeps_the_proposals_with_the_highest_weights(batch, heads: int):
    model = build_coupalign(heads=heads)

    some = explain_prediction(model, *batch, proposals=3)
    everything = explain_prediction(model, *batch, proposals=99)

    assert some.weights.shape == (2, 3) and some.signals.shape == (2, 3, SIZE // 4, SIZE // 4)
    assert (some.weights.diff(dim=1) <= 0).all()
    assert 0 <= some.signals.min() and some.signals.max() <= 1
    assert everything.weights.shape == (2, COUNT)
    torch.testing.assert_close(everything.weights.sum(1), torch.ones(2))
    assert torch.equal(everything.signals[:, :3], some.signals)
    spread = everything.signals.std(1, correction=0).flatten(1).mean(1)
    torch.testing.assert_close(some.spread, spread)


@pytest.mark.parametrize("heads", [1, 2])
def test_explanation_does_not_change_the_model(batch, heads: int):
    model = build_coupalign(heads=heads)
    before = model(*batch)

    explain_prediction(model, *batch, proposals=3)

    assert torch.equal(model(*batch), before) and not has_hooks(model)


def test_pixels_of_the_head_can_be_rebuilt_from_all_weights_and_signals(batch):
    """The head reads the decoder's embedding and the mask signals of the explanation."""
    model, recorded = build_coupalign(), {}
    model.sma.register_forward_hook(
        lambda _, inputs, output: recorded.update(inputs=inputs, output=output)
    )

    explanation = explain_prediction(model, *batch, proposals=COUNT)

    # Bring the values of the masks into the explanation's order, by descending weight.
    masks, sentence, pixels = recorded["inputs"]
    weights, _ = mask_signals(model.sma, masks, sentence, pixels)
    order = weights.argsort(1, descending=True)[..., None].expand(-1, -1, masks.shape[2])
    values = model.sma.project_masks(masks).gather(1, order)

    message = torch.einsum("bn,bnhw,bnd->bdhw", explanation.weights, explanation.signals, values)
    torch.testing.assert_close(pixels + message, recorded["output"], rtol=1e-4, atol=1e-4)


def test_explanation_under_autocast_is_float32_and_near_the_exact_one(batch):
    model = build_coupalign()

    exact = explain_prediction(model, *batch)
    with torch.autocast("cpu", torch.bfloat16):
        rough = explain_prediction(model, *batch)

    exact_map, rough_map = exact.attention[0].over_words, rough.attention[0].over_words
    assert rough.weights.dtype == rough_map.dtype == torch.float32
    assert (rough_map - exact_map).abs().max() < 0.05


def test_explanation_of_a_model_without_proposals_has_attention_only(batch):
    explanation = explain_prediction(build_coupalign(count=0), *batch)

    assert explanation.weights is None and explanation.signals is None
    assert list(explanation.attention) == [0, 2, 3]


def test_explanation_of_a_baseline_is_empty(batch):
    config = LavtConfig.model_validate({"kind": "lavt", **ENCODERS})

    explanation = explain_prediction(Lavt(config, VOCABULARY, SIZE).eval(), *batch)

    assert explanation.weights is None and not explanation.attention


def test_hooks_are_removed_after_a_failure(batch):
    model = build_coupalign()
    image, words, mask = batch

    with pytest.raises(AssertionError, match="image"):
        explain_prediction(model, image[..., :32], words, mask)

    assert not has_hooks(model)
