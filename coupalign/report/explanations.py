"""Draw what a model looked at, for the pictures that `save_pictures` writes.

explain = build_explainer(model.eval(), tokenizer, config.data, device=device)
save_pictures(folder, evaluation, 8, explain=explain)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
from coupalign.model.explain import AttentionMaps, Explanation, explain_prediction
from coupalign.report.drawing import LabeledMap, MapSection, heat_sheet

_MAX_PROPOSALS = 6


def build_explainer(
    model: nn.Module,
    tokenizer: Tokenizer,
    data: DataConfig,
    *,
    device: torch.device | str = "cpu",
) -> Callable[[Picture], Image.Image | None]:
    """Return a function that runs the model on one picture and draws what it looked at.

    It draws the masks that the sentence weights highest and, for each stage with an alignment, one
    heat map per word. It returns None for a model that has neither.

    Args:
        model: in evaluation mode, on `device`, with its whole weights: one process runs it alone.
    """

    def draw(picture: Picture) -> Image.Image | None:
        frame = frame_of(*picture.truth.shape, data.image_size, data.resize)
        square = image_to_square(picture.image, frame)
        image = torch.from_numpy(square.transpose(2, 0, 1).copy())[None]
        words, word_mask, _ = tokenizer.encode([picture.sentence], data.max_tokens)
        explanation = explain_prediction(
            model,
            image.to(device),
            words=words.to(device),
            word_mask=word_mask.to(device),
            proposals=_MAX_PROPOSALS,
        )

        sections: list[MapSection] = []
        if explanation.weights is not None:
            sections.append(_proposal_section(explanation, frame))
        tokens = [tokenizer.vocabulary[number] for number in words[0][word_mask[0]].tolist()]
        for stage, attention in sorted(explanation.attention.items()):
            sections.append(_stage_section(stage, attention, tokens, frame))
        return heat_sheet(picture.image, sections) if sections else None

    return draw


def _proposal_section(explanation: Explanation, frame: Frame) -> MapSection:
    """Draw the mask signals of the proposals with the highest weights."""
    heading = (
        "Mask signals of the proposals that the sentence weights highest, with their weights "
        f"(all proposals: 1; the signals differ by {float(explanation.spread[0]):.1g} per pixel)"
    )
    labels = [f"{weight:.3f}" for weight in explanation.weights[0].tolist()]
    return heading, _label_maps(labels, explanation.signals[0], frame)


def _stage_section(
    stage: int, attention: AttentionMaps, tokens: Sequence[str], frame: Frame
) -> MapSection:
    """Draw how much each pixel reads of each word; the largest value of the stage is yellow."""
    maps = attention.over_words[0][: len(tokens)]
    largest = float(maps.max())
    heading = (
        f"Stage {stage + 1}: how much each pixel reads of each word "
        f"(yellow: {largest:.2f}, violet: 0)"
    )
    return heading, _label_maps(tokens, maps / max(largest, 1e-12), frame)


def _label_maps(labels: Sequence[str], maps: Tensor, frame: Frame) -> list[LabeledMap]:
    """Resize maps [n, h, w] of the square input to the image [H, W], with their labels."""
    size = (frame.size, frame.size)
    squares = functional.interpolate(
        maps[None].float(), size=size, mode="bilinear", align_corners=False
    )[0]

    labeled = []
    for label, square in zip(labels, squares, strict=True):
        labeled.append((label, logits_at_original_size(square, frame).cpu().numpy()))
    return labeled
