"""Losses: each is a mean over the samples of a per-sample number, so that any equal split of a batch averages to the whole.

All in float32. Shape legend: B batch, S input side, h w sides at stride 4, d embedding width, K sampled pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from coupalign.config.schema import LossConfig, MaskLossConfig


def referring_losses(
    logits: Tensor, embedding: Tensor, target: Tensor, config: LossConfig
) -> dict[str, Tensor]:
    """CoupAlign's losses: those of the mask, and the contrast of its pixel embedding.

    Args:
        logits: [B, S, S].
        embedding: pixel embedding Y [B, d, S/4, S/4].
        target: bool [B, S, S].

    Returns:
        as `mask_losses`, with "contrast".
    """
    losses = mask_losses(logits, target, config)
    if not config.contrast:
        return {**losses, "contrast": logits.new_zeros((), dtype=torch.float32)}
    with torch.autocast(logits.device.type, enabled=False):
        contrast = contrast_loss(embedding, target, config.temperature, config.contrast_samples)
    return {
        **losses,
        "loss": losses["loss"] + config.contrast * contrast,
        "contrast": contrast.detach(),
    }


def mask_losses(logits: Tensor, target: Tensor, config: MaskLossConfig) -> dict[str, Tensor]:
    """The weighted sum of what a mask is held to, and its terms.

    Args:
        logits: [B, S, S].
        target: bool [B, S, S].

    Returns:
        scalars "loss" (the weighted sum, the only one with a gradient) and, unweighted, "mask", "dice" and, where it has a
        weight, "boundary".
    """
    with torch.autocast(logits.device.type, enabled=False):
        mask, dice = (
            weighted_cross_entropy(logits, target, config.foreground, config.background),
            dice_loss(logits, target),
        )
        losses = {
            "loss": config.mask * mask + config.dice * dice,
            "mask": mask.detach(),
            "dice": dice.detach(),
        }
        if config.boundary:
            boundary = boundary_loss(logits, target)
            losses |= {
                "loss": losses["loss"] + config.boundary * boundary,
                "boundary": boundary.detach(),
            }
    return losses


def weighted_cross_entropy(
    logits: Tensor, target: Tensor, foreground: float, background: float
) -> Tensor:
    """Binary cross-entropy of [B, S, S], pixels weighted by class, normalized by the weights of the sample."""
    truth = target.float()
    weight = background + (foreground - background) * truth
    pixelwise = F.binary_cross_entropy_with_logits(
        logits.float(), truth, weight=weight, reduction="none"
    )
    return (pixelwise.flatten(1).sum(1) / weight.flatten(1).sum(1)).mean()


def dice_loss(logits: Tensor, target: Tensor) -> Tensor:
    """1 - (2 I + 1) / (P + G + 1) of the probabilities [B, S, S] (V-Net's Dice, smoothed by one pixel)."""
    probability, truth = logits.float().sigmoid().flatten(1), target.float().flatten(1)
    shared = (probability * truth).sum(1)
    return (1 - (2 * shared + 1) / (probability.sum(1) + truth.sum(1) + 1)).mean()


def boundary_loss(logits: Tensor, target: Tensor) -> Tensor:
    """1 - F1 of the boundaries of probabilities and truth [B, S, S], two pixels apart being near enough.

    A soft boundary is what a 3x3 erosion takes away; precision is the share of the predicted one within two pixels of the true
    one, recall the other way round (Bokhovkin and Burnaev, 2019). A truth without a boundary counts 0.
    """
    predicted, true = (_edge(mask[:, None]) for mask in (logits.float().sigmoid(), target.float()))
    near_true, near_predicted = (
        F.max_pool2d(edge, 5, stride=1, padding=2) for edge in (true, predicted)
    )
    precision = (predicted * near_true).flatten(1).sum(1) / (predicted.flatten(1).sum(1) + 1e-6)
    recall = (true * near_predicted).flatten(1).sum(1) / (true.flatten(1).sum(1) + 1e-6)
    f1 = 2 * precision * recall / (precision + recall + 1e-6)
    return ((1 - f1) * (true.flatten(1).sum(1) > 0)).mean()


def _edge(mask: Tensor) -> Tensor:
    """[B, 1, S, S] in 0 … 1 -> what a 3x3 erosion takes away; beyond the picture nothing is outside."""
    return F.max_pool2d(1 - mask, 3, stride=1, padding=1) - (1 - mask)


def contrast_loss(embedding: Tensor, target: Tensor, temperature: float, samples: int) -> Tensor:
    """Foreground pixels against the foreground prototype, background pixels as negatives (InfoNCE on unit vectors).

        -log  e^(y_i.p / t) / (e^(y_i.p / t) + sum_j e^(y_i.y_j / t))      i foreground, j background, p their mean direction

    At most `samples` pixels of each kind an image, at evenly spaced ranks: no random numbers. A stride-4 pixel is
    foreground where at least half of it is. An image without foreground or without background counts 0.

    Args:
        embedding: [B, d, h, w].
        target: bool [B, S, S], S a multiple of h.
    """
    truth = (
        F.avg_pool2d(target.float()[:, None], target.shape[1] // embedding.shape[2]).flatten(1)
        >= 0.5
    )  # [B, h*w]
    y = embedding.flatten(2).transpose(1, 2)  # [B, h*w, d]
    front, is_front = _draw(y, truth, samples)  # [B, K, d], [B, K]
    back, is_back = _draw(y, ~truth, samples)
    prototype = _unit((front * is_front[..., None]).sum(1, keepdim=True))  # [B, 1, d]
    positive = (front * prototype).sum(2) / temperature  # [B, K]
    negative = (front @ back.transpose(1, 2) / temperature).masked_fill(
        ~is_back[:, None], -1e9
    )  # [B, K, K]
    each = F.softplus(negative.logsumexp(2) - positive) * is_front
    per_image = each.sum(1) / is_front.sum(1).clamp(min=1)
    return (per_image * is_back.any(1)).mean()


def _draw(y: Tensor, chosen: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """Unit vectors [B, K, d] at evenly spaced ranks of the chosen pixels (bool [B, h*w]), and which of the K are real."""
    rank = chosen.cumsum(1)  # [B, h*w]
    count = rank[:, -1:]  # [B, 1]
    slot = torch.arange(min(samples, chosen.shape[1]), device=y.device).expand(len(y), -1)  # [B, K]
    wanted = torch.where(count > slot.shape[1], slot * count // slot.shape[1], slot)
    place = torch.searchsorted(rank, wanted + 1).clamp(max=chosen.shape[1] - 1)
    drawn = y.gather(1, place[..., None].expand(-1, -1, y.shape[2]))
    return _unit(drawn), slot < count


def _unit(x: Tensor) -> Tensor:
    """Scale to length 1; the floor keeps the gradient of a zero vector finite."""
    x = x.float()
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
