"""What a model looked at, drawn for the pictures that `keep_pictures` keeps.

explain = explainer(model.eval(), tokenizer, config.data, device)
keep_pictures(folder, evaluation, 8, explain)
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from coupalign.config.schema import DataConfig
from coupalign.data.batch import Frame
from coupalign.data.tokenizer import Tokenizer
from coupalign.data.transforms import frame_of, image_to_square
from coupalign.evaluation.protocols import logits_at_original_size
from coupalign.evaluation.shelf import Picture
from coupalign.model.explain import explain_prediction
from coupalign.report.drawing import heat_sheet

_PROPOSALS = 6
Section = tuple[str, list[tuple[str, np.ndarray]]]


def explainer(
    model: nn.Module, tokenizer: Tokenizer, data: DataConfig, device: torch.device | str = "cpu"
) -> Callable[[Picture], Image.Image | None]:
    """A function that runs a model, in evaluation mode on `device`, on one picture and draws what it looked at.

    It draws the masks that the sentence weights highest and, for each stage with an alignment, a heat map for each word;
    None for a model that has neither. It runs on one process alone: the model must hold its whole weights there.
    """

    def draw(picture: Picture) -> Image.Image | None:
        frame = frame_of(*picture.truth.shape, data.image_size, data.resize)
        square = image_to_square(picture.image, frame)
        pixels = torch.from_numpy(square.transpose(2, 0, 1).copy())[None]
        words, word_mask, _ = tokenizer.encode([picture.sentence], data.max_tokens)
        found = explain_prediction(
            model, pixels.to(device), words.to(device), word_mask.to(device), _PROPOSALS
        )
        sections: list[Section] = []
        if found.weights is not None and found.signals is not None:
            labels = [f"{weight:.3f}" for weight in found.weights[0].tolist()]
            sections.append(
                (
                    "Mask signals of the proposals that the sentence weights highest, with their weights (all proposals: 1; "
                    f"they differ by {float(found.spread[0]):.1g} a pixel)",
                    _labeled(labels, found.signals[0], frame),
                )
            )
        tokens = [tokenizer.vocabulary[number] for number in words[0][word_mask[0]].tolist()]
        for stage, attention in sorted(found.attention.items()):
            maps = attention.over_words[0][: len(tokens)]
            most = float(maps.max())
            sections.append(
                (
                    f"Stage {stage + 1}: how much each pixel reads of each word (yellow: {most:.2f}, violet: 0)",
                    _labeled(tokens, maps / max(most, 1e-12), frame),
                )
            )
        return heat_sheet(picture.image, sections) if sections else None

    return draw


def _labeled(labels: list[str], maps: Tensor, frame: Frame) -> list[tuple[str, np.ndarray]]:
    """Maps [n, h, w] of the square input as maps [H, W] of the photograph, with their labels."""
    squares = functional.interpolate(
        maps[None].float(), size=(frame.size, frame.size), mode="bilinear", align_corners=False
    )[0]
    return [
        (label, logits_at_original_size(one, frame).cpu().numpy())
        for label, one in zip(labels, squares, strict=True)
    ]
