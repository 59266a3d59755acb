"""Losses, each a mean over the samples, so that any equal split of a batch averages to the whole.

All losses are computed in float32.

Shape legend: B batch, S input side, h w sides at stride 4, d embedding width, K sampled pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from coupalign.config.schema import LossConfig, MaskLossConfig


def coupalign_losses(
    logits: Tensor, embedding: Tensor, target: Tensor, config: LossConfig
) -> dict[str, Tensor]:
    """Compute CoupAlign's losses: those of the mask, and the contrast of its pixel embedding.

    Args:
        logits: [B, S, S].
        embedding: pixel embedding Y [B, d, S/4, S/4].
        target: bool [B, S, S].
        config: the weights.

    Returns:
        the scalars of `mask_losses`, and "contrast".
    """
    losses = mask_losses(logits, target, config)
    if not config.contrast:
        losses["contrast"] = logits.new_zeros((), dtype=torch.float32)
        return losses

    with torch.autocast(logits.device.type, enabled=False):
        contrast = contrast_loss(
            embedding, target, config.temperature, samples=config.contrast_samples
        )
    losses["loss"] = losses["loss"] + config.contrast * contrast
    losses["contrast"] = contrast.detach()
    return losses


def mask_losses(logits: Tensor, target: Tensor, config: MaskLossConfig) -> dict[str, Tensor]:
    """Compute the losses of a mask.

    Args:
        logits: [B, S, S].
        target: bool [B, S, S].
        config: the weights.

    Returns:
        scalars: "loss" is the weighted sum and the only one with a gradient. The unweighted terms
        are "mask", "dice" and, if its weight is not zero, "boundary".
    """
    with torch.autocast(logits.device.type, enabled=False):
        mask = weighted_cross_entropy(
            logits, target, foreground=config.foreground, background=config.background
        )
        dice = dice_loss(logits, target)
        losses = {
            "loss": config.mask * mask + config.dice * dice,
            "mask": mask.detach(),
            "dice": dice.detach(),
        }

        if config.boundary:
            boundary = boundary_loss(logits, target)
            losses["loss"] = losses["loss"] + config.boundary * boundary
            losses["boundary"] = boundary.detach()

    return losses


def weighted_cross_entropy(
    logits: Tensor, target: Tensor, foreground: float, background: float
) -> Tensor:
    """Compute binary cross-entropy [B, S, S] -> scalar, with pixels weighted by class.

    Each sample is normalized by the sum of its weights.
    """
    truth = target.float()
    weight = background + (foreground - background) * truth
    pixelwise = F.binary_cross_entropy_with_logits(
        logits.float(), truth, weight=weight, reduction="none"
    )
    return (_sum_pixels(pixelwise) / _sum_pixels(weight)).mean()


def dice_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Compute 1 - (2 I + 1) / (P + G + 1) of probabilities and truth, [B, S, S] -> scalar.

    I is their product, P and G their sums: V-Net's Dice, smoothed by one pixel.
    """
    probability = logits.float().sigmoid().flatten(1)
    truth = target.float().flatten(1)
    shared = (probability * truth).sum(1)  # [B]
    total = probability.sum(1) + truth.sum(1)  # [B]
    return (1 - (2 * shared + 1) / (total + 1)).mean()


