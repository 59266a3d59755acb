"""How shapes are cut: every pixel and every channel exactly once, for any shape."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from coupalign.kernels.plan import (
    LITTLE_SHARED_MEMORY,
    MOST_SPLITS,
    PROGRAMS,
    plan_kernels,
    refusal,
)

SHAPES = {
    "batch": st.integers(1, 65),
    "pixels": st.integers(1, 40_000),
    "words": st.integers(1, 64),
    "channels": st.integers(1, 2048),
    "heads": st.integers(1, 4),
    "dtype": st.sampled_from((torch.float32, torch.float16, torch.bfloat16)),
    "direction": st.sampled_from(("forward", "backward")),
    "shared_memory": st.sampled_from((LITTLE_SHARED_MEMORY, 227 * 1024)),
}


@given(**SHAPES)
def test_everything_is_covered_once(
    batch: int,
    pixels: int,
    words: int,
    channels: int,
    heads: int,
    dtype: torch.dtype,
    direction: str,
    shared_memory: int,
) -> None:
    if refusal((batch, pixels, channels), words, heads, dtype):
        return
    cut = plan_kernels(direction, batch, pixels, words, channels, heads, dtype, shared_memory)
    size = cut.tiling.pixels * cut.tiles
    assert (cut.splits - 1) * size < pixels <= cut.splits * size, (
        "no split is empty, none is missing"
    )
    blocks = -(-channels // cut.tiling.channels)
    assert (cut.groups - 1) * cut.blocks < blocks <= cut.groups * cut.blocks
    assert cut.wide or (blocks == 1 and cut.groups == 1)
    assert (
        cut.columns >= 16 and cut.head_columns >= words and cut.columns >= heads * cut.head_columns
    )
    assert cut.columns & (cut.columns - 1) == 0 == cut.head_columns & (cut.head_columns - 1)
    assert cut.splits <= MOST_SPLITS and batch * cut.splits * cut.groups <= max(PROGRAMS, batch)


@given(**SHAPES)
def test_little_shared_memory_changes_only_what_does_not_fit(
    batch: int,
    pixels: int,
    words: int,
    channels: int,
    heads: int,
    dtype: torch.dtype,
    direction: str,
    shared_memory: int,
) -> None:
    """Only the backward of up to 256 channels holds more than 99 KiB."""
    if refusal((batch, pixels, channels), words, heads, dtype):
        return
    cuts = [
        plan_kernels(direction, batch, pixels, words, channels, heads, dtype, size)
        for size in (LITTLE_SHARED_MEMORY, 227 * 1024)
    ]
    assert cuts[0] == cuts[1] or (direction == "backward" and 128 < channels <= 256)


def test_what_is_refused_is_named() -> None:
    half = torch.float16
    assert refusal((1, 8, 2048), 64, 4, half) is None
    for shape, words, heads, dtype, part in (
        ((1, 8, 2049), 8, 1, half, "2049 channels"),
        ((1, 8, 64), 65, 1, half, "65 words"),
        ((1, 8, 64), 8, 5, half, "5 heads"),
        ((70_000, 1, 16), 1, 1, half, "70000 images"),
        ((1, 8, 64), 8, 1, torch.float64, "float64"),
        ((1, 8, 64), 64, 4, torch.float32, "float32"),
        ((0, 8, 64), 8, 1, half, "nothing"),
    ):
        assert part in refusal(shape, words, heads, dtype)
