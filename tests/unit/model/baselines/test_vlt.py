"""VLT: query generation against its formula, and its sizes."""

from __future__ import annotations

import math

import pytest
import torch

from coupalign.config.schema import VltConfig
from coupalign.errors import InputError
from tests.unit.model.baselines.examples import BASELINES, ENCODERS, SIDE, build_small

WIDTH = 16
GRID = SIDE // 16


@torch.no_grad()
def test_queries_are_the_words_as_a_view_weights_them():
    generation = build_small(BASELINES["vlt"]).generation
    mask = torch.tensor([[True, True, True, False]])
    fused, words = torch.randn(1, WIDTH, GRID, GRID), torch.randn(1, 4, WIDTH)

    queries, views = generation(fused, words, mask)[0], generation.views(fused)[0]

    real = words[0, :3]
    for n in range(3):
        asked = torch.tanh(generation.ask(views[n].flatten()))
        answers = [torch.tanh(generation.answer(word)) for word in real]
        scores = [float(asked @ answer) / math.sqrt(WIDTH) for answer in answers]
        total = sum(map(math.exp, scores))
        carried = [torch.tanh(generation.carry(word)) for word in real]
        expected = sum(math.exp(score) / total * word for score, word in zip(scores, carried))
        torch.testing.assert_close(queries[n], expected)


def test_queries_depend_on_the_image():
    """The same sentence is weighted differently for each picture."""
    model = build_small(BASELINES["vlt"])
    words, mask = torch.randn(1, 5, WIDTH).expand(2, -1, -1), torch.ones(2, 5, dtype=torch.bool)

    queries = model.generation(torch.randn(2, WIDTH, GRID, GRID), words, mask)

    assert queries.shape == (2, 3, WIDTH)
    assert not torch.allclose(queries[0], queries[1], atol=1e-5)
    assert not torch.allclose(queries[0, 0], queries[0, 1], atol=1e-5), "all queries are equal"


def test_width_must_be_a_multiple_of_heads():
    wrong = VltConfig.model_validate({**ENCODERS, "transformer": {"width": 20, "heads": 8}})
    message = (
        "model.transformer.width = 20 must be a multiple of 4 and of model.transformer.heads = 8"
    )

    with pytest.raises(InputError, match=message):
        build_small(wrong)
