"""The protocols: turn logits into a mask and compare it with the truth.

    ris-v1             the default: everything at the image's original size
    lavt               everything at the model's input size, as LAVT does
    cris               probabilities, bicubic back to the original size, with CRIS's threshold of
                       0.35 and its strict P@X
    coupalign-author   at the original size with align_corners=True, all sentences of a ref as one,
                       as the code of CoupAlign's first author does

Each protocol says with every score what the authors' own code does otherwise. Other tools are not
named, because they rasterize truths in other ways (ReLA scales polygons, PolyFormer uses OpenCV).

Legend: n samples; S side of the square input; H, W the original size of the image; h, w the size
at which a protocol counts. `Frame` says where the image is inside the square.

Samples are scored in groups, but every number of a sample is bit for bit the one that the sample
gets alone. Pixel centers are at half integers throughout: column x of an image W wide is at
(x + 0.5) * inner_width / W - 0.5 + left in the square.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from coupalign.errors import InputError
from coupalign.evaluation.metrics import IouRule

if TYPE_CHECKING:
    from coupalign.config.schema import DataConfig, Source
    from coupalign.data.batch import Frame
    from coupalign.data.table import Rule

_CRIS_THRESHOLD = 0.35


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """A named way to score.

    Attributes:
        predict: (logits float [n, S, S], frame) -> bool [n, h, w], on the device of the logits.
        resize_truth: (truth bool [H, W], frame) -> bool [h, w], on the host.
        iou_rule: see `metrics.IouRule`.
        truth, prediction, threshold: descriptions, printed with every score.
        authors: what the authors' own code does otherwise, printed with every score.
        sentences: the sentence rule of its authors.
        resize: how its authors fit an image into the square. None: either way.
    """

    name: str
    predict: Callable[[Tensor, Frame], Tensor]
    resize_truth: Callable[[np.ndarray, Frame], np.ndarray]
    iou_rule: IouRule
    truth: str
    prediction: str
    threshold: str
    authors: str = ""
    sentences: Rule = "each"
    resize: Literal["squash", "letterbox"] | None = None


# ------------------------------------------------------------------------------------- counting


def count_pixels(prediction: Tensor, truth: Tensor) -> Tensor:
    """Count the pixels of masks bool [n, h, w] and of their boundary bands.

    Returns:
        int32 [n, 4]: intersection, union, intersection of the bands, union of the bands.
    """
    assert prediction.shape == truth.shape, (
        f"prediction {tuple(prediction.shape)}, truth {tuple(truth.shape)}"
    )
    masks = torch.stack([prediction, truth])  # [2, n, h, w]

    counts = []
    for a, b in (masks, boundary(masks)):
        for overlap in (a & b, a | b):
            counts.append(overlap.sum(dim=(-2, -1), dtype=torch.int32))
    return torch.stack(counts, dim=1)


def boundary(mask: Tensor) -> Tensor:
    """Return the band of masks bool [..., h, w] along their contour: the mask minus its erosion.

    The erosion is by a 3x3 square, d = max(1, round(0.02 * diagonal)) times, the diagonal in
    pixels of the mask. Everything outside the image is background, so an object that the image
    cuts off has a band at the edge too. That is `mask_to_boundary` of Cheng et al., Boundary IoU,
    CVPR 2021 (github.com/bowenc0221/boundary-iou-api).
    """
    height, width = mask.shape[-2:]
    d = max(1, round(0.02 * math.hypot(height, width)))

    # d erosions by a 3x3 square are one by a square of 2d + 1, first its columns, then its rows.
    eroded = functional.pad(mask, (d, d, d, d))
    for dim in (-2, -1):
        eroded = _erode(eroded, 2 * d + 1, dim)
    return mask & ~eroded


def _erode(mask: Tensor, width: int, dim: int) -> Tensor:
    """Whether `width` neighbors along a dimension are all set, [… n …] -> [… n - width + 1 …].

    Doubles the window each time, so it takes log2(width) steps.
    """
    window = 1
    while window < width:
        step = min(window, width - window)
        length = mask.shape[dim] - step
        mask = mask.narrow(dim, 0, length) & mask.narrow(dim, step, length)
        window += step
    return mask


# ------------------------------------------------------------------------- predictions and truths


def logits_at_original_size(logits: Tensor, frame: Frame) -> Tensor:
    """Resize the part of the square that shows the image, [..., S, S] -> float32 [..., H, W].

    Bilinear with align_corners=False.
    """
    return _resize_to_original(logits, frame, align_corners=False)


def _resize_to_original(logits: Tensor, frame: Frame, *, align_corners: bool) -> Tensor:
    inner = _crop_to_frame(logits, frame).float()
    size = (frame.height, frame.width)

    # As batch items of one channel, every sample takes the path through torch it would take alone.
    alone = inner.reshape(-1, 1, frame.inner_height, frame.inner_width)
    resized = functional.interpolate(alone, size=size, mode="bilinear", align_corners=align_corners)
    return resized.view(*logits.shape[:-2], *size)


def predict_ris_v1(logits: Tensor, frame: Frame) -> Tensor:
    """Predict at the original size: logit > 0 is p > 0.5 without the rounding of a sigmoid."""
    return logits_at_original_size(logits, frame) > 0


def predict_lavt(logits: Tensor, frame: Frame) -> Tensor:
    """Predict at the input size, inside the frame.

    One logit is the difference of two channels, so their argmax is logit > 0.
    """
    return _crop_to_frame(logits, frame) > 0


def predict_cris(logits: Tensor, frame: Frame) -> Tensor:
    """Predict at the original size: bicubic probabilities, back through the frame's map, > 0.35."""
    # One by one: on a CPU, the last bit of torch's sigmoid depends on how threads share the pixels.
    probabilities = torch.stack([torch.sigmoid(sample) for sample in logits.float()])
    return _warp_to_original(probabilities, frame) > _CRIS_THRESHOLD


