"""Word-pixel attention in both directions as Triton kernels.

Forward and backward each pass over the pixels once; README.md in this folder derives the formulas.
No tensor of size pixels x words reaches memory. There are no atomics: each program writes its own
partial sums, and a combine kernel adds them in a fixed order, so two runs agree bit for bit.

Shape legend: B batch, P pixels, T words, C channels. In a kernel, P_ is the pixels per tile, C_ the
channels per block, and W the columns: T padded to a power of two. Arguments in capitals are tensors
in memory (or compile-time sizes). Lower-case v, k, u and their products are in registers:

    v pixels [P_, C_]      k keys [W, C_]      u values [W, C_]      do, dv, ... gradients
    s scores [P_, W]       p softmax over words [P_, W]       q softmax over pixels [P_, W]
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from coupalign.kernels.plan import LARGE_SHARED_MEMORY, Direction, KernelPlan, plan_kernels

LOG2E = tl.constexpr(1.4426950408889634)

# The weights over pixels are scaled by up to 2^14: a weight of 1 then stays below float16's 65504.
MAX_WEIGHT_EXPONENT = 14

# Sizes that vary from call to call. Recompiling for multiples of 16 would gain nothing.
UNSPECIALIZED = ["pixel_count", "word_count", "tiles", "blocks", "splits"]


# ------------------------------------------------------------------------------------------- blocks


@triton.jit
def _block(row, row_mask, column, LENGTH, WHOLE: tl.constexpr):
    """Return offsets and mask of a block, rows x columns, of a matrix with rows of LENGTH.

    WHOLE: all columns are inside the matrix, so that only the rows need a mask.
    """
    offsets = row[:, None] * LENGTH + column[None, :]
    mask = row_mask[:, None]
    if not WHOLE:
        mask = mask & (column < LENGTH)[None, :]
    return offsets, mask


@triton.jit
def _dot(a, b):
    """Multiply matrices; float32 is not rounded to TF32."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _add_dot(sums, a, b):
    """Return sums + a b, as `_dot` computes it."""
    return tl.dot(a, b, sums, input_precision="ieee")


# ----------------------------------------------------------------------------------------- formulas


@triton.jit
def _softmax_over_words(s):
    """Turn base-2 scores [P_, W] into weights. Every word is in the tile, so one tile is enough."""
    largest = tl.max(s, 1)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    p = tl.exp2(s - largest[:, None])
    total = tl.sum(p, 1)
    return p / tl.where(total == 0.0, 1.0, total)[:, None]


@triton.jit
def _update_softmax_over_pixels(s, in_image, largest, total):
    """Add a tile of base-2 scores [P_, W] to the softmax over pixels, which runs across tiles.

    Returns the tile's weights relative to the largest score so far, that score, the factor by which
    earlier sums shrink, and the new total weight.
    """
    s = tl.where(in_image[:, None], s, float("-inf"))
    new_largest = tl.maximum(largest, tl.max(s, 0))
    pivot = tl.where(new_largest == float("-inf"), 0.0, new_largest)
    q = tl.exp2(s - pivot[None, :])
    shrink = tl.exp2(largest - pivot)
    return q, new_largest, shrink, total * shrink + tl.sum(q, 0)


@triton.jit
def _weights_and_score_gradient(
    s,
    dp,
    dq,
    in_image,
    log_sum,
    delta,
    grad_scale,
    weight_exponent,
):
    """Compute both weights and the gradient of the scores from base-2 scores [P_, W].

    dp and dq are the gradients of the weights over words and over pixels. Each softmax with weights
    w passes on w (dw - sum w dw); over pixels that sum is `delta`. Returns p, 2^weight_exponent q
    and ds.
    """
    p = _softmax_over_words(s)
    ds = p * (dp - tl.sum(p * dp, 1)[:, None])

    q = tl.exp2(s - log_sum[None, :] + weight_exponent)
    q = tl.where(in_image[:, None], q, 0.0)
    ds += (q * grad_scale) * (dq - delta[None, :])
    return p, q, tl.where(in_image[:, None], ds, 0.0)


