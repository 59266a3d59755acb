"""DeepSpeed's dictionary is derived: batch size and learning rate exist once, in our own config."""

from __future__ import annotations

import random
from typing import Any

import pytest

from coupalign.config.load import override
from coupalign.config.schema import Config
from coupalign.engine.zero import deepspeed_config
from coupalign.errors import InputError


def derive(*changes: str, ranks: int = 1) -> dict[str, Any]:
    return deepspeed_config(override(Config(), ["engine.kind=deepspeed", *changes]), ranks)


def test_batch_sizes_multiply_to_the_global_batch() -> None:
    dice = random.Random(0)
    for _ in range(200):
        ranks, share, max_size = dice.randint(1, 16), dice.randint(1, 40), dice.randint(1, 20)

        derived = derive(
            f"train.global_batch={ranks * share}", f"train.max_micro_batch={max_size}", ranks=ranks
        )

        micro_batch = derived["train_micro_batch_size_per_gpu"]
        accumulation = derived["gradient_accumulation_steps"]
        assert derived["train_batch_size"] == ranks * share
        assert micro_batch * accumulation * ranks == ranks * share
        assert micro_batch <= max_size


def test_global_batch_that_the_ranks_cannot_share_is_refused() -> None:
    with pytest.raises(InputError, match="train.global_batch=10"):
        derive("train.global_batch=10", ranks=4)


def test_clipping_is_always_set_and_learning_rate_and_precision_never() -> None:
    """DeepSpeed clips at 1.0 if the key is absent, and its own mixed precision is not ours."""
    for stage in range(4):
        derived = derive(f"engine.stage={stage}")

        assert not {"optimizer", "scheduler", "bf16", "fp16", "torch_autocast"} & derived.keys()
        assert derived["gradient_clipping"] == 0.0
        assert derived["zero_optimization"]["stage"] == stage

    clipping = derive("optim.clip_norm=0.5", "engine.stage=2")
    assert clipping["gradient_clipping"] == 0.5
