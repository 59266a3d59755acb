"""LTS: Locate then Segment (Jing et al., CVPR 2021), our re-implementation for this framework.

The sentence is multiplied into the image's features. What is relevant to the sentence gives a heat
map of where the object is, which is trained with the true mask at stride 16. Features and heat map
together are then segmented. We wrote this from the paper's description; its code was not published
to our knowledge and was not used.

What differs on purpose:

- The framework's text encoder reads the sentence (the paper: a bi-GRU over GloVe).
- GroupNorm and LayerNorm replace BatchNorm, so that no split of a batch changes a number.

What we are not sure of:

- whether the sentence is multiplied into all three stages or the coarsest alone (here: all);
- what s is (here: the mean of the words);
- the form of the eight coordinate channels (here: sine and cosine of y and x in two wavelengths);
- the relevance filter, which the paper also gives as a transformer;
- how the truth is brought to stride 16 (here: the share of the object's pixels in a cell);
- the weight of that loss, the widths, the dilations, and the stride of the output (here: 4).

Shape legend: B batch, T words, D text width, d width, h w sides at stride 16, S input side.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coupalign.config.schema import LtsConfig
from coupalign.model.backbone import group_norm
from coupalign.model.base import ReferringModel
from coupalign.model.baselines.blocks import (
    STRIDE,
    MaskDecoder,
    SentenceFusion,
    average_words,
    enlarge_logits,
)
from coupalign.model.decoder import SmoothingConv
from coupalign.model.losses import mask_losses
from coupalign.model.proposals import sine_positions

_COORDINATES = 8  # channels that say where a pixel is


class Lts(ReferringModel):
    """Locate, then segment: a heat map of the object, and a network that reads it."""

    def __init__(self, config: LtsConfig, vocabulary: int, image_size: int):
        super().__init__(config, vocabulary, image_size)
        width = config.segment.width
        self.fusion = SentenceFusion(
            self.image.channels[1:], self.text.width, width, act=torch.relu
        )
        self.locate = Localization(self.text.width, width)
        self.segment = Segmentation(width + _COORDINATES + 1, width, config.segment.dilations)

    def forward(
        self, image: Tensor, words: Tensor, word_mask: Tensor, target: Tensor | None = None
    ) -> Tensor | dict[str, Tensor]:
        """Segment what each sentence refers to, see `ReferringModel`.

        The losses also have "locate", that of the heat map.
        """
        # Multiply the sentence into the stages at strides 8 to 32.
        words = self.encode_text(words, word_mask)  # [B, T, D]
        sentence = average_words(words, word_mask)  # s [B, D]
        stages = self.encode_image(image)[1:]  # 3 x [B, H, W, C]
        fused = append_coordinates(self.fusion(stages, sentence))  # F [B, d + 8, h, w]

        # Locate, then segment.
        heat = self.locate(fused, sentence)  # [B, 1, h, w]
        logits = self.segment(fused, heat)  # [B, 1, S/4, S/4]
        logits = enlarge_logits(logits, self.image_size)  # [B, S, S]

        if target is None:
            return logits
        losses = mask_losses(logits, target, self.config.losses)
        locate = location_loss(heat, target)
        losses["loss"] = losses["loss"] + self.config.losses.locate * locate
        losses["locate"] = locate.detach()
        return losses


class Localization(nn.Module):
    """Filter the fused map by the sentence, and predict where the object is.

    k = tanh(W s)        r = sigmoid(d^-1/2 k . conv(F))        heat = conv(r F)
    """

    def __init__(self, word_width: int, width: int):
        super().__init__()
        self.kernel = nn.Linear(word_width, width)
        self.key = SmoothingConv(width + _COORDINATES, width)
        self.filtered = SmoothingConv(width + _COORDINATES, width)
        self.heat = nn.Conv2d(width, 1, 1)

    def forward(self, fused: Tensor, sentence: Tensor) -> Tensor:
        """F [B, d + 8, h, w], s [B, D] -> logits of the heat map [B, 1, h, w]."""
        kernel = torch.tanh(self.kernel(sentence))  # k [B, d]
        width = kernel.shape[1]

        agreement = (self.key(fused) * kernel[..., None, None]).sum(1, keepdim=True)
        relevance = (agreement / width**0.5).sigmoid()  # r [B, 1, h, w]

        return self.heat(torch.relu(self.filtered(fused * relevance)))


class Segmentation(nn.Module):
    """Read the fused map and the heat map by parallel dilated convolutions, and predict a mask."""

    def __init__(self, inputs: int, width: int, dilations: tuple[int, ...]):
        super().__init__()
        self.views = nn.ModuleList(_dilated_conv(inputs, width, d) for d in dilations)
        self.mask = MaskDecoder(len(dilations) * width, width)

    def forward(self, fused: Tensor, heat: Tensor) -> Tensor:
        """F [B, d + 8, h, w], heat map [B, 1, h, w] -> logits [B, 1, S/4, S/4]."""
        features = torch.cat([fused, heat.sigmoid()], dim=1)
        views = [view(features) for view in self.views]
        return self.mask(torch.cat(views, dim=1))


def append_coordinates(pixels: Tensor) -> Tensor:
    """Append eight channels that say where each pixel is: [B, d, h, w] -> [B, d + 8, h, w]."""
    batch, _, height, width = pixels.shape
    where = sine_positions(height, width, _COORDINATES, device=pixels.device)  # [h*w, 8]
    where = where.T.unflatten(1, (height, width)).to(pixels.dtype)  # [8, h, w]
    return torch.cat([pixels, where.expand(batch, -1, -1, -1)], dim=1)


def location_loss(heat: Tensor, target: Tensor) -> Tensor:
    """Compute the cross-entropy of the heat map with the object's share of each cell.

    Args:
        heat: logits [B, 1, h, w].
        target: bool [B, S, S].
    """
    with torch.autocast(heat.device.type, enabled=False):
        share = F.avg_pool2d(target.float()[:, None], STRIDE)
        return F.binary_cross_entropy_with_logits(heat.float(), share)


def _dilated_conv(inputs: int, width: int, dilation: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, width, 3, padding=dilation, dilation=dilation, bias=False)
    return nn.Sequential(conv, group_norm(width), nn.ReLU())
