"""Cut the pixels and channels of a shape into tiles and programs.

The cut is a pure function of the shape, so the same shape gives the same bits on every run.

Shape legend: B batch, P pixels, T words, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Direction = Literal["forward", "backward"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_CHANNELS = 2048
MAX_WORDS = 64
MAX_IMAGES = 65_535  # the third axis of a CUDA grid

# Two programs for each of the 132 multiprocessors of an H100 or H200, on every GPU.
PROGRAMS = 264
# The combine kernels read the splits one after the other.
MAX_SPLITS = 32

# Shared memory per program, in bytes: of the data-center GPUs the kernels are tuned for, and of
# GeForce and L4/L40 (compute capability 8.6, 8.9, 12.0).
LARGE_SHARED_MEMORY = 227 * 1024
SMALL_SHARED_MEMORY = 99 * 1024


@dataclass(frozen=True)
class Tiling:
    pixels: int  # per tile
    channels: int  # per block
    warps: int
    stages: int  # of the software pipeline


# With these tilings every sum and tile stays in registers on sm_90, without spilling.
# `coupalign bench registers` checks it.

# Narrow kernels hold all channels in one block. They take float16 and bfloat16 and up to
# NARROW_COLUMNS columns. Keys: channels per block.
NARROW: dict[Direction, dict[int, Tiling]] = {
    "forward": {64: Tiling(64, 64, 4, 3), 128: Tiling(64, 128, 4, 2), 256: Tiling(32, 256, 8, 3)},
    "backward": {64: Tiling(64, 64, 4, 2), 128: Tiling(32, 128, 4, 2), 256: Tiling(32, 256, 8, 2)},
}
NARROW_COLUMNS = 32
NARROW_CHANNELS: dict[Direction, int] = {"forward": 256, "backward": 256}
NARROW_CHANNELS_SMALL_MEMORY: dict[Direction, int] = {"forward": 256, "backward": 128}

# Wide kernels take everything else, channel block by channel block. Keys: columns, at least 32.
WIDE: dict[Direction, dict[int, Tiling]] = {
    "forward": {32: Tiling(64, 64, 4, 3), 64: Tiling(64, 64, 8, 2)},
    "backward": {32: Tiling(64, 64, 4, 2), 64: Tiling(64, 32, 8, 2)},
}
# Products in float32 use no tensor cores, but many registers.
WIDE_FLOAT32: dict[Direction, dict[int, Tiling]] = {
    "forward": {32: Tiling(32, 32, 8, 1), 64: Tiling(32, 32, 8, 1)},
    "backward": {32: Tiling(32, 32, 8, 1), 64: Tiling(32, 16, 8, 1)},
}


@dataclass(frozen=True, kw_only=True)
class KernelPlan:
    """How one kernel is launched: the grid is groups x splits x B.

    Attributes:
        tiling: size of a tile, and how a program computes it.
        wide: whether the channels are processed block by block.
        columns: the words, padded to a power of two; at least 16, the least a matrix product takes.
        tiles: tiles per split. A split is a run of tiles of one image.
        splits: splits per image.
        blocks: channel blocks per group.
        groups: programs that share a split, each with its own channel blocks.
    """

    tiling: Tiling
    wide: bool
    columns: int
    tiles: int
    splits: int
    blocks: int
    groups: int

    @property
    def constants(self) -> dict[str, int]:
        """Compile-time arguments of the forward and backward kernels, without C."""
        return {"P_": self.tiling.pixels, "C_": self.tiling.channels, "W": self.columns}

    @property
    def helper_constants(self) -> dict[str, int]:
        """Compile-time arguments of the prepare and combine kernels, without C.

        Those kernels hold two blocks of channels x columns.
        """
        return {"C_": max(16, 1024 // self.columns), "W": self.columns}


def plan_kernels(
    direction: Direction,
    batch: int,
    pixels: int,
    words: int,
    channels: int,
    dtype: torch.dtype,
    shared_memory: int = LARGE_SHARED_MEMORY,
) -> KernelPlan:
    """Cut pixels [B, P, C] that attend to T words.

    Args:
        direction: "forward" or "backward".
        batch, pixels, words, channels: B, P, T, C.
        dtype: of the pixels.
        shared_memory: bytes available to one program.
    """
    columns = max(16, _next_power_of_two(words))
    block = max(64, _next_power_of_two(channels))

    # Choose the kernel and its tiling.
    enough_memory = shared_memory > SMALL_SHARED_MEMORY
    narrow_channels = NARROW_CHANNELS if enough_memory else NARROW_CHANNELS_SMALL_MEMORY
    half = dtype != torch.float32
    narrow = half and columns <= NARROW_COLUMNS and block <= narrow_channels[direction]
    if narrow:
        tiling = NARROW[direction][block]
    else:
        tilings = WIDE if half else WIDE_FLOAT32
        tiling = tilings[direction][max(columns, 32)]

    # Split the tiles of each image over programs.
    tiles_per_image = _ceil_div(pixels, tiling.pixels)
    wanted_splits = max(1, min(MAX_SPLITS, PROGRAMS // batch, tiles_per_image))
    tiles = _ceil_div(tiles_per_image, wanted_splits)
    splits = _ceil_div(tiles_per_image, tiles)

    # If programs are left over, share the channel blocks of each split among several.
    all_blocks = _ceil_div(channels, tiling.channels)
    wanted_groups = max(1, min(all_blocks, PROGRAMS // (batch * splits)))
    blocks = _ceil_div(all_blocks, wanted_groups)

    return KernelPlan(
        tiling=tiling,
        wide=not narrow,
        columns=columns,
        tiles=tiles,
        splits=splits,
        blocks=blocks,
        groups=_ceil_div(all_blocks, blocks),
    )


def refusal(pixels: tuple[int, ...], words: int, heads: int, dtype: torch.dtype) -> str | None:
    """Say why the kernels cannot run pixels [B, P, C] with these words, or return None."""
    batch, pixel_count, channels = pixels
    limits = (
        ("channels", channels, MAX_CHANNELS),
        ("words", words, MAX_WORDS),
        ("images per batch", batch, MAX_IMAGES),
    )

    if reason := heads_refusal(heads):
        return reason
    if dtype not in DTYPES:
        name = str(dtype).removeprefix("torch.")
        return f"the fused kernels compute in float32, float16 and bfloat16, not in {name}"
    for name, value, limit in limits:
        if value > limit:
            return f"the fused kernels take at most {limit} {name}, not {value}"
    if not (batch and pixel_count and words):
        return "there is nothing to compute"
    return None


def heads_refusal(heads: int) -> str | None:
    """Say why the kernels cannot run this number of heads, or return None."""
    return f"the fused kernels compute one head, not {heads}" if heads > 1 else None


def _ceil_div(number: int, divisor: int) -> int:
    return -(-number // divisor)


def _next_power_of_two(number: int) -> int:
    """Return the smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()
