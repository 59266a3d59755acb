"""LAVT, VLT and LTS alike: parameters learn, padding and splits change nothing, each reads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from coupalign.config.schema import TimmBackbone
from tests.unit.model.baselines.examples import BASELINES, SIDE, build_small
from tests.unit.model.examples import (
    VOCABULARY,
    gradients_in_micro_batches,
    model_inputs,
    parameters_without_gradient,
)

each_baseline = pytest.mark.parametrize("kind", BASELINES)


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("side", [32, 96])
@each_baseline
def test_every_trainable_parameter_gets_a_gradient(kind, side, empty):
    """Data parallelism without `find_unused_parameters` hangs on a parameter without gradient."""
    model = build_small(BASELINES[kind], side)
    image, words, mask, target = model_inputs(side=side)

    losses = model(image, words, mask, target & (not empty))
    losses["loss"].backward()
    logits = model.eval()(image, words, mask)

    assert not parameters_without_gradient(model)
    assert set(losses) == {"loss", "mask", "dice"} | ({"locate"} if kind == "lts" else set())
    assert logits.shape == (2, side, side) and logits.dtype == torch.float32


@each_baseline
def test_published_encoders_train(kind):
    config = BASELINES[kind].model_copy(update={"image": TimmBackbone(name="darknet53")})
    model = build_small(config)

    model(*model_inputs(side=SIDE))["loss"].backward()

    assert not parameters_without_gradient(model)


@each_baseline
def test_logits_do_not_depend_on_padding_or_on_the_rest_of_the_batch(kind):
    # The image means are float64 too, so only the order of sums can differ.
    model = build_small(BASELINES[kind]).eval().double()
    image, words, mask, _ = model_inputs(3, side=SIDE)
    together = model(image, words, mask)

    # Other tokens at padded positions.
    other = torch.where(mask, words, torch.randint_like(words, 1, VOCABULARY))
    assert torch.equal(model(image, other, mask), together), "a padded token matters"

    # More padding.
    longer = model(image, F.pad(words, (0, 4), value=7), F.pad(mask, (0, 4)))
    torch.testing.assert_close(longer, together, rtol=1e-6, atol=1e-6)

    # One sample alone.
    for i in range(3):
        alone = model(image[i : i + 1], words[i : i + 1], mask[i : i + 1])
        torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-6, atol=1e-6)


@each_baseline
def test_micro_batches_give_the_gradient_of_the_whole_batch(kind):
    """LAVT has BatchNorm, so this holds for it only with fixed statistics."""
    model = build_small(BASELINES[kind]).double().train(kind != "lavt")
    inputs = model_inputs(4, side=SIDE)

    whole = gradients_in_micro_batches(model, inputs, size=4)
    split = gradients_in_micro_batches(model, inputs, size=2)

    for (name, _), a, b in zip(model.named_parameters(), whole, split):
        # Losses and logits are float32 and round differently. The floor is for gradients that are
        # zero but for this rounding.
        assert (a - b).norm() <= 1e-4 * max(a.norm().item(), 1e-3), name


@each_baseline
def test_only_lavt_has_batch_norm(kind):
    modules = build_small(BASELINES[kind]).modules()

    assert any(isinstance(module, _BatchNorm) for module in modules) == (kind == "lavt")


@each_baseline
def test_bf16_autocast_is_near_fp32_and_keeps_float32_logits(kind):
    model = build_small(BASELINES[kind]).eval()
    image, words, mask, target = model_inputs(side=SIDE)
    expected = model(image, words, mask)

    with torch.autocast("cpu", torch.bfloat16):
        actual = model(image, words, mask)
        losses = model(image, words, mask, target)

    assert actual.dtype == losses["loss"].dtype == torch.float32
    assert (actual - expected).norm() < 0.05 * expected.norm()


@each_baseline
def test_model_learns_to_tell_two_sentences_apart(kind):
    """One picture, two words, two objects: only a model that reads can lower the loss of both."""
    model = build_small(BASELINES[kind])
    image, _, _, target = model_inputs(side=SIDE)
    image[:] = image[:1]
    words, mask = torch.tensor([[1, 7, 2], [1, 8, 2]]), torch.ones(2, 3, dtype=torch.bool)
    target[:] = False
    target[0, 4:28, 4:28] = True
    target[1, 32:60, 32:60] = True

    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    history = []
    for _ in range(40):
        losses = model(image, words, mask, target)
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        history.append(losses["loss"].item())
    predicted = model(image, words, mask) > 0
    swapped = model(image, words.flip(0), mask) > 0

    assert history[-1] < history[0] / 2
    shared = (predicted & target).sum()
    assert shared / (predicted | target).sum() > 0.6
    assert (swapped & target).sum() < shared / 2, "the mask does not follow the sentence"
