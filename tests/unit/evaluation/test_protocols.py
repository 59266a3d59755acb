"""The three protocols: golden values by hand, and slow resampling loops beside torch's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from coupalign.config.schema import DataConfig, Source
from coupalign.data.batch import Frame
from coupalign.data.transforms import frame_of
from coupalign.errors import InputError
from coupalign.evaluation.protocols import (
    PROTOCOLS,
    boundary,
    count_pixels,
    describe_conditions,
    find_protocol,
    logits_at_original_size,
)

SHAPES = [(7, 11), (11, 7), (24, 24), (33, 50), (5, 64), (1, 9)]


def counts_under(
    name: str, logits: torch.Tensor, frame: Frame, truth: np.ndarray
) -> tuple[int, int]:
    """Intersection and union under a protocol."""
    return tuple(count_alone(name, logits, frame, truth)[:2])


def count_alone(name: str, logits: torch.Tensor, frame: Frame, truth: np.ndarray) -> list[int]:
    """All four counts of one sample."""
    protocol = PROTOCOLS[name]
    return count_pixels(
        protocol.predict(logits[None], frame), torch.from_numpy(protocol.place(truth, frame))[None]
    )[0].tolist()


def noise(size: int, seed: int = 0, smooth: int = 1) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return (
        torch.randn(size // smooth, size // smooth, generator=random)
        .repeat_interleave(smooth, 0)
        .repeat_interleave(smooth, 1)
    )


def slow_bilinear(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """Half-pixel centers, the border repeated: align_corners=False, written out."""
    rows, columns = values.shape
    result = np.zeros((height, width))
    for y in range(height):
        for x in range(width):
            top = min(max((y + 0.5) * rows / height - 0.5, 0), rows - 1)
            left = min(max((x + 0.5) * columns / width - 0.5, 0), columns - 1)
            y0, x0 = int(top), int(left)
            y1, x1 = min(y0 + 1, rows - 1), min(x0 + 1, columns - 1)
            dy, dx = top - y0, left - x0
            result[y, x] = (1 - dy) * ((1 - dx) * values[y0, x0] + dx * values[y0, x1]) + dy * (
                (1 - dx) * values[y1, x0] + dx * values[y1, x1]
            )
    return result


def cubic(distance: float, a: float = -0.75) -> float:
    """Keys' kernel with OpenCV's a."""
    d = abs(distance)
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0


def slow_warp(values: np.ndarray, frame: Frame) -> np.ndarray:
    """Bicubic at the place of every photograph pixel in the square, zero outside the square."""
    result = np.zeros((frame.height, frame.width))
    for y in range(frame.height):
        for x in range(frame.width):
            v = (y + 0.5) * frame.inner_height / frame.height - 0.5 + frame.top
            u = (x + 0.5) * frame.inner_width / frame.width - 0.5 + frame.left
            for row in range(math.floor(v) - 1, math.floor(v) + 3):
                for column in range(math.floor(u) - 1, math.floor(u) + 3):
                    if 0 <= row < frame.size and 0 <= column < frame.size:
                        result[y, x] += values[row, column] * cubic(v - row) * cubic(u - column)
    return result


def counted(prediction: np.ndarray, truth: np.ndarray) -> tuple[int, int]:
    return int((prediction & truth).sum()), int((prediction | truth).sum())


# ------------------------------------------------------------------------------------------------- golden values


def test_ris_v1_by_hand():
    """2x2 logits to 4x4: the columns lie at -0.25 (the border), 0.25, 0.75 and 1.25 (the border)."""
    frame = frame_of(4, 4, 2, "squash")
    logits = torch.tensor(
        [[3.0, -1.0], [3.0, -1.0]]
    )  # across: 3, 2, 0, -1; exactly 0 is background
    assert logits_at_original_size(logits, frame)[0].tolist() == [3, 2, 0, -1]
    truth = np.zeros((4, 4), bool)
    truth[:2, 1:] = True
    assert counts_under("ris-v1", logits, frame, truth) == (2, 8 + 6 - 2)


def test_lavt_by_hand():
    """The 4x4 truth becomes 2x2 by the pixel below each center: rows and columns 1 and 3."""
    truth = np.zeros((4, 4), bool)
    truth[1, 3] = truth[0, 0] = truth[2, 2] = True
    logits = torch.tensor([[0.0, 0.1], [0.1, -0.1]])  # a tie of two channels is background
    assert counts_under("lavt", logits, frame_of(4, 4, 2, "squash"), truth) == (1, 2)


def test_cris_by_hand():
    """A photograph of the input's own size comes back unchanged; 0.35 is passed, not reached, at logit log(7/13)."""
    edge = math.log(0.35 / 0.65)
    logits = torch.tensor([[edge + 1e-3, edge - 1e-3], [-5.0, 5.0]])
    truth = np.array([[True, True], [False, False]])
    assert counts_under("cris", logits, frame_of(2, 2, 2, "squash"), truth) == (1, 3)
    assert counts_under("ris-v1", logits, frame_of(2, 2, 2, "squash"), truth) == (0, 3)


