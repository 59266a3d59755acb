"""Counting by the batch: equal to a plain loop over the samples, and nothing read on the way."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional
from torch.profiler import profile

from coupalign.data.batch import Frame, SampleInfo
from coupalign.data.transforms import frame_of
from coupalign.evaluation.counting import count_batch, counted_width, rows_for_protocol
from coupalign.evaluation.protocols import PROTOCOLS

SIZE = 64
SHAPES = [(48, 64), (33, 50), (48, 64), (107, 71), (48, 64), (7, 90), (33, 50), (200, 150)]


# --------------------------------------------------------------------- one sample after another


def inside(frame: Frame, square: torch.Tensor) -> torch.Tensor:
    """The part of a square [S, S] that shows the image."""
    bottom, right = frame.top + frame.inner_height, frame.left + frame.inner_width
    return square[frame.top : bottom, frame.left : right]


def resize_one(logits: torch.Tensor, frame: Frame, align_corners: bool = False) -> torch.Tensor:
    """One sample [S, S] at the original size [H, W]."""
    inner = inside(frame, logits).float()[None, None]
    size = (frame.height, frame.width)
    return functional.interpolate(inner, size=size, mode="bilinear", align_corners=align_corners)[
        0, 0
    ]


def warp_one(probabilities: torch.Tensor, frame: Frame) -> torch.Tensor:
    """One sample [S, S], bicubic at every pixel of the image [H, W]."""

    def coordinates(length: int, inner: int, offset: int) -> torch.Tensor:
        centers = (torch.arange(length, dtype=torch.float64) + 0.5) * (inner / length) + offset
        return (2 * centers / frame.size - 1).float()

    y = coordinates(frame.height, frame.inner_height, frame.top)
    x = coordinates(frame.width, frame.inner_width, frame.left)
    grid = torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x))], dim=-1)
    return functional.grid_sample(
        probabilities[None, None],
        grid[None],
        mode="bicubic",
        padding_mode="zeros",
        align_corners=False,
    )[0, 0]


def masks_of_one(
    name: str, logits: torch.Tensor, info: SampleInfo
) -> tuple[np.ndarray, np.ndarray]:
    """Prediction and truth of one sample under a protocol."""
    frame = info.frame
    if name == "ris-v1":
        return (resize_one(logits, frame) > 0).numpy(), info.truth
    if name == "coupalign-author":
        return (resize_one(logits, frame, align_corners=True) > 0).numpy(), info.truth
    if name == "cris":
        return (warp_one(torch.sigmoid(logits.float()), frame) > 0.35).numpy(), info.truth

    size = (frame.inner_width, frame.inner_height)
    image = Image.fromarray(info.truth.astype(np.uint8))
    small = image.resize(size, Image.Resampling.NEAREST)
    return (inside(frame, logits) > 0).numpy(), np.asarray(small) > 0


def band_of(mask: np.ndarray) -> np.ndarray:
    """The mask minus d erosions by a 3x3 square; everything outside the image is background."""
    left = np.pad(mask, 1)
    for _ in range(max(1, round(0.02 * math.hypot(*mask.shape)))):
        rows = left[:-2] & left[1:-1] & left[2:]
        left = np.pad(rows[:, :-2] & rows[:, 1:-1] & rows[:, 2:], 1)
    return mask & ~left[1:-1, 1:-1]


def rows_one_by_one(
    logits: torch.Tensor, infos: list[SampleInfo], names: list[str]
) -> list[list[int]]:
    """The counted row of each sample, one after another."""
    rows = []
    for square, info in zip(logits, infos):
        broken = not torch.isfinite(square).all()
        row = [info.number, info.image_id, int(info.truth.sum()), info.truth.size]
        row += [info.same_class, int(info.cut), int(info.unknown), int(broken)]
        for name in names:
            prediction, truth = masks_of_one(name, square, info)
            for a, b in ((prediction, truth), (band_of(prediction), band_of(truth))):
                row += [int((a & b).sum()), int((a | b).sum())]
        rows.append(row)
    return rows


def example_batch(resize: str, seed: int = 0) -> tuple[torch.Tensor, list[SampleInfo]]:
    """Smooth logits, and truths that have something in common with them."""
    random = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(SHAPES), 1, SIZE // 8, SIZE // 8, generator=random)
    size = (SIZE, SIZE)
    logits = functional.interpolate(noise, size=size, mode="bicubic", align_corners=False)[:, 0]

    infos = []
    for number, (shape, square) in enumerate(zip(SHAPES, logits)):
        frame = frame_of(*shape, SIZE, resize)
        disturbed = resize_one(square, frame) + 0.4 * torch.randn(shape, generator=random)
        infos.append(
            SampleInfo(
                number=number,
                name=f"sample {number}",
                sentence="words",
                frame=frame,
                image_id=number // 3,
                category="star",
                same_class=number % 4 - 1,
                truth=(disturbed > 0.2).numpy(),
                cut=number % 2 == 1,
                unknown=number % 3 == 1,
            )
        )
    return logits, infos


# ------------------------------------------------------------------------------------------ tests


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "names",
    [["ris-v1"], ["lavt"], ["cris"], ["cris", "lavt", "ris-v1"], ["coupalign-author"]],
    ids="+".join,
)
@pytest.mark.parametrize("resize", ["squash", "letterbox"])
def test_batch_counts_equal_counts_one_by_one(resize: str, names: list[str], dtype: torch.dtype):
    logits, infos = example_batch(resize)
    logits = logits.to(dtype)
    logits[3, 5, 5], logits[6, 0, 63] = math.nan, math.inf

    counted = count_batch(logits, infos, [PROTOCOLS[name] for name in names])

    rows = counted.rows()
    assert rows.dtype == np.int64
    assert rows.shape == (len(SHAPES), counted_width(len(names)))
    assert sorted(rows.tolist()) == rows_one_by_one(logits, infos, names)
    assert [info.number for info in counted.infos] == rows[:, 0].tolist()
    assert not counted.predictions


def test_rows_for_protocol_selects_its_counts():
    logits, infos = example_batch("squash")
    names = ["cris", "lavt"]

    rows = count_batch(logits, infos, [PROTOCOLS[name] for name in names]).rows()

    for index, name in enumerate(names):
        selected = rows_for_protocol(rows, index)
        alone = count_batch(logits, infos, [PROTOCOLS[name]]).rows()
        expected = np.hstack([alone[:, :1], alone[:, 8:], alone[:, 1:8]])
        assert selected.tolist() == expected.tolist()


def test_kept_predictions_belong_to_their_samples():
    logits, infos = example_batch("letterbox")

    counted = count_batch(logits, infos, [PROTOCOLS["lavt"]], keep_predictions={2, 5, 7})

    assert {counted.infos[index].number for index in counted.predictions} == {2, 5, 7}
    for index, copy in counted.predictions.items():
        info, prediction = counted.infos[index], copy.numpy()
        expected = resize_one(logits[info.number], info.frame) > 0
        assert np.array_equal(prediction, expected.numpy())
        stored_bytes = prediction.base.untyped_storage().nbytes()
        assert stored_bytes == info.truth.size, "it would keep its whole group"


@pytest.mark.parametrize("names", [["ris-v1"], list(PROTOCOLS)], ids="+".join)
def test_counting_reads_no_value_and_calls_few_operators(names: list[str]):
    """32 sentences about images of two sizes.

    A plain loop called 99 operators per sample and protocol (torch 2.13).
    """
    logits, infos = example_batch("squash")
    logits, infos = logits[[0, 1] * 16], [infos[0], infos[1]] * 16

    with profile() as profiler:
        count_batch(logits, infos, [PROTOCOLS[name] for name in names])

    events = profiler.events()
    waits = {
        "aten::_local_scalar_dense",
        "aten::nonzero",
        "aten::masked_select",
        "aten::item",
        "aten::index",
    }
    assert not waits & {event.name for event in events}
    operators = [
        event for event in events if event.name.startswith("aten::") and event.cpu_parent is None
    ]
    assert len(operators) < 12 * 32 * len(names)


def test_truth_of_another_size_is_refused():
    logits, infos = example_batch("squash")
    wrong = SampleInfo(
        number=0,
        name="a",
        sentence="b",
        frame=infos[0].frame,
        image_id=0,
        category="star",
        truth=infos[1].truth,
    )

    with pytest.raises(AssertionError, match=r"truth \(33, 50\) of an image \(48, 64\)"):
        count_batch(logits[:1], [wrong], [PROTOCOLS["ris-v1"]])
