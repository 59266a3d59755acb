"""The three ways the field turns logits into a mask that meets the truth, each a small function of the samples of one frame.

    ris-v1   the default: everything at the photograph's own resolution
    lavt     everything at the model's input size, as LAVT, ReLA, MagNet, PolyFormer and others score
    cris     probabilities bicubic back to the photograph's resolution, a threshold of 0.35, as CRIS, ETRIS, DETRIS score

Legend: n samples; S side of the square input; H, W the photograph's size; h, w that at which a protocol counts. `Frame` says where
the photograph lies in the square. Every number of a sample is that of the sample alone, bit for bit, whatever it is counted with.
Pixel centers lie at half integers throughout: column x of a photograph W wide is found at (x + 0.5) * inner_width / W - 0.5
+ left in the square.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from coupalign.errors import InputError
from coupalign.evaluation.metrics import EmptyUnion

if TYPE_CHECKING:
    from coupalign.config.schema import DataConfig, Source
    from coupalign.data.batch import Frame
    from coupalign.data.table import Rule

_CRIS_THRESHOLD = 0.35


@dataclass(frozen=True)
class Protocol:
    """A named way to score.

    `predict(logits float [n, S, S], frame) -> bool [n, h, w]` works where the logits lie, `place(truth bool [H, W], frame) ->
    bool [h, w]` on the host. `truth`, `prediction` and `threshold` are the words printed with every score.
    """

    name: str
    predict: Callable[[Tensor, Frame], Tensor]
    place: Callable[[np.ndarray, Frame], np.ndarray]
    empty: EmptyUnion
    truth: str
    prediction: str
    threshold: str


def count_pixels(prediction: Tensor, truth: Tensor) -> Tensor:
    """int32 [n, 4]: pixels in the intersection and in the union of masks bool [n, h, w], and in those of their boundary bands."""
    assert prediction.shape == truth.shape, (
        f"prediction {tuple(prediction.shape)}, truth {tuple(truth.shape)}"
    )
    masks = torch.stack([prediction, truth])  # [2, n, h, w]
    sums = [
        part.sum(dim=(-2, -1), dtype=torch.int32)
        for a, b in (masks, boundary(masks))
        for part in (a & b, a | b)
    ]
    return torch.stack(sums, dim=1)


def boundary(mask: Tensor) -> Tensor:
    """The band of masks bool [..., h, w] along their contour: the mask without what is left of it after an erosion.

    The erosion is by a 3x3 square, d = max(1, round(0.02 * diagonal)) times, the diagonal in pixels of the mask; beyond the edge
    of the image lies background, so an object that the image cuts off has a band there, too. That is `mask_to_boundary` of
    Cheng et al., Boundary IoU, CVPR 2021 (github.com/bowenc0221/boundary-iou-api). d times the 3x3 square is once a square of
    2d + 1, and a square is its rows and then its columns.
    """
    height, width = mask.shape[-2:]
    d = max(1, round(0.02 * math.hypot(height, width)))
    padded = functional.pad(mask, (d, d, d, d))
    return mask & ~_all_of(_all_of(padded, 2 * d + 1, -2), 2 * d + 1, -1)


def _all_of(mask: Tensor, width: int, dim: int) -> Tensor:
    """Whether `width` neighbors along a dimension are all set, [… n …] -> [… n - width + 1 …], in log2(width) steps."""
    reach = 1
    while reach < width:
        step = min(reach, width - reach)
        rest = mask.shape[dim] - step
        mask = mask.narrow(dim, 0, rest) & mask.narrow(dim, step, rest)
        reach += step
    return mask


def logits_at_original_size(logits: Tensor, frame: Frame) -> Tensor:
    """[..., S, S] -> float32 [..., H, W]: the part of the square that shows the photograph, bilinear with align_corners=False."""
    inner = _inside_frame(logits, frame).float()
    size = (frame.height, frame.width)
    # One channel each: so every sample takes the path through torch that it would take alone.
    alone = inner.reshape(-1, 1, frame.inner_height, frame.inner_width)
    return functional.interpolate(alone, size=size, mode="bilinear", align_corners=False).view(
        *logits.shape[:-2], *size
    )


def predict_ris_v1(logits: Tensor, frame: Frame) -> Tensor:
    """At the photograph's size; p > 0.5 is logit > 0, without the rounding of a sigmoid."""
    return logits_at_original_size(logits, frame) > 0


def predict_lavt(logits: Tensor, frame: Frame) -> Tensor:
    """At the input size, inside the frame; one logit is the difference of two channels, so argmax is logit > 0."""
    return _inside_frame(logits, frame) > 0


def predict_cris(logits: Tensor, frame: Frame) -> Tensor:
    """At the photograph's size: probabilities, bicubic through the inverse of the frame's map, p > 0.35."""
    # One after another: on a CPU the last bit of torch's sigmoid depends on how the threads share the pixels.
    probabilities = torch.stack([torch.sigmoid(one) for one in logits.float()])
    return _warp_back(probabilities, frame) > _CRIS_THRESHOLD


