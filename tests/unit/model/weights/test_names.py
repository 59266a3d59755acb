"""The names of published weights, and the resize of Swin's tables.

The resize is compared with its definition and with timm's own.
"""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from timm.layers.pos_embed_rel import resize_rel_pos_bias_table_simple

from coupalign.model.weights.names import (
    guess_contents,
    rename_bert,
    rename_swin,
    resize_bias_table,
)


def bicubic_1d(length, new_length):
    """Return the matrix of the textbook cubic convolution, in float64.

    a = -0.75, half-pixel centers, edges repeated.
    """
    rows = np.zeros((new_length, length))
    for i in range(new_length):
        position = (i + 0.5) * length / new_length - 0.5
        first = int(np.floor(position)) - 1
        for k in range(first, first + 4):
            x = abs(position - k)
            if x <= 1:
                weight = 1.25 * x**3 - 2.25 * x**2 + 1
            else:
                weight = -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
            rows[i, min(max(k, 0), length - 1)] += weight
    return rows


# ------------------------------------------------------------------------------------ the resize


@pytest.mark.parametrize("old, new", [(7, 12), (12, 7), (7, 15), (12, 13), (7, 3), (2, 12)])
def test_resize_equals_bicubic_from_its_definition_and_timm(old, new):
    old_side, new_side = 2 * old - 1, 2 * new - 1
    generator = torch.Generator().manual_seed(old * 100 + new)
    table = torch.randn(old_side**2, 3, generator=generator)

    resized = resize_bias_table(table, new_side**2)

    # fp32 places the samples to about 2e-6 of a step. Random tables change by a few units per step.
    rows = bicubic_1d(old_side, new_side)
    grid = table.double().numpy().reshape(old_side, old_side, 3)
    expected = np.einsum("yi,xj,ijh->yxh", rows, rows, grid).reshape(-1, 3)
    np.testing.assert_allclose(resized.numpy(), expected, rtol=1e-5, atol=2e-5)
    by_timm = resize_rel_pos_bias_table_simple(table, (new, new), (new_side**2, 3))
    assert torch.equal(resized, by_timm)


def smooth_table(y, x):
    """A bump, and a slope along y, [..., 2]."""
    return torch.stack([torch.exp(-(y**2 + x**2) / 18), y / 6], -1)


def test_resize_keeps_constants_symmetry_and_the_zero_offset():
    table = torch.randn(169, 3)
    assert resize_bias_table(table, 169) is table

    constant = resize_bias_table(torch.full((169, 2), 0.7), 529)
    assert torch.allclose(constant, torch.full((529, 2), 0.7), atol=1e-6)

    y, x = torch.meshgrid(*[torch.arange(-6.0, 7)] * 2, indexing="ij")
    resized = resize_bias_table(smooth_table(y, x).reshape(169, 2), 529).reshape(23, 23, 2)
    # Offset d of the large window is d * 13 / 23 in the small one. A smooth function is followed
    # there; at the rim the table is flat.
    offsets = torch.arange(-11.0, 12) * 13 / 23
    y, x = torch.meshgrid(offsets, offsets, indexing="ij")
    assert (resized - smooth_table(y, x))[2:-2, 2:-2].abs().max() < 0.02
    assert torch.allclose(resized[..., 0], resized[..., 0].flip(0, 1), atol=1e-6), "not symmetric"
    zero_offset = resized[11, 11]
    assert torch.allclose(zero_offset, torch.tensor([1.0, 0.0]), atol=1e-6)


# --------------------------------------------------------------------------------------- guesses


@pytest.mark.parametrize(
    "name",
    [
        "swin_tiny_patch4_window7_224",
        "swin_small_patch4_window7_224",
        "swin_base_patch4_window12_384",
        "swin_large_patch4_window12_384",
        "resnet18",
        "resnet50",
        "resnet101",
        "resnet152",
        "darknet53",
    ],
)
def test_contents_are_guessed_by_their_timm_name(name):
    with torch.device("meta"):
        state = timm.create_model(name).state_dict()
    prefixed = {f"module.encoder.{key}": tensor for key, tensor in state.items()}

    assert guess_contents(state) == name
    assert guess_contents(prefixed) == name


def test_unknown_contents_are_not_guessed():
    assert guess_contents({"a.weight": torch.zeros(1)}) is None
    assert guess_contents({}) is None


# ----------------------------------------------------------------------------------- translation


def test_names_that_need_no_translation_are_kept():
    names = {"layers.1.downsample.reduction.weight", "conv1.weight", "layer1.0.downsample.0.weight"}
    assert rename_swin(names) == ({name: name for name in names}, None)

    names = {"embeddings.LayerNorm.weight", "encoder.layer.0.output.dense.bias"}
    assert rename_bert(names) == ({name: name for name in names}, None)
