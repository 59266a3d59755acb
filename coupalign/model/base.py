"""The base class of every method: the two encoders, and how an image becomes their input."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from coupalign.config.schema import EncodersConfig
from coupalign.model.backbone import StagedBackbone
from coupalign.model.text import GROUPS, StagedText

STAGES = 4

# RGB, of pixels scaled to 0 .. 1.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class ReferringModel(nn.Module):
    """A method: an image encoder, a text encoder, and what each method adds to them.

    `forward(image, words, word_mask, target=None)` takes

        image      uint8 [B, 3, S, S], RGB
        words      token ids, int64 [B, T]
        word_mask  bool [B, T], true at real tokens
        target     bool [B, S, S], or None

    and returns logits, float32 [B, S, S]. With a target it returns the dict of losses instead
    (`losses.mask_losses`).

    The encoders are called `image` and `text` in every method, because pretrained weights, learning
    rates and reports use these names.

    Args:
        config: the method's part of the configuration.
        vocabulary: number of tokens of the tokenizer.
        image_size: S, pixels, a multiple of 32.
        word_groups: how many of the four groups of text layers the method runs.

    Raises:
        InputError: two fields contradict each other; the message names both.
    """

    def __init__(
        self, config: EncodersConfig, vocabulary: int, image_size: int, word_groups: int = GROUPS
    ):
        super().__init__()
        self.config = config
        self.image_size = image_size
        self.image = StagedBackbone(config.image, image_size)
        self.text = StagedText(config.text, vocabulary, groups=word_groups)
        self.register_buffer("mean", 255 * torch.tensor(IMAGENET_MEAN), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(IMAGENET_STD), persistent=False)

    def normalize(self, image: Tensor) -> Tensor:
        """Normalize pixels by ImageNet's mean and standard deviation.

        uint8 [B, 3, S, S] -> float [B, S, S, 3].
        """
        expected = (3, self.image_size, self.image_size)
        assert image.shape[1:] == expected, f"image {tuple(image.shape)}, expected [B, *{expected}]"

        # The loader's batches are channels-last. The memory format decides which convolution
        # kernels run, and so the rounding: use the same one for every caller.
        image = image.contiguous()
        return (image.permute(0, 2, 3, 1) - self.mean) / self.std

    def encode_image(self, image: Tensor) -> list[Tensor]:
        """Run the image encoder without words in between.

        uint8 [B, 3, S, S] -> four maps [B, H, W, C] at strides 4, 8, 16 and 32.
        """
        pixels = self.normalize(image)  # [B, S, S, 3]
        stages = []
        for stage in range(STAGES):
            pixels = self.image(stage, pixels)  # [B, H, W, C]
            stages.append(pixels)
        return stages

    def encode_text(self, words: Tensor, word_mask: Tensor) -> Tensor:
        """Run the text encoder without pixels in between.

        int64 [B, T], bool [B, T] -> states [B, T, D], zero where padded.
        """
        states = self.text.embed(words, word_mask)
        for group in range(GROUPS):
            states = self.text(group, states, word_mask)
        return states

    def regions(self) -> list[nn.Module]:
        """List the modules that `compile.compile_regions` compiles one by one.

        These are the blocks of the encoders, and every other part of the model.
        """
        regions = [*self.image.blocks(), *self.text.bert.encoder.layer]
        for name, _ in self.named_children():
            if name not in ("image", "text"):
                regions += called_modules(self, name).values()
        return regions


def called_modules(model: nn.Module, name: str) -> dict[str, nn.Module]:
    """Return the modules of a child that are called, by name.

    A ModuleList or ModuleDict is never called itself, so its entries are returned: {"wpa.0": …}.
    """
    module = getattr(model, name)
    if isinstance(module, nn.ModuleDict | nn.ModuleList):
        return {f"{name}.{key}": entry for key, entry in module.named_children()}
    return {name: module}