def boundary_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Compute 1 - F1 of the boundaries of probabilities and truth, [B, S, S] -> scalar.

    A soft boundary is what a 3x3 erosion removes. Precision is the share of the predicted boundary
    within two pixels of the true one; recall is the other way round (Bokhovkin and Burnaev, 2019).
    A sample whose truth has no boundary counts 0.
    """
    predicted = _soft_boundary(logits.float().sigmoid())  # [B, 1, S, S]
    true = _soft_boundary(target.float())

    # Dilate each boundary by the two pixels of tolerance.
    near_true = F.max_pool2d(true, 5, stride=1, padding=2)
    near_predicted = F.max_pool2d(predicted, 5, stride=1, padding=2)

    precision = _sum_pixels(predicted * near_true) / (_sum_pixels(predicted) + 1e-6)  # [B]
    recall = _sum_pixels(true * near_predicted) / (_sum_pixels(true) + 1e-6)  # [B]
    f1 = 2 * precision * recall / (precision + recall + 1e-6)

    has_boundary = _sum_pixels(true) > 0
    return ((1 - f1) * has_boundary).mean()


def contrast_loss(embedding: Tensor, target: Tensor, temperature: float, samples: int) -> Tensor:
    """Pull foreground pixels to their mean direction and away from background pixels.

    This is InfoNCE on unit vectors: for a foreground pixel i, background pixels j, and the mean
    direction p of the foreground,

        -log  e^(y_i.p / t) / (e^(y_i.p / t) + sum_j e^(y_i.y_j / t))

    Each image draws at most `samples` pixels of each kind, at evenly spaced ranks: there are no
    random numbers. A stride-4 pixel is foreground if at least half of it is. An image without
    foreground or without background counts 0.

    Args:
        embedding: [B, d, h, w].
        target: bool [B, S, S], S a multiple of h.
        temperature: t.
        samples: K.
    """
    stride = target.shape[1] // embedding.shape[2]
    share = F.avg_pool2d(target.float()[:, None], stride).flatten(1)  # [B, h*w]
    is_foreground = share >= 0.5

    y = embedding.flatten(2).transpose(1, 2)  # [B, h*w, d]
    front, front_mask = _sample_pixels(y, is_foreground, samples)  # [B, K, d], [B, K]
    back, back_mask = _sample_pixels(y, ~is_foreground, samples)

    # Score the foreground pixels against their mean direction and against the background.
    prototype = _unit_vectors((front * front_mask[..., None]).sum(1, keepdim=True))  # [B, 1, d]
    positive = (front * prototype).sum(2) / temperature  # [B, K]
    negative = front @ back.transpose(1, 2) / temperature  # [B, K, K]
    negative = negative.masked_fill(~back_mask[:, None], -1e9)

    # -log(e^p / (e^p + sum e^n)) = softplus(logsumexp(n) - p).
    per_pixel = F.softplus(negative.logsumexp(2) - positive) * front_mask  # [B, K]
    per_image = per_pixel.sum(1) / front_mask.sum(1).clamp(min=1)  # [B]
    return (per_image * back_mask.any(1)).mean()


def _sum_pixels(maps: Tensor) -> Tensor:
    """Sum over everything but the batch: [B, ...] -> [B]."""
    return maps.flatten(1).sum(1)


def _soft_boundary(mask: Tensor) -> Tensor:
    """Return what a 3x3 erosion removes from a mask in 0 .. 1. The image border is not a boundary.

    [B, S, S] -> [B, 1, S, S].
    """
    outside = 1 - mask[:, None]
    return F.max_pool2d(outside, 3, stride=1, padding=1) - outside


def _sample_pixels(y: Tensor, chosen: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """Draw pixels at evenly spaced ranks among the chosen ones.

    Args:
        y: [B, h*w, d].
        chosen: bool [B, h*w].
        samples: K; fewer if the map has fewer pixels.

    Returns:
        unit vectors [B, K, d], and which of the K are real, bool [B, K]: the rest is filled up
        where an image has fewer than K chosen pixels.
    """
    batch, pixels, width = y.shape
    samples = min(samples, pixels)
    ranks = chosen.cumsum(1)  # [B, h*w]
    count = ranks[:, -1:]  # [B, 1]

    # Slot k takes the chosen pixel of rank k, or of rank k * count / K if there are more than K.
    slot = torch.arange(samples, device=y.device).expand(batch, -1)  # [B, K]
    rank = torch.where(count > samples, slot * count // samples, slot)
    index = torch.searchsorted(ranks, rank + 1).clamp(max=pixels - 1)  # [B, K]

    drawn = y.gather(1, index[..., None].expand(-1, -1, width))  # [B, K, d]
    return _unit_vectors(drawn), slot < count


def _unit_vectors(x: Tensor) -> Tensor:
    """Scale the last axis to length 1. The floor keeps the gradient of a zero vector finite."""
    x = x.float()
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
