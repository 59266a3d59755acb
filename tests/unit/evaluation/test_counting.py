"""Counting by the batch: the integers of a plain loop over the samples, whatever they are counted with, and nothing read on the way."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional
from torch.profiler import profile

from coupalign.data.batch import Frame, SampleInfo
from coupalign.data.transforms import frame_of
from coupalign.evaluation.counting import count_batch, counted_width
from coupalign.evaluation.protocols import PROTOCOLS
from coupalign.evaluation.transfer import PendingCopy, lag_by_one

SIZE = 64
SHAPES = [(48, 64), (33, 50), (48, 64), (107, 71), (48, 64), (7, 90), (33, 50), (200, 150)]


def alone(logits: torch.Tensor, frame: Frame) -> torch.Tensor:
    """One sample [S, S] at the photograph's size [H, W]."""
    inner = logits[
        frame.top : frame.top + frame.inner_height, frame.left : frame.left + frame.inner_width
    ].float()
    return functional.interpolate(
        inner[None, None], size=(frame.height, frame.width), mode="bilinear", align_corners=False
    )[0, 0]


def warped(probabilities: torch.Tensor, frame: Frame) -> torch.Tensor:
    """One sample [S, S], bicubic at the place of every pixel of the photograph [H, W]."""

    def places(length: int, inner: int, offset: int) -> torch.Tensor:
        return (
            2
            * ((torch.arange(length, dtype=torch.float64) + 0.5) * (inner / length) + offset)
            / frame.size
            - 1
        ).float()

    y, x = (
        places(frame.height, frame.inner_height, frame.top),
        places(frame.width, frame.inner_width, frame.left),
    )
    grid = torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x))], dim=-1)
    return functional.grid_sample(
        probabilities[None, None],
        grid[None],
        mode="bicubic",
        padding_mode="zeros",
        align_corners=False,
    )[0, 0]


def masks_alone(name: str, logits: torch.Tensor, info: SampleInfo) -> tuple[np.ndarray, np.ndarray]:
    """Prediction and truth of one sample under a protocol."""
    frame = info.frame
    match name:
        case "ris-v1":
            return (alone(logits, frame) > 0).numpy(), info.truth
        case "cris":
            return (warped(torch.sigmoid(logits.float()), frame) > 0.35).numpy(), info.truth
    small = Image.fromarray(info.truth.astype(np.uint8)).resize(
        (frame.inner_width, frame.inner_height), Image.Resampling.NEAREST
    )
    inner = logits[
        frame.top : frame.top + frame.inner_height, frame.left : frame.left + frame.inner_width
    ]
    return (inner > 0).numpy(), np.asarray(small) > 0


def band(mask: np.ndarray) -> np.ndarray:
    """The mask without what d erosions by a 3x3 square leave of it; beyond the edge lies background."""
    left = np.pad(mask, 1)
    for _ in range(max(1, round(0.02 * math.hypot(*mask.shape)))):
        rows = left[:-2] & left[1:-1] & left[2:]
        left = np.pad(rows[:, :-2] & rows[:, 1:-1] & rows[:, 2:], 1)
    return mask & ~left[1:-1, 1:-1]


def rows_alone(logits: torch.Tensor, infos: list[SampleInfo], names: list[str]) -> list[list[int]]:
    """What scoring knows of each sample, one after another."""
    rows = []
    for one, info in zip(logits, infos):
        row = [
            info.number,
            info.image_id,
            int(info.truth.sum()),
            info.truth.size,
            info.same_class,
            int(info.cut),
            int(not torch.isfinite(one).all()),
        ]
        for name in names:
            prediction, truth = masks_alone(name, one, info)
            row += [
                int(part.sum())
                for a, b in ((prediction, truth), (band(prediction), band(truth)))
                for part in (a & b, a | b)
            ]
        rows.append(row)
    return rows


