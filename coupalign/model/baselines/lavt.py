"""LAVT: Language-Aware Vision Transformer (Yang et al., CVPR 2022), re-implemented from the paper.

The sentence is read once, before the image. After each image stage the pixels read the words. What
they read goes to the decoder, and through a gate to the next stage.

Where the paper leaves a choice open, we chose:

- The two maps of the gate have no bias.
- InstanceNorm has no scale or shift.
- The two channels of the decoder become one logit, their difference. The softmax of two channels is
  the sigmoid of that.
- BatchNorm's statistics are those of a rank's own micro-batches, averaged over the ranks whenever
  the model is scored or saved.

Shape legend: B batch, P pixels of a stage (H*W), T words, C stage channels, D text width,
d decoder width, S input side.
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
        # No stage comes after the last, so it has no gate.
        self.gates = nn.ModuleList(LanguageGate(c) for c in channels[:-1])
        self.norms = nn.ModuleList(nn.LayerNorm(c) for c in channels)
        self.decoder = WideDecoder(channels, config.decoder.width)

    def forward(
        self, image: Tensor, words: Tensor, word_mask: Tensor, target: Tensor | None = None
    ) -> Tensor | dict[str, Tensor]:
        """Segment what each sentence refers to, see `ReferringModel`."""
        # Read the whole sentence before the image.
        words = self.encode_text(words, word_mask)  # L [B, T, D]

        # Fuse the words into every stage.
        pixels = self.normalize(image)  # [B, S, S, 3]
        fused = []
        for stage in range(STAGES):
            pixels = self.image(stage, pixels)  # V [B, H, W, C]
            message = self.pwam[stage](pixels.flatten(1, 2), words, word_mask)
            message = message.view_as(pixels)  # F [B, H, W, C]
            if stage < len(self.gates):
                pixels = self.gates[stage](pixels, message)  # E [B, H, W, C]
            fused.append(self.norms[stage](message))

        # Predict the mask at stride 4 and enlarge it.
        logits = self.decoder(fused).float()  # [B, 1, S/4, S/4]
        logits = F.interpolate(logits, size=image.shape[2:], mode="bilinear", align_corners=True)
        logits = logits[:, 0]  # [B, S, S]

        if target is None:
            return logits
        return mask_losses(logits, target, self.config.losses)


class PixelWordAttention(nn.Module):
    """PWAM: every pixel reads the words, and its message is multiplied into the pixel.

        A = softmax_words(C^-1/2 IN(Wq V) (Wk L)^T)
        G = IN(Wo (A (Wu L)))
        F = GELU(Wm (GELU(Wv V) * G))

    The 1x1 convolutions of the paper are Linear layers on channels-last pixels. IN is InstanceNorm
    over the pixels.
    """

    def __init__(self, channels: int, word_width: int):
        super().__init__()
        self.query = nn.Linear(channels, channels)
        self.project = nn.Linear(channels, channels)
        self.out = nn.Linear(channels, channels)
        self.mix = nn.Linear(channels, channels)
        self.key = nn.Linear(word_width, channels)
        self.value = nn.Linear(word_width, channels)

    def forward(self, pixels: Tensor, words: Tensor, word_mask: Tensor) -> Tensor:
        """V [B, P, C], L [B, T, D], mask [B, T] -> F [B, P, C]."""
        key = self.key(words)  # [B, T, C]
        value = self.value(words) * word_mask[..., None]  # [B, T, C]
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
        gated = torch.tanh(self.gate(message)) * message
        return pixels + gated.to(pixels.dtype)


class WideDecoder(nn.Module):
    """From stage 4 to stage 1: upsample, concatenate the finer stage, convolve twice.

    A convolution is 3x3 conv-BatchNorm-ReLU. A 1x1 convolution to two channels comes last.
    """

    def __init__(self, channels: Sequence[int], width: int):
        super().__init__()
        inputs = [channels[3] + channels[2], width + channels[1], width + channels[0]]
        self.levels = nn.ModuleList(
            nn.Sequential(*conv_norm_relu(c, width), *conv_norm_relu(width, width)) for c in inputs
        )
        self.classify = nn.Conv2d(width, 2, 1)

    def forward(self, stages: Sequence[Tensor]) -> Tensor:
        """Decode four maps.

        Args:
            stages: [B, H, W, C] each, finest first.

        Returns:
            one logit per pixel, foreground minus background, [B, 1, S/4, S/4].
        """
        *finer, level = (stage.permute(0, 3, 1, 2) for stage in stages)
        for body, stage in zip(self.levels, reversed(finer)):
            level = F.interpolate(level, size=stage.shape[2:], mode="bilinear", align_corners=True)
            level = body(torch.cat([level, stage], dim=1))

        background, foreground = self.classify(level).split(1, dim=1)
        return foreground - background


def conv_norm_relu(inputs: int, outputs: int) -> list[nn.Module]:
    """Build a 3x3 convolution, BatchNorm and ReLU."""
    return [
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    ]


def instance_norm(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Normalize to zero mean and unit variance over the pixels of each sample and channel.

    [B, P, C] -> float32 [B, P, C]. torch's own refuses a map of one pixel, which becomes zero here.
    """
    x = x.float()
    variance, mean = torch.var_mean(x, dim=1, keepdim=True, correction=0)
    return (x - mean) * torch.rsqrt(variance + eps)
