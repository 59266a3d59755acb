"""The dictionary that DeepSpeed gets is derived: batch size and learning rate exist once, in our configuration."""

from __future__ import annotations

import random
from typing import Any

import pytest

from coupalign.config.load import override
from coupalign.config.schema import Config
from coupalign.engine.zero import deepspeed_config
from coupalign.errors import InputError


def derived(*changes: str, ranks: int = 1) -> dict[str, Any]:
    return deepspeed_config(override(Config(), ["engine.kind=deepspeed", *changes]), ranks)


def test_the_batch_is_always_the_global_one() -> None:
    dice = random.Random(0)
    for _ in range(200):
        ranks, share, most = dice.randint(1, 16), dice.randint(1, 40), dice.randint(1, 20)
        found = derived(
            f"train.global_batch={ranks * share}", f"train.max_micro_batch={most}", ranks=ranks
        )
        micro, accumulation = (
            found["train_micro_batch_size_per_gpu"],
            found["gradient_accumulation_steps"],
        )
        assert micro * accumulation * ranks == found["train_batch_size"] == ranks * share
        assert micro <= most
    with pytest.raises(InputError, match="train.global_batch=10"):
        derived("train.global_batch=10", ranks=4)


def test_no_learning_rate_no_precision_and_always_a_clipping() -> None:
    """DeepSpeed clips at 1.0 where the key is absent, and its own mixed precision is not ours."""
    for stage in range(4):
        found = derived(f"engine.stage={stage}")
        assert not {"optimizer", "scheduler", "bf16", "fp16", "torch_autocast"} & found.keys()
        assert found["gradient_clipping"] == 0.0
        assert found["zero_optimization"]["stage"] == stage
    assert derived("optim.clip_norm=0.5", "engine.stage=2")["gradient_clipping"] == 0.5
