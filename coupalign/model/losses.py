"""Losses: each is a mean over the samples of a per-sample number, so that any equal split of a batch averages to the whole.

All in float32. Shape legend: B batch, S input side, h w sides at stride 4, d embedding width, K sampled pixels.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from coupalign.config.schema import LossConfig


def referring_losses(logits: Tensor, embedding: Tensor, target: Tensor, config: LossConfig) -> dict[str, Tensor]:
    """The weighted sum and its terms.

    Args:
        logits: [B, S, S].
        embedding: pixel embedding Y [B, d, S/4, S/4].
        target: bool [B, S, S].

    Returns:
        scalars "loss" (the weighted sum, the only one with a gradient) and, unweighted, "mask", "dice", "contrast".
    """
    with torch.autocast(logits.device.type, enabled=False):
        terms = {
            "mask": weighted_cross_entropy(logits, target, config.foreground, config.background),
            "dice": dice_loss(logits, target),
            "contrast": contrast_loss(embedding, target, config.temperature, config.contrast_samples) if config.contrast
            else logits.new_zeros((), dtype=torch.float32),
        }
        loss = config.mask * terms["mask"] + config.dice * terms["dice"] + config.contrast * terms["contrast"]
    return {"loss": loss, **{name: term.detach() for name, term in terms.items()}}


def weighted_cross_entropy(logits: Tensor, target: Tensor, foreground: float, background: float) -> Tensor:
    """Binary cross-entropy of [B, S, S], pixels weighted by class, normalized by the weights of the sample."""
    truth = target.float()
    weight = background + (foreground - background) * truth
    pixelwise = F.binary_cross_entropy_with_logits(logits.float(), truth, weight=weight, reduction="none")
    return (pixelwise.flatten(1).sum(1) / weight.flatten(1).sum(1)).mean()


def dice_loss(logits: Tensor, target: Tensor) -> Tensor:
    """1 - (2 I + 1) / (P + G + 1) of the probabilities [B, S, S] (V-Net's Dice, smoothed by one pixel)."""
    probability, truth = logits.float().sigmoid().flatten(1), target.float().flatten(1)
    shared = (probability * truth).sum(1)
    return (1 - (2 * shared + 1) / (probability.sum(1) + truth.sum(1) + 1)).mean()


def contrast_loss(embedding: Tensor, target: Tensor, temperature: float, samples: int) -> Tensor:
    """Foreground pixels against the foreground prototype, background pixels as negatives (InfoNCE on unit vectors).

        -log  e^(y_i.p / t) / (e^(y_i.p / t) + sum_j e^(y_i.y_j / t))      i foreground, j background, p their mean direction

    At most `samples` pixels of each kind an image, at evenly spaced ranks: no random numbers. A stride-4 pixel is
    foreground where at least half of it is. An image without foreground or without background counts 0.

    Args:
        embedding: [B, d, h, w].
        target: bool [B, S, S], S a multiple of h.
    """
    truth = F.avg_pool2d(target.float()[:, None], target.shape[1] // embedding.shape[2]).flatten(1) >= 0.5     # [B, h*w]
    y = embedding.flatten(2).transpose(1, 2)                                                                   # [B, h*w, d]
    front, is_front = _draw(y, truth, samples)                                                                 # [B, K, d], [B, K]
    back, is_back = _draw(y, ~truth, samples)
    prototype = _unit((front * is_front[..., None]).sum(1, keepdim=True))                                      # [B, 1, d]
    positive = (front * prototype).sum(2) / temperature                                                        # [B, K]
    negative = (front @ back.transpose(1, 2) / temperature).masked_fill(~is_back[:, None], -1e9)               # [B, K, K]
    each = F.softplus(negative.logsumexp(2) - positive) * is_front
    per_image = each.sum(1) / is_front.sum(1).clamp(min=1)
    return (per_image * is_back.any(1)).mean()


def _draw(y: Tensor, chosen: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """Unit vectors [B, K, d] at evenly spaced ranks of the chosen pixels (bool [B, h*w]), and which of the K are real."""
    rank = chosen.cumsum(1)                                                                  # [B, h*w]
    count = rank[:, -1:]                                                                     # [B, 1]
    slot = torch.arange(min(samples, chosen.shape[1]), device=y.device).expand(len(y), -1)   # [B, K]
    wanted = torch.where(count > slot.shape[1], slot * count // slot.shape[1], slot)
    place = torch.searchsorted(rank, wanted + 1).clamp(max=chosen.shape[1] - 1)
    drawn = y.gather(1, place[..., None].expand(-1, -1, y.shape[2]))
    return _unit(drawn), slot < count


def _unit(x: Tensor) -> Tensor:
    """Scale to length 1; the floor keeps the gradient of a zero vector finite."""
    x = x.float()
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
