"""Detectors and segmenters are recognized, since COCO has shown them the test images; what is no detector is not accused."""

from __future__ import annotations

import json

import pytest
import timm
import torch
import torchvision
from transformers import (
    DetrConfig,
    DetrForObjectDetection,
    MaskFormerConfig,
    MaskFormerForInstanceSegmentation,
)

from coupalign.config.schema import (
    CoupAlignConfig,
    LavtConfig,
    LtsConfig,
    VltConfig,
)
from coupalign.model.build import build_model
from coupalign.model.weights import load as weights
from coupalign.model.weights.detectors import (
    detector_of,
    leak_of,
)
from coupalign.model.weights.names import looks_like


def state_of(make, *arguments, **options):
    with torch.device("meta"):
        return make(*arguments, **options).state_dict()


@pytest.mark.parametrize(
    "make, kind",
    [
        (
            lambda: torchvision.models.detection.maskrcnn_resnet50_fpn(
                weights=None, weights_backbone=None
            ),
            "Faster or Mask R-CNN",
        ),
        (
            lambda: torchvision.models.detection.retinanet_resnet50_fpn(
                weights=None, weights_backbone=None
            ),
            "RetinaNet or another detector",
        ),
        (
            lambda: torchvision.models.segmentation.deeplabv3_resnet101(
                weights=None, weights_backbone=None, aux_loss=True
            ),
            "DeepLab or FCN",
        ),
        (
            lambda: DetrForObjectDetection(
                DetrConfig(use_timm_backbone=True, use_pretrained_backbone=False)
            ),
            "DETR",
        ),
        (lambda: MaskFormerForInstanceSegmentation(MaskFormerConfig()), "MaskFormer"),
    ],
)
def test_real_detectors_and_segmenters_are_recognized(make, kind):
    state = state_of(make)
    assert kind in detector_of(state) and kind in looks_like(state) and "COCO" in leak_of(state)
    assert kind in detector_of({f"module.{name}" for name in state})


@pytest.mark.parametrize(
    "names, kind",
    [
        (
            ["backbone.bottom_up.stem.conv1.weight", "proposal_generator.rpn_head.conv.weight"],
            "Faster or Mask R-CNN",
        ),  # detectron2
        (
            ["backbone.conv1.weight", "bbox_head.fcos_cls.weight"],
            "RetinaNet or another detector",
        ),  # mmdetection
        (
            [
                "backbone.layers.0.blocks.0.attn.qkv.weight",
                "sem_seg_head.predictor.mask_embed.layers.0.weight",
            ],
            "Mask2Former",
        ),
        (["backbone.0.body.layer1.0.conv1.weight", "class_embed.weight"], "DETR"),  # its authors'
    ],
)
def test_the_names_of_other_libraries_are_known(names, kind):
    assert kind in detector_of(names)


@pytest.mark.parametrize(
    "name", ["swin_tiny_patch4_window7_224", "resnet101", "darknet53", "vit_base_patch16_224"]
)
def test_classifiers_are_not_accused(name):
    state = state_of(timm.create_model, name)
    assert not leak_of(state) and not leak_of(
        {f"backbone.{key}" for key in state} | {"decode_head.conv_seg.weight"}
    )


def test_our_own_models_are_not_accused():
    encoders = {
        "image": {"kind": "timm", "name": "resnet18"},
        "text": {"kind": "small", "width": 32},
    }
    for kind in (CoupAlignConfig, LavtConfig, VltConfig, LtsConfig):
        assert not leak_of(build_model(kind.model_validate(encoders), 50, 32).state_dict()), kind


@pytest.mark.parametrize(
    "prefix, other, kind",
    [
        ("backbone.body.", "roi_heads.box_head.fc6.weight", "Faster or Mask R-CNN"),
        ("backbone.0.body.", "bbox_embed.layers.0.weight", "DETR or a relative of it"),
        ("backbone.", "aux_classifier.0.weight", "DeepLab or FCN of torchvision"),
    ],
)
def test_an_encoder_out_of_a_detector_loads_and_says_so_first(tmp_path, prefix, other, kind):
    source, net = timm.create_model("resnet18"), timm.create_model("resnet18", num_classes=0)
    state = {
        f"{prefix}{name}": tensor
        for name, tensor in source.state_dict().items()
        if not name.startswith("fc")
    }
    torch.save({"model": state | {other: torch.zeros(2)}}, tmp_path / "coco.pth")
    report = weights.load_image_weights(net, "resnet18", str(tmp_path / "coco.pth"))
    assert torch.equal(net.layer4[1].conv2.weight, source.layer4[1].conv2.weight)
    assert report.text().startswith(
        "image: THESE WEIGHTS MAY HAVE SEEN THE TEST IMAGES. The file holds a whole " + kind
    )
    assert json.loads(json.dumps(report.to_json()))[
        "leak"
    ] == report.leak and f"the resnet18 of {kind}" == looks_like(state | {other: 0})


def test_an_innocent_file_has_no_leak_and_says_nothing(tmp_path):
    net = timm.create_model("resnet18", num_classes=0)
    torch.save(net.state_dict(), tmp_path / "r.pth")
    report = weights.load_image_weights(net, "resnet18", str(tmp_path / "r.pth"))
    assert report.leak == "" and "SEEN" not in report.text() and report.to_json()["leak"] == ""
