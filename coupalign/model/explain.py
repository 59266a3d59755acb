"""What a CoupAlign model used for an answer: the masks that the sentence chose, and the attention.

The fused kernel never stores the score matrix. It is computed again here, in plain float32, from
the inputs of each alignment.

Shape legend: B batch, k proposals, N all proposals, T words, P pixels of a stage (H*W), h heads,
S input side.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import isqrt

import torch
from torch import Tensor, nn

from coupalign.kernels.reference import finite_bias, without_autocast
from coupalign.model.sma import SentenceMaskAlignment
from coupalign.model.wpa import WordPixelAlignment


@dataclass(frozen=True)
class AttentionMaps:
    """The attention of one stage, averaged over the heads. Float32 [B, T, H, W] each.

    Attributes:
        over_words: how much each pixel reads of each word. Sums to 1 over the words, 0 at padded
            ones.
        over_pixels: where each word reads. Sums to 1 over the pixels, 0 at padded words.
    """

    over_words: Tensor
    over_pixels: Tensor


@dataclass(frozen=True)
class Explanation:
    """What a forward pass did with a batch.

    A model without mask proposals or without alignments leaves their fields empty.

    Attributes:
        weights: a_n of the k proposals with the highest weights, in descending order, float32
            [B, k]. All N sum to 1.
        signals: m_n of the same proposals, 0 .. 1, float32 [B, k, S/4, S/4].
        spread: standard deviation of m_n over all N, averaged over the pixels, float32 [B]. Near 0
            all proposals are the same mask.
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
    """Run a model in evaluation mode on a batch, and record its weights, signals and attention.

    Args:
        model: any method; only CoupAlign's alignments are recorded.
        image, words, word_mask: as for `CoupAlign.forward`.
        proposals: k, the most that are kept.
    """
    attention: dict[int, AttentionMaps] = {}
    masks: dict[str, Tensor] = {}

    def record_attention(stage: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(wpa: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            attention[stage] = _stage_attention(wpa, *inputs)

        return hook

    def record_masks(sma: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        weights, signals = mask_signals(sma, *inputs)  # [B, N], [B, N, h, w]
        top = weights.topk(min(proposals, weights.shape[1]), dim=1)
        index = top.indices[..., None, None].expand(-1, -1, *signals.shape[2:])

        masks["spread"] = signals.std(1, correction=0).mean((1, 2))
        masks["weights"] = top.values
        masks["signals"] = signals.gather(1, index)

    # Hook the alignments, and remove the hooks even if the forward pass fails.
    with ExitStack() as hooks:
        for stage, wpa in getattr(model, "wpa", {}).items():
            handle = wpa.register_forward_pre_hook(record_attention(int(stage)))
            hooks.callback(handle.remove)
        if hasattr(model, "sma"):
            handle = model.sma.register_forward_pre_hook(record_masks)
            hooks.callback(handle.remove)

        model(image, words, word_mask)

    return Explanation(attention=attention, **masks)


def word_pixel_attention(
    wpa: WordPixelAlignment, v: Tensor, l: Tensor, word_mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the two softmaxes of an alignment's score matrix S.

    Args:
        wpa: the alignment.
        v: normalized pixels [B, P, C].
        l: normalized words [B, T, D].
        word_mask: bool [B, T].

    Returns:
        the attention over words and the attention over pixels, [B, h, T, P] each, both 0 at padded
        words.
    """
    with without_autocast(v.device):
        exact = torch.promote_types(v.dtype, torch.float32)
        keys, _, bias = wpa.absorb(l.to(exact), word_mask)  # [B, h*T, C], [B, h*T]
        bias, padding = finite_bias(bias)
        scores = keys @ v.to(exact).transpose(1, 2) + bias[..., None]  # [B, h*T, P]

        by_head = (wpa.heads, -1)
        scores = scores.unflatten(1, by_head)  # [B, h, T, P]
        real = ~padding[..., None].unflatten(1, by_head)  # [B, h, T, 1]
        return scores.softmax(2) * real, scores.softmax(3) * real


def mask_signals(
    sma: SentenceMaskAlignment, masks: Tensor, sentence: Tensor, pixels: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the weights and signals of the masks, from the inputs of `sma.forward`.

    Returns:
        a [B, N] and m [B, N, h, w], float32.
    """
    with without_autocast(pixels.device):
        exact = torch.promote_types(pixels.dtype, torch.float32)
        masks, y = masks.to(exact), pixels.to(exact)

        sentence = sentence.to(sma.project_sentence.weight.dtype)
        sentence = sma.project_sentence(sentence).to(exact)  # [B, d]
        agreement = torch.einsum("bnd,bd->bn", masks, sentence)
        weights = (agreement * masks.shape[2] ** -0.5).softmax(1)

        signals = torch.einsum("bnd,bdhw->bnhw", masks * sma.scale, y).sigmoid()
        return weights, signals


def _stage_attention(
    wpa: WordPixelAlignment, pixels: Tensor, words: Tensor, word_mask: Tensor
) -> AttentionMaps:
    side = isqrt(pixels.shape[1])
    assert side * side == pixels.shape[1], f"{pixels.shape[1]} pixels do not form a square"

    v, l = wpa.norm_pixels(pixels), wpa.norm_words(words)
    over_words, over_pixels = word_pixel_attention(wpa, v, l, word_mask=word_mask)
    return AttentionMaps(
        over_words=_average_heads(over_words, side), over_pixels=_average_heads(over_pixels, side)
    )


def _average_heads(attention: Tensor, side: int) -> Tensor:
    """[B, h, T, P] -> float32 [B, T, H, W]."""
    return attention.float().mean(1).unflatten(2, (side, side))
