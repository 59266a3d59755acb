"""1, 2 and 3 ranks give the same integers, sample by sample."""

from __future__ import annotations

from pathlib import Path

import torch

from coupalign.config.load import override
from coupalign.config.schema import Config, Source
from coupalign.data.build import open_tokenizer
from coupalign.data.table import RULES
from coupalign.distributed.world import World
from coupalign.evaluation.protocols import PROTOCOLS
from coupalign.model.build import build_model
from coupalign.scoring.splits import ScoreRequest, score_split
from tests.distributed.jobs import TINY
from tests.distributed.ranks import run_ranks


def score(world: World, config: Config, shards: Path) -> dict[str, object]:
    """Rows and score of an untrained model under each protocol and sentence rule."""
    source = Source(index=str(shards), split="val")
    config = config.model_copy(
        update={"data": config.data.model_copy(update={"train": (source,), "workers": 0})}
    )
    tokenizer = open_tokenizer(config.data)
    torch.manual_seed(0)
    model = build_model(config.model, len(tokenizer), config.data.image_size).eval()

    def infer(batch: object) -> torch.Tensor:
        with torch.no_grad():
            return (
                model(batch.image, batch.words, batch.word_mask) + 2.0
            )  # a random start predicts nothing without it

    results = score_split(
        infer,
        config,
        "val",
        source,
        tokenizer=tokenizer,
        world=world,
        request=ScoreRequest(protocols=list(PROTOCOLS), rules=RULES),
    )
    return {
        key: (evaluation.rows.tolist(), evaluation.score and evaluation.score.to_json())
        for key, evaluation in results.items()
    }


def test_any_number_of_ranks_gives_the_same_integers(shards: Path, tmp_path: Path) -> None:
    configs = [
        override(
            Config(run_dir=tmp_path / str(ranks)),
            [*TINY, "evaluate.batch=4", "evaluate.bootstrap=20"],
        )
        for ranks in (1, 2, 3)
    ]
    one, two, three = (
        run_ranks(score, ranks, config, shards)[0] for ranks, config in zip((1, 2, 3), configs)
    )
    assert one == two == three
    assert any(inside for rows, _ in one.values() for _, inside, *_ in rows), (
        "a prediction that never hits proves nothing"
    )
    files = [
        {file.name: file.read_bytes() for file in (config.directory / "scores").iterdir()}
        for config in configs
    ]
    assert files[0] == files[1] == files[2] and len(files[0]) == 9
