"""MaskProposals: symmetry in the queries, positions, sizes."""

from __future__ import annotations

import pytest
import torch

from coupalign.config.schema import ProposalsConfig
from coupalign.errors import InputError
from coupalign.model.proposals import MaskProposals, sine_positions

SIZES = ProposalsConfig(count=5, layers=2, heads=2, ffn=16)


@pytest.mark.parametrize("channels", [(12,), (8, 12)])
def test_proposals_are_permuted_with_their_queries(channels):
    torch.manual_seed(0)
    proposals = MaskProposals(channels, 16, SIZES).double()
    maps = [torch.randn(2, 3 + i, 3 + i, c, dtype=torch.float64) for i, c in enumerate(channels)]

    before = proposals(maps)
    with torch.no_grad():
        proposals.queries.copy_(proposals.queries.flip(0))
    after = proposals(maps)

    assert before.shape == (2, 5, 16)
    torch.testing.assert_close(after, before.flip(1))


def test_proposals_depend_on_pixel_positions():
    torch.manual_seed(0)
    proposals = MaskProposals((12,), 16, SIZES)
    pixels = torch.randn(1, 4, 4, 12)

    assert not torch.allclose(proposals([pixels]), proposals([pixels.flip(2)]), atol=1e-3)


def test_proposals_refuse_widths_that_do_not_fit():
    with pytest.raises(InputError, match="multiple of 4"):
        MaskProposals((12,), 18, SIZES)


def test_sine_positions_are_distinct_and_separable():
    grid = sine_positions(6, 7, 16, torch.device("cpu")).view(6, 7, 16)

    # The first half of the channels depends on y only, the second on x only.
    assert torch.equal(grid[:, :1, :8].expand(-1, 7, -1), grid[..., :8])
    assert torch.equal(grid[:1, :, 8:].expand(6, -1, -1), grid[..., 8:])

    pixels = grid.flatten(0, 1)
    distances = torch.cdist(pixels, pixels) + 9 * torch.eye(42)
    assert distances.min() > 0.05
