"""LTS: the loss of its heat map."""

from __future__ import annotations

import torch

from coupalign.model.baselines.lts import append_coordinates, location_loss
from tests.unit.model.baselines.examples import BASELINES, SIDE, build_small
from tests.unit.model.examples import model_inputs


def test_location_loss_compares_the_heat_map_with_the_share_of_the_object_in_each_cell():
    # The object covers half of the first of four cells.
    target = torch.zeros(1, 32, 32, dtype=torch.bool)
    target[0, :16, :8] = True
    share = torch.tensor([0.5, 0, 0, 0]).view(1, 1, 2, 2)
    heat = torch.randn(1, 1, 2, 2)

    p = heat.sigmoid()
    expected = -(share * p.log() + (1 - share) * (1 - p).log()).mean()

    assert torch.allclose(location_loss(heat, target), expected)


def test_loss_is_the_sum_of_mask_and_location_loss():
    model = build_small(BASELINES["lts"])

    losses = model(*model_inputs(side=SIDE))

    assert torch.allclose(losses["loss"], losses["mask"] + losses["locate"])


def test_append_coordinates_keeps_pixels_and_marks_each_position():
    pixels = torch.randn(2, 5, 3, 4)

    out = append_coordinates(pixels)

    assert out.shape == (2, 13, 3, 4) and torch.equal(out[:, :5], pixels)
    positions = out[0, 5:].flatten(1).T
    assert len(positions.unique(dim=0)) == 12
