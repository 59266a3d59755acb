"""Darknet's binary weights: Darknet-53 as its authors published it, alone, with its classifier, or inside YOLOv3.

A file is major, minor and revision (int32), the number of images seen (int64 from version 0.2 on, else int32), and then float32
numbers, all little-endian, without a name or a shape: for each convolution in the order of the network the shifts, scales, means
and variances of its BatchNorm, then its weights [out, in, height, width]. A convolution without BatchNorm, as the classifier is,
has its biases in their place. So the number of numbers is all that tells one network from another.
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

BLOCKS = (1, 2, 8, 8, 4)  # residual blocks of the five stages
NUMBERS = 40_620_640  # of the 52 convolutions without the classifier
_CLASS = 1025  # numbers of the classifier for each class: 1024 weights and a bias
# YOLOv3's numbers behind the 52 convolutions: without its last layers, and those of the last layers for each of the classes + 5
# values that describe a box
_DETECTORS = {"YOLOv3": 20_923_392, "YOLOv3-SPP": 20_923_392 + 2048 * 512 + 4 * 512}
_VALUE = 3 * (1024 + 512 + 256 + 3)  # three boxes at each of three scales: weights and biases
_SLOPE = 0.1  # of Darknet's leaky rectifier
# As model/referring.py normalizes; Darknet reads 0 .. 1.
_MEAN, _STD = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))


def is_darknet(path: Path) -> bool:
    """Whether the name is one that Darknet gives: *.weights, or *.conv.74 for the first 74 layers."""
    return path.suffix == ".weights" or re.search(r"\.conv\.\d+$", path.name) is not None


def read_darknet(path: Path) -> dict[str, Tensor]:
    """Darknet-53's tensors under timm's names, exactly as in the file.

    A classifier becomes `head.fc.*`. The rest of a YOLOv3 becomes one row of numbers, `detector.YOLOv3_of_80_classes`.

    Raises:
        InputError: not a file of Darknet's, not whole, or of another network.
    """
    start, count = _layout(path)
    rest = _rest(count - NUMBERS)
    if rest is None:
        raise InputError(f"{_named(path)}: {count:,} numbers are in the file. {_wanted(count)}")
    numbers = np.fromfile(path, "<f4", offset=start).astype(np.float32, copy=False)
    shapes = _shapes(rest, count - NUMBERS)
    rows = torch.from_numpy(numbers).split([math.prod(shape) for shape in shapes.values()])
    found = {name: row.view(shape) for row, (name, shape) in zip(rows, shapes.items())}
    for name, tensor in found.items():
        if name.endswith("running_var") and not (tensor >= 0).all():
            raise InputError(
                f"{_named(path)}: the variances {name} are not all 0 or more. The file is damaged, or of another network "
                "than Darknet-53 that happens to have as many numbers"
            )
    return found


def _shapes(rest: int | str, numbers: int) -> dict[str, tuple[int, ...]]:
    """timm's names and the shapes, in the order of the file; `rest` as of `_rest`, of so many numbers."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, outputs, inputs, kernel in convolutions():
        shapes |= {
            f"{name}.bn.{vector}": (outputs,)
            for vector in ("bias", "weight", "running_mean", "running_var")
        }
        shapes[f"{name}.conv.weight"] = outputs, inputs, kernel, kernel
    if isinstance(rest, str):
        return {**shapes, f"detector.{rest}": (numbers,)}
    return {**shapes, "head.fc.bias": (rest,), "head.fc.weight": (rest, 1024)} if rest else shapes


def convolutions() -> Iterator[tuple[str, int, int, int]]:
    """(timm's name, outputs, inputs, kernel) of the 52 convolutions, in the order of the network."""
    yield "stem.conv1", 32, 3, 3
    for stage, blocks in enumerate(BLOCKS):
        width = 64 * 2**stage
        yield f"stages.{stage}.conv_down", width, width // 2, 3
        for block in range(blocks):
            yield f"stages.{stage}.blocks.{block}.conv1", width // 2, width, 1
            yield f"stages.{stage}.blocks.{block}.conv2", width, width // 2, 3


