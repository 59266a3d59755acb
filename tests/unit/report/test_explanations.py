"""What a model looked at: one sheet for a model with alignments, nothing for any other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from coupalign.config.schema import CoupAlignConfig, DataConfig, LavtConfig
from coupalign.data.tokenizer import SPECIAL, Tokenizer
from coupalign.model.build import build_model
from coupalign.report.explanations import build_explainer
from tests.unit.report.examples import evaluation_of

WORDS = "left one man a cup dark dog red star the second"
ENCODERS = {
    "image": {"kind": "small", "widths": [16, 16, 32, 32]},
    "text": {"kind": "small", "width": 32, "layers": 4, "heads": 2},
}
COUPALIGN = {
    **ENCODERS,
    "decoder": {"width": 32},
    "proposals": {"count": 3, "layers": 1, "ffn": 32},
}
LAVT = {**ENCODERS, "kind": "lavt", "decoder": {"width": 16}}


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join([*SPECIAL, *WORDS.split()]) + "\n")
    return Tokenizer.open(path)


def data_of(resize: str) -> DataConfig:
    return DataConfig.model_validate(
        {
            "train": [{"index": "shards", "split": "train"}],
            "image_size": 64,
            "max_tokens": 8,
            "resize": resize,
        }
    )


@pytest.mark.parametrize("resize", ["squash", "letterbox"])
def test_explainer_draws_proposals_and_words_of_each_stage(resize: str, tokenizer: Tokenizer):
    model = build_model(CoupAlignConfig.model_validate(COUPALIGN), len(tokenizer), 64)
    picture = evaluation_of().pictures[1]  # "left one": four tokens
    explain = build_explainer(model.eval(), tokenizer, data_of(resize))

    sheet = explain(picture)

    rows = 1 + 4  # the proposals, and four stages of one row of words
    assert sheet.width == 4 * 160 + 5 * 8
    assert rows * 107 < sheet.height < rows * 180
    assert np.array_equal(np.asarray(explain(picture)), np.asarray(sheet))


@pytest.mark.parametrize("resize", ["squash", "letterbox"])
def test_explainer_draws_nothing_for_model_without_alignments(resize: str, tokenizer: Tokenizer):
    model = build_model(LavtConfig.model_validate(LAVT), len(tokenizer), 64)
    explain = build_explainer(model.eval(), tokenizer, data_of(resize))

    assert explain(evaluation_of().pictures[1]) is None
