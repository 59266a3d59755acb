"""Weights that may have seen the test images.

RefCOCO, RefCOCO+ and G-Ref are made of COCO's training images, their test splits as well. A detector or segmenter trained on
COCO was shown those very objects with their masks, and an encoder that is taken from it starts where the test ends.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

# Names of tensors that only such networks have, wherever their files come from (torchvision, detectron2, mmdetection, hub).
_DETECTORS = (
    (r"^detector\.(?P<kind>[\w-]+)$", "{kind}"),  # model/weights_darknet.py
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


def detector_of(names: Iterable[str]) -> str | None:
    """The kind of detector or segmenter that a file with these tensors holds; None: none that is known."""
    names = list(names)
    for pattern, kind in _DETECTORS:
        if match := next(filter(None, (re.search(pattern, name) for name in names)), None):
            return kind.format(**match.groupdict()).replace("_", " ")
    return None


def leak_of(names: Iterable[str]) -> str:
    """What a reader of a score must know of an encoder from a file with these tensors; "" where nothing."""
    detector = detector_of(names)
    if detector is None:
        return ""
    return (
        f"The file holds a whole {detector}. Such networks are usually trained on COCO, whose training images hold the test images "
        "of RefCOCO, RefCOCO+ and G-Ref with their masks: a score from this start compares with no other, unless those images "
        "were left out of that training"
    )
