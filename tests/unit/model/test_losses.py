"""Losses: splits of the batch, degenerate masks, and each term against its definition."""

from __future__ import annotations

import math

import pytest
import torch

from coupalign.config.schema import LossConfig, MaskLossConfig
from coupalign.model.losses import (
    boundary_loss,
    contrast_loss,
    dice_loss,
    mask_losses,
    referring_losses,
    weighted_cross_entropy,
)


def case(batch: int = 4, side: int = 32, width: int = 6, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    target = torch.zeros(batch, side, side, dtype=torch.bool)
    for b in range(batch):
        target[b, 4 : 12 + 4 * b, 8:20] = True
    logits = torch.randn(batch, side, side, generator=generator).requires_grad_()
    embedding = torch.randn(
        batch, width, side // 4, side // 4, generator=generator
    ).requires_grad_()
    return logits, embedding, target


def test_micro_batches_average_to_the_whole_batch_with_gradients():
    logits, embedding, target = (x.double() if x.is_floating_point() else x for x in case())
    target[2] = False
    config = LossConfig(contrast_samples=9)
    whole = referring_losses(logits, embedding, target, config)
    parts = [
        referring_losses(logits[i : i + 2], embedding[i : i + 2], target[i : i + 2], config)
        for i in (0, 2)
    ]
    for name in whole:
        assert whole[name].item() == pytest.approx(sum(p[name].item() for p in parts) / 2, rel=1e-6)
    a = torch.autograd.grad(whole["loss"], [logits, embedding])
    b = torch.autograd.grad((parts[0]["loss"] + parts[1]["loss"]) / 2, [logits, embedding])
    for x, y in zip(a, b):
        torch.testing.assert_close(x, y)


def test_only_the_sum_has_a_gradient_and_it_is_weighted():
    config = LossConfig(mask=2.0, dice=0.5, contrast=0.25)
    out = referring_losses(*case(), config)
    assert [name for name, x in out.items() if x.requires_grad] == ["loss"]
    assert out["loss"].item() == pytest.approx(
        (2 * out["mask"] + 0.5 * out["dice"] + 0.25 * out["contrast"]).item()
    )


@pytest.mark.parametrize("fill", [False, True])
def test_empty_and_full_masks_give_no_contrast_and_finite_gradients(fill):
    logits, embedding, target = case()
    target[:] = fill
    out = referring_losses(logits, embedding, target, LossConfig())
    assert out["contrast"].item() == 0 and out["loss"].isfinite()
    gradients = torch.autograd.grad(out["loss"], [logits, embedding])
    assert all(g.isfinite().all() for g in gradients) and not gradients[1].any()


def test_equal_and_zero_embeddings_stay_finite():
    _, embedding, target = case()
    for constant in (0.0, 1.0):
        flat = torch.full_like(embedding, constant).requires_grad_()
        contrast_loss(flat, target, 0.07, 16).backward()
        assert flat.grad.isfinite().all()


def test_contrast_equals_its_definition_where_every_pixel_is_drawn():
    _, embedding, target = case(batch=1)
    y = torch.nn.functional.normalize(embedding[0].detach().flatten(1).T, dim=1)
    truth = torch.nn.functional.avg_pool2d(target.float(), 4)[0].flatten() >= 0.5
    front, back = y[truth], y[~truth]
    prototype = torch.nn.functional.normalize(front.sum(0), dim=0)
    want = 0.0
    for pixel in front:
        positive = math.exp(pixel @ prototype / 0.1)
        want -= math.log(
            positive / (positive + sum(math.exp(pixel @ other / 0.1) for other in back))
        )
    assert contrast_loss(embedding, target, 0.1, 64).item() == pytest.approx(
        want / len(front), rel=1e-4
    )


def test_sampling_is_deterministic_and_leaves_the_global_generator_alone():
    _, embedding, target = case()
    before = torch.random.get_rng_state()
    assert contrast_loss(embedding, target, 0.1, 5) == contrast_loss(embedding, target, 0.1, 5)
    assert torch.equal(before, torch.random.get_rng_state())


def test_contrast_falls_when_the_object_separates():
    _, embedding, target = case()
    truth = torch.nn.functional.avg_pool2d(target.float()[:, None], 4)
    assert contrast_loss(embedding + 9 * truth, target, 0.1, 32) < contrast_loss(
        embedding, target, 0.1, 32
    )


def test_cross_entropy_and_dice_by_hand():
    logits = torch.tensor([[[0.0, 2.0], [-1.0, 3.0]]])
    target = torch.tensor([[[True, False], [False, True]]])
    p = logits.sigmoid().flatten().tolist()
    cross = [
        1.1 * -math.log(p[0]),
        0.9 * -math.log(1 - p[1]),
        0.9 * -math.log(1 - p[2]),
        1.1 * -math.log(p[3]),
    ]
    assert weighted_cross_entropy(logits, target, 1.1, 0.9).item() == pytest.approx(
        sum(cross) / 4, rel=1e-5
    )
    dice = 1 - (2 * (p[0] + p[3]) + 1) / (sum(p) + 2 + 1)
    assert dice_loss(logits, target).item() == pytest.approx(dice, rel=1e-5)


def test_losses_are_float32_under_autocast():
    logits, embedding, target = case()
    with torch.autocast("cpu", torch.bfloat16):
        out = referring_losses(logits, embedding.bfloat16(), target, LossConfig())
    assert all(x.dtype == torch.float32 for x in out.values())


def test_the_boundary_loss_of_hard_masks_is_one_minus_f1_counted_by_hand():
    truth = torch.zeros(1, 24, 24, dtype=torch.bool)
    truth[0, 6:18, 6:18] = True

    def edge(mask):
        inner = torch.zeros_like(mask)
        for y in range(24):
            for x in range(24):
                around = mask[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2]
                inner[y, x] = bool(around.all())
        return [(int(y), int(x)) for y, x in (mask & ~inner).nonzero()]

    def near(point, others):
        return any(abs(point[0] - y) <= 2 and abs(point[1] - x) <= 2 for y, x in others)

    for shift in (0, 2, 3, 5):
        predicted = truth.roll(shift, 2)
        a, b = edge(predicted[0]), edge(truth[0])
        precision, recall = sum(near(p, b) for p in a) / len(a), sum(near(p, a) for p in b) / len(b)
        found = boundary_loss((predicted.float() * 2 - 1) * 50, truth).item()
        assert found == pytest.approx(
            1 - 2 * precision * recall / (precision + recall), abs=1e-4
        ), shift
    assert (
        boundary_loss(torch.zeros(1, 24, 24), torch.zeros(1, 24, 24, dtype=torch.bool)).item() == 0
    ), "no boundary to find"


def test_the_boundary_loss_has_a_gradient_and_splits_like_the_others():
    logits, _, target = (x.double() if x.is_floating_point() else x for x in case())
    config = MaskLossConfig(mask=0, dice=0, boundary=1)
    whole = mask_losses(logits, target, config)
    parts = [mask_losses(logits[i : i + 2], target[i : i + 2], config) for i in (0, 2)]
    assert whole["loss"].item() == pytest.approx(sum(p["loss"].item() for p in parts) / 2, rel=1e-6)
    (grad,) = torch.autograd.grad(whole["loss"], logits)
    assert grad.isfinite().all() and grad.abs().sum() > 0
    assert "boundary" not in mask_losses(logits, target, MaskLossConfig())
