"""PointRefinement: which pixels it changes, what it reads, what it trains."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from coupalign.config.schema import (
    CoupAlignConfig,
    DecoderConfig,
    ProposalsConfig,
    RefineConfig,
    SmallBackbone,
    SmallText,
)
from coupalign.model.build import build_model
from coupalign.model.refine import _surrounding_colors
from tests.unit.model.examples import VOCABULARY, model_inputs

POINTS = 7
CONFIG = CoupAlignConfig(
    image=SmallBackbone(widths=(8, 8, 16, 16)),
    text=SmallText(width=16, heads=2),
    decoder=DecoderConfig(width=16),
    proposals=ProposalsConfig(count=3, layers=1, heads=2, ffn=16),
)


@pytest.fixture
def models() -> tuple[nn.Module, nn.Module]:
    """A model with refinement, and one with the same weights without it."""
    torch.manual_seed(0)
    config = CONFIG.model_copy(update={"refine": RefineConfig(points=POINTS)})
    refining = build_model(config, VOCABULARY, 32).eval()
    for parameter in refining.wpa.parameters():
        nn.init.normal_(parameter, std=0.3)

    plain = build_model(CONFIG, VOCABULARY, 32).eval()
    weights = refining.state_dict().items()
    plain.load_state_dict({name: x for name, x in weights if not name.startswith("refine.")})
    return refining, plain


def assert_only_uncertain_pixels_moved(coarse: Tensor, refined: Tensor, by: float) -> None:
    changed = (coarse != refined).nonzero().flatten().tolist()
    uncertain = coarse.abs().topk(POINTS, largest=False).indices.tolist()
    assert sorted(changed) == sorted(uncertain)
    torch.testing.assert_close(refined[changed], coarse[changed] + by)


@torch.no_grad()
def test_refinement_starts_at_zero_and_changes_only_the_least_certain_pixels(models):
    refining, plain = models
    image, words, mask, _ = model_inputs()
    coarse = plain(image, words, mask)

    torch.testing.assert_close(refining(image, words, mask), coarse, rtol=0, atol=0)

    refining.refine.decide[-1].bias += 1.0
    refined = refining(image, words, mask)
    for one, other in zip(coarse.flatten(1), refined.flatten(1)):
        assert_only_uncertain_pixels_moved(one, other, by=1.0)


def test_point_loss_trains_the_refinement_and_nothing_else(models):
    refining, plain = models
    with torch.no_grad():
        refining.refine.decide[-1].bias += 1.0
    inputs = model_inputs()

    losses, plain_losses = refining(*inputs), plain(*inputs)
    losses["loss"].backward()
    plain_losses["loss"].backward()

    assert losses["points"] > 0
    assert set(losses) == {"loss", "mask", "dice", "contrast", "points"}
    assert refining.refine.decide[-1].bias.grad.abs() > 0
    expected = {name: p.grad for name, p in plain.named_parameters()}
    for name, p in refining.named_parameters():
        if not name.startswith("refine."):
            message = f"{name} learns from the points"
            torch.testing.assert_close(p.grad, expected[name], rtol=0, atol=0, msg=message)


def test_surrounding_colors_equal_a_loop_over_points_with_repeated_edges():
    colors = torch.randn(2, 5, 5, 3, generator=torch.Generator().manual_seed(0))
    y, x = torch.tensor([[0, 4, 2], [3, 0, 1]]), torch.tensor([[0, 4, 3], [1, 2, 0]])

    actual = _surrounding_colors(colors, y, x)

    for b in range(2):
        for k in range(3):
            expected = []
            for i in (-1, 0, 1):
                for j in (-1, 0, 1):
                    row = min(max(int(y[b, k]) + i, 0), 4)
                    column = min(max(int(x[b, k]) + j, 0), 4)
                    expected.append(colors[b, row, column])
            torch.testing.assert_close(actual[b, k], torch.cat(expected))