@triton.jit
def _floor_power_of_two(x):
    """Round x >= 0 down to a power of two between 2^-100 and 2^100: keep its exponent bits only."""
    x = tl.minimum(tl.maximum(x, 2.0**-100), 2.0**100)
    return (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def _first_unit(dtype: tl.constexpr):
    """Return the unit of the score gradients before the first tile; see `_next_unit`."""
    if dtype == tl.float16:
        return tl.full([], 2.0**-100, tl.float32)
    else:
        return tl.full([], 1.0, tl.float32)


@triton.jit
def _next_unit(unit, ds, dtype: tl.constexpr):
    """Return the unit in which score gradients are rounded to `dtype`.

    The unit is a power of two that grows with the largest gradient so far. float16 would overflow
    above 65504 and lose values below 6e-8. The other types have the range of float32, and unit 1.
    """
    if dtype == tl.float16:
        return tl.maximum(unit, _floor_power_of_two(tl.max(tl.abs(ds))))
    else:
        return tl.full([], 1.0, tl.float32)


# ------------------------------------------------------------------------------------------ forward


@triton.jit(do_not_specialize=UNSPECIALIZED)
def forward_kernel(
    PIXELS,  # [B, P, C]
    KEYS,  # [B, T, C]
    VALUES,  # [B, T, C]
    BIAS,  # [B, T]
    FROM_WORDS,  # out, [B, P, C]
    SUMS,  # out, [B, splits, C, W]
    LARGEST,  # out, [B, splits, W]
    TOTAL,  # out, [B, splits, W]
    pixel_count,
    word_count,
    tiles,
    splits,
    C: tl.constexpr,
    P_: tl.constexpr,
    C_: tl.constexpr,
    W: tl.constexpr,
):
    """Process a run of pixel tiles of one image, all channels at once (C <= C_).

    The sums over pixels stay in registers.
    """
    WHOLE: tl.constexpr = C == C_
    dtype: tl.constexpr = PIXELS.dtype.element_ty
    split, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    part = image * splits + split
    channel, pixel, column = tl.arange(0, C_), tl.arange(0, P_), tl.arange(0, W)

    # The word side is loaded once.
    is_word = column < word_count
    at_words, word_mask = _block(column, is_word, channel, C, WHOLE)
    at_words += image * word_count * C
    # [W, C_]
    k = tl.load(KEYS + at_words, mask=word_mask, other=0.0).to(dtype)
    u = tl.load(VALUES + at_words, mask=word_mask, other=0.0).to(dtype)
    # [W]
    bias = tl.load(BIAS + image * word_count + column, mask=is_word, other=float("-inf")) * LOG2E

    # [W], and the sums transposed: channels are the long side of the matrix product.
    largest = tl.full([W], float("-inf"), tl.float32)
    total = tl.zeros([W], tl.float32)
    sums = tl.zeros([C_, W], tl.float32)

    for i in range(0, tiles):
        first = (split * tiles + i) * P_
        tile = (image * pixel_count + first) * C  # 64 bits; offsets within a tile fit into 32
        in_image = pixel < pixel_count - first
        at_tile, mask = _block(pixel, in_image, channel, C, WHOLE)
        # [P_, C_]
        v = tl.load(PIXELS + tile + at_tile, mask=mask, other=0.0)

        # Every pixel reads the words.
        s = _dot(v, tl.trans(k)) * LOG2E + bias[None, :]
        p = _softmax_over_words(s)
        o = _dot(p.to(dtype), u)
        tl.store(FROM_WORDS + tile + at_tile, o.to(dtype), mask=mask)

        # Every word reads the pixels of this tile.
        q, largest, shrink, total = _update_softmax_over_pixels(s, in_image, largest, total)
        sums = _add_dot(sums * shrink[None, :], tl.trans(v), q.to(dtype))

    at_sums, mask = _block(channel, channel < C, column, W, WHOLE=True)
    tl.store(SUMS + part * C * W + at_sums, sums, mask=mask)
    tl.store(LARGEST + part * W + column, largest)
    tl.store(TOTAL + part * W + column, total)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def forward_wide_kernel(
    PIXELS,  # [B, P, C]
    KEYS,  # [B, T, C]
    VALUES,  # [B, T, C]
    BIAS,  # [B, T]
    FROM_WORDS,  # out, [B, P, C]
    SUMS,  # out, [B, splits, C, W]
    LARGEST,  # out, [B, splits, W]
    TOTAL,  # out, [B, splits, W]
    pixel_count,
    word_count,
    tiles,
    splits,
    blocks,
    C,
    P_: tl.constexpr,
    C_: tl.constexpr,
    W: tl.constexpr,
):
    """Process a run of pixel tiles of one image, block by block of channels.

    The scores need all channels, the outputs come after them. So a program reads each tile twice,
    the second time from the cache. The sums over pixels are too large for registers: they are added
    up in memory that no other program touches. An image with few tiles makes few programs, so a
    group of programs may share a run: each computes the scores, and the outputs of `blocks` blocks.
    """
    dtype: tl.constexpr = PIXELS.dtype.element_ty
    group, split, image = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    part = image * splits + split
    pixel, column = tl.arange(0, P_), tl.arange(0, W)
    first_channel = group * blocks * C_
    end_channel = tl.minimum((group + 1) * blocks * C_, C)

    is_word = column < word_count
    words = image * word_count * C
    # [W]
    bias = tl.load(BIAS + image * word_count + column, mask=is_word, other=float("-inf")) * LOG2E
    largest = tl.full([W], float("-inf"), tl.float32)
    total = tl.zeros([W], tl.float32)

    for i in range(0, tiles):
        first = (split * tiles + i) * P_
        tile = (image * pixel_count + first) * C
        in_image = pixel < pixel_count - first

        # The scores, over all channels.
        s = tl.zeros([P_, W], tl.float32)
        for block in range(0, C, C_):
            channel = block + tl.arange(0, C_)
            at_tile, mask = _block(pixel, in_image, channel, C, WHOLE=False)
            at_tile += tile
            at_words, word_mask = _block(column, is_word, channel, C, WHOLE=False)
            at_words += words
            # [P_, C_] and [W, C_]
            v = tl.load(PIXELS + at_tile, mask=mask, other=0.0)
            k = tl.load(KEYS + at_words, mask=word_mask, other=0.0)
            s = _add_dot(s, v, tl.trans(k))
        s = s * LOG2E + bias[None, :]

        p = _softmax_over_words(s).to(dtype)
        q, largest, shrink, total = _update_softmax_over_pixels(s, in_image, largest, total)
        q = q.to(dtype)

        # The outputs, over the channels of this program.
        for block in range(first_channel, end_channel, C_):
            channel = block + tl.arange(0, C_)
            at_tile, mask = _block(pixel, in_image, channel, C, WHOLE=False)
            at_tile += tile
            at_words, word_mask = _block(column, is_word, channel, C, WHOLE=False)
            at_words += words
            # [P_, C_] and [W, C_]
            v = tl.load(PIXELS + at_tile, mask=mask, other=0.0)
            u = tl.load(VALUES + at_words, mask=word_mask, other=0.0)

            # Every word reads the pixels of this tile: [C_, W], zero before the first tile.
            at_sums, sum_mask = _block(channel, channel < C, column, W, WHOLE=True)
            at_sums += part * C * W
            sums = tl.load(SUMS + at_sums, mask=sum_mask & (i > 0), other=0.0)
            sums = _add_dot(sums * shrink[None, :], tl.trans(v), q)
            tl.store(SUMS + at_sums, sums, mask=sum_mask)

            # Every pixel reads the words.
            o = _dot(p, u)
            tl.store(FROM_WORDS + at_tile, o.to(dtype), mask=mask)

        tl.debug_barrier()  # the next tile reads sums that other threads of this program wrote

    if group == 0:
        tl.store(LARGEST + part * W + column, largest)
        tl.store(TOTAL + part * W + column, total)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def forward_combine_kernel(
    SUMS,  # [B, splits, C, W]
    LARGEST,  # [B, splits, W]
    TOTAL,  # [B, splits, W]
    FROM_PIXELS,  # out, [B, T, C]
    LOG_SUM,  # out, [B, T]
    word_count,
    splits,
    C,
    C_: tl.constexpr,
    W: tl.constexpr,
):
    """Add the partial sums of one channel block of one image, in the order of the splits."""
    block, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    channel, column = block * C_ + tl.arange(0, C_), tl.arange(0, W)
    at_sums, mask = _block(channel, channel < C, column, W, WHOLE=True)

    # The largest score of all splits, [W].
    largest = tl.full([W], float("-inf"), tl.float32)
    for i in range(0, splits):
        part = image * splits + i
        largest = tl.maximum(largest, tl.load(LARGEST + part * W + column))
    pivot = tl.where(largest == float("-inf"), 0.0, largest)

    # Totals [W] and sums [C_, W] of all splits, relative to that score.
    total = tl.zeros([W], tl.float32)
    sums = tl.zeros([C_, W], tl.float32)
    for i in range(0, splits):
        part = image * splits + i
        share = tl.exp2(tl.load(LARGEST + part * W + column) - pivot)
        total += share * tl.load(TOTAL + part * W + column)
        split_sums = tl.load(SUMS + part * C * W + at_sums, mask=mask, other=0.0)
        sums += share[None, :] * split_sums

    empty = total == 0.0
    total = tl.where(empty, 1.0, total)

    # [C_, W] into [T, C]
    is_word = column < word_count
    at_words = image * word_count * C + column[None, :] * C + channel[:, None]
    mask = is_word[None, :] & (channel < C)[:, None]
    tl.store(FROM_PIXELS + at_words, sums / total[None, :], mask=mask)

    # A word that no pixel reads gets +inf: its weights exp2(s - inf) are 0 in backward too.
    if block == 0:
        log_sum = tl.where(empty, float("inf"), pivot + tl.log2(total))
        tl.store(LOG_SUM + image * word_count + column, log_sum, mask=is_word)


# ----------------------------------------------------------------------------------------- backward


@triton.jit(do_not_specialize=UNSPECIALIZED)
def backward_prepare_kernel(
    KEYS,  # [B, T, C]
    VALUES,  # [B, T, C]
    FROM_PIXELS,  # [B, T, C]
    GRAD_FROM_PIXELS,  # [B, T, C]
    ROUNDED_KEYS,  # out, [B, T, C]
    ROUNDED_VALUES,  # out, [B, T, C]
    ROUNDED_GRAD,  # out, [B, T, C]
    DELTA,  # out, [B, W]
    GRAD_SCALE,  # out, [B]
    word_count,
    weight_exponent,
    C,
    C_: tl.constexpr,
    W: tl.constexpr,
):
    """Prepare the word side of one image for backward.

    Keys, values and the gradient of `words_from_pixels` are rounded to the type of the matrix
    products. DELTA is the mean of that gradient under the softmax over pixels.

    The gradient is divided by a power of two that brings it near 1, so that float16 holds it for
    any loss scale. GRAD_SCALE undoes that, and the factor 2^weight_exponent of the weights.
    """
    dtype: tl.constexpr = ROUNDED_KEYS.dtype.element_ty
    image = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, W)
    is_word = column < word_count

    # Round keys and values; measure the gradient.
    delta = tl.zeros([W], tl.float32)
    largest = tl.zeros([W], tl.float32)
    for first in range(0, C, C_):
        channel = first + tl.arange(0, C_)
        at_words, mask = _block(column, is_word, channel, C, WHOLE=False)
        at_words += image * word_count * C
        # [W, C_]
        g = tl.load(GRAD_FROM_PIXELS + at_words, mask=mask, other=0.0)
        m = tl.load(FROM_PIXELS + at_words, mask=mask, other=0.0)
        delta += tl.sum(g * m, 1)
        largest = tl.maximum(largest, tl.max(tl.abs(g), 1))

        k = tl.load(KEYS + at_words, mask=mask, other=0.0)
        tl.store(ROUNDED_KEYS + at_words, k.to(dtype), mask=mask)
        u = tl.load(VALUES + at_words, mask=mask, other=0.0)
        tl.store(ROUNDED_VALUES + at_words, u.to(dtype), mask=mask)

    # Scale and round the gradient.
    near_one = 1.0 / _floor_power_of_two(tl.max(largest, 0))
    for first in range(0, C, C_):
        channel = first + tl.arange(0, C_)
        at_words, mask = _block(column, is_word, channel, C, WHOLE=False)
        at_words += image * word_count * C
        # [W, C_]
        g = tl.load(GRAD_FROM_PIXELS + at_words, mask=mask, other=0.0)
        tl.store(ROUNDED_GRAD + at_words, (g * near_one).to(dtype), mask=mask)

    tl.store(DELTA + image * W + column, delta * near_one)
    tl.store(GRAD_SCALE + image, tl.exp2(-weight_exponent) / near_one)


