"""Recognize weights that may have seen the test images.

RefCOCO, RefCOCO+ and G-Ref are made of COCO's training images, and so are their test splits. A
detector or segmenter trained on COCO was shown those very objects with their masks. An encoder
taken from it has seen the test.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

# (pattern, kind): names of tensors that only such networks have, in the files of torchvision,
# detectron2, mmdetection and the hub. "detector.KIND" is how weights/darknet.py names a YOLOv3.
_DETECTORS = (
    (r"^detector\.(?P<kind>[\w-]+)$", "{kind}"),
    (r"(^|\.)(rpn|rpn_head|proposal_generator|roi_heads?)\.", "Faster or Mask R-CNN"),
    (r"(^|\.)(sem_seg_head|pixel_level_module|mask_embedder)\.", "MaskFormer or Mask2Former"),
    (
        r"(^|\.)(class_embed|bbox_embed|query_embed|class_labels_classifier|bbox_predictor)\.",
        "DETR or a relative of it",
    ),
    (
        r"(^|\.)(bbox_head|mask_head|classification_head|regression_head)\.",
        "RetinaNet or another detector",
    ),
    (r"(^|\.)(yolo_head|yolo_layers|dfl|anchor_grid)(\.|$)", "YOLO"),
    (r"^(module\.)?(aux_classifier\.|classifier\.\d+\.convs\.)", "DeepLab or FCN of torchvision"),
)


def find_detector(names: Iterable[str]) -> str | None:
    """Name the kind of detector or segmenter that has tensors of these names, or return None."""
    names = list(names)
    for pattern, kind in _DETECTORS:
        for name in names:
            if found := re.search(pattern, name):
                return kind.format(**found.groupdict()).replace("_", " ")
    return None


def describe_leak(names: Iterable[str]) -> str:
    """Say what a reader of a score must know of an encoder from such a file; "" if nothing."""
    detector = find_detector(names)
    if detector is None:
        return ""
    return (
        f"The file holds a whole {detector}. Such networks are usually trained on COCO, whose "
        "training images include the test images of RefCOCO, RefCOCO+ and G-Ref with their masks. "
        "A score from this start compares with no other, unless those images were left out of that "
        "training"
    )