def test_letterbox_by_hand():
    """A 2x4 photograph in the middle of a 4x4 square: the gray bars above and below take no part in ris-v1 and lavt."""
    frame = frame_of(2, 4, 4, "letterbox")
    assert (frame.top, frame.left, frame.inner_height, frame.inner_width) == (1, 0, 2, 4)
    logits = torch.full((4, 4), 9.0)
    logits[1:3] = torch.tensor([[1.0, -1, -1, -1], [1, 1, -1, -1]])
    truth = np.array([[True, True, False, False], [True, True, False, False]])
    assert counts_under("ris-v1", logits, frame, truth) == (3, 4)
    assert counts_under("lavt", logits, frame, truth) == (3, 4)


# ------------------------------------------------------------------------------------------------------- oracles


@pytest.mark.parametrize("resize", ["squash", "letterbox"])
@pytest.mark.parametrize("shape", SHAPES)
def test_bilinear_equals_the_loop(shape: tuple[int, int], resize: str):
    frame = frame_of(*shape, 24, resize)
    logits = noise(24, seed=sum(shape))
    inner = logits.numpy()[
        frame.top : frame.top + frame.inner_height, frame.left : frame.left + frame.inner_width
    ]
    slow = slow_bilinear(inner.astype(np.float64), *shape)
    assert np.abs(logits_at_original_size(logits, frame).numpy() - slow).max() < 1e-5
    truth = slow > 0.3
    assert counts_under("ris-v1", logits, frame, truth) == counted(slow > 0, truth)


@pytest.mark.parametrize("resize", ["squash", "letterbox"])
@pytest.mark.parametrize("shape", SHAPES)
def test_bicubic_equals_the_loop(shape: tuple[int, int], resize: str):
    frame = frame_of(*shape, 24, resize)
    logits = noise(24, seed=sum(shape))
    slow = slow_warp(torch.sigmoid(logits.double()).numpy(), frame)
    assert np.abs(slow - 0.35).min() > 1e-5, "the example is decided by rounding"
    truth = slow > 0.6
    assert counts_under("cris", logits, frame, truth) == counted(slow > 0.35, truth)


@pytest.mark.parametrize("resize", ["squash", "letterbox"])
@pytest.mark.parametrize("shape", [(7, 11), (24, 24), (23, 49), (50, 31), (1, 9)])
def test_lavt_truth_equals_the_loop(shape: tuple[int, int], resize: str):
    """Sizes in which no center falls on the edge of two pixels."""
    frame = frame_of(*shape, 25, resize)
    truth = np.random.default_rng(1).random(shape) > 0.5
    rows, columns = frame.inner_height, frame.inner_width
    small = np.array(
        [
            [
                truth[
                    math.floor((y + 0.5) * shape[0] / rows),
                    math.floor((x + 0.5) * shape[1] / columns),
                ]
                for x in range(columns)
            ]
            for y in range(rows)
        ]
    )
    whole = noise(25, seed=3)
    logits = whole[frame.top : frame.top + rows, frame.left : frame.left + columns]
    assert counts_under("lavt", whole, frame, truth) == counted(logits.numpy() > 0, small)


# ---------------------------------------------------------------------------------------------------- properties


@pytest.mark.parametrize("name", PROTOCOLS)
@pytest.mark.parametrize("resize", ["squash", "letterbox"])
def test_a_perfect_prediction_is_nearly_perfect_and_its_opposite_nearly_nothing(
    name: str, resize: str
):
    frame = frame_of(48, 64, 32, resize)
    truth = np.zeros((48, 64), bool)
    truth[10:30, 12:40] = True
    square = np.zeros((32, 32), np.uint8)
    inner = (
        Image.fromarray(truth)
        .convert("L")
        .resize((frame.inner_width, frame.inner_height), Image.Resampling.BILINEAR)
    )
    square[
        frame.top : frame.top + frame.inner_height, frame.left : frame.left + frame.inner_width
    ] = np.asarray(inner)
    logits = torch.from_numpy(square).float() / 255 * 20 - 10
    inside, union = count_pixels(name, logits, frame, truth)
    assert inside / union > 0.85
    inside, union = count_pixels(name, -logits, frame, truth)
    assert inside / union < 0.1


