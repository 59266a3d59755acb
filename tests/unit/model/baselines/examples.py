"""A small configuration of each baseline."""

from __future__ import annotations

import torch

from coupalign.config.schema import LavtConfig, LtsConfig, ModelConfig, VltConfig
from coupalign.model.base import ReferringModel
from coupalign.model.build import build_model
from tests.unit.model.examples import VOCABULARY

SIDE = 64
ENCODERS = {
    "image": {"kind": "small", "widths": (16, 16, 24, 32)},
    "text": {"kind": "small", "width": 16, "heads": 2},
}
VLT_SIZES = {"count": 3, "width": 16, "heads": 2, "ffn": 32}
BASELINES: dict[str, ModelConfig] = {
    "lavt": LavtConfig.model_validate({**ENCODERS, "decoder": {"width": 16}}),
    "vlt": VltConfig.model_validate({**ENCODERS, "transformer": VLT_SIZES}),
    "lts": LtsConfig.model_validate({**ENCODERS, "segment": {"width": 16}}),
}


def build_small(config: ModelConfig, side: int = SIDE) -> ReferringModel:
    """Build a model from seed 0."""
    torch.manual_seed(0)
    return build_model(config, VOCABULARY, side)
