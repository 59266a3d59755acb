"""What every method shares: the two encoders by their names, and how an image becomes numbers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from coupalign.config.schema import EncodersConfig
from coupalign.model.backbone import StagedBackbone
from coupalign.model.text import GROUPS, StagedText

STAGES = 4
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


class ReferringModel(nn.Module):
    """A method: `forward(image uint8 [B, 3, S, S], words int64 [B, T], word_mask bool [B, T], target bool [B, S, S] or none)` gives
    logits float32 [B, S, S] or, with a target, the losses (`losses.mask_losses`).

    The encoders are `image` and `text` in every method: pretrained weights, learning rates and reports go by these names.

    Args:
        config: the method's part of the configuration.
        vocabulary: number of tokens of the tokenizer.
        image_size: S, pixels, a multiple of 32.
        word_groups: how many of the four groups of text layers will be run.

    Raises:
        InputError: a field does not fit another; the message names both.
    """

    def __init__(
        self, config: EncodersConfig, vocabulary: int, image_size: int, word_groups: int = GROUPS
    ):
        super().__init__()
        self.config, self.image_size = config, image_size
        self.image = StagedBackbone(config.image, image_size)
        self.text = StagedText(config.text, vocabulary, groups=word_groups)
        self.register_buffer("mean", 255 * torch.tensor(_IMAGENET_MEAN), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(_IMAGENET_STD), persistent=False)

    def regions(self) -> list[nn.Module]:
        """The parts that `compiled.compile_regions` compiles: blocks of the encoders, and every other part as it is called."""
        others = [name for name, _ in self.named_children() if name not in ("image", "text")]
        return [
            *self.image.blocks(),
            *self.text.bert.encoder.layer,
            *(module for name in others for module in called_modules(self, name).values()),
        ]

    def normalized(self, image: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] -> float [B, S, S, 3], by ImageNet's mean and deviation."""
        assert image.shape[1:] == (3, self.image_size, self.image_size), (
            f"image {tuple(image.shape)}, model {self.image_size}"
        )
        image = image.contiguous()  # the loader's is channels last; what lies how decides which convolutions run, and so the rounding
        return (image.permute(0, 2, 3, 1) - self.mean) / self.std

    def read(self, words: Tensor, word_mask: Tensor) -> Tensor:
        """The whole sentence through the whole text encoder, before any pixel: [B, T] -> [B, T, D], zero where padded."""
        states = self.text.embed(words, word_mask)
        for group in range(GROUPS):
            states = self.text(group, states, word_mask)
        return states


def called_modules(model: nn.Module, name: str) -> dict[str, nn.Module]:
    """A child by its name or, of a list or dictionary of modules, its entries, which are what is called: {"wpa.0": …}."""
    module = getattr(model, name)
    if isinstance(module, nn.ModuleDict | nn.ModuleList):
        return {f"{name}.{key}": inner for key, inner in module.named_children()}
    return {name: module}