@pytest.mark.parametrize("name", PROTOCOLS)
def test_counts_are_plain_integers_within_bounds(name: str):
    for seed, shape in enumerate(SHAPES):
        truth = np.random.default_rng(seed).random(shape) > 0.5
        inside, union = count_pixels(
            name, noise(24, seed).bfloat16(), frame_of(*shape, 24, "letterbox"), truth
        )
        assert type(inside) is type(union) is int
        assert 0 <= inside <= union <= (24 * 24 if name == "lavt" else truth.size)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_nothing_and_nothing_is_an_empty_union(name: str):
    frame = frame_of(6, 6, 8, "squash")
    assert count_pixels(name, torch.full((8, 8), -9.0), frame, np.zeros((6, 6), bool)) == (0, 0)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_logits_of_another_size_are_refused(name: str):
    with pytest.raises(AssertionError, match="input of 24 pixels"):
        count_pixels(name, noise(12), frame_of(8, 8, 24, "squash"), np.zeros((8, 8), bool))


# ------------------------------------------------------------------------------------------------------ boundaries


def slow_boundary(mask: np.ndarray) -> np.ndarray:
    """Pixels of the mask with background, or the world beyond the image, within a square of d around them."""
    height, width = mask.shape
    d = max(1, round(0.02 * math.sqrt(height**2 + width**2)))
    band = np.zeros_like(mask)
    for y, x in np.argwhere(mask):
        near = mask[max(0, y - d) : y + d + 1, max(0, x - d) : x + d + 1]
        band[y, x] = near.size < (2 * d + 1) ** 2 or not near.all()
    return band


@pytest.mark.parametrize(
    "shape, d",
    [((7, 11), 1), ((50, 56), 2), ((60, 80), 2), ((130, 120), 4), ((1, 9), 1), ((150, 2), 3)],
)
def test_a_boundary_equals_the_loop(shape: tuple[int, int], d: int):
    assert max(1, round(0.02 * math.hypot(*shape))) == d
    random = np.random.default_rng(d)
    for mask in (
        random.random(shape) > 0.01,
        np.ones(shape, bool),
        np.zeros(shape, bool),
        random.random(shape) > 0.5,
    ):
        assert np.array_equal(boundary(torch.from_numpy(mask)).numpy(), slow_boundary(mask))


def test_a_boundary_by_hand():
    """A 5x4 object at the lower edge: its inside is what has no background within one pixel; below the image is background."""
    mask = torch.zeros(7, 8, dtype=torch.bool)
    mask[2:7, 2:6] = True
    assert boundary(mask)[2:7, 2:6].int().tolist() == [
        [1, 1, 1, 1],
        [1, 0, 0, 1],
        [1, 0, 0, 1],
        [1, 0, 0, 1],
        [1, 1, 1, 1],
    ]
    other = torch.zeros(7, 8, dtype=torch.bool)
    other[2:7, 1:6] = True
    assert count_pixels(mask[None], other[None]).tolist() == [[20, 25, 14 - 3, 14 + 16 - 11]]


# --------------------------------------------------------------------------------------------------------- words


def test_an_unknown_protocol_lists_the_known_ones():
    with pytest.raises(InputError, match=r"'lawt'.*ris-v1, lavt, cris"):
        find_protocol("lawt")


def test_conditions_say_what_a_reader_must_know():
    data = DataConfig(image_size=96, max_tokens=15, sentence="raw")
    sources = (
        Source(index="x", dataset="refcoco", split_by="unc", split="testA"),
        Source(index="x", split="testA"),
    )
    words = describe_conditions(find_protocol("ris-v1"), data, sources, limit=50)
    assert words["sets"] == "all data sets/all testA, refcoco/unc testA"
    assert words["input"] == "squashed to 96x96"
    assert "original" in words["truth"] and "0.5" in words["threshold"]
    assert (
        "every sentence" in words["sentences"]
        and "raw" in words["sentences"]
        and "15" in words["sentences"]
    )
    assert words["limit"].startswith("50 samples")
    assert "limit" not in describe_conditions(find_protocol("ris-v1"), data, sources)
    assert (
        "the first sentence"
        in describe_conditions(find_protocol("ris-v1"), data, sources, rule="first")["sentences"]
    )
    assert (
        "joined"
        in describe_conditions(find_protocol("ris-v1"), data, sources, rule="concatenated")[
            "sentences"
        ]
    )


@pytest.mark.parametrize(
    "name, resize, comparable",
    [
        ("cris", "squash", False),
        ("cris", "letterbox", True),
        ("lavt", "squash", True),
        ("lavt", "letterbox", False),
        ("ris-v1", "letterbox", True),
    ],
)
def test_a_foreign_input_is_said_to_be_one(name: str, resize: str, comparable: bool):
    words = describe_conditions(find_protocol(name), DataConfig(resize=resize), ())
    assert ("not comparable" in words["input"]) is not comparable
