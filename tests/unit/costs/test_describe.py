"""`coupalign describe`: sums are the model's, FLOPs scale, and weights take no memory."""

from __future__ import annotations

import json

import pytest

from coupalign.config.schema import (
    Config,
    CoupAlignConfig,
    DataConfig,
    DecoderConfig,
    ProposalsConfig,
    SmallBackbone,
    SmallText,
    TimmBackbone,
)
from coupalign.costs.describe import describe
from coupalign.model.build import build_model

SMALL = CoupAlignConfig(
    image=SmallBackbone(widths=(8, 8, 16, 16)),
    text=SmallText(width=16, heads=2),
    decoder=DecoderConfig(width=16),
    proposals=ProposalsConfig(count=3, layers=1, heads=2, ffn=16),
)


def small_config(image_size: int = 64, model: CoupAlignConfig = SMALL) -> Config:
    return Config(model=model, data=DataConfig(image_size=image_size))


def test_parts_sum_to_the_model() -> None:
    model = build_model(SMALL, 50, 64)

    description = describe(small_config(), 50)

    parameters = sum(p.numel() for p in model.parameters())
    assert description.total.parameters == description.total.trainable == parameters
    assert list(description.parts) == [name for name, _ in model.named_children()]
    assert all(part.flops > 0 for part in description.parts.values())
    assert description.shapes[-1] == ("logits", (1, 64, 64))
    assert ("image stage 4", (1, 2, 2, 16)) in description.shapes

    # The same as JSON and as a table.
    value = json.loads(json.dumps(description.to_json()))
    assert value["total"]["flops"] == description.total.flops
    assert f"{parameters:,}" in description.table()


def test_flops_of_the_image_encoder_grow_with_the_pixels() -> None:
    small = describe(small_config(image_size=64), 50)
    large = describe(small_config(image_size=128), 50)

    assert large.parts["image"].flops == 4 * small.parts["image"].flops
    assert large.parts["text"].flops == small.parts["text"].flops


def test_convolutions_are_counted_exactly() -> None:
    without_proposals = SMALL.model_copy(update={"proposals": ProposalsConfig(count=0)})

    description = describe(small_config(model=without_proposals), 50)

    # At 16 x 16: a 3 x 3 convolution of 16 channels, and a 1 x 1 convolution to one.
    assert description.parts["head"].flops == 2 * 16 * 16 * (9 * 16 * 16 + 16)
    assert "proposals" not in description.parts


@pytest.mark.parametrize(
    "name, millions",
    [
        ("swin_base_patch4_window12_384", 86.9),
        ("swin_large_patch4_window12_384", 195.2),
        ("resnet101", 42.5),
        ("darknet53", 40.6),
    ],
)
def test_published_encoders_are_described_without_weights(name: str, millions: float) -> None:
    config = Config(model=CoupAlignConfig(image=TimmBackbone(name=name)))

    description = describe(config)

    image, text = description.parts["image"], description.parts["text"]
    assert image.parameters / 1e6 == pytest.approx(millions, abs=0.1)
    assert text.parameters == 108_891_648
    assert description.vocabulary == 30522
    assert description.parts["decoder"].flops < 0.5 * image.flops
