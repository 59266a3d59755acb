"""Any number of ranks gives the same counts for every sample, in fp32 and in bf16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from coupalign.config.load import override
from coupalign.config.schema import Config, Source
from coupalign.data.batch import Batch
from coupalign.data.build import open_tokenizer
from coupalign.data.table import RULES
from coupalign.distributed.world import World
from coupalign.engine.base import MixedPrecision, infer_logits
from coupalign.evaluation.protocols import PROTOCOLS
from coupalign.model.build import build_model
from coupalign.scoring.splits import ScoreRequest, score_set
from tests.distributed.jobs import TINY
from tests.distributed.ranks import run_ranks


def score_untrained_model(world: World, config: Config, shards: Path) -> dict[Any, Any]:
    """Rows and score of an untrained model under each protocol and sentence rule."""
    source = Source(index=str(shards), split="val")
    data = config.data.model_copy(update={"train": (source,), "workers": 0})
    config = config.model_copy(update={"data": data})
    tokenizer = open_tokenizer(config.data)
    torch.manual_seed(0)
    model = build_model(config.model, len(tokenizer), config.data.image_size)
    net = MixedPrecision(model, config.precision).eval()

    def infer(batch: Batch) -> torch.Tensor:
        # An untrained model predicts nothing without the offset.
        return infer_logits(net, batch) + 2.0

    scored = score_set(
        infer,
        config,
        "val",
        source,
        tokenizer=tokenizer,
        world=world,
        request=ScoreRequest(protocols=list(PROTOCOLS), rules=RULES),
    )
    if world.is_main:
        scored.write_rows(config.directory)
    return {
        key: (evaluation.rows.tolist(), evaluation.score and evaluation.score.to_json())
        for key, evaluation in scored.evaluations.items()
    }


@pytest.mark.parametrize(
    "changes",
    [
        ["evaluate.batch=4"],
        ["evaluate.batch=5", "precision=bf16"],
        ["evaluate.batch=1", "evaluate.limit=2"],  # fewer samples than ranks
    ],
    ids=["fp32", "bf16", "few"],
)
def test_any_number_of_ranks_gives_the_same_counts(
    shards: Path, tmp_path: Path, changes: list[str]
) -> None:
    results, files = [], []
    for ranks in (1, 2, 3):
        config = override(
            Config(run_dir=tmp_path / str(ranks)), [*TINY, "evaluate.bootstrap=20", *changes]
        )
        results.append(run_ranks(score_untrained_model, ranks, config, shards)[0])
        folder = config.directory / "scores"
        files.append({file.name: file.read_bytes() for file in folder.iterdir()})

    assert results[0] == results[1] == results[2]
    has_hit = any(inside for rows, _ in results[0].values() for _, inside, *_ in rows)
    assert has_hit, "a prediction that never hits proves nothing"

    assert files[0] == files[1] == files[2]
    assert len(files[0]) == len(PROTOCOLS) * len(RULES)
