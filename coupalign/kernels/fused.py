"""Word-pixel attention in both directions as Triton kernels: one pass over the pixels forward, one backward.

README.md beside this file derives what is computed here. Nothing of size pixels x words reaches memory. There are no
atomics: every program writes its own partial sums and a second kernel adds them in a fixed order, so two runs agree
bit for bit.

Shape legend: B batch, P pixels, H heads, T words, C channels; in a kernel P_ pixels of a tile, C_ channels of a block,
W columns: the words of all heads, each head padded to a power of two.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from coupalign.kernels.plan import KernelPlan, plan_kernels

LOG2E = tl.constexpr(1.4426950408889634)
FINEST_SHIFT = (
    14  # 2^14 is the largest power of two by which a weight of 1 stays far from float16's 65504
)
SHAPES = [
    "pixel_count",
    "words",
    "tiles",
    "blocks",
    "splits",
]  # recompiling for a multiple of 16 would gain nothing


# ------------------------------------------------------------------------------------------------------ shared pieces


@triton.jit
def _columns(words, HEADS: tl.constexpr, W: tl.constexpr, W_HEAD: tl.constexpr):
    """Row of each column in a [H*T, ...] tensor, and which columns are words at all."""
    column = tl.arange(0, W)
    head = column // W_HEAD
    word = column % W_HEAD
    return head * words + word, (head < HEADS) & (word < words)


@triton.jit
def _softmax_over_words(s, P_: tl.constexpr, W: tl.constexpr, W_HEAD: tl.constexpr):
    """[P_, W] base-2 scores -> weights, head by head. All words lie in the tile, so one tile is enough."""
    s = tl.reshape(s, [P_, W // W_HEAD, W_HEAD])
    largest = tl.max(s, 2)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    p = tl.exp2(s - largest[:, :, None])
    total = tl.sum(p, 2)
    p = p / tl.where(total == 0.0, 1.0, total)[:, :, None]
    return tl.reshape(p, [P_, W])


@triton.jit
def _next_over_pixels(s, there, largest, total):
    """One more tile of base-2 scores in the softmax over pixels, which runs across tiles: its weights relative to the
    largest score so far, that score, the factor by which earlier sums shrink, and the new total weight."""
    s = tl.where(there[:, None], s, float("-inf"))
    new = tl.maximum(largest, tl.max(s, 0))
    pivot = tl.where(new == float("-inf"), 0.0, new)
    q = tl.exp2(s - pivot[None, :])
    shrink = tl.exp2(largest - pivot)
    return q, new, shrink, total * shrink + tl.sum(q, 0)


@triton.jit
def _weights_and_score_gradient(
    s,
    dp,
    dq,
    there,
    log_sum,
    delta,
    back,
    finer,
    P_: tl.constexpr,
    W: tl.constexpr,
    W_HEAD: tl.constexpr,
):
    """Base-2 scores [P_, W] and the gradients of both weights -> weights over words, 2^finer times those over pixels,
    and the gradient of the scores. Each softmax gives w (dw - sum w dw); over pixels that sum is `delta`."""
    p = tl.reshape(_softmax_over_words(s, P_, W, W_HEAD), [P_, W // W_HEAD, W_HEAD])
    dp = tl.reshape(dp, [P_, W // W_HEAD, W_HEAD])
    ds = tl.reshape(p * (dp - tl.sum(p * dp, 2)[:, :, None]), [P_, W])
    q = tl.where(there[:, None], tl.exp2(s - log_sum[None, :] + finer), 0.0)
    ds = tl.where(there[:, None], ds + (q * back) * (dq - delta[None, :]), 0.0)
    return tl.reshape(p, [P_, W]), q, ds


@triton.jit
def _power_of_two(x):
    """The largest power of two that is not above x >= 0, between 2^-100 and 2^100: its exponent without its fraction."""
    x = tl.minimum(tl.maximum(x, 2.0**-100), 2.0**100)
    return (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def _unit(ds, before, dtype: tl.constexpr):
    """In what unit score gradients are rounded to `dtype`: a power of two that grows with the largest of them seen so far.

    float16 would overflow beyond 65504 and lose what is below 6e-8; the other types have the range of float32.
    """
    if dtype == tl.float16:
        if ds is None:
            return tl.full([], 2.0**-100, tl.float32)
        else:
            return tl.maximum(before, _power_of_two(tl.max(tl.abs(ds))))
    else:
        return tl.full([], 1.0, tl.float32)


# ------------------------------------------------------------------------------------------------------------ forward


@triton.jit(do_not_specialize=SHAPES)
def forward_kernel(
    PIXELS,
    KEYS,
    VALUES,
    BIAS,
    FROM_WORDS,
    SUMS,
    LARGEST,
    TOTAL,
    pixel_count,
    words,
    tiles,
    splits,
    C: tl.constexpr,
    HEADS: tl.constexpr,
    P_: tl.constexpr,
    C_: tl.constexpr,
    W: tl.constexpr,
    W_HEAD: tl.constexpr,
):
    """A run of pixel tiles of one image, all channels at once (C <= C_): the sums over pixels stay in registers."""
    WHOLE: tl.constexpr = C == C_
    split, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, real = _columns(words, HEADS, W, W_HEAD)
    channel = tl.arange(0, C_)
    inside = channel < C
    at_words = image * HEADS * words * C + row[:, None] * C + channel[None, :]
    word_mask = real[:, None] if WHOLE else real[:, None] & inside[None, :]
    k = tl.load(KEYS + at_words, mask=word_mask, other=0.0).to(PIXELS.dtype.element_ty)
    u = tl.load(VALUES + at_words, mask=word_mask, other=0.0).to(PIXELS.dtype.element_ty)
    bias = tl.load(BIAS + image * HEADS * words + row, mask=real, other=float("-inf")) * LOG2E
    largest = tl.full([W], float("-inf"), tl.float32)
    total = tl.zeros([W], tl.float32)
    sums = tl.zeros(
        [C_, W], tl.float32
    )  # transposed: channels are the long side of the matrix product
    place = tl.arange(0, P_)
    at_tile = place[:, None] * C + channel[None, :]
    for i in range(0, tiles):
        first = (split * tiles + i) * P_
        start = (image * pixel_count + first) * C  # 64 bits; what is added to it fits into 32
        there = place < pixel_count - first
        mask = there[:, None] if WHOLE else there[:, None] & inside[None, :]
        v = tl.load(PIXELS + start + at_tile, mask=mask, other=0.0)
        s = tl.dot(v, tl.trans(k), input_precision="ieee") * LOG2E + bias[None, :]
        p = _softmax_over_words(s, P_, W, W_HEAD)
        o = tl.dot(p.to(v.dtype), u, input_precision="ieee")
        tl.store(FROM_WORDS + start + at_tile, o.to(v.dtype), mask=mask)
        q, largest, shrink, total = _next_over_pixels(s, there, largest, total)
        sums = tl.dot(tl.trans(v), q.to(v.dtype), sums * shrink[None, :], input_precision="ieee")
    part = image * splits + split
    column = tl.arange(0, W)
    tl.store(
        SUMS + part * C * W + channel[:, None] * W + column[None, :], sums, mask=inside[:, None]
    )
    tl.store(LARGEST + part * W + column, largest)
    tl.store(TOTAL + part * W + column, total)


@triton.jit(do_not_specialize=SHAPES)
def forward_wide_kernel(
    PIXELS,
    KEYS,
    VALUES,
    BIAS,
    FROM_WORDS,
    SUMS,
    LARGEST,
    TOTAL,
    pixel_count,
    words,
    tiles,
    splits,
    blocks,
    C,
    HEADS: tl.constexpr,
    P_: tl.constexpr,
    C_: tl.constexpr,
    W: tl.constexpr,
    W_HEAD: tl.constexpr,
):
    """A run of pixel tiles of one image, the channels block by block: the scores over all channels, then the outputs.

    A tile is read twice by the same program, the second time from the cache. The sums over pixels are too many for
    registers: they are added up in memory, where this program alone touches them. Few tiles make few programs, so a
    group of programs may share a run: each computes the scores, and the outputs of `blocks` channel blocks.
    """
    group, split, image = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    row, real = _columns(words, HEADS, W, W_HEAD)
    bias = tl.load(BIAS + image * HEADS * words + row, mask=real, other=float("-inf")) * LOG2E
    word_start = image * HEADS * words * C
    part = image * splits + split
    column = tl.arange(0, W)
    largest = tl.full([W], float("-inf"), tl.float32)
    total = tl.zeros([W], tl.float32)
    place = tl.arange(0, P_)
    for i in range(0, tiles):
        first = (split * tiles + i) * P_
        start = (image * pixel_count + first) * C
        there = place < pixel_count - first
        s = tl.zeros([P_, W], tl.float32)
        for block in range(0, C, C_):
            c = block + tl.arange(0, C_)
            v = tl.load(
                PIXELS + start + place[:, None] * C + c[None, :],
                mask=there[:, None] & (c < C)[None, :],
                other=0.0,
            )
            k = tl.load(
                KEYS + word_start + row[:, None] * C + c[None, :],
                mask=real[:, None] & (c < C)[None, :],
                other=0.0,
            )
            s = tl.dot(v, tl.trans(k), s, input_precision="ieee")
        s = s * LOG2E + bias[None, :]
        p = _softmax_over_words(s, P_, W, W_HEAD).to(PIXELS.dtype.element_ty)
        q, largest, shrink, total = _next_over_pixels(s, there, largest, total)
        q = q.to(PIXELS.dtype.element_ty)
        for block in range(group * blocks * C_, tl.minimum((group + 1) * blocks * C_, C), C_):
            c = block + tl.arange(0, C_)
            mask = there[:, None] & (c < C)[None, :]
            v = tl.load(PIXELS + start + place[:, None] * C + c[None, :], mask=mask, other=0.0)
            u = tl.load(
                VALUES + word_start + row[:, None] * C + c[None, :],
                mask=real[:, None] & (c < C)[None, :],
                other=0.0,
            )
            o = tl.dot(p, u, input_precision="ieee")
            tl.store(FROM_WORDS + start + place[:, None] * C + c[None, :], o.to(v.dtype), mask=mask)
            at_sums = SUMS + part * C * W + c[:, None] * W + column[None, :]
            sums = tl.load(at_sums, mask=(c < C)[:, None] & (i > 0), other=0.0)
            tl.store(
                at_sums,
                tl.dot(tl.trans(v), q, sums * shrink[None, :], input_precision="ieee"),
                mask=(c < C)[:, None],
            )
        tl.debug_barrier()  # the next tile reads what other threads of this program wrote
    if group == 0:
        tl.store(LARGEST + part * W + column, largest)
        tl.store(TOTAL + part * W + column, total)


@triton.jit(do_not_specialize=SHAPES)
def forward_combine_kernel(
    SUMS,
    LARGEST,
    TOTAL,
    FROM_PIXELS,
    LOG_SUM,
    words,
    splits,
    C,
    HEADS: tl.constexpr,
    C_: tl.constexpr,
    W: tl.constexpr,
    W_HEAD: tl.constexpr,
):
    """Add the partial sums of one channel block of one image, in the order of the splits."""
    block, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, real = _columns(words, HEADS, W, W_HEAD)
    column = tl.arange(0, W)
    channel = block * C_ + tl.arange(0, C_)
    inside = channel < C
    largest = tl.full([W], float("-inf"), tl.float32)
    for i in range(0, splits):
        largest = tl.maximum(largest, tl.load(LARGEST + (image * splits + i) * W + column))
    pivot = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.zeros([W], tl.float32)
    sums = tl.zeros([C_, W], tl.float32)
    for i in range(0, splits):
        part = image * splits + i
        share = tl.exp2(tl.load(LARGEST + part * W + column) - pivot)
        total += share * tl.load(TOTAL + part * W + column)
        one = tl.load(
            SUMS + part * C * W + channel[:, None] * W + column[None, :],
            mask=inside[:, None],
            other=0.0,
        )
        sums += share[None, :] * one
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    tl.store(
        FROM_PIXELS + image * HEADS * words * C + row[None, :] * C + channel[:, None],
        sums / total[None, :],
        mask=real[None, :] & inside[:, None],
    )
    if (
        block == 0
    ):  # +inf for a word that no pixel reads: its weights exp2(s - inf) are 0 in backward too
        tl.store(
            LOG_SUM + image * HEADS * words + row,
            tl.where(empty, float("inf"), pivot + tl.log2(total)),
            mask=real,
        )


# ----------------------------------------------------------------------------------------------------------- backward


@triton.jit(do_not_specialize=SHAPES)
def backward_prepare_kernel(
    KEYS,
    VALUES,
    FROM_PIXELS,
    GRAD_FROM_PIXELS,
    K,
    U,
    G,
    DELTA,
    BACK,
    words,
    finer,
    C,
    HEADS: tl.constexpr,
    C_: tl.constexpr,
    W: tl.constexpr,
    W_HEAD: tl.constexpr,
):
    """The word side of one image for backward: keys, values and gradient in the type of the matrix products, and
    delta [B, W], the mean of the gradient under the softmax over pixels.

    The gradient is divided by a power of two that brings it near 1: float16 then holds it, whatever the loss scale.
    BACK [B] undoes that and the scale 2^finer of the weights.
    """
    image = tl.program_id(0).to(tl.int64)
    row, real = _columns(words, HEADS, W, W_HEAD)
    at_words = image * HEADS * words * C
    delta = tl.zeros([W], tl.float32)
    largest = tl.zeros([W], tl.float32)
    for first in range(0, C, C_):
        c = first + tl.arange(0, C_)
        at = at_words + row[:, None] * C + c[None, :]
        mask = real[:, None] & (c < C)[None, :]
        g = tl.load(GRAD_FROM_PIXELS + at, mask=mask, other=0.0)
        delta += tl.sum(g * tl.load(FROM_PIXELS + at, mask=mask, other=0.0), 1)
        largest = tl.maximum(largest, tl.max(tl.abs(g), 1))
        tl.store(K + at, tl.load(KEYS + at, mask=mask, other=0.0).to(K.dtype.element_ty), mask=mask)
        tl.store(
            U + at, tl.load(VALUES + at, mask=mask, other=0.0).to(U.dtype.element_ty), mask=mask
        )
    size = tl.max(largest, 0)
    near_one = 1.0 / _power_of_two(size)
    for first in range(0, C, C_):
        c = first + tl.arange(0, C_)
        at = at_words + row[:, None] * C + c[None, :]
        mask = real[:, None] & (c < C)[None, :]
        g = tl.load(GRAD_FROM_PIXELS + at, mask=mask, other=0.0)
        tl.store(G + at, (g * near_one).to(G.dtype.element_ty), mask=mask)
    tl.store(DELTA + image * W + tl.arange(0, W), delta * near_one)
    tl.store(BACK + image, tl.exp2(-finer) / near_one)


@triton.jit(do_not_specialize=[*SHAPES, "finer"])
def backward_kernel(
    PIXELS,
    GRAD_FROM_WORDS,
    KEYS,
    VALUES,
    BIAS,
    LOG_SUM,
    GRAD_FROM_PIXELS,
    DELTA,
    BACK,
    GRAD_PIXELS,
    KEY_SUMS,
    VALUE_SUMS,
    BIAS_SUMS,
    UNIT,
    pixel_count,
    words,
    tiles,
    splits,
    finer,
    C: tl.constexpr,
    HEADS: tl.constexpr,
    P_: tl.constexpr,
    C_: tl.constexpr,
    W: tl.constexpr,
    W_HEAD: tl.constexpr,
):
    """The scores and both softmaxes of a run of pixel tiles again, and all gradients from them (C <= C_)."""
    WHOLE: tl.constexpr = C == C_
    split, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, real = _columns(words, HEADS, W, W_HEAD)
    channel = tl.arange(0, C_)
    inside = channel < C
    at_words = image * HEADS * words * C + row[:, None] * C + channel[None, :]
    word_mask = real[:, None] if WHOLE else real[:, None] & inside[None, :]
    k = tl.load(KEYS + at_words, mask=word_mask, other=0.0)
    u = tl.load(VALUES + at_words, mask=word_mask, other=0.0)
    g = tl.load(GRAD_FROM_PIXELS + at_words, mask=word_mask, other=0.0)
    bias = tl.load(BIAS + image * HEADS * words + row, mask=real, other=float("-inf")) * LOG2E
    log_sum = tl.load(LOG_SUM + image * HEADS * words + row, mask=real, other=float("inf"))
    column = tl.arange(0, W)
    delta = tl.load(DELTA + image * W + column)
    back = tl.load(BACK + image)
    unit = _unit(None, None, PIXELS.dtype.element_ty)
    key_sums = tl.zeros([C_, W], tl.float32)
    value_sums = tl.zeros([C_, W], tl.float32)
    bias_sums = tl.zeros([W], tl.float32)
    place = tl.arange(0, P_)
    at_tile = place[:, None] * C + channel[None, :]
    for i in range(0, tiles):
        first = (split * tiles + i) * P_
        start = (image * pixel_count + first) * C
        there = place < pixel_count - first
        mask = there[:, None] if WHOLE else there[:, None] & inside[None, :]
        v = tl.load(PIXELS + start + at_tile, mask=mask, other=0.0)
        do = tl.load(GRAD_FROM_WORDS + start + at_tile, mask=mask, other=0.0)
        s = tl.dot(v, tl.trans(k), input_precision="ieee") * LOG2E + bias[None, :]
        dp = tl.dot(do, tl.trans(u), input_precision="ieee")
        dq = tl.dot(v, tl.trans(g), input_precision="ieee")
        p, q, ds = _weights_and_score_gradient(
            s, dp, dq, there, log_sum, delta, back, finer, P_, W, W_HEAD
        )
        bias_sums += tl.sum(ds, 0)
        before = unit
        unit = _unit(ds, unit, v.dtype)
        ds = (ds / unit).to(v.dtype)
        dv = tl.dot(q.to(v.dtype), g, input_precision="ieee") * (back / unit)
        dv = tl.dot(ds, k, dv, input_precision="ieee") * unit
        tl.store(GRAD_PIXELS + start + at_tile, dv.to(v.dtype), mask=mask)
        key_sums = tl.dot(tl.trans(v), ds, key_sums * (before / unit), input_precision="ieee")
        value_sums = tl.dot(tl.trans(do), p.to(v.dtype), value_sums, input_precision="ieee")
    part = image * splits + split
    at_sums = part * C * W + channel[:, None] * W + column[None, :]
    tl.store(KEY_SUMS + at_sums, key_sums, mask=inside[:, None])
    tl.store(VALUE_SUMS + at_sums, value_sums, mask=inside[:, None])
    tl.store(BIAS_SUMS + part * W + column, bias_sums)
    tl.store(UNIT + part, unit)


@triton.jit
def _scores_and_weight_gradients(
    PIXELS,
    GRAD_FROM_WORDS,
    KEYS,
    VALUES,
    GRAD_FROM_PIXELS,
    start,
    word_start,
    there,
    row,
    real,
    C,
    P_: tl.constexpr,
    C_: tl.constexpr,
    W: tl.constexpr,
):
    """Three products of a tile with the words, each over all channels: never over one program's own block of them."""
    place = tl.arange(0, P_)
    s = tl.zeros([P_, W], tl.float32)
    dp = tl.zeros([P_, W], tl.float32)
    dq = tl.zeros([P_, W], tl.float32)
    for block in range(0, C, C_):
        c = block + tl.arange(0, C_)
        at_tile = start + place[:, None] * C + c[None, :]
        at_words = word_start + row[:, None] * C + c[None, :]
        mask = there[:, None] & (c < C)[None, :]
        word_mask = real[:, None] & (c < C)[None, :]
        v = tl.load(PIXELS + at_tile, mask=mask, other=0.0)
        do = tl.load(GRAD_FROM_WORDS + at_tile, mask=mask, other=0.0)
        k = tl.load(KEYS + at_words, mask=word_mask, other=0.0)
        u = tl.load(VALUES + at_words, mask=word_mask, other=0.0)
        g = tl.load(GRAD_FROM_PIXELS + at_words, mask=word_mask, other=0.0)
        s = tl.dot(v, tl.trans(k), s, input_precision="ieee")
        dp = tl.dot(do, tl.trans(u), dp, input_precision="ieee")
        dq = tl.dot(v, tl.trans(g), dq, input_precision="ieee")
    return s, dp, dq


