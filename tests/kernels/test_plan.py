"""How shapes are cut: every pixel and every channel exactly once, for any shape."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coupalign.kernels.plan import (
    LARGE_SHARED_MEMORY,
    MAX_SPLITS,
    PROGRAMS,
    SMALL_SHARED_MEMORY,
    heads_refusal,
    plan_kernels,
    refusal,
)

SHAPES = st.fixed_dictionaries(
    {
        "direction": st.sampled_from(("forward", "backward")),
        "batch": st.integers(1, 65),
        "pixels": st.integers(1, 40_000),
        "words": st.integers(1, 64),
        "channels": st.integers(1, 2048),
        "dtype": st.sampled_from((torch.float32, torch.float16, torch.bfloat16)),
    }
)
SHARED_MEMORY = st.sampled_from((SMALL_SHARED_MEMORY, LARGE_SHARED_MEMORY))


@given(SHAPES, SHARED_MEMORY)
def test_plan_covers_every_pixel_and_channel_once(shape: dict, shared_memory: int) -> None:
    batch, pixels, channels = shape["batch"], shape["pixels"], shape["channels"]
    assert refusal((batch, pixels, channels), shape["words"], 1, shape["dtype"]) is None

    plan = plan_kernels(**shape, shared_memory=shared_memory)

    # No split is empty, and none is missing.
    split_size = plan.tiling.pixels * plan.tiles
    assert (plan.splits - 1) * split_size < pixels <= plan.splits * split_size

    # The same for the groups of channel blocks.
    blocks = -(-channels // plan.tiling.channels)
    assert (plan.groups - 1) * plan.blocks < blocks <= plan.groups * plan.blocks
    assert plan.wide or (blocks == 1 and plan.groups == 1)

    # The columns are a power of two that holds the words.
    assert plan.columns >= 16 and plan.columns >= shape["words"]
    assert plan.columns & (plan.columns - 1) == 0

    # The programs are few.
    assert plan.splits <= MAX_SPLITS
    assert batch * plan.splits * plan.groups <= max(PROGRAMS, batch)


@given(SHAPES)
def test_small_shared_memory_changes_only_backward_up_to_256_channels(shape: dict) -> None:
    """Only the backward of 129 to 256 channels needs more than 99 KiB."""
    small = plan_kernels(**shape, shared_memory=SMALL_SHARED_MEMORY)
    large = plan_kernels(**shape, shared_memory=LARGE_SHARED_MEMORY)

    assert small == large or (shape["direction"] == "backward" and 128 < shape["channels"] <= 256)


@pytest.mark.parametrize(
    "shape, words, heads, dtype, reason",
    [
        ((1, 8, 2049), 8, 1, torch.float16, "2048 channels, not 2049"),
        ((1, 8, 64), 65, 1, torch.float16, "64 words, not 65"),
        ((1, 8, 64), 8, 5, torch.float16, "one head, not 5"),
        ((1, 8, 64), 64, 4, torch.float32, "one head, not 4"),
        ((70_000, 1, 16), 1, 1, torch.float16, "65535 images per batch, not 70000"),
        ((1, 8, 64), 8, 1, torch.float64, "not in float64"),
        ((0, 8, 64), 8, 1, torch.float16, "nothing to compute"),
    ],
)
def test_refusal_names_the_limit(shape, words, heads, dtype, reason) -> None:
    assert reason in refusal(shape, words, heads, dtype)


def test_largest_shape_is_not_refused() -> None:
    assert refusal((1, 8, 2048), 64, 1, torch.float16) is None
    assert heads_refusal(1) is None
