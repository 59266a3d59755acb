"""How a shape is cut into tiles and programs: a pure function, so that the same shape gives the same bits on every run.

Shape legend: B batch, P pixels, H heads, T words, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Direction = Literal["forward", "backward"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MOST_CHANNELS, MOST_WORDS, MOST_HEADS = 2048, 64, 4
MOST_IMAGES = 65_535  # the third axis of a CUDA grid
PROGRAMS = 264  # two for each of the 132 multiprocessors of an H100 or H200, whatever GPU it is
MOST_SPLITS = 32  # the kernel that adds the splits up reads them one after the other
LITTLE_SHARED_MEMORY = (
    99 * 1024
)  # bytes that a program can have on GeForce and L4/L40 GPUs (8.6, 8.9, 12.0)


@dataclass(frozen=True)
class Tiling:
    pixels: int  # of a tile
    channels: int  # of a block
    warps: int
    stages: int  # of the software pipeline


# All tilings keep their sums and tiles in registers on sm_90 without spilling; `coupalign bench registers` shows it.
# Narrow: float16 and bfloat16, up to 32 columns, all channels in one block; by that block's width.
NARROW: dict[Direction, dict[int, Tiling]] = {
    "forward": {64: Tiling(64, 64, 4, 3), 128: Tiling(64, 128, 4, 2), 256: Tiling(32, 256, 8, 3)},
    "backward": {64: Tiling(64, 64, 4, 2), 128: Tiling(32, 128, 4, 2), 256: Tiling(32, 256, 8, 2)},
}
NARROW_COLUMNS = 32
NARROW_CHANNELS = {
    "forward": (256, 256),
    "backward": (128, 256),
}  # with little and with enough shared memory
# Wide: everything else, by the number of columns.
WIDE: dict[Direction, dict[int, Tiling]] = {
    "forward": {
        32: Tiling(64, 64, 4, 3),
        64: Tiling(64, 64, 8, 2),
        128: Tiling(32, 64, 8, 2),
        256: Tiling(32, 32, 8, 2),
    },
    "backward": {
        32: Tiling(64, 64, 4, 2),
        64: Tiling(64, 32, 8, 2),
        128: Tiling(32, 32, 8, 2),
        256: Tiling(16, 32, 8, 1),
    },
}
WIDE_FLOAT32: dict[
    Direction, dict[int, Tiling]
] = {  # its products use no tensor cores, and many registers
    "forward": {32: Tiling(32, 32, 8, 1), 64: Tiling(32, 32, 8, 1), 128: Tiling(16, 16, 8, 1)},
    "backward": {32: Tiling(32, 32, 8, 1), 64: Tiling(32, 16, 8, 1), 128: Tiling(16, 16, 8, 1)},
}


@dataclass(frozen=True)
class KernelPlan:
    """A launch. Its grid is groups x splits x B: a split is a run of `tiles` tiles, a group `blocks` channel blocks."""

    tiling: Tiling
    wide: bool
    columns: int  # the words of all heads, each head padded to `head_columns`
    head_columns: int
    tiles: int
    splits: int
    blocks: int
    groups: int

    @property
    def constants(self) -> dict[str, int]:
        """Arguments that the kernels are compiled for, but for C and HEADS."""
        return {
            "P_": self.tiling.pixels,
            "C_": self.tiling.channels,
            "W": self.columns,
            "W_HEAD": self.head_columns,
        }

    @property
    def helper_constants(self) -> dict[str, int]:
        """The same for the kernels before and after, which hold two blocks of channels x columns."""
        return {"C_": max(16, 1024 // self.columns), "W": self.columns, "W_HEAD": self.head_columns}


def plan_kernels(
    direction: Direction,
    batch: int,
    pixels: int,
    words: int,
    channels: int,
    heads: int,
    dtype: torch.dtype,
    shared_memory: int = 227 * 1024,
) -> KernelPlan:
    """Cut [batch, pixels, channels] with `heads` x `words` columns; `shared_memory` is what one program can have, in bytes."""
    columns, head_columns = _columns(words, heads)
    block = max(64, _power_of_two(channels))
    limit = NARROW_CHANNELS[direction][shared_memory > LITTLE_SHARED_MEMORY]
    narrow = dtype != torch.float32 and columns <= NARROW_COLUMNS and block <= limit
    if narrow:
        tiling = NARROW[direction][block]
    else:
        tiling = (WIDE_FLOAT32 if dtype == torch.float32 else WIDE)[direction][max(columns, 32)]
    tiles_of_image = -(-pixels // tiling.pixels)
    tiles = -(-tiles_of_image // max(1, min(MOST_SPLITS, PROGRAMS // batch, tiles_of_image)))
    splits = -(-tiles_of_image // tiles)
    all_blocks = -(-channels // tiling.channels)
    blocks = -(-all_blocks // max(1, min(all_blocks, PROGRAMS // (batch * splits))))
    return KernelPlan(
        tiling, not narrow, columns, head_columns, tiles, splits, blocks, -(-all_blocks // blocks)
    )


def refusal(pixels: tuple[int, ...], words: int, heads: int, dtype: torch.dtype) -> str | None:
    """Why [B, P, C] pixels with so many words and heads cannot run fused; none if they can."""
    batch, count, channels = pixels
    if dtype not in DTYPES:
        return f"it computes in float32, float16 and bfloat16, not in {str(dtype).removeprefix('torch.')}"
    for name, value, most in (
        ("channels", channels, MOST_CHANNELS),
        ("words", words, MOST_WORDS),
        ("heads", heads, MOST_HEADS),
        ("images in a batch", batch, MOST_IMAGES),
    ):
        if value > most:
            return f"{value} {name} are more than its {most}"
    if dtype == torch.float32 and heads > 2 and words > 32:  # 256 columns
        return f"{heads} heads of {words} words leave no registers for float32"
    return None if batch and count and words else "there is nothing to compute"


def _columns(words: int, heads: int) -> tuple[int, int]:
    """Columns of a tile, of all heads and of one: powers of two, 16 at least, since a matrix product takes no fewer."""
    head_columns = max(_power_of_two(words), 16 // _power_of_two(heads))
    return head_columns * _power_of_two(heads), head_columns


def _power_of_two(number: int) -> int:
    """The smallest power of two that is not less."""
    return 1 << (number - 1).bit_length()
