"""ReferringModel: normalization, and the modules that are compiled."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from coupalign.config.schema import EncodersConfig, SmallBackbone, SmallText
from coupalign.model.base import IMAGENET_MEAN, IMAGENET_STD, ReferringModel, called_modules
from tests.unit.model.examples import VOCABULARY, model_inputs

SIDE = 32
ENCODERS = EncodersConfig(
    image=SmallBackbone(widths=(8, 8, 16, 16)), text=SmallText(width=16, heads=2)
)


@pytest.fixture
def model() -> ReferringModel:
    torch.manual_seed(0)
    return ReferringModel(ENCODERS, VOCABULARY, SIDE).eval()


def test_normalize_maps_imagenet_mean_to_zero_and_deviation_to_one(model):
    image = torch.zeros(1, 3, SIDE, SIDE, dtype=torch.uint8)
    image[:, 1] = 255

    pixels = model.normalize(image)

    assert pixels.shape == (1, SIDE, SIDE, 3) and pixels.dtype == torch.float32
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    expected = (torch.tensor([0.0, 1.0, 0.0]) - mean) / std
    torch.testing.assert_close(pixels[0, 0, 0], expected)


def test_normalize_refuses_another_image_size(model):
    image = torch.zeros(1, 3, SIDE, 2 * SIDE, dtype=torch.uint8)

    with pytest.raises(AssertionError, match="image"):
        model.normalize(image)


def test_normalization_constants_are_not_in_the_state_dict(model):
    assert not {"mean", "std"} & set(model.state_dict())


def test_encoders_run_all_stages_and_zero_padded_words(model):
    image, words, mask, _ = model_inputs(side=SIDE)

    stages = model.encode_image(image)
    states = model.encode_text(words, mask)

    assert [stage.shape for stage in stages] == [
        (2, 8, 8, 8),
        (2, 4, 4, 8),
        (2, 2, 2, 16),
        (2, 1, 1, 16),
    ]
    assert states.shape == (2, 5, 16)
    assert not states[~mask].any() and states[mask].any()


def test_regions_are_the_encoder_blocks_and_all_other_called_modules(model):
    model.parts = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    model.head = nn.Linear(2, 2)

    assert list(called_modules(model, "parts")) == ["parts.a", "parts.b"]
    assert called_modules(model, "head") == {"head": model.head}
    assert model.regions() == [
        *model.image.blocks(),
        *model.text.bert.encoder.layer,
        model.parts["a"],
        model.parts["b"],
        model.head,
    ]