def predict_coupalign_author(logits: Tensor, frame: Frame) -> Tensor:
    """Predict at the original size: bilinear with align_corners=True, then logit > 0."""
    return _resize_to_original(logits, frame, align_corners=True) > 0


def truth_at_original_size(truth: np.ndarray, frame: Frame) -> np.ndarray:
    """Return the truth unchanged, after a check of its size."""
    assert truth.shape == (frame.height, frame.width), (
        f"truth {truth.shape} of an image {(frame.height, frame.width)}"
    )
    return truth


def truth_at_input_size(truth: np.ndarray, frame: Frame) -> np.ndarray:
    """Resize the truth to the input size, inside the frame, as LAVT does.

    Use Pillow, as LAVT does: where a center falls on the edge between two pixels (every third one
    from 640 to 480), its rounding decides.
    """
    size = (frame.inner_width, frame.inner_height)
    image = Image.fromarray(truth.view(np.uint8)).resize(size, Image.Resampling.NEAREST)
    return np.asarray(image) > 0


def _crop_to_frame(squares: Tensor, frame: Frame) -> Tensor:
    _check_size(squares, frame)
    bottom = frame.top + frame.inner_height
    right = frame.left + frame.inner_width
    return squares[..., frame.top : bottom, frame.left : right]


def _warp_to_original(squares: Tensor, frame: Frame) -> Tensor:
    """Sample each pixel of the image from the square, bicubic, [n, S, S] -> [n, H, W].

    Pixels next to the frame contribute; everything outside the square is zero.
    """
    _check_size(squares, frame)

    def grid_coordinates(length: int, inner: int, offset: int) -> Tensor:
        """Return the position of each pixel center in the square, in grid_sample's -1 … 1."""
        index = torch.arange(length, device=squares.device, dtype=torch.float64)
        centers = (index + 0.5) * (inner / length) + offset
        return (2 * centers / frame.size - 1).to(squares.dtype)

    y = grid_coordinates(frame.height, frame.inner_height, frame.top)
    x = grid_coordinates(frame.width, frame.inner_width, frame.left)
    columns = x.expand(len(y), -1)
    rows = y[:, None].expand(-1, len(x))
    grid = torch.stack([columns, rows], dim=-1)
    warped = functional.grid_sample(
        squares[None], grid[None], mode="bicubic", padding_mode="zeros", align_corners=False
    )
    return warped[0]


def _check_size(squares: Tensor, frame: Frame) -> None:
    assert squares.shape[-2:] == (frame.size, frame.size), (
        f"squares {tuple(squares.shape)} for an input of {frame.size} pixels"
    )


# ------------------------------------------------------------------------------------ the protocols

