"""Losses: splits of the batch, degenerate masks, and each term against its definition."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from coupalign.config.schema import LossConfig, MaskLossConfig
from coupalign.model.losses import (
    boundary_loss,
    contrast_loss,
    coupalign_losses,
    dice_loss,
    mask_losses,
    weighted_cross_entropy,
)


def draw_case(
    batch: int = 4, side: int = 32, width: int = 6, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw logits, embedding and target; the objects have different sizes."""
    generator = torch.Generator().manual_seed(0)
    target = torch.zeros(batch, side, side, dtype=torch.bool)
    for b in range(batch):
        target[b, 4 : 12 + 4 * b, 8:20] = True

    logits = torch.randn(batch, side, side, generator=generator).to(dtype)
    embedding = torch.randn(batch, width, side // 4, side // 4, generator=generator).to(dtype)
    return logits.requires_grad_(), embedding.requires_grad_(), target


def test_micro_batches_average_to_the_whole_batch_with_gradients():
    logits, embedding, target = draw_case(dtype=torch.float64)
    target[2] = False
    config = LossConfig(contrast_samples=9)

    whole = coupalign_losses(logits, embedding, target, config=config)
    first = coupalign_losses(logits[:2], embedding[:2], target[:2], config=config)
    second = coupalign_losses(logits[2:], embedding[2:], target[2:], config=config)

    for name in whole:
        mean = (first[name].item() + second[name].item()) / 2
        assert whole[name].item() == pytest.approx(mean, rel=1e-6)
    inputs = [logits, embedding]
    expected = torch.autograd.grad(whole["loss"], inputs)
    actual = torch.autograd.grad((first["loss"] + second["loss"]) / 2, inputs)
    for a, b in zip(actual, expected):
        torch.testing.assert_close(a, b)


def test_loss_is_the_weighted_sum_and_the_only_one_with_a_gradient():
    config = LossConfig(mask=2.0, dice=0.5, contrast=0.25)

    losses = coupalign_losses(*draw_case(), config=config)

    assert [name for name, x in losses.items() if x.requires_grad] == ["loss"]
    expected = 2 * losses["mask"] + 0.5 * losses["dice"] + 0.25 * losses["contrast"]
    assert losses["loss"].item() == pytest.approx(expected.item())


@pytest.mark.parametrize("fill", [False, True])
def test_empty_and_full_masks_have_no_contrast_and_finite_gradients(fill):
    logits, embedding, target = draw_case()
    target[:] = fill

    losses = coupalign_losses(logits, embedding, target, config=LossConfig())
    of_logits, of_embedding = torch.autograd.grad(losses["loss"], [logits, embedding])

    assert losses["contrast"].item() == 0 and losses["loss"].isfinite()
    assert of_logits.isfinite().all()
    assert not of_embedding.any()


@pytest.mark.parametrize("constant", [0.0, 1.0])
def test_contrast_of_equal_and_zero_embeddings_has_finite_gradients(constant):
    _, embedding, target = draw_case()
    flat = torch.full_like(embedding, constant).requires_grad_()

    contrast_loss(flat, target, 0.07, samples=16).backward()

    assert flat.grad.isfinite().all()


def test_contrast_equals_its_definition_when_every_pixel_is_drawn():
    _, embedding, target = draw_case(batch=1)
    y = F.normalize(embedding[0].detach().flatten(1).T, dim=1)
    truth = F.avg_pool2d(target.float(), 4)[0].flatten() >= 0.5
    front, back = y[truth], y[~truth]
    prototype = F.normalize(front.sum(0), dim=0)

    expected = 0.0
    for pixel in front:
        positive = math.exp(pixel @ prototype / 0.1)
        negative = sum(math.exp(pixel @ other / 0.1) for other in back)
        expected -= math.log(positive / (positive + negative)) / len(front)

    actual = contrast_loss(embedding, target, 0.1, samples=64).item()
    assert actual == pytest.approx(expected, rel=1e-4)


def test_contrast_sampling_is_deterministic_and_draws_no_random_numbers():
    _, embedding, target = draw_case()
    before = torch.random.get_rng_state()

    first = contrast_loss(embedding, target, 0.1, samples=5)
    second = contrast_loss(embedding, target, 0.1, samples=5)

    assert first == second
    assert torch.equal(before, torch.random.get_rng_state())


def test_contrast_falls_when_the_object_separates():
    _, embedding, target = draw_case()
    truth = F.avg_pool2d(target.float()[:, None], 4)

    mixed = contrast_loss(embedding, target, 0.1, samples=32)
    separated = contrast_loss(embedding + 9 * truth, target, 0.1, samples=32)

    assert separated < mixed


def test_cross_entropy_and_dice_equal_sums_by_hand():
    logits = torch.tensor([[[0.0, 2.0], [-1.0, 3.0]]])
    target = torch.tensor([[[True, False], [False, True]]])
    p = logits.sigmoid().flatten().tolist()

    terms = [
        1.1 * -math.log(p[0]),
        0.9 * -math.log(1 - p[1]),
        0.9 * -math.log(1 - p[2]),
        1.1 * -math.log(p[3]),
    ]
    cross_entropy = weighted_cross_entropy(logits, target, foreground=1.1, background=0.9)
    assert cross_entropy.item() == pytest.approx(sum(terms) / 4, rel=1e-5)

    dice = 1 - (2 * (p[0] + p[3]) + 1) / (sum(p) + 2 + 1)
    assert dice_loss(logits, target).item() == pytest.approx(dice, rel=1e-5)


def test_losses_are_float32_under_autocast():
    logits, embedding, target = draw_case()

    with torch.autocast("cpu", torch.bfloat16):
        losses = coupalign_losses(logits, embedding.bfloat16(), target, config=LossConfig())

    assert all(x.dtype == torch.float32 for x in losses.values())


def boundary_pixels(mask: Tensor) -> list[tuple[int, int]]:
    """List the pixels of a 24 x 24 mask that have a neighbor outside the mask."""
    pixels = []
    for y, x in mask.nonzero().tolist():
        around = mask[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2]
        if not around.all():
            pixels.append((y, x))
    return pixels


def share_within_two_pixels(pixels: list[tuple[int, int]], others: list[tuple[int, int]]) -> float:
    near = [
        any(abs(y - other_y) <= 2 and abs(x - other_x) <= 2 for other_y, other_x in others)
        for y, x in pixels
    ]
    return sum(near) / len(near)


@pytest.mark.parametrize("shift", [0, 2, 3, 5])
def test_boundary_loss_of_hard_masks_is_one_minus_f1_counted_by_hand(shift):
    truth = torch.zeros(1, 24, 24, dtype=torch.bool)
    truth[0, 6:18, 6:18] = True
    predicted = truth.roll(shift, 2)

    ours, true = boundary_pixels(predicted[0]), boundary_pixels(truth[0])
    precision = share_within_two_pixels(ours, true)
    recall = share_within_two_pixels(true, ours)
    f1 = 2 * precision * recall / (precision + recall)

    logits = (predicted.float() * 2 - 1) * 50
    assert boundary_loss(logits, truth).item() == pytest.approx(1 - f1, abs=1e-4)


def test_boundary_loss_is_zero_without_a_true_boundary():
    empty = torch.zeros(1, 24, 24, dtype=torch.bool)

    assert boundary_loss(torch.zeros(1, 24, 24), empty).item() == 0


def test_boundary_loss_has_a_gradient_and_averages_over_micro_batches():
    logits, _, target = draw_case(dtype=torch.float64)
    config = MaskLossConfig(mask=0, dice=0, boundary=1)

    whole = mask_losses(logits, target, config)["loss"]
    first = mask_losses(logits[:2], target[:2], config)["loss"]
    second = mask_losses(logits[2:], target[2:], config)["loss"]
    (gradient,) = torch.autograd.grad(whole, logits)

    assert whole.item() == pytest.approx((first.item() + second.item()) / 2, rel=1e-6)
    assert gradient.isfinite().all() and gradient.abs().sum() > 0
    assert "boundary" not in mask_losses(logits, target, MaskLossConfig())
