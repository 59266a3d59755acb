"""What a CoupAlign model looked at: the masks that the sentence chose, and the attention between words and pixels.

The fused kernel never makes the score matrix, so it is made again here, in plain float32, from what each alignment was given.

Shape legend: B batch, k proposals, T words, P pixels of a stage (H*W), h heads, S input side.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn

from coupalign.kernels.reference import finite_bias, without_autocast
from coupalign.model.sma import SentenceMaskAlignment
from coupalign.model.wpa import WordPixelAlignment


@dataclass(frozen=True)
class AttentionMaps:
    """The attention of one stage, the mean of its heads; float32 [B, T, H, W] each.

    Attributes:
        over_words: how much each pixel reads of each word; sums to 1 over the words, 0 at padded ones.
        over_pixels: where each word reads; sums to 1 over the pixels, 0 at padded words.
    """

    over_words: Tensor
    over_pixels: Tensor


@dataclass(frozen=True)
class Explanation:
    """What a forward pass did with a batch; a model without mask proposals or alignments leaves those parts empty.

    Attributes:
        weights: a_n of the k proposals that the sentence weights highest, in that order, float32 [B, k]. All N sum to 1.
        signals: m_n of the same proposals, 0 … 1, float32 [B, k, S/4, S/4].
        spread: the standard deviation of m_n over all N, mean over the pixels, float32 [B]: near 0 all proposals are one mask.
        attention: by stage, counted from 0 as in `model.wpa`.
    """

    weights: Tensor | None = None
    signals: Tensor | None = None
    spread: Tensor | None = None
    attention: dict[int, AttentionMaps] = field(default_factory=dict)


@torch.no_grad()
def explain_prediction(
    model: nn.Module, image: Tensor, words: Tensor, word_mask: Tensor, proposals: int = 6
) -> Explanation:
    """Run `model`, which is in evaluation mode, on a batch and listen at its alignments.

    Args:
        image, words, word_mask: as for `CoupAlign.forward`.
        proposals: k, the most that are kept.
    """
    found: dict[str, Any] = {"attention": {}}

    def hear_stage(stage: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hear(wpa: nn.Module, given: tuple[Tensor, ...]) -> None:
            found["attention"][stage] = _stage_attention(wpa, *given)

        return hear

    def hear_masks(sma: nn.Module, given: tuple[Tensor, ...]) -> None:
        weights, signals = mask_signals(sma, *given)
        found["spread"] = signals.std(1, correction=0).mean((1, 2))
        top = weights.topk(min(proposals, weights.shape[1]), dim=1)
        found["weights"] = top.values
        found["signals"] = signals.gather(
            1, top.indices[..., None, None].expand(-1, -1, *signals.shape[2:])
        )

    with ExitStack() as hooks:
        for stage, wpa in getattr(model, "wpa", {}).items():
            hooks.callback(wpa.register_forward_pre_hook(hear_stage(int(stage))).remove)
        if hasattr(model, "sma"):
            hooks.callback(model.sma.register_forward_pre_hook(hear_masks).remove)
        model(image, words, word_mask)
    return Explanation(**found)


def word_pixel_attention(
    wpa: WordPixelAlignment, v: Tensor, l: Tensor, word_mask: Tensor
) -> tuple[Tensor, Tensor]:  # noqa: E741
    """The two softmaxes of S for normalized pixels v [B, P, C] and words l [B, T, D]: over words, over pixels, [B, h, T, P] each.

    Both are 0 at padded words.
    """
    with without_autocast(v.device):
        exact = torch.promote_types(v.dtype, torch.float32)
        keys, _, bias = wpa.absorb(l.to(exact), word_mask)  # [B, h*T, C], [B, h*T]
        bias, padding = finite_bias(bias)
        scores = keys @ v.to(exact).transpose(1, 2) + bias[..., None]  # [B, h*T, P]
        scores, real = (x.unflatten(1, (wpa.heads, -1)) for x in (scores, ~padding[..., None]))
        return scores.softmax(2) * real, scores.softmax(3) * real


def mask_signals(
    sma: SentenceMaskAlignment, masks: Tensor, sentence: Tensor, pixels: Tensor
) -> tuple[Tensor, Tensor]:
    """a [B, N] and m [B, N, h, w] in float32, of what `SentenceMaskAlignment.forward` was given."""
    with without_autocast(pixels.device):
        exact = torch.promote_types(pixels.dtype, torch.float32)
        masks, y = masks.to(exact), pixels.to(exact)
        agreement = torch.einsum(
            "bnd,bd->bn",
            masks,
            sma.project_sentence(sentence.to(sma.project_sentence.weight.dtype)).to(exact),
        )
        weights = (agreement * masks.shape[2] ** -0.5).softmax(1)
        return weights, torch.einsum("bnd,bdhw->bnhw", masks * sma.scale, y).sigmoid()


def _stage_attention(
    wpa: WordPixelAlignment, pixels: Tensor, words: Tensor, word_mask: Tensor
) -> AttentionMaps:
    maps = word_pixel_attention(wpa, wpa.norm_pixels(pixels), wpa.norm_words(words), word_mask)
    side = isqrt(pixels.shape[1])  # the input is a square
    assert side * side == pixels.shape[1], f"{pixels.shape[1]} pixels are no square"
    return AttentionMaps(*(each.float().mean(1).unflatten(2, (side, side)) for each in maps))