def samples(resize: str, seed: int = 0) -> tuple[torch.Tensor, list[SampleInfo]]:
    """Smooth logits, and truths that have something in common with them."""
    random = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(SHAPES), 1, SIZE // 8, SIZE // 8, generator=random)
    logits = functional.interpolate(noise, size=(SIZE, SIZE), mode="bicubic", align_corners=False)[
        :, 0
    ]
    infos = []
    for number, (shape, one) in enumerate(zip(SHAPES, logits)):
        frame = frame_of(*shape, SIZE, resize)
        truth = (alone(one, frame) + 0.4 * torch.randn(shape, generator=random) > 0.2).numpy()
        infos.append(
            SampleInfo(
                number=number,
                name=f"sample {number}",
                sentence="words",
                frame=frame,
                image_id=number // 3,
                category="star",
                same_class=number % 4 - 1,
                truth=truth,
                cut=number % 2 == 1,
            )
        )
    return logits, infos


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "names", [["ris-v1"], ["lavt"], ["cris"], ["cris", "lavt", "ris-v1"]], ids="+".join
)
@pytest.mark.parametrize("resize", ["squash", "letterbox"])
def test_a_batch_counts_what_its_samples_count_alone(
    resize: str, names: list[str], dtype: torch.dtype
):
    logits, infos = samples(resize)
    logits = logits.to(dtype)
    logits[3, 5, 5], logits[6, 0, 63] = math.nan, math.inf
    counted = count_batch(logits, infos, [PROTOCOLS[name] for name in names])
    rows = counted.rows()
    assert rows.dtype == np.int64 and rows.shape == (len(SHAPES), counted_width(len(names)))
    assert sorted(rows.tolist()) == rows_alone(logits, infos, names)
    assert [info.number for info in counted.infos] == rows[
        :, 0
    ].tolist() and not counted.predictions


def test_the_predictions_asked_for_come_with_their_samples():
    logits, infos = samples("letterbox")
    counted = count_batch(logits, infos, [PROTOCOLS["lavt"]], keep_predictions={2, 5, 7})
    assert {counted.infos[place].number for place in counted.predictions} == {2, 5, 7}
    for place, prediction in counted.predictions.items():
        info = counted.infos[place]
        assert np.array_equal(
            prediction.numpy(), (alone(logits[info.number], info.frame) > 0).numpy()
        )
        assert prediction.numpy().base.untyped_storage().nbytes() == info.truth.size, (
            "it would keep its whole group"
        )


@pytest.mark.parametrize("names", [["ris-v1"], list(PROTOCOLS)], ids="+".join)
def test_counting_reads_no_number_and_takes_few_operators(names: list[str]):
    """32 sentences about photographs of two sizes. A plain loop called 99 operators a sample and protocol (torch 2.13)."""
    logits, infos = samples("squash")
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
    called = sum(event.name.startswith("aten::") and event.cpu_parent is None for event in events)
    assert called < 12 * 32 * len(names)


def test_a_truth_of_another_size_is_refused():
    logits, infos = samples("squash")
    with pytest.raises(AssertionError, match=r"truth \(33, 50\) of an image \(48, 64\)"):
        count_batch(
            logits[:1],
            [replace(infos[0], truth=infos[1].truth)],
            [PROTOCOLS["ris-v1"]],
        )


def test_one_behind_keeps_the_order_and_is_one_behind():
    made: list[int] = []

    def make():
        for number in range(4):
            made.append(number)
            yield number

    assert [(number, len(made)) for number in lag_by_one(make())] == [
        (0, 2),
        (1, 3),
        (2, 4),
        (3, 4),
    ]
    assert list(lag_by_one([])) == [] and list(lag_by_one([7])) == [7]


def test_what_comes_is_what_was_sent_and_not_what_became_of_it():
    tensor = torch.arange(5)
    coming = PendingCopy(tensor)
    tensor += 1
    assert coming.numpy().tolist() == [0, 1, 2, 3, 4]
