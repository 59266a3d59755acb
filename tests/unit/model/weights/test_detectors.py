"""Detectors and segmenters are recognized, because COCO has shown them the test images.

Classifiers and our own models are not.
"""

from __future__ import annotations

import json

import pytest
import timm
import torch
from torchvision.models.detection import maskrcnn_resnet50_fpn, retinanet_resnet50_fpn
from torchvision.models.segmentation import deeplabv3_resnet101
from transformers import (
    DetrConfig,
    DetrForObjectDetection,
    MaskFormerConfig,
    MaskFormerForInstanceSegmentation,
)

from coupalign.config.schema import CoupAlignConfig, LavtConfig, LtsConfig, VltConfig
from coupalign.model.build import build_model
from coupalign.model.weights.detectors import describe_leak, find_detector
from coupalign.model.weights.load import load_image_weights
from coupalign.model.weights.names import guess_contents


def mask_rcnn():
    return maskrcnn_resnet50_fpn(weights=None, weights_backbone=None)


def retinanet():
    return retinanet_resnet50_fpn(weights=None, weights_backbone=None)


def deeplab():
    return deeplabv3_resnet101(weights=None, weights_backbone=None, aux_loss=True)


def detr():
    config = DetrConfig(use_timm_backbone=True, use_pretrained_backbone=False)
    return DetrForObjectDetection(config)


def maskformer():
    return MaskFormerForInstanceSegmentation(MaskFormerConfig())


def state_of(make, *arguments):
    with torch.device("meta"):
        return make(*arguments).state_dict()


# -------------------------------------------------------------------------------------- recognition


@pytest.mark.parametrize(
    "make, kind",
    [
        (mask_rcnn, "Faster or Mask R-CNN"),
        (retinanet, "RetinaNet or another detector"),
        (deeplab, "DeepLab or FCN"),
        (detr, "DETR"),
        (maskformer, "MaskFormer"),
    ],
)
def test_real_detectors_and_segmenters_are_recognized(make, kind):
    state = state_of(make)

    assert kind in find_detector(state)
    assert kind in guess_contents(state)
    assert "COCO" in describe_leak(state)
    assert kind in find_detector({f"module.{name}" for name in state})


DETECTRON2 = ["backbone.bottom_up.stem.conv1.weight", "proposal_generator.rpn_head.conv.weight"]
MMDETECTION = ["backbone.conv1.weight", "bbox_head.fcos_cls.weight"]
MASK2FORMER = [
    "backbone.layers.0.blocks.0.attn.qkv.weight",
    "sem_seg_head.predictor.mask_embed.layers.0.weight",
]
DETR_OF_ITS_AUTHORS = ["backbone.0.body.layer1.0.conv1.weight", "class_embed.weight"]


@pytest.mark.parametrize(
    "names, kind",
    [
        (DETECTRON2, "Faster or Mask R-CNN"),
        (MMDETECTION, "RetinaNet or another detector"),
        (MASK2FORMER, "Mask2Former"),
        (DETR_OF_ITS_AUTHORS, "DETR"),
    ],
)
def test_detectors_of_other_libraries_are_recognized(names, kind):
    assert kind in find_detector(names)


@pytest.mark.parametrize(
    "name", ["swin_tiny_patch4_window7_224", "resnet101", "darknet53", "vit_base_patch16_224"]
)
def test_classifiers_have_no_leak(name):
    state = state_of(timm.create_model, name)
    segmenter_of_another_data_set = {f"backbone.{key}" for key in state}
    segmenter_of_another_data_set.add("decode_head.conv_seg.weight")

    assert not describe_leak(state)
    assert not describe_leak(segmenter_of_another_data_set)


def test_our_own_models_have_no_leak():
    encoders = {
        "image": {"kind": "timm", "name": "resnet18"},
        "text": {"kind": "small", "width": 32},
    }

    for method in (CoupAlignConfig, LavtConfig, VltConfig, LtsConfig):
        model = build_model(method.model_validate(encoders), 50, 32)
        assert not describe_leak(model.state_dict()), method


# ------------------------------------------------------------------------------------------ loading


@pytest.mark.parametrize(
    "prefix, other, kind",
    [
        ("backbone.body.", "roi_heads.box_head.fc6.weight", "Faster or Mask R-CNN"),
        ("backbone.0.body.", "bbox_embed.layers.0.weight", "DETR or a relative of it"),
        ("backbone.", "aux_classifier.0.weight", "DeepLab or FCN of torchvision"),
    ],
)
def test_encoder_of_a_detector_is_loaded_with_a_leak_warning_first(tmp_path, prefix, other, kind):
    source, net = timm.create_model("resnet18"), timm.create_model("resnet18", num_classes=0)
    state = {
        f"{prefix}{name}": tensor
        for name, tensor in source.state_dict().items()
        if not name.startswith("fc")
    }
    state[other] = torch.zeros(2)
    torch.save({"model": state}, tmp_path / "coco.pth")

    report = load_image_weights(net, "resnet18", str(tmp_path / "coco.pth"))

    assert torch.equal(net.layer4[1].conv2.weight, source.layer4[1].conv2.weight)
    warning = "image: THESE WEIGHTS MAY HAVE SEEN THE TEST IMAGES. The file holds a whole " + kind
    assert report.text().startswith(warning)
    assert json.loads(json.dumps(report.to_json()))["leak"] == report.leak
    assert guess_contents(state) == f"the resnet18 of {kind}"


def test_report_of_a_classifier_mentions_no_leak(tmp_path):
    net = timm.create_model("resnet18", num_classes=0)
    torch.save(net.state_dict(), tmp_path / "r.pth")

    report = load_image_weights(net, "resnet18", str(tmp_path / "r.pth"))

    assert report.leak == "" and report.to_json()["leak"] == ""
    assert "SEEN" not in report.text()
