"""Makes torchvision importable beside a CPU build of torch.

The torchvision wheel on PyPI is linked against CUDA. Beside a CPU-only torch its compiled operators do not load, and
`import torchvision`, and with it timm and transformers, fails because two operator schemas are unknown. Declaring the
schemas is enough for everything this project uses; nothing is declared where torch has CUDA.
"""

from __future__ import annotations

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library: torch.library.Library | None = None


def prepare_torchvision() -> None:
    """Call before the first import of torchvision, timm or transformers; does nothing the second time."""
    global _library
    if _library is not None or torch.version.cuda is not None:
        return
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        _library.define(schema)