@triton.jit(do_not_specialize=[*SHAPES, "finer"])
def backward_wide_kernel(
    PIXELS,
    GRAD_FROM_WORDS,
    KEYS,
    VALUES,
    BIAS,
    LOG_SUM,
    GRAD_FROM_PIXELS,
    DELTA,
    BACK,
    GRAD_PIXELS,
    KEY_SUMS,
    VALUE_SUMS,
    BIAS_SUMS,
    UNIT,
    pixel_count,
    words,
    tiles,
    splits,
    finer,
    blocks,
    C,
    HEADS: tl.constexpr,
    P_: tl.constexpr,
    C_: tl.constexpr,
    W: tl.constexpr,
    W_HEAD: tl.constexpr,
):
    """A run of pixel tiles of one image, the channels block by block, as in `forward_wide_kernel`."""
    group, split, image = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    row, real = _columns(words, HEADS, W, W_HEAD)
    bias = tl.load(BIAS + image * HEADS * words + row, mask=real, other=float("-inf")) * LOG2E
    log_sum = tl.load(LOG_SUM + image * HEADS * words + row, mask=real, other=float("inf"))
    column = tl.arange(0, W)
    delta = tl.load(DELTA + image * W + column)
    back = tl.load(BACK + image)
    word_start = image * HEADS * words * C
    part = image * splits + split
    unit = _unit(None, None, PIXELS.dtype.element_ty)
    bias_sums = tl.zeros([W], tl.float32)
    place = tl.arange(0, P_)
    for i in range(0, tiles):
        first = (split * tiles + i) * P_
        start = (image * pixel_count + first) * C
        there = place < pixel_count - first
        s, dp, dq = _scores_and_weight_gradients(
            PIXELS,
            GRAD_FROM_WORDS,
            KEYS,
            VALUES,
            GRAD_FROM_PIXELS,
            start,
            word_start,
            there,
            row,
            real,
            C,
            P_,
            C_,
            W,
        )
        s = s * LOG2E + bias[None, :]
        p, q, ds = _weights_and_score_gradient(
            s, dp, dq, there, log_sum, delta, back, finer, P_, W, W_HEAD
        )
        bias_sums += tl.sum(ds, 0)
        before = unit
        unit = _unit(ds, unit, PIXELS.dtype.element_ty)
        p = p.to(PIXELS.dtype.element_ty)
        q = q.to(PIXELS.dtype.element_ty)
        ds = (ds / unit).to(PIXELS.dtype.element_ty)
        for block in range(group * blocks * C_, tl.minimum((group + 1) * blocks * C_, C), C_):
            c = block + tl.arange(0, C_)
            at_tile = start + place[:, None] * C + c[None, :]
            at_words = word_start + row[:, None] * C + c[None, :]
            mask = there[:, None] & (c < C)[None, :]
            word_mask = real[:, None] & (c < C)[None, :]
            k = tl.load(KEYS + at_words, mask=word_mask, other=0.0)
            g = tl.load(GRAD_FROM_PIXELS + at_words, mask=word_mask, other=0.0)
            dv = tl.dot(q, g, input_precision="ieee") * (back / unit)
            dv = tl.dot(ds, k, dv, input_precision="ieee") * unit
            tl.store(GRAD_PIXELS + at_tile, dv.to(PIXELS.dtype.element_ty), mask=mask)
            at_sums = part * C * W + c[:, None] * W + column[None, :]
            again = (c < C)[:, None] & (i > 0)
            v = tl.load(PIXELS + at_tile, mask=mask, other=0.0)
            sums = tl.load(KEY_SUMS + at_sums, mask=again, other=0.0) * (before / unit)
            tl.store(
                KEY_SUMS + at_sums,
                tl.dot(tl.trans(v), ds, sums, input_precision="ieee"),
                mask=(c < C)[:, None],
            )
            do = tl.load(GRAD_FROM_WORDS + at_tile, mask=mask, other=0.0)
            sums = tl.load(VALUE_SUMS + at_sums, mask=again, other=0.0)
            tl.store(
                VALUE_SUMS + at_sums,
                tl.dot(tl.trans(do), p, sums, input_precision="ieee"),
                mask=(c < C)[:, None],
            )
        tl.debug_barrier()  # the next tile reads what other threads of this program wrote
    if group == 0:
        tl.store(BIAS_SUMS + part * W + column, bias_sums)
        tl.store(UNIT + part, unit)