def place_original(truth: np.ndarray, frame: Frame) -> np.ndarray:
    """The truth as it is."""
    assert truth.shape == (frame.height, frame.width), (
        f"truth {truth.shape} of a photograph {(frame.height, frame.width)}"
    )
    return truth


def place_lavt(truth: np.ndarray, frame: Frame) -> np.ndarray:
    """The truth at the input size, inside the frame.

    Pillow resizes it, as it does for LAVT: where a center falls on the edge of two pixels (every third one from 640 to 480) its
    rounding decides.
    """
    small = Image.fromarray(truth.view(np.uint8)).resize(
        (frame.inner_width, frame.inner_height), Image.Resampling.NEAREST
    )
    return np.asarray(small) > 0


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "ris-v1",
            predict_ris_v1,
            place_original,
            "one",
            truth="original resolution, union of polygons",
            prediction="logits, bilinear (align_corners=False, no antialiasing) to the original resolution",
            threshold="p > 0.5",
        ),
        Protocol(
            "lavt",
            predict_lavt,
            place_lavt,
            "zero",
            truth="nearest-resized to the input size, union of polygons (LAVT drops pixels where polygons of one object "
            "overlap; shards hold the union only)",
            prediction="logits at the input size, as the model itself upsamples them (LAVT: bilinear, align_corners=True)",
            threshold="logit > 0, which is the argmax of two channels",
        ),
        Protocol(
            "cris",
            predict_cris,
            place_original,
            "zero",
            truth="original resolution, union of polygons",
            prediction="probabilities, bicubic (a = -0.75, zero outside) through the inverse of the "
            "input's affine map to the original resolution",
            threshold=f"p > {_CRIS_THRESHOLD}",
        ),
    )
}

_EXPECTED_RESIZE = {"lavt": "squash", "cris": "letterbox"}
_READ = {
    "each": "every sentence of every ref",
    "first": "the first sentence of every ref",
    "concatenated": "all sentences of a ref, joined with a space, as one",
}


def find_protocol(name: str) -> Protocol:
    """The protocol of that name.

    Raises:
        InputError: no such protocol; lists them.
    """
    if name not in PROTOCOLS:
        raise InputError(f"protocol {name!r}: there are {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


def describe_conditions(
    protocol: Protocol,
    data: DataConfig,
    sources: Sequence[Source],
    limit: int | None = None,
    rule: Rule = "each",
) -> dict[str, str]:
    """Everything a reader must know to compare a score, by heading, in words.

    A model may be scored under a protocol whose authors feed the image in another way; the words under "input" say so,
    because such a number is not comparable with theirs.
    """
    shape = "squashed to" if data.resize == "squash" else "letterboxed into"
    expected = _EXPECTED_RESIZE.get(protocol.name, data.resize)
    strange = (
        ""
        if expected == data.resize
        else f"; the authors of {protocol.name} use {expected}: not comparable with theirs"
    )
    sets = sorted(
        {
            f"{source.dataset or 'all data sets'}/{source.split_by or 'all'} {source.split}"
            for source in sources
        }
    )
    conditions = {
        "sets": ", ".join(sets),
        "input": f"{shape} {data.image_size}x{data.image_size}{strange}",
        "truth": protocol.truth,
        "prediction": protocol.prediction,
        "threshold": protocol.threshold,
        "sentences": f"{_READ[rule]}, {data.sentence}, cut to {data.max_tokens} tokens",
        "empty": f"an empty union counts as IoU {'1' if protocol.empty == 'one' else '0'}; P@X counts IoU >= X",
    }
    if limit is not None:
        conditions["limit"] = f"{limit:,} samples only, evenly spaced: a quick look, not a result"
    return conditions


def _inside_frame(squares: Tensor, frame: Frame) -> Tensor:
    _check_size(squares, frame)
    return squares[
        ..., frame.top : frame.top + frame.inner_height, frame.left : frame.left + frame.inner_width
    ]


def _warp_back(squares: Tensor, frame: Frame) -> Tensor:
    """[n, S, S] -> [n, H, W], bicubic; the neighbors of the frame take part, and zero lies outside the square."""
    _check_size(squares, frame)

    def places(length: int, inner: int, offset: int) -> Tensor:
        """Where each pixel center lies in the square, in grid_sample's -1 … 1."""
        centers = (torch.arange(length, device=squares.device, dtype=torch.float64) + 0.5) * (
            inner / length
        ) + offset
        return (2 * centers / frame.size - 1).to(squares.dtype)

    y = places(frame.height, frame.inner_height, frame.top)
    x = places(frame.width, frame.inner_width, frame.left)
    grid = torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x))], dim=-1)
    return functional.grid_sample(
        squares[None], grid[None], mode="bicubic", padding_mode="zeros", align_corners=False
    )[0]


def _check_size(squares: Tensor, frame: Frame) -> None:
    assert squares.shape[-2:] == (frame.size, frame.size), (
        f"squares {tuple(squares.shape)} for an input of {frame.size} pixels"
    )
