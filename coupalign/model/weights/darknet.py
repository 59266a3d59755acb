"""Read Darknet's binary weights: Darknet-53 alone, with its classifier, or inside YOLOv3.

A file is little-endian. It begins with major, minor and revision (int32) and the number of images
seen (int64 from version 0.2 on, else int32). Then come float32 numbers without names or shapes. For
each convolution, in the order of the network:

    with BatchNorm      shifts, scales, means, variances, weights [out, in, height, width]
    without             biases, weights (the classifier)

So only the size of a file tells which network it holds.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from coupalign.errors import InputError
from coupalign.model.base import IMAGENET_MEAN, IMAGENET_STD

# Residual blocks of the five stages.
BLOCKS = (1, 2, 8, 8, 4)
# Numbers of the 52 convolutions without the classifier.
ENCODER_NUMBERS = 40_620_640

# The classifier has 1024 weights and a bias per class.
_NUMBERS_PER_CLASS = 1024 + 1
# YOLOv3 after the 52 convolutions, without its output layers. SPP has one more 1x1 convolution.
_DETECTORS = {"YOLOv3": 20_923_392, "YOLOv3-SPP": 20_923_392 + 2048 * 512 + 4 * 512}
# YOLOv3's output layers give (classes + 5) values for each of three boxes, at each of three scales.
# These are the weights and biases per value.
_NUMBERS_PER_BOX_VALUE = 3 * (1024 + 512 + 256 + 3)

# The slope of Darknet's leaky rectifiers below zero.
_LEAKY_SLOPE = 0.1


def is_darknet(path: Path) -> bool:
    """Tell by the name: *.weights, or *.conv.74 (the first 74 layers) for Darknet-53."""
    return path.suffix == ".weights" or re.search(r"\.conv\.\d+$", path.name) is not None


def read_darknet(path: Path) -> dict[str, Tensor]:
    """Read Darknet-53's tensors under timm's names, exactly as they are in the file.

    A classifier becomes `head.fc.*`. The rest of a YOLOv3 becomes one row of numbers, called
    `detector.YOLOv3_of_80_classes`.

    Raises:
        InputError: the file is not Darknet's, is incomplete, or holds another network.
    """
    start, total = _read_header(path)
    shapes = _shapes(total)
    if shapes is None:
        raise InputError(
            f"{_path_and_size(path)}: it has {total:,} numbers. {_explain_size(total)}"
        )

    # The file is one tensor after the other.
    numbers = np.fromfile(path, "<f4", offset=start).astype(np.float32, copy=False)
    sizes = [math.prod(shape) for shape in shapes.values()]
    rows = torch.from_numpy(numbers).split(sizes)
    tensors = {name: row.view(shape) for row, (name, shape) in zip(rows, shapes.items())}

    # The size may fit by chance. Variances below 0 then show that the order does not.
    for name, tensor in tensors.items():
        if name.endswith("running_var") and not (tensor >= 0).all():
            raise InputError(
                f"{_path_and_size(path)}: some variances in {name} are below 0. The file is "
                "damaged, or holds another network of the same size as Darknet-53"
            )
    return tensors


def convolutions() -> Iterator[tuple[str, int, int, int]]:
    """Yield (timm's name, outputs, inputs, kernel) of the 52 convolutions, in network order."""
    yield "stem.conv1", 32, 3, 3
    for stage, blocks in enumerate(BLOCKS):
        width = 64 * 2**stage
        yield f"stages.{stage}.conv_down", width, width // 2, 3
        for block in range(blocks):
            yield f"stages.{stage}.blocks.{block}.conv1", width // 2, width, 1
            yield f"stages.{stage}.blocks.{block}.conv2", width, width // 2, 3


def adapt_to_normalized_pixels(values: dict[str, Tensor], net: nn.Module) -> list[str]:
    """Change Darknet's tensors so that the network can be given normalized pixels.

    Darknet reads pixels y of 0 to 1, our encoders x = (y - mean) / std. The first convolution W * y
    is (W std) * x plus W mean, and the BatchNorm behind it subtracts W mean again. Only at the
    border this is not exact: x is padded with the mean, y with black.

    Args:
        values: tensors by timm's names, changed in place.
        net: the network that will hold them.

    Returns:
        notes on what was changed, and on what still differs.
    """
    # Undo in the first layer what normalization does to the pixels.
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    weight = values["stem.conv1.conv.weight"]
    running_mean = values["stem.conv1.bn.running_mean"]
    values["stem.conv1.conv.weight"] = weight * std[:, None, None]
    values["stem.conv1.bn.running_mean"] = running_mean - torch.einsum("oihw,i->o", weight, mean)
    notes = [
        "Darknet's binary format, translated to timm's names; Darknet reads pixels of 0 to 1, so "
        "the first convolution was fitted to normalized ones; the format does not say on which "
        "images it was trained"
    ]

    # Tell the user what only the config can change.
    slopes = {module.negative_slope for module in net.modules() if isinstance(module, nn.LeakyReLU)}
    if others := slopes - {_LEAKY_SLOPE}:
        notes.append(
            f"Darknet's rectifiers have slope {_LEAKY_SLOPE} below zero, "
            f"this network's {max(others)}: set model.image.slope={_LEAKY_SLOPE}. Otherwise its "
            "features differ from Darknet's until it is trained"
        )
    return notes


def _shapes(total: int) -> dict[str, tuple[int, ...]] | None:
    """Return timm's names and the shapes in a file of `total` numbers, in the order of the file.

    None: no known network has this size.
    """
    # The encoder.
    shapes: dict[str, tuple[int, ...]] = {}
    for name, outputs, inputs, kernel in convolutions():
        for vector in ("bias", "weight", "running_mean", "running_var"):
            shapes[f"{name}.bn.{vector}"] = (outputs,)
        shapes[f"{name}.conv.weight"] = outputs, inputs, kernel, kernel

    # What follows it: nothing, the rest of a detector, or a classifier.
    rest = total - ENCODER_NUMBERS
    if rest == 0:
        return shapes
    if detector := _detector_of_size(rest):
        return {**shapes, f"detector.{detector}": (rest,)}
    if classes := _classes_of_size(rest):
        return {**shapes, "head.fc.bias": (classes,), "head.fc.weight": (classes, 1024)}
    return None


def _detector_of_size(numbers: int) -> str | None:
    """Name the YOLOv3 that has this many numbers after the encoder, or return None."""
    for name, shared in _DETECTORS.items():
        values, remainder = divmod(numbers - shared, _NUMBERS_PER_BOX_VALUE)
        if remainder == 0 and values > 5:
            return f"{name}_of_{values - 5}_classes"
    return None


def _classes_of_size(numbers: int) -> int | None:
    """Return the classes of the classifier that has this many numbers, or None."""
    classes, remainder = divmod(numbers, _NUMBERS_PER_CLASS)
    return classes if remainder == 0 and 0 < classes < 20_000 else None


def _read_header(path: Path) -> tuple[int, int]:
    """Return the byte at which the numbers start, and how many they are."""
    with path.open("rb") as file:
        head = file.read(64)
    if len(head) < 16:
        raise InputError(
            f"{_path_and_size(path)}: too short for the header of Darknet's weights; "
            f"{_explain_head(head)}"
        )

    major, minor, revision = version = struct.unpack_from("<3i", head)
    if not (0 <= major < 10 and 0 <= minor < 10 and 0 <= revision < 1000):
        raise InputError(
            f"{_path_and_size(path)}: does not begin with a version as Darknet's weights do "
            f"(found {version}); {_explain_head(head)}"
        )

    # The number of images seen has eight bytes since version 0.2, and had four before.
    start = 20 if major * 10 + minor >= 2 else 16
    total, remainder = divmod(path.stat().st_size - start, 4)
    if remainder:
        raise InputError(
            f"{_path_and_size(path)}: ends in the middle of a number. "
            "The file is truncated; fetch it again"
        )
    return start, total


def _explain_size(total: int) -> str:
    """Say which sizes are known, and what another one means."""
    size = ENCODER_NUMBERS * 4 + 20
    known = f"Darknet-53 has {ENCODER_NUMBERS:,} ({size:,} bytes with the header)"
    if total < ENCODER_NUMBERS:
        return (
            f"{known}. The file is truncated, or holds a smaller network (a tiny YOLO, "
            "Darknet-19); fetch darknet53.conv.74 again"
        )
    return (
        f"{known}, a classifier {_NUMBERS_PER_CLASS:,} more per class, and YOLOv3 of 80 classes "
        "62,001,757 in all. The file holds another network (YOLOv4 has CSPDarknet-53), or "
        "something was appended to it"
    )


def _explain_head(head: bytes) -> str:
    """Say what a file seems to be by its first bytes, and what to do."""
    if head.startswith((b"PK", b"\x80")):
        return "it is a PyTorch file: rename it to .pth"
    if head.startswith(b"<"):
        return "it is a web page saved under this name: fetch the file again"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer and not the file: run git lfs pull"
    return "it is damaged or from another program: fetch it again"


def _path_and_size(path: Path) -> str:
    return f"{path} ({path.stat().st_size:,} bytes)"
