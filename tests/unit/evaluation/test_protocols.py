"""The three protocols: values computed by hand, and slow loops next to torch's resampling."""

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
    """Intersection and union of one sample under a protocol."""
    protocol = PROTOCOLS[name]
    prediction = protocol.predict(logits[None], frame)
    resized = torch.from_numpy(protocol.resize_truth(truth, frame))[None]
    intersection, union, *_ = count_pixels(prediction, resized)[0].tolist()
    return intersection, union


def noise(size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, size, generator=torch.Generator().manual_seed(seed))


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
            above = (1 - dx) * values[y0, x0] + dx * values[y0, x1]
            below = (1 - dx) * values[y1, x0] + dx * values[y1, x1]
            result[y, x] = (1 - dy) * above + dy * below
    return result


def cubic(distance: float, a: float = -0.75) -> float:
    """Keys' kernel with OpenCV's a."""
    d = abs(distance)
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    if d < 2:
        return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
    return 0.0


def slow_warp(values: np.ndarray, frame: Frame) -> np.ndarray:
    """Sample the square at every pixel of the image, bicubic, zero outside the square."""
    result = np.zeros((frame.height, frame.width))
    for y in range(frame.height):
        for x in range(frame.width):
            v = (y + 0.5) * frame.inner_height / frame.height - 0.5 + frame.top
            u = (x + 0.5) * frame.inner_width / frame.width - 0.5 + frame.left
            for row in range(math.floor(v) - 1, math.floor(v) + 3):
                for column in range(math.floor(u) - 1, math.floor(u) + 3):
                    if 0 <= row < frame.size and 0 <= column < frame.size:
                        weight = cubic(v - row) * cubic(u - column)
                        result[y, x] += values[row, column] * weight
    return result


def inside(frame: Frame, square: np.ndarray | torch.Tensor) -> np.ndarray | torch.Tensor:
    """The part of a square [S, S] that shows the image."""
    bottom, right = frame.top + frame.inner_height, frame.left + frame.inner_width
    return square[frame.top : bottom, frame.left : right]


def counted(prediction: np.ndarray, truth: np.ndarray) -> tuple[int, int]:
    return int((prediction & truth).sum()), int((prediction | truth).sum())


# ------------------------------------------------------------------------------- values by hand


def test_ris_v1_counts_by_hand():
    """2x2 logits to 4x4: the columns are at -0.25 (border), 0.25, 0.75 and 1.25 (border)."""
    frame = frame_of(4, 4, 2, "squash")
    logits = torch.tensor([[3.0, -1.0], [3.0, -1.0]])
    truth = np.zeros((4, 4), bool)
    truth[:2, 1:] = True

    # Exactly 0 is background.
    assert logits_at_original_size(logits, frame)[0].tolist() == [3, 2, 0, -1]
    assert counts_under("ris-v1", logits, frame, truth) == (2, 8 + 6 - 2)


def test_lavt_counts_by_hand():
    """The 4x4 truth becomes 2x2 by the pixel below each center: rows and columns 1 and 3."""
    truth = np.zeros((4, 4), bool)
    truth[1, 3] = truth[0, 0] = truth[2, 2] = True
    # A tie of two channels is background.
    logits = torch.tensor([[0.0, 0.1], [0.1, -0.1]])

    assert counts_under("lavt", logits, frame_of(4, 4, 2, "squash"), truth) == (1, 2)


def test_cris_counts_by_hand():
    """An image of the input's own size comes back unchanged; 0.35 is logit log(7/13)."""
    frame = frame_of(2, 2, 2, "squash")
    edge = math.log(0.35 / 0.65)
    logits = torch.tensor([[edge + 1e-3, edge - 1e-3], [-5.0, 5.0]])
    truth = np.array([[True, True], [False, False]])

    assert counts_under("cris", logits, frame, truth) == (1, 3)
    assert counts_under("ris-v1", logits, frame, truth) == (0, 3)


def test_coupalign_author_counts_by_hand():
    """A row of two logits becomes one of four: its corners stay where they are."""
    frame = frame_of(2, 4, 2, "squash")
    logits = torch.tensor([[3.0, -1.0], [3.0, -1.0]])
    truth = np.array([[True, True, True, True], [False, False, False, False]])

    # 3, 5/3, 1/3, -1 with align_corners=True; 3, 2, 0, -1 without.
    assert counts_under("coupalign-author", logits, frame, truth) == (3, 7)
    assert counts_under("ris-v1", logits, frame, truth) == (2, 6)


