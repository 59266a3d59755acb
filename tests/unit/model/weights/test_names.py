"""The names of published weights, and the resize of Swin's tables against its definition and timm's own."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from timm.layers.pos_embed_rel import resize_rel_pos_bias_table_simple

from coupalign.model.weights.names import (
    bert_names,
    looks_like,
    resize_bias_table,
    swin_names,
)


def bicubic_1d(count, wanted):
    """Matrix of the textbook cubic convolution (a = -0.75, half-pixel centers, edges repeated), in float64."""
    rows = np.zeros((wanted, count))
    for i in range(wanted):
        at = (i + 0.5) * count / wanted - 0.5
        for k in range(int(np.floor(at)) - 1, int(np.floor(at)) + 3):
            x = abs(at - k)
            kernel = (
                1.25 * x**3 - 2.25 * x**2 + 1 if x <= 1 else -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
            )
            rows[i, min(max(k, 0), count - 1)] += kernel
    return rows


@pytest.mark.parametrize("old,new", [(7, 12), (12, 7), (7, 15), (12, 13), (7, 3), (2, 12)])
def test_resize_equals_bicubic_from_its_definition_and_timm(old, new):
    table = torch.randn(
        (2 * old - 1) ** 2, 3, generator=torch.Generator().manual_seed(old * 100 + new)
    )
    resized = resize_bias_table(table, (2 * new - 1) ** 2)
    rows = bicubic_1d(2 * old - 1, 2 * new - 1)
    grid = np.einsum(
        "yi,xj,ijh->yxh", rows, rows, table.double().numpy().reshape(2 * old - 1, 2 * old - 1, 3)
    )
    # fp32 places the samples to about 2e-6 of a step; random tables change by up to a few units in a step
    np.testing.assert_allclose(resized.numpy(), grid.reshape(-1, 3), rtol=1e-5, atol=2e-5)
    assert torch.equal(
        resized, resize_rel_pos_bias_table_simple(table, (new, new), ((2 * new - 1) ** 2, 3))
    )


def test_resize_keeps_what_it_must():
    table = torch.randn(169, 3)
    assert resize_bias_table(table, 169) is table
    assert torch.allclose(
        resize_bias_table(torch.full((169, 2), 0.7), 529), torch.full((529, 2), 0.7), atol=1e-6
    )
    y, x = torch.meshgrid(*[torch.arange(-6.0, 7)] * 2, indexing="ij")
    bump = torch.stack([torch.exp(-(y**2 + x**2) / 18), y / 6], -1).reshape(169, 2)
    resized = resize_bias_table(bump, 529).reshape(23, 23, 2)
    # offset d of the large window lies at d * 13 / 23 of the small one: a smooth function is followed there, the rim is flat
    offsets = torch.arange(-11.0, 12) * 13 / 23
    y, x = torch.meshgrid(offsets, offsets, indexing="ij")
    expected = torch.stack([torch.exp(-(y**2 + x**2) / 18), y / 6], -1)
    assert (resized - expected)[2:-2, 2:-2].abs().max() < 0.02
    assert torch.allclose(resized[..., 0], resized[..., 0].flip(0, 1), atol=1e-6), "not symmetric"
    assert torch.allclose(resized[11, 11], torch.tensor([1.0, 0.0]), atol=1e-6), (
        "the zero offset moved"
    )


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
def test_files_are_recognized_by_their_timm_name(name):
    with torch.device("meta"):
        state = timm.create_model(name).state_dict()
    assert looks_like(state) == name
    assert looks_like({f"module.encoder.{key}": tensor for key, tensor in state.items()}) == name


def test_unknown_files_look_like_nothing():
    assert looks_like({"a.weight": torch.zeros(1)}) is None and looks_like({}) is None


def test_names_that_need_no_translation_stay():
    names = {"layers.1.downsample.reduction.weight", "conv1.weight", "layer1.0.downsample.0.weight"}
    assert swin_names(names) == ({name: name for name in names}, None)
    names = {"embeddings.LayerNorm.weight", "encoder.layer.0.output.dense.bias"}
    assert bert_names(names) == ({name: name for name in names}, None)