@triton.jit(do_not_specialize=SHAPES)
def backward_combine_kernel(
    KEY_SUMS,
    VALUE_SUMS,
    BIAS_SUMS,
    UNIT,
    GRAD_KEYS,
    GRAD_VALUES,
    GRAD_BIAS,
    words,
    splits,
    C,
    HEADS: tl.constexpr,
    C_: tl.constexpr,
    W: tl.constexpr,
    W_HEAD: tl.constexpr,
):
    """Add the word-side gradients of one channel block of one image, in the order of the splits."""
    block, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, real = _columns(words, HEADS, W, W_HEAD)
    column = tl.arange(0, W)
    channel = block * C_ + tl.arange(0, C_)
    inside = channel < C
    key_sums = tl.zeros([C_, W], tl.float32)
    value_sums = tl.zeros([C_, W], tl.float32)
    bias_sums = tl.zeros([W], tl.float32)
    for i in range(0, splits):
        part = image * splits + i
        at_sums = part * C * W + channel[:, None] * W + column[None, :]
        key_sums += tl.load(KEY_SUMS + at_sums, mask=inside[:, None], other=0.0) * tl.load(
            UNIT + part
        )
        value_sums += tl.load(VALUE_SUMS + at_sums, mask=inside[:, None], other=0.0)
        bias_sums += tl.load(BIAS_SUMS + part * W + column)
    at_words = image * HEADS * words * C + row[None, :] * C + channel[:, None]
    mask = real[None, :] & inside[:, None]
    tl.store(GRAD_KEYS + at_words, key_sums.to(GRAD_KEYS.dtype.element_ty), mask=mask)
    tl.store(GRAD_VALUES + at_words, value_sums.to(GRAD_VALUES.dtype.element_ty), mask=mask)
    if block == 0:
        tl.store(GRAD_BIAS + image * HEADS * words + row, bias_sums, mask=real)