@pytest.mark.parametrize("name, tools", [("lavt", "LAVT"), ("cris", "CRIS"), ("ris-v1", "")])
def test_conditions_name_only_what_is_reproduced(name: str, tools: str):
    conditions = describe_conditions(find_protocol(name), DataConfig(), ())

    text = " ".join(conditions.values())
    named = {"LAVT", "CRIS", "ETRIS", "DETRIS", "ReLA", "MagNet", "PolyFormer"}
    assert {tool for tool in named if tool in text} == ({tools} if tools else set())
    sign = ">" if name == "cris" else ">="
    assert conditions["empty"].endswith(f"P@X counts IoU {sign} X")


def test_conditions_of_coupalign_author_ask_for_joined_sentences():
    protocol = find_protocol("coupalign-author")

    each, joined = (
        describe_conditions(protocol, DataConfig(), (), rule=rule)["sentences"]
        for rule in ("each", "concatenated")
    )

    assert protocol.sentences == "concatenated"
    assert "not comparable" in each and "not comparable" not in joined


def test_letterbox_counts_by_hand():
    """A 2x4 image in the middle of a 4x4 square: ris-v1 and lavt ignore the bars around it."""
    frame = frame_of(2, 4, 4, "letterbox")
    logits = torch.full((4, 4), 9.0)
    logits[1:3] = torch.tensor([[1.0, -1, -1, -1], [1, 1, -1, -1]])
    truth = np.array([[True, True, False, False], [True, True, False, False]])

    assert (frame.top, frame.left, frame.inner_height, frame.inner_width) == (1, 0, 2, 4)
    assert counts_under("ris-v1", logits, frame, truth) == (3, 4)
    assert counts_under("lavt", logits, frame, truth) == (3, 4)


# ----------------------------------------------------------------------------------- slow loops


@pytest.mark.parametrize("resize", ["squash", "letterbox"])
@pytest.mark.parametrize("shape", SHAPES)
def test_bilinear_equals_loop(shape: tuple[int, int], resize: str):
    frame = frame_of(*shape, 24, resize)
    logits = noise(24, seed=sum(shape))

    slow = slow_bilinear(inside(frame, logits.numpy()).astype(np.float64), *shape)

    assert np.abs(logits_at_original_size(logits, frame).numpy() - slow).max() < 1e-5
    truth = slow > 0.3
    assert counts_under("ris-v1", logits, frame, truth) == counted(slow > 0, truth)


@pytest.mark.parametrize("resize", ["squash", "letterbox"])
@pytest.mark.parametrize("shape", SHAPES)
def test_bicubic_equals_loop(shape: tuple[int, int], resize: str):
    frame = frame_of(*shape, 24, resize)
    logits = noise(24, seed=sum(shape))

    slow = slow_warp(torch.sigmoid(logits.double()).numpy(), frame)

    assert np.abs(slow - 0.35).min() > 1e-5, "the example is decided by rounding"
    truth = slow > 0.6
    assert counts_under("cris", logits, frame, truth) == counted(slow > 0.35, truth)


@pytest.mark.parametrize("resize", ["squash", "letterbox"])
@pytest.mark.parametrize("shape", [(7, 11), (24, 24), (23, 49), (50, 31), (1, 9)])
def test_lavt_truth_equals_loop(shape: tuple[int, int], resize: str):
    """Sizes in which no center falls on the edge between two pixels."""
    frame = frame_of(*shape, 25, resize)
    truth = np.random.default_rng(1).random(shape) > 0.5
    logits = noise(25, seed=3)

    rows, columns = frame.inner_height, frame.inner_width
    small = np.zeros((rows, columns), bool)
    for y in range(rows):
        for x in range(columns):
            row = math.floor((y + 0.5) * shape[0] / rows)
            column = math.floor((x + 0.5) * shape[1] / columns)
            small[y, x] = truth[row, column]

    prediction = inside(frame, logits).numpy() > 0
    assert counts_under("lavt", logits, frame, truth) == counted(prediction, small)


# ----------------------------------------------------------------------------------- properties


@pytest.mark.parametrize("name", PROTOCOLS)
@pytest.mark.parametrize("resize", ["squash", "letterbox"])
def test_perfect_prediction_scores_high_and_its_opposite_low(name: str, resize: str):
    frame = frame_of(48, 64, 32, resize)
    truth = np.zeros((48, 64), bool)
    truth[10:30, 12:40] = True

    size = (frame.inner_width, frame.inner_height)
    resized = Image.fromarray(truth).convert("L").resize(size, Image.Resampling.BILINEAR)
    square = np.zeros((32, 32), np.uint8)
    inside(frame, square)[:] = np.asarray(resized)
    logits = torch.from_numpy(square).float() / 255 * 20 - 10

    intersection, union = counts_under(name, logits, frame, truth)
    assert intersection / union > 0.85
    intersection, union = counts_under(name, -logits, frame, truth)
    assert intersection / union < 0.1