def adapt(values: dict[str, Tensor], net: nn.Module) -> list[str]:
    """Fit Darknet's numbers to a network that is shown normalized pixels; returns what was done and what still differs.

    With x = (y - mean) / std the first convolution, W * y, is (W std) * x plus W mean, which the BatchNorm behind it takes off
    again. Only at the border, where x is padded with the mean and y with black, is this not exact.
    """
    weight = values["stem.conv1.conv.weight"]
    values["stem.conv1.conv.weight"] = weight * _STD[:, None, None]
    values["stem.conv1.bn.running_mean"] = values["stem.conv1.bn.running_mean"] - torch.einsum(
        "oihw,i->o", weight, _MEAN
    )
    notes = [
        "Darknet's binary format, translated to timm's names; Darknet reads pixels of 0 to 1, so the first convolution was "
        "fitted to normalized ones; the format does not say on which images it was trained"
    ]
    slopes = {module.negative_slope for module in net.modules() if isinstance(module, nn.LeakyReLU)}
    if slopes - {_SLOPE}:
        notes.append(
            f"Darknet's rectifiers have slope {_SLOPE} below zero, this network's {max(slopes - {_SLOPE})}: "
            f"set model.image.slope={_SLOPE}, or its features are not Darknet's before it is trained"
        )
    return notes


def _layout(path: Path) -> tuple[int, int]:
    """Where the numbers begin, and how many they are."""
    with path.open("rb") as file:
        head = file.read(64)
    if len(head) < 16:
        raise InputError(
            f"{_named(path)}: too short for the header of Darknet's weights; {_cause(head)}"
        )
    version = struct.unpack_from("<3i", head)
    if not all(0 <= part < most for part, most in zip(version, (10, 10, 1000))):
        raise InputError(
            f"{_named(path)}: does not begin as Darknet's weights do, with a version (found {version}); {_cause(head)}"
        )
    start = 20 if version[0] * 10 + version[1] >= 2 else 16
    count, odd = divmod(path.stat().st_size - start, 4)
    if odd:
        raise InputError(
            f"{_named(path)}: ends within a number. The file was cut off; fetch it again"
        )
    return start, count


def _rest(numbers: int) -> int | str | None:
    """What so many numbers behind the 52 convolutions are: classes of a classifier, the name of a detector, or None: unknown."""
    if numbers < 0:
        return None
    for name, shared in _DETECTORS.items():
        values, odd = divmod(numbers - shared, _VALUE)
        if not odd and values > 5:
            return f"{name}_of_{values - 5}_classes"
    classes, odd = divmod(numbers, _CLASS)
    return classes if not odd and classes < 20_000 else None


def _wanted(numbers: int) -> str:
    least = f"Darknet-53 has {NUMBERS:,} ({NUMBERS * 4 + 20:,} bytes with the header)"
    if numbers < NUMBERS:
        return f"{least}. The file was cut off, or holds a smaller network (a tiny YOLO, Darknet-19); fetch darknet53.conv.74 again"
    return (
        f"{least}, with a classifier {_CLASS:,} more for each class, in YOLOv3 of 80 classes 62,001,757. The file holds another "
        "network (YOLOv4 has CSPDarknet-53), or something was written behind its end"
    )


def _cause(head: bytes) -> str:
    causes = {
        b"PK": "it is a file of PyTorch's: rename it to .pth",
        b"\x80": "it is a file of PyTorch's: rename it to .pth",
        b"<": "a web page was saved in its place: fetch it again",
        b"version https://git-lfs": "it is a pointer of Git LFS, not the file: run git lfs pull",
    }
    known = (cause for start, cause in causes.items() if head.startswith(start))
    return next(known, "it is damaged or of another program: fetch it again")


def _named(path: Path) -> str:
    return f"{path} ({path.stat().st_size:,} bytes)"