@triton.jit(do_not_specialize=[*UNSPECIALIZED, "weight_exponent"])
def backward_kernel(
    PIXELS,  # [B, P, C]
    GRAD_FROM_WORDS,  # [B, P, C]
    KEYS,  # [B, T, C], rounded
    VALUES,  # [B, T, C], rounded
    BIAS,  # [B, T]
    LOG_SUM,  # [B, T]
    GRAD_FROM_PIXELS,  # [B, T, C], rounded
    DELTA,  # [B, W]
    GRAD_SCALE,  # [B]
    GRAD_PIXELS,  # out, [B, P, C]
    KEY_SUMS,  # out, [B, splits, C, W]
    VALUE_SUMS,  # out, [B, splits, C, W]
    BIAS_SUMS,  # out, [B, splits, W]
    UNIT,  # out, [B, splits]
    pixel_count,
    word_count,
    tiles,
    splits,
    weight_exponent,
    C: tl.constexpr,
    P_: tl.constexpr,
    C_: tl.constexpr,
    W: tl.constexpr,
):
    """Compute all gradients of a run of pixel tiles of one image, all channels at once (C <= C_).

    The scores and both softmaxes are recomputed.
    """
    WHOLE: tl.constexpr = C == C_
    dtype: tl.constexpr = PIXELS.dtype.element_ty
    split, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    part = image * splits + split
    channel, pixel, column = tl.arange(0, C_), tl.arange(0, P_), tl.arange(0, W)

    # The word side is loaded once.
    is_word = column < word_count
    at_words, word_mask = _block(column, is_word, channel, C, WHOLE)
    at_words += image * word_count * C
    # [W, C_]
    k = tl.load(KEYS + at_words, mask=word_mask, other=0.0)
    u = tl.load(VALUES + at_words, mask=word_mask, other=0.0)
    g = tl.load(GRAD_FROM_PIXELS + at_words, mask=word_mask, other=0.0)
    # [W]
    bias = tl.load(BIAS + image * word_count + column, mask=is_word, other=float("-inf")) * LOG2E
    log_sum = tl.load(LOG_SUM + image * word_count + column, mask=is_word, other=float("inf"))
    delta = tl.load(DELTA + image * W + column)
    grad_scale = tl.load(GRAD_SCALE + image)

    unit = _first_unit(dtype)
    key_sums = tl.zeros([C_, W], tl.float32)
    value_sums = tl.zeros([C_, W], tl.float32)
    bias_sums = tl.zeros([W], tl.float32)

    for i in range(0, tiles):
        first = (split * tiles + i) * P_
        tile = (image * pixel_count + first) * C
        in_image = pixel < pixel_count - first
        at_tile, mask = _block(pixel, in_image, channel, C, WHOLE)
        # [P_, C_]
        v = tl.load(PIXELS + tile + at_tile, mask=mask, other=0.0)
        do = tl.load(GRAD_FROM_WORDS + tile + at_tile, mask=mask, other=0.0)

        # Scores, and the gradients of both weights, [P_, W].
        s = _dot(v, tl.trans(k)) * LOG2E + bias[None, :]
        dp = _dot(do, tl.trans(u))
        dq = _dot(v, tl.trans(g))
        p, q, ds = _weights_and_score_gradient(
            s, dp, dq, in_image, log_sum, delta, grad_scale, weight_exponent
        )
        bias_sums += tl.sum(ds, 0)

        previous_unit = unit
        unit = _next_unit(unit, ds, dtype)
        ds = (ds / unit).to(dtype)

        dv = _dot(q.to(dtype), g) * (grad_scale / unit)
        dv = _add_dot(dv, ds, k) * unit
        tl.store(GRAD_PIXELS + tile + at_tile, dv.to(dtype), mask=mask)

        key_sums *= previous_unit / unit
        key_sums = _add_dot(key_sums, tl.trans(v), ds)
        value_sums = _add_dot(value_sums, tl.trans(do), p.to(dtype))

    at_sums, mask = _block(channel, channel < C, column, W, WHOLE=True)
    at_sums += part * C * W
    tl.store(KEY_SUMS + at_sums, key_sums, mask=mask)
    tl.store(VALUE_SUMS + at_sums, value_sums, mask=mask)
    tl.store(BIAS_SUMS + part * W + column, bias_sums)
    tl.store(UNIT + part, unit)


