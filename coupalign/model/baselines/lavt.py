"""LAVT: Language-Aware Vision Transformer (Yang et al., CVPR 2022), re-implemented from the paper for this harness.

The sentence is read once, before the image. After each image stage the pixels read the words; what they read goes to the
decoder, and through a gate to the next stage. Where the paper leaves a choice open, ours is: the gate's two maps have no bias;
InstanceNorm has no scale or shift; the two channels of the decoder become one logit, their difference (the softmax of two
channels is the sigmoid of that). BatchNorm's statistics are those of a rank's own micro-batches, averaged over the ranks
whenever the model is scored or saved.

Shape legend: B batch, P pixels of a stage (H*W), T words, C stage channels, D text width, d decoder width, S input side.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coupalign.config.schema import LavtConfig
from coupalign.model.base import STAGES, ReferringModel
from coupalign.model.losses import mask_losses


class Lavt(ReferringModel):
    """One-way fusion at every stage of the image encoder, and a wide decoder."""

    def __init__(self, config: LavtConfig, vocabulary: int, image_size: int):
        super().__init__(config, vocabulary, image_size)
        channels = self.image.channels
        self.pwam = nn.ModuleList(PixelWordAttention(c, self.text.width) for c in channels)
        self.gates = nn.ModuleList(
            LanguageGate(c) for c in channels[:-1]
        )  # nothing comes after the last
        self.norms = nn.ModuleList(nn.LayerNorm(c) for c in channels)
        self.decoder = WideDecoder(channels, config.decoder.width)

    def forward(
        self, image: Tensor, words: Tensor, word_mask: Tensor, target: Tensor | None = None
    ) -> Tensor | dict[str, Tensor]:
        """As every `ReferringModel`."""
        words = self.read(words, word_mask)  # [B, T, D]
        pixels = self.normalized(image)
        fused = []
        for stage in range(STAGES):
            pixels = self.image(stage, pixels)  # V [B, H, W, C]
            message = self.pwam[stage](pixels.flatten(1, 2), words, word_mask).view_as(pixels)  # F
            if stage < len(self.gates):
                pixels = self.gates[stage](pixels, message)  # E goes on
            fused.append(self.norms[stage](message))
        logits = F.interpolate(
            self.decoder(fused).float(), size=image.shape[2:], mode="bilinear", align_corners=True
        )[:, 0]
        return logits if target is None else mask_losses(logits, target, self.config.losses)


class PixelWordAttention(nn.Module):
    """PWAM: every pixel reads the words, and its message is multiplied into the pixel.

        A = softmax_words(C^-1/2 IN(Wq V) (Wk L)^T)      G = IN(Wo (A (Wu L)))      F = GELU(Wm (GELU(Wv V) * G))

    The 1x1 convolutions of the paper are Linear layers on channels-last pixels; IN is InstanceNorm over the pixels.
    """

    def __init__(self, channels: int, word_width: int):
        super().__init__()
        self.query, self.project, self.out, self.mix = (
            nn.Linear(channels, channels) for _ in range(4)
        )
        self.key, self.value = nn.Linear(word_width, channels), nn.Linear(word_width, channels)

    def forward(self, pixels: Tensor, words: Tensor, word_mask: Tensor) -> Tensor:
        """V [B, P, C], L [B, T, D], mask [B, T] -> F [B, P, C]."""
        key, value = self.key(words), self.value(words) * word_mask[..., None]  # [B, T, C]
        query = instance_norm(self.query(pixels)).to(key.dtype)  # [B, P, C]
        read = F.scaled_dot_product_attention(
            query, key, value.to(key.dtype), attn_mask=word_mask[:, None]
        )
        message = instance_norm(self.out(read))  # G [B, P, C]
        return F.gelu(self.mix(F.gelu(self.project(pixels)) * message))


class LanguageGate(nn.Module):
    """E = V + tanh(W2 ReLU(W1 F)) * F."""

    def __init__(self, channels: int):
        super().__init__()
        self.gate = nn.Sequential(
            nn.Linear(channels, channels, bias=False),
            nn.ReLU(),
            nn.Linear(channels, channels, bias=False),
        )

    def forward(self, pixels: Tensor, message: Tensor) -> Tensor:
        """V and F [B, H, W, C] -> E of the same shape."""
        return pixels + (torch.tanh(self.gate(message)) * message).to(pixels.dtype)


class WideDecoder(nn.Module):
    """From stage 4 to stage 1: upsample, concatenate the finer stage, two 3x3 conv-BatchNorm-ReLU; then 1x1 to two channels."""

    def __init__(self, channels: Sequence[int], width: int):
        super().__init__()
        inputs = [channels[3] + channels[2], width + channels[1], width + channels[0]]
        self.levels = nn.ModuleList(
            nn.Sequential(*conv_norm_relu(c, width), *conv_norm_relu(width, width)) for c in inputs
        )
        self.classify = nn.Conv2d(width, 2, 1)

    def forward(self, stages: Sequence[Tensor]) -> Tensor:
        """Four maps [B, H, W, C], finest first -> one logit [B, 1, S/4, S/4]: foreground minus background."""
        *finer, level = (stage.permute(0, 3, 1, 2) for stage in stages)
        for body, stage in zip(self.levels, reversed(finer)):
            level = F.interpolate(level, size=stage.shape[2:], mode="bilinear", align_corners=True)
            level = body(torch.cat([level, stage], dim=1))
        background, foreground = self.classify(level).split(1, dim=1)
        return foreground - background


def conv_norm_relu(inputs: int, outputs: int) -> list[nn.Module]:
    """3x3 convolution, BatchNorm, ReLU."""
    return [
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    ]


def instance_norm(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Zero mean and unit variance over the pixels of each sample and channel: [B, P, C] -> float32 [B, P, C].

    By hand, since torch's refuses a map of one pixel, which here becomes zero.
    """
    x = x.float()
    variance, mean = torch.var_mean(x, dim=1, keepdim=True, correction=0)
    return (x - mean) * torch.rsqrt(variance + eps)
