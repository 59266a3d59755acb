"""Sentence-mask alignment: the sentence weights the masks, whose signals go back to the pixels.

Shape legend: B batch, N mask embeddings, d mask width, D text width, P pixels at stride 4 (h*w).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SentenceMaskAlignment(nn.Module):
    """Y' = Y + sum_n a_n m_n (W_o Q)_n.

    The weights are a = softmax_n(Q . W L_g / sqrt(d)), the mask signals m_n = sigmoid(Q_n . Y).
    The sigmoid matters: without it the sum over n is one dynamic kernel, and N has no meaning.

    Args:
        width: d.
        sentence_width: D.
        scaled: use m_n = sigmoid(Q_n . Y / sqrt(d)) instead, which does not start saturated.
    """

    def __init__(self, width: int, sentence_width: int, scaled: bool = False):
        super().__init__()
        self.scale = width**-0.5 if scaled else 1.0
        self.project_sentence = nn.Linear(sentence_width, width)
        self.project_masks = nn.Linear(width, width)
        for linear in (self.project_sentence, self.project_masks):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, masks: Tensor, sentence: Tensor, pixels: Tensor) -> Tensor:
        """Add the mask signals to the pixels.

        Args:
            masks: Q_o [B, N, d].
            sentence: L_g [B, D].
            pixels: Y [B, d, h, w].

        Returns:
            Y' [B, d, h, w].
        """
        _, width, height, _ = pixels.shape
        y = pixels.permute(0, 2, 3, 1).flatten(1, 2)  # [B, P, d]

        # Weight the masks by how well they agree with the sentence.
        agreement = (masks @ self.project_sentence(sentence)[..., None]).squeeze(2)  # [B, N]
        weights = (agreement.float() * width**-0.5).softmax(1).to(masks.dtype)  # [B, N]

        # Each mask signals where it is; the pixels receive what the mask says there.
        signals = torch.sigmoid(y @ (masks * self.scale).transpose(1, 2))  # [B, P, N]
        message = signals @ (weights[..., None] * self.project_masks(masks))  # [B, P, d]

        return (y + message).unflatten(1, (height, -1)).permute(0, 3, 1, 2)