@triton.jit(do_not_specialize=[*UNSPECIALIZED, "weight_exponent"])
def backward_wide_kernel(
    PIXELS,  # [B, P, C]
    GRAD_FROM_WORDS,  # [B, P, C]
    KEYS,  # [B, T, C], rounded
    VALUES,  # [B, T, C], rounded
    BIAS,  # [B, T]
    LOG_SUM,  # [B, T]
    GRAD_FROM_PIXELS,  # [B, T, C], rounded
    DELTA,  # [B, W]
    GRAD_SCALE,  # [B]
    GRAD_PIXELS,  # out, [B, P, C]
    KEY_SUMS,  # out, [B, splits, C, W]
    VALUE_SUMS,  # out, [B, splits, C, W]
    BIAS_SUMS,  # out, [B, splits, W]
    UNIT,  # out, [B, splits]
    pixel_count,
    word_count,
    tiles,
    splits,
    weight_exponent,
    blocks,
    C,
    P_: tl.constexpr,
    C_: tl.constexpr,
    W: tl.constexpr,
):
    """Compute all gradients of a run of pixel tiles of one image, block by block of channels.

    Programs share channel blocks and keep sums in memory as in `forward_wide_kernel`.
    """
    dtype: tl.constexpr = PIXELS.dtype.element_ty
    group, split, image = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    part = image * splits + split
    pixel, column = tl.arange(0, P_), tl.arange(0, W)
    first_channel = group * blocks * C_
    end_channel = tl.minimum((group + 1) * blocks * C_, C)

    is_word = column < word_count
    words = image * word_count * C
    # [W]
    bias = tl.load(BIAS + image * word_count + column, mask=is_word, other=float("-inf")) * LOG2E
    log_sum = tl.load(LOG_SUM + image * word_count + column, mask=is_word, other=float("inf"))
    delta = tl.load(DELTA + image * W + column)
    grad_scale = tl.load(GRAD_SCALE + image)

    unit = _first_unit(dtype)
    bias_sums = tl.zeros([W], tl.float32)

    for i in range(0, tiles):
        first = (split * tiles + i) * P_
        tile = (image * pixel_count + first) * C
        in_image = pixel < pixel_count - first

        # Scores, and the gradients of both weights, over all channels, [P_, W].
        s = tl.zeros([P_, W], tl.float32)
        dp = tl.zeros([P_, W], tl.float32)
        dq = tl.zeros([P_, W], tl.float32)
        for block in range(0, C, C_):
            channel = block + tl.arange(0, C_)
            at_tile, mask = _block(pixel, in_image, channel, C, WHOLE=False)
            at_tile += tile
            at_words, word_mask = _block(column, is_word, channel, C, WHOLE=False)
            at_words += words
            # [P_, C_]
            v = tl.load(PIXELS + at_tile, mask=mask, other=0.0)
            do = tl.load(GRAD_FROM_WORDS + at_tile, mask=mask, other=0.0)
            # [W, C_]
            k = tl.load(KEYS + at_words, mask=word_mask, other=0.0)
            u = tl.load(VALUES + at_words, mask=word_mask, other=0.0)
            g = tl.load(GRAD_FROM_PIXELS + at_words, mask=word_mask, other=0.0)
            s = _add_dot(s, v, tl.trans(k))
            dp = _add_dot(dp, do, tl.trans(u))
            dq = _add_dot(dq, v, tl.trans(g))
        s = s * LOG2E + bias[None, :]

        p, q, ds = _weights_and_score_gradient(
            s, dp, dq, in_image, log_sum, delta, grad_scale, weight_exponent
        )
        bias_sums += tl.sum(ds, 0)

        previous_unit = unit
        unit = _next_unit(unit, ds, dtype)
        p, q, ds = p.to(dtype), q.to(dtype), (ds / unit).to(dtype)

        # The gradients, over the channels of this program.
        for block in range(first_channel, end_channel, C_):
            channel = block + tl.arange(0, C_)
            at_tile, mask = _block(pixel, in_image, channel, C, WHOLE=False)
            at_tile += tile
            at_words, word_mask = _block(column, is_word, channel, C, WHOLE=False)
            at_words += words
            at_sums, sum_mask = _block(channel, channel < C, column, W, WHOLE=True)
            at_sums += part * C * W

            # [W, C_], then [P_, C_]
            k = tl.load(KEYS + at_words, mask=word_mask, other=0.0)
            g = tl.load(GRAD_FROM_PIXELS + at_words, mask=word_mask, other=0.0)
            dv = _dot(q, g) * (grad_scale / unit)
            dv = _add_dot(dv, ds, k) * unit
            tl.store(GRAD_PIXELS + at_tile, dv.to(dtype), mask=mask)

            # [P_, C_], and the sums [C_, W]: zero before the first tile
            v = tl.load(PIXELS + at_tile, mask=mask, other=0.0)
            sums = tl.load(KEY_SUMS + at_sums, mask=sum_mask & (i > 0), other=0.0)
            sums *= previous_unit / unit
            tl.store(KEY_SUMS + at_sums, _add_dot(sums, tl.trans(v), ds), mask=sum_mask)

            do = tl.load(GRAD_FROM_WORDS + at_tile, mask=mask, other=0.0)
            sums = tl.load(VALUE_SUMS + at_sums, mask=sum_mask & (i > 0), other=0.0)
            tl.store(VALUE_SUMS + at_sums, _add_dot(sums, tl.trans(do), p), mask=sum_mask)

        tl.debug_barrier()  # the next tile reads sums that other threads of this program wrote

    if group == 0:
        tl.store(BIAS_SUMS + part * W + column, bias_sums)
        tl.store(UNIT + part, unit)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def backward_combine_kernel(
    KEY_SUMS,  # [B, splits, C, W]
    VALUE_SUMS,  # [B, splits, C, W]
    BIAS_SUMS,  # [B, splits, W]
    UNIT,  # [B, splits]
    GRAD_KEYS,  # out, [B, T, C]
    GRAD_VALUES,  # out, [B, T, C]
    GRAD_BIAS,  # out, [B, T]
    word_count,
    splits,
    C,
    C_: tl.constexpr,
    W: tl.constexpr,
):
    """Add the word-side gradients of one channel block of one image, in the order of the splits."""
    block, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    channel, column = block * C_ + tl.arange(0, C_), tl.arange(0, W)
    at_block, mask = _block(channel, channel < C, column, W, WHOLE=True)

    key_sums = tl.zeros([C_, W], tl.float32)
    value_sums = tl.zeros([C_, W], tl.float32)
    bias_sums = tl.zeros([W], tl.float32)
    for i in range(0, splits):
        part = image * splits + i
        at_sums = part * C * W + at_block
        key_sums += tl.load(KEY_SUMS + at_sums, mask=mask, other=0.0) * tl.load(UNIT + part)
        value_sums += tl.load(VALUE_SUMS + at_sums, mask=mask, other=0.0)
        bias_sums += tl.load(BIAS_SUMS + part * W + column)

    # [C_, W] into [T, C]
    is_word = column < word_count
    at_words = image * word_count * C + column[None, :] * C + channel[:, None]
    mask = is_word[None, :] & (channel < C)[:, None]
    tl.store(GRAD_KEYS + at_words, key_sums.to(GRAD_KEYS.dtype.element_ty), mask=mask)
    tl.store(GRAD_VALUES + at_words, value_sums.to(GRAD_VALUES.dtype.element_ty), mask=mask)
    if block == 0:
        tl.store(GRAD_BIAS + image * word_count + column, bias_sums, mask=is_word)