# ---------------------------------------------------------------------------------------------- registered operations


@torch.library.custom_op("coupalign::bidirectional_attention", mutates_args=())
def attention_forward(
    pixels: Tensor, keys: Tensor, values: Tensor, bias: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """pixels_from_words [B, P, C], words_from_pixels [B, H*T, C] and the base-2 log-sum of each word's scores [B, H*T]."""
    pixels, keys, values, bias = (x.contiguous() for x in (pixels, keys, values, bias))
    cut = _plan("forward", pixels, keys, heads)
    batch, count, channels = pixels.shape
    if cut.wide:  # it reads the words once for each tile: worth rounding once
        keys, values = keys.to(pixels.dtype), values.to(pixels.dtype)
    from_words = torch.empty_like(pixels)
    from_pixels = pixels.new_empty(keys.shape, dtype=torch.float32)
    log_sum = pixels.new_empty(bias.shape, dtype=torch.float32)
    sums = pixels.new_empty(batch, cut.splits, channels, cut.columns, dtype=torch.float32)
    largest, total = pixels.new_empty(2, batch, cut.splits, cut.columns, dtype=torch.float32)
    words = keys.shape[1] // heads
    with torch.cuda.device_of(pixels):
        _launch(
            forward_wide_kernel if cut.wide else forward_kernel,
            cut,
            batch,
            channels,
            heads,
            pixels,
            keys,
            values,
            bias,
            from_words,
            sums,
            largest,
            total,
            count,
            words,
            cut.tiles,
            cut.splits,
        )
        _launch_combine(
            forward_combine_kernel,
            cut,
            batch,
            channels,
            heads,
            sums,
            largest,
            total,
            from_pixels,
            log_sum,
            words,
            cut.splits,
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
    heads: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of pixels, keys, values and bias."""
    pixels, keys, values, bias, grad_from_words, grad_from_pixels = (
        x.contiguous() for x in (pixels, keys, values, bias, grad_from_words, grad_from_pixels)
    )
    cut = _plan("backward", pixels, keys, heads)
    batch, count, channels = pixels.shape
    words = keys.shape[1] // heads
    finer = float(min(FINEST_SHIFT, int(math.log2(count))))
    k, u, g = pixels.new_empty(3, *keys.shape)
    delta = pixels.new_empty(batch, cut.columns, dtype=torch.float32)
    back = pixels.new_empty(batch, dtype=torch.float32)
    grad_pixels, grad_keys, grad_values, grad_bias = (
        torch.empty_like(x) for x in (pixels, keys, values, bias)
    )
    unit = pixels.new_empty(batch, cut.splits, dtype=torch.float32)
    key_sums, value_sums = pixels.new_empty(
        2, batch, cut.splits, channels, cut.columns, dtype=torch.float32
    )
    bias_sums = pixels.new_empty(batch, cut.splits, cut.columns, dtype=torch.float32)
    with torch.cuda.device_of(pixels):
        backward_prepare_kernel[(batch,)](
            keys,
            values,
            from_pixels,
            grad_from_pixels,
            k,
            u,
            g,
            delta,
            back,
            words,
            finer,
            C=channels,
            HEADS=heads,
            **cut.helper_constants,
            num_warps=4,
        )
        _launch(
            backward_wide_kernel if cut.wide else backward_kernel,
            cut,
            batch,
            channels,
            heads,
            pixels,
            grad_from_words,
            k,
            u,
            bias,
            log_sum,
            g,
            delta,
            back,
            grad_pixels,
            key_sums,
            value_sums,
            bias_sums,
            unit,
            count,
            words,
            cut.tiles,
            cut.splits,
            finer,
        )
        _launch_combine(
            backward_combine_kernel,
            cut,
            batch,
            channels,
            heads,
            key_sums,
            value_sums,
            bias_sums,
            unit,
            grad_keys,
            grad_values,
            grad_bias,
            words,
            cut.splits,
        )
    return grad_pixels, grad_keys, grad_values, grad_bias


def _plan(direction: str, pixels: Tensor, keys: Tensor, heads: int) -> KernelPlan:
    batch, count, channels = pixels.shape
    return plan_kernels(
        direction,
        batch,
        count,
        keys.shape[1] // heads,
        channels,
        heads,
        pixels.dtype,
        _shared_memory(pixels.device),
    )


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Bytes that one program can have; the interpreter runs what the large GPUs run."""
    return (
        torch.cuda.get_device_properties(device).shared_memory_per_block_optin
        if device.type == "cuda"
        else 227 * 1024
    )


def _launch(
    kernel: triton.JITFunction,
    cut: KernelPlan,
    batch: int,
    channels: int,
    heads: int,
    *arguments: Tensor | int | float,
) -> None:
    grid = (cut.groups, cut.splits, batch) if cut.wide else (cut.splits, batch)
    more = {"blocks": cut.blocks} if cut.wide else {}
    kernel[grid](
        *arguments,
        **more,
        C=channels,
        HEADS=heads,
        **cut.constants,
        num_warps=cut.tiling.warps,
        num_stages=cut.tiling.stages,
    )


def _launch_combine(
    kernel: triton.JITFunction,
    cut: KernelPlan,
    batch: int,
    channels: int,
    heads: int,
    *arguments: Tensor | int,
) -> None:
    constants = cut.helper_constants
    kernel[(-(-channels // constants["C_"]), batch)](
        *arguments, C=channels, HEADS=heads, **constants, num_warps=4
    )


@attention_forward.register_fake
def _(
    pixels: Tensor, keys: Tensor, values: Tensor, bias: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
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
    heads: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return tuple(x.new_empty(x.shape) for x in (pixels, keys, values, bias))


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.heads = inputs
    ctx.save_for_backward(*tensors, *output[1:])


def _differentiate(
    ctx: Any, grad_from_words: Tensor | None, grad_from_pixels: Tensor | None, _: Tensor | None
) -> tuple:
    pixels, keys, values, bias, from_pixels, log_sum = ctx.saved_tensors
    grad_from_words = torch.zeros_like(pixels) if grad_from_words is None else grad_from_words
    grad_from_pixels = (
        torch.zeros_like(from_pixels) if grad_from_pixels is None else grad_from_pixels
    )
    gradients = attention_backward(
        pixels,
        keys,
        values,
        bias,
        from_pixels,
        log_sum,
        grad_from_words,
        grad_from_pixels,
        ctx.heads,
    )
    return *gradients, None


attention_forward.register_autograd(_differentiate, setup_context=_save)


def bidirectional_attention(
    pixels: Tensor, keys: Tensor, values: Tensor, bias: Tensor, heads: int = 1
) -> tuple[Tensor, Tensor]:
    """See `coupalign.kernels.bidirectional_attention`; what `plan.refusal` refuses must not come here."""
    from_words, from_pixels, _ = attention_forward(
        pixels, keys.float(), values.float(), bias.float(), heads
    )
    return from_words, from_pixels