@pytest.mark.parametrize("name", PROTOCOLS)
def test_counts_are_plain_integers_within_bounds(name: str):
    for seed, shape in enumerate(SHAPES):
        frame = frame_of(*shape, 24, "letterbox")
        truth = np.random.default_rng(seed).random(shape) > 0.5

        intersection, union = counts_under(name, noise(24, seed).bfloat16(), frame, truth)

        assert type(intersection) is type(union) is int
        assert 0 <= intersection <= union <= (24 * 24 if name == "lavt" else truth.size)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_two_empty_masks_have_empty_union(name: str):
    frame = frame_of(6, 6, 8, "squash")

    assert counts_under(name, torch.full((8, 8), -9.0), frame, np.zeros((6, 6), bool)) == (0, 0)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_logits_of_another_size_are_refused(name: str):
    frame = frame_of(8, 8, 24, "squash")

    with pytest.raises(AssertionError, match="input of 24 pixels"):
        counts_under(name, noise(12), frame, np.zeros((8, 8), bool))


# ----------------------------------------------------------------------------------- boundaries


def slow_boundary(mask: np.ndarray) -> np.ndarray:
    """Pixels of the mask with background, or the outside, within a square of d around them."""
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
def test_boundary_equals_loop(shape: tuple[int, int], d: int):
    assert max(1, round(0.02 * math.hypot(*shape))) == d

    random = np.random.default_rng(d)
    masks = [
        random.random(shape) > 0.01,
        np.ones(shape, bool),
        np.zeros(shape, bool),
        random.random(shape) > 0.5,
    ]
    for mask in masks:
        assert np.array_equal(boundary(torch.from_numpy(mask)).numpy(), slow_boundary(mask))


def test_boundary_by_hand():
    """A 5x4 object at the lower edge; below the image is background."""
    mask = torch.zeros(7, 8, dtype=torch.bool)
    mask[2:7, 2:6] = True
    other = torch.zeros(7, 8, dtype=torch.bool)
    other[2:7, 1:6] = True

    assert boundary(mask)[2:7, 2:6].int().tolist() == [
        [1, 1, 1, 1],
        [1, 0, 0, 1],
        [1, 0, 0, 1],
        [1, 0, 0, 1],
        [1, 1, 1, 1],
    ]
    assert count_pixels(mask[None], other[None]).tolist() == [[20, 25, 14 - 3, 14 + 16 - 11]]


# ----------------------------------------------------------------------------------- conditions


def test_unknown_protocol_lists_known_ones():
    with pytest.raises(InputError, match=r"'lawt'.*ris-v1, lavt, cris, coupalign-author"):
        find_protocol("lawt")


def test_conditions_describe_everything_to_compare_a_score():
    data = DataConfig(image_size=96, max_tokens=15, sentence="raw")
    sources = (
        Source(index="x", dataset="refcoco", split_by="unc", split="testA"),
        Source(index="x", split="testA"),
    )

    conditions = describe_conditions(find_protocol("ris-v1"), data, sources, limit=50)

    assert conditions["sets"] == "all data sets/all testA, refcoco/unc testA"
    assert conditions["input"] == "squashed to 96x96"
    assert "original" in conditions["truth"]
    assert "0.5" in conditions["threshold"]
    for text in ("every sentence", "raw", "15"):
        assert text in conditions["sentences"]
    assert conditions["limit"].startswith("50 samples")
    assert "limit" not in describe_conditions(find_protocol("ris-v1"), data, sources)


@pytest.mark.parametrize(
    "rule, text", [("first", "the first sentence"), ("concatenated", "joined")]
)
def test_conditions_name_sentence_rule(rule: str, text: str):
    conditions = describe_conditions(find_protocol("ris-v1"), DataConfig(), (), rule=rule)

    assert text in conditions["sentences"]


@pytest.mark.parametrize(
    "name, resize, comparable",
    [
        ("cris", "squash", False),
        ("cris", "letterbox", True),
        ("lavt", "squash", True),
        ("lavt", "letterbox", False),
        ("ris-v1", "letterbox", True),
        ("coupalign-author", "squash", True),
        ("coupalign-author", "letterbox", False),
    ],
)
def test_conditions_warn_of_input_unlike_the_authors(name: str, resize: str, comparable: bool):
    conditions = describe_conditions(find_protocol(name), DataConfig(resize=resize), ())

    assert ("not comparable" in conditions["input"]) is not comparable