# --------------------------------------------------------------------------- registered operations


@torch.library.custom_op("coupalign::bidirectional_attention", mutates_args=())
def attention_forward(
    pixels: Tensor, keys: Tensor, values: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute both outputs, and what backward needs.

    Returns:
        pixels_from_words [B, P, C], words_from_pixels [B, T, C], and the base-2 log-sum of each
        word's scores [B, T].
    """
    pixels, keys, values, bias = (x.contiguous() for x in (pixels, keys, values, bias))
    batch, pixel_count, channels = pixels.shape
    word_count = keys.shape[1]
    plan = _plan("forward", pixels, keys)

    # The wide kernel reads the words once per tile, so rounding them beforehand pays.
    if plan.wide:
        keys, values = keys.to(pixels.dtype), values.to(pixels.dtype)

    # Outputs.
    from_words = torch.empty_like(pixels)
    from_pixels = pixels.new_empty(keys.shape, dtype=torch.float32)
    log_sum = pixels.new_empty(bias.shape, dtype=torch.float32)

    # Partial results of the splits.
    per_word = (batch, plan.splits, plan.columns)
    per_channel_and_word = (batch, plan.splits, channels, plan.columns)
    sums = pixels.new_empty(per_channel_and_word, dtype=torch.float32)
    largest, total = pixels.new_empty(2, *per_word, dtype=torch.float32)

    with torch.cuda.device_of(pixels):
        _launch(
            forward_wide_kernel if plan.wide else forward_kernel,
            plan,
            batch,
            channels,
            pixels,
            keys,
            values,
            bias,
            from_words,
            sums,
            largest,
            total,
            pixel_count,
            word_count,
            plan.tiles,
            plan.splits,
        )
        _launch_combine(
            forward_combine_kernel,
            plan,
            batch,
            channels,
            sums,
            largest,
            total,
            from_pixels,
            log_sum,
            word_count,
            plan.splits,
        )
    return from_words, from_pixels, log_sum


@torch.library.custom_op("coupalign::bidirectional_attention_backward", mutates_args=())
def attention_backward(
    pixels: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor,
    from_pixels: Tensor,
    log_sum: Tensor,
    grad_from_words: Tensor,
    grad_from_pixels: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of pixels, keys, values and bias."""
    pixels, keys, values, bias = (x.contiguous() for x in (pixels, keys, values, bias))
    grad_from_words = grad_from_words.contiguous()
    grad_from_pixels = grad_from_pixels.contiguous()
    batch, pixel_count, channels = pixels.shape
    word_count = keys.shape[1]
    plan = _plan("backward", pixels, keys)
    weight_exponent = float(min(MAX_WEIGHT_EXPONENT, int(math.log2(pixel_count))))

    # The word side, rounded and scaled.
    rounded_keys, rounded_values, rounded_grad = pixels.new_empty(3, *keys.shape)
    delta = pixels.new_empty(batch, plan.columns, dtype=torch.float32)
    grad_scale = pixels.new_empty(batch, dtype=torch.float32)

    # Outputs.
    grad_pixels = torch.empty_like(pixels)
    grad_keys = torch.empty_like(keys)
    grad_values = torch.empty_like(values)
    grad_bias = torch.empty_like(bias)

    # Partial results of the splits.
    per_word = (batch, plan.splits, plan.columns)
    per_channel_and_word = (batch, plan.splits, channels, plan.columns)
    key_sums, value_sums = pixels.new_empty(2, *per_channel_and_word, dtype=torch.float32)
    bias_sums = pixels.new_empty(per_word, dtype=torch.float32)
    unit = pixels.new_empty(batch, plan.splits, dtype=torch.float32)

    with torch.cuda.device_of(pixels):
        backward_prepare_kernel[(batch,)](
            keys,
            values,
            from_pixels,
            grad_from_pixels,
            rounded_keys,
            rounded_values,
            rounded_grad,
            delta,
            grad_scale,
            word_count,
            weight_exponent,
            C=channels,
            **plan.helper_constants,
            num_warps=4,
        )
        _launch(
            backward_wide_kernel if plan.wide else backward_kernel,
            plan,
            batch,
            channels,
            pixels,
            grad_from_words,
            rounded_keys,
            rounded_values,
            bias,
            log_sum,
            rounded_grad,
            delta,
            grad_scale,
            grad_pixels,
            key_sums,
            value_sums,
            bias_sums,
            unit,
            pixel_count,
            word_count,
            plan.tiles,
            plan.splits,
            weight_exponent,
        )
        _launch_combine(
            backward_combine_kernel,
            plan,
            batch,
            channels,
            key_sums,
            value_sums,
            bias_sums,
            unit,
            grad_keys,
            grad_values,
            grad_bias,
            word_count,
            plan.splits,
        )
    return grad_pixels, grad_keys, grad_values, grad_bias


def _plan(direction: Direction, pixels: Tensor, keys: Tensor) -> KernelPlan:
    batch, pixel_count, channels = pixels.shape
    return plan_kernels(
        direction,
        batch=batch,
        pixels=pixel_count,
        words=keys.shape[1],
        channels=channels,
        dtype=pixels.dtype,
        shared_memory=_shared_memory(pixels.device),
    )


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Return the bytes available to one program; the interpreter runs what the large GPUs run."""
    if device.type != "cuda":
        return LARGE_SHARED_MEMORY
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def _launch(
    kernel: triton.JITFunction,
    plan: KernelPlan,
    batch: int,
    channels: int,
    *arguments: Tensor | int | float,
) -> None:
    """Launch a forward or backward kernel, narrow or wide."""
    grid = (plan.groups, plan.splits, batch) if plan.wide else (plan.splits, batch)
    blocks = {"blocks": plan.blocks} if plan.wide else {}
    kernel[grid](
        *arguments,
        **blocks,
        C=channels,
        **plan.constants,
        num_warps=plan.tiling.warps,
        num_stages=plan.tiling.stages,
    )


def _launch_combine(
    kernel: triton.JITFunction,
    plan: KernelPlan,
    batch: int,
    channels: int,
    *arguments: Tensor | int,
) -> None:
    """Launch a combine kernel: one program per channel block and image."""
    constants = plan.helper_constants
    grid = (triton.cdiv(channels, constants["C_"]), batch)
    kernel[grid](*arguments, C=channels, **constants, num_warps=4)


@attention_forward.register_fake
def _(pixels: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (
        pixels.new_empty(pixels.shape),
        pixels.new_empty(keys.shape, dtype=torch.float32),
        pixels.new_empty(bias.shape, dtype=torch.float32),
    )


@attention_backward.register_fake
def _(
    pixels: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor,
    from_pixels: Tensor,
    log_sum: Tensor,
    grad_from_words: Tensor,
    grad_from_pixels: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return tuple(x.new_empty(x.shape) for x in (pixels, keys, values, bias))


def _save_for_backward(
    ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    _, from_pixels, log_sum = output
    ctx.save_for_backward(*inputs, from_pixels, log_sum)


def _backward(
    ctx: Any, grad_from_words: Tensor | None, grad_from_pixels: Tensor | None, _: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    pixels, keys, values, bias, from_pixels, log_sum = ctx.saved_tensors
    if grad_from_words is None:
        grad_from_words = torch.zeros_like(pixels)
    if grad_from_pixels is None:
        grad_from_pixels = torch.zeros_like(from_pixels)
    return attention_backward(
        pixels,
        keys,
        values,
        bias,
        from_pixels,
        log_sum,
        grad_from_words,
        grad_from_pixels,
    )


attention_forward.register_autograd(_backward, setup_context=_save_for_backward)


def bidirectional_attention(
    pixels: Tensor, keys: Tensor, values: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute `coupalign.kernels.bidirectional_attention` with one head in the fused kernels.

    The caller must have asked `plan.refusal` whether they can run this call.
    """
    from_words, from_pixels, _ = attention_forward(
        pixels, keys.float(), values.float(), bias.float()
    )
    return from_words, from_pixels