_RIS_V1 = Protocol(
    name="ris-v1",
    predict=predict_ris_v1,
    resize_truth=truth_at_original_size,
    iou_rule="one",
    truth="original resolution, union of polygons",
    prediction="logits, bilinear (align_corners=False, no antialiasing) to the original resolution",
    threshold="p > 0.5",
)
_LAVT = Protocol(
    name="lavt",
    predict=predict_lavt,
    resize_truth=truth_at_input_size,
    iou_rule="zero",
    truth="nearest-resized to the input size, union of polygons",
    prediction="logits at the input size, as the model itself upsamples them",
    threshold="logit > 0, which is the argmax of two channels",
    authors="LAVT drops pixels where polygons of one object overlap, upsamples bilinearly with "
    "align_corners=True, reads raw sentences, and loses [SEP] of a sentence that it cuts",
    resize="squash",
)
_CRIS = Protocol(
    name="cris",
    predict=predict_cris,
    resize_truth=truth_at_original_size,
    iou_rule="strict",
    truth="original resolution, union of polygons",
    prediction="probabilities, bicubic (a = -0.75, zero outside) through the inverse of the "
    "input's affine map to the original resolution",
    threshold=f"p > {_CRIS_THRESHOLD}",
    authors="CRIS enlarges probabilities of 104x104 bicubically with align_corners=True first, and "
    "its letterbox has bars of a fraction of a pixel, so its masks differ at their edges",
    resize="letterbox",
)
_COUPALIGN_AUTHOR = Protocol(
    name="coupalign-author",
    predict=predict_coupalign_author,
    resize_truth=truth_at_original_size,
    iou_rule="zero",
    truth="original resolution, union of polygons",
    prediction="logits, bilinear (align_corners=True, no antialiasing) to the original resolution",
    threshold="logit > 0, which is the argmax of two channels",
    authors="the author's code joins token rows of 30, each with its own [CLS], [SEP] and padding; "
    "here the text is joined, and cut once",
    sentences="concatenated",
    resize="squash",
)
PROTOCOLS = {protocol.name: protocol for protocol in (_RIS_V1, _LAVT, _CRIS, _COUPALIGN_AUTHOR)}

_RULE_DESCRIPTIONS = {
    "each": "every sentence of every ref",
    "first": "the first sentence of every ref",
    "concatenated": "all sentences of a ref, joined with a space, as one",
}


def find_protocol(name: str) -> Protocol:
    """Look up a protocol by name.

    Raises:
        InputError: there is no such protocol; lists those there are.
    """
    if name not in PROTOCOLS:
        raise InputError(f"unknown protocol {name!r}; use one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


def describe_conditions(
    protocol: Protocol,
    data: DataConfig,
    sources: Sequence[Source],
    *,
    shards: str = "",
    limit: int | None = None,
    rule: Rule = "each",
) -> dict[str, str]:
    """Describe by heading everything a reader must know to compare a score.

    You may score a model under a protocol whose authors feed the image in another way. The text
    under "input" then says so, because such a number is not comparable with theirs.

    Args:
        shards: name and fingerprint of the indexes that the sources are read from.
    """
    # Say how the image enters the model, and whether the protocol's authors do the same.
    fitted = "squashed to" if data.resize == "squash" else "letterboxed into"
    warning = ""
    if protocol.resize not in (None, data.resize):
        warning = (
            f"; the authors of {protocol.name} use {protocol.resize}: not comparable with theirs"
        )

    sets = set()
    for source in sources:
        dataset = source.dataset or "all data sets"
        sets.add(f"{dataset}/{source.split_by or 'all'} {source.split}")

    rule_text = f"{_RULE_DESCRIPTIONS[rule]}, {data.sentence}, cut to {data.max_tokens} tokens"
    if protocol.sentences not in ("each", rule):
        rule_text += (
            f"; the authors of {protocol.name} score {_RULE_DESCRIPTIONS[protocol.sentences]}: not "
            "comparable with theirs"
        )
    empty_iou = "1" if protocol.iou_rule == "one" else "0"
    sign = ">" if protocol.iou_rule == "strict" else ">="
    conditions = {
        "sets": ", ".join(sorted(sets)) + (f"; shards {shards}" if shards else ""),
        "input": f"{fitted} {data.image_size}x{data.image_size}{warning}",
        "truth": protocol.truth,
        "prediction": protocol.prediction,
        "threshold": protocol.threshold,
        "sentences": rule_text,
        "empty": f"an empty union counts as IoU {empty_iou}; P@X counts IoU {sign} X",
    }
    if protocol.authors:
        conditions["authors"] = protocol.authors
    if limit is not None:
        conditions["limit"] = f"{limit:,} samples only, evenly spaced: a quick look, not a result"
    return conditions
