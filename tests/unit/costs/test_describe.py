"""`describe`: the sums are the model's, the FLOPs scale as they must, and no memory is taken for weights."""

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


def test_parts_sum_to_the_model():
    found = describe(Config(model=SMALL, data=DataConfig(image_size=64)), 50)
    model = build_model(SMALL, 50, 64)
    assert (
        found.total.parameters
        == found.total.trainable
        == sum(p.numel() for p in model.parameters())
    )
    assert tuple(found.parts) == tuple(dict(model.named_children())) and all(
        part.flops > 0 for part in found.parts.values()
    )
    assert (
        found.shapes[-1] == ("logits", (1, 64, 64))
        and ("image stage 4", (1, 2, 2, 16)) in found.shapes
    )
    assert json.loads(json.dumps(found.to_json()))["total"]["flops"] == found.total.flops
    assert f"{found.total.parameters:,}" in found.table()


def test_convolutions_are_counted_exactly():
    """Four times the pixels: four times the FLOPs in the image encoder, none more in the text encoder."""
    small, large = (
        describe(Config(model=SMALL, data=DataConfig(image_size=s)), 50) for s in (64, 128)
    )
    assert large.parts["image"].flops == 4 * small.parts["image"].flops
    assert large.parts["text"].flops == small.parts["text"].flops
    head = 2 * 16 * 16 * (9 * 16 * 16 + 16)
    without = SMALL.model_copy(update={"proposals": ProposalsConfig(count=0)})
    without = describe(Config(model=without, data=DataConfig(image_size=64)), 50)
    assert without.parts["head"].flops == head and "proposals" not in without.parts


@pytest.mark.parametrize(
    "name, millions",
    [
        ("swin_base_patch4_window12_384", 86.9),
        ("swin_large_patch4_window12_384", 195.2),
        ("resnet101", 42.5),
        ("darknet53", 40.6),
    ],
)
def test_published_encoders_need_no_weights(name, millions):
    found = describe(Config(model=CoupAlignConfig(image=TimmBackbone(name=name))))
    assert found.parts["image"].parameters / 1e6 == pytest.approx(millions, abs=0.1)
    assert found.parts["text"].parameters == 108_891_648 and found.vocabulary == 30522
    assert found.parts["decoder"].flops < 0.5 * found.parts["image"].flops
