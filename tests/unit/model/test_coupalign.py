"""CoupAlign: every parameter learns in every variant, padding and batch splits change nothing."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from coupalign.config.schema import (
    CoupAlignConfig,
    DecoderConfig,
    LossConfig,
    ProposalsConfig,
    SmallBackbone,
    SmallText,
    TimmBackbone,
    WpaConfig,
)
from coupalign.errors import InputError
from coupalign.model.build import build_model
from coupalign.model.coupalign import CoupAlign
from tests.unit.model.examples import (
    VOCABULARY,
    gradients_in_micro_batches,
    model_inputs,
    parameters_without_gradient,
)

SIDE = 32


def small_config(count: int = 3, image=None, proposal_stages=(4,), **parts) -> CoupAlignConfig:
    return CoupAlignConfig(
        image=image or SmallBackbone(widths=(8, 8, 16, 16)),
        text=SmallText(width=16, heads=2),
        decoder=DecoderConfig(width=16),
        proposals=ProposalsConfig(count=count, layers=1, heads=2, ffn=16, stages=proposal_stages),
        **parts,
    )


def open_model(config: CoupAlignConfig | None = None) -> CoupAlign:
    """Build a model whose gates are open, as after some training."""
    torch.manual_seed(0)
    model = build_model(config or small_config(), VOCABULARY, SIDE).eval()
    for parameter in model.wpa.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


PATTERNS = ("0000", "1111", "1000", "0101", "0010", "0001")
WPA_STAGES = [tuple(digit == "1" for digit in pattern) for pattern in PATTERNS]


@pytest.mark.parametrize(
    "count, stages, empty", itertools.product((0, 3), WPA_STAGES, (False, True))
)
def test_every_trainable_parameter_gets_a_gradient(count, stages, empty):
    """Data parallelism without `find_unused_parameters` hangs on a parameter without gradient."""
    config = small_config(count, wpa=WpaConfig(stages=stages))
    if not count and not any(stages):
        with pytest.raises(InputError, match="nothing in the model would read the sentence"):
            build_model(config, VOCABULARY, SIDE)
        return
    model = build_model(config, VOCABULARY, SIDE)
    image, words, mask, target = model_inputs()

    losses = model(image, words, mask, target & (not empty))
    losses["loss"].backward()

    assert not parameters_without_gradient(model)
    assert set(losses) == {"loss", "mask", "dice", "contrast"}
    assert all(loss.ndim == 0 for loss in losses.values())


@pytest.mark.parametrize("losses", [LossConfig(contrast=0), LossConfig(dice=0), LossConfig(mask=0)])
def test_loss_with_weight_zero_leaves_no_parameter_without_gradient(losses):
    model = build_model(small_config(losses=losses), VOCABULARY, SIDE)

    model(*model_inputs())["loss"].backward()

    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "darknet53"])
def test_published_encoders_train(name):
    torch.manual_seed(0)
    encoder = TimmBackbone(name=name, drop_path=0.1)
    config = small_config(image=encoder, proposal_stages=(3, 4))
    model = build_model(config, VOCABULARY, 64)
    image, words, mask, target = model_inputs(side=64)

    model(image, words, mask, target)["loss"].backward()

    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model(image, words, mask).shape == (2, 64, 64)


def test_logits_do_not_depend_on_padding_or_on_the_rest_of_the_batch():
    # Float32 rounds differently in another batch size, by an amount that the processor decides.
    model = open_model().double()
    image, words, mask, _ = model_inputs(3)
    together = model(image, words, mask)

    padded = model(image, F.pad(words, (0, 4)), F.pad(mask, (0, 4)))

    torch.testing.assert_close(together, padded, rtol=1e-5, atol=1e-5)
    for i in range(3):
        alone = model(image[i : i + 1], words[i : i + 1], mask[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-5)


def test_logits_depend_on_the_sentence_once_the_gates_are_open():
    model = open_model()
    image, words, mask, _ = model_inputs()

    logits = model(image, words, mask)
    swapped = model(image, words.flip(0), mask.flip(0))

    assert not torch.allclose(logits, swapped, atol=1e-4)


def test_sentence_of_sma_is_the_final_cls_state():
    model = open_model()
    image, words, mask, _ = model_inputs()
    sma_inputs = []
    model.sma.register_forward_pre_hook(lambda _, inputs: sma_inputs.extend(inputs))

    model(image, words, mask)

    _, states = model.align(image, words, mask)
    _, sentence, _ = sma_inputs
    assert torch.equal(sentence, states[:, 0])


def test_micro_batches_give_the_gradient_of_the_whole_batch():
    model = open_model().double()
    inputs = model_inputs(4)

    whole = gradients_in_micro_batches(model, inputs, size=4)
    split = gradients_in_micro_batches(model, inputs, size=2)

    for (name, _), a, b in zip(model.named_parameters(), whole, split):
        assert (a - b).norm() <= 1e-5 * max(a.norm().item(), 1e-4), name


@pytest.mark.parametrize("impl", ["reference", "plain"])
def test_plain_and_absorbed_alignments_give_the_same_logits(impl):
    inputs = model_inputs()[:3]

    expected = open_model()(*inputs)
    actual = open_model(small_config(wpa=WpaConfig(impl=impl)))(*inputs)

    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


def test_bf16_autocast_is_near_fp32_and_keeps_float32_logits():
    model = open_model()
    image, words, mask, target = model_inputs()
    expected = model(image, words, mask)

    with torch.autocast("cpu", torch.bfloat16):
        actual = model(image, words, mask)
        losses = model(image, words, mask, target)

    assert actual.dtype == losses["loss"].dtype == torch.float32
    assert (actual - expected).norm() < 0.05 * expected.norm()


def test_logits_are_bit_equal_for_channels_last_images():
    """The loader's batches are channels-last."""
    torch.manual_seed(0)
    model = build_model(small_config(), VOCABULARY, SIDE).eval()
    image, words, mask, _ = model_inputs()

    plain = model(image, words, mask)
    channels_last = model(image.to(memory_format=torch.channels_last), words, mask)

    assert torch.equal(plain, channels_last)


@pytest.mark.parametrize(
    "config, message",
    [
        (small_config(proposal_stages=()), "stages is empty"),
        (small_config(wpa=WpaConfig(heads=3)), "heads = 3"),
        (small_config(wpa=WpaConfig(impl="fused")), "impl = fused: out of order"),
    ],
)
def test_fields_that_contradict_each_other_are_named(config, message, monkeypatch):
    monkeypatch.setattr("coupalign.kernels.obstacle", lambda: "out of order")

    with pytest.raises(InputError, match=message):
        build_model(config, VOCABULARY, SIDE)


def test_model_learns_to_tell_two_sentences_apart():
    """One picture, two words, two objects: only a model that reads can lower the loss of both."""
    torch.manual_seed(0)
    model = build_model(small_config(), VOCABULARY, SIDE)
    image, _, _, target = model_inputs()
    image[:] = image[:1]
    words, mask = torch.tensor([[1, 7, 2], [1, 8, 2]]), torch.ones(2, 3, dtype=torch.bool)
    target[:] = False
    target[0, 4:16, 4:16] = True
    target[1, 16:28, 16:28] = True

    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        model(image, words, mask, target)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    predicted = model(image, words, mask) > 0
    assert (predicted & target).sum() / (predicted | target).sum() > 0.7
