"""From the model's part of the configuration to the model."""

from __future__ import annotations

from coupalign.config.schema import CoupAlignConfig, LavtConfig, LtsConfig, ModelConfig, VltConfig
from coupalign.model.base import ReferringModel
from coupalign.model.baselines.lavt import Lavt
from coupalign.model.baselines.lts import Lts
from coupalign.model.baselines.vlt import Vlt
from coupalign.model.coupalign import CoupAlign


def build_model(config: ModelConfig, vocabulary: int, image_size: int) -> ReferringModel:
    """Build a model with random weights. `model.weights` loads pretrained encoders into it.

    Args:
        config: the model's part of the configuration; its `kind` selects the method.
        vocabulary: number of tokens of the tokenizer.
        image_size: S, pixels, a multiple of 32.

    Raises:
        InputError: two fields contradict each other; the message names both.
    """
    match config:
        case CoupAlignConfig():
            return CoupAlign(config, vocabulary, image_size)
        case LavtConfig():
            return Lavt(config, vocabulary, image_size)
        case VltConfig():
            return Vlt(config, vocabulary, image_size)
        case LtsConfig():
            return Lts(config, vocabulary, image_size)
