"""Loaders over the packed scenes, and what they give, as bytes."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import torch

from coupalign.config.schema import Augmentation, DataConfig, Source
from coupalign.data.batch import Batch
from coupalign.data.build import build_eval_loader, build_train_loader, open_tokenizer
from coupalign.data.loader import EvalLoader, TrainLoader
from coupalign.distributed.world import World

Row = tuple


def world_of(rank: int = 0, ranks: int = 1) -> World:
    """One rank of a job, without a process group."""
    return World(
        rank=rank, size=ranks, local_rank=rank, local_size=ranks, device=torch.device("cpu")
    )


def config_of(packed: Path, **fields) -> DataConfig:
    source = Source(index=str(packed), dataset="refcoco", split="train")
    return DataConfig(
        **{
            "train": (source,),
            "image_size": 32,
            "max_tokens": 8,
            "workers": 0,
            "shuffle_window": 2,
            "augment": Augmentation(flip=0.5, color_jitter=0.4),
            **fields,
        }
    )


def train(
    config: DataConfig,
    global_batch: int = 6,
    micro: int | None = None,
    rank: int = 0,
    ranks: int = 1,
    seed: int = 0,
) -> TrainLoader:
    return build_train_loader(
        config,
        seed=seed,
        global_batch=global_batch,
        max_micro_batch=micro,
        world=world_of(rank, ranks),
        tokenizer=open_tokenizer(config),
    )


def evaluate(
    config: DataConfig,
    split: str = "val",
    dataset: str | None = None,
    batch: int = 3,
    rank: int = 0,
    ranks: int = 1,
    **fields,
) -> EvalLoader:
    source = Source(index=config.train[0].index, dataset=dataset, split=split)
    return build_eval_loader(
        config,
        (source,),
        batch=batch,
        world=world_of(rank, ranks),
        tokenizer=open_tokenizer(config),
        **fields,
    )


def rows_of(batch: Batch) -> list[Row]:
    """All that there is of each sample, as bytes."""
    return [
        (
            info.number,
            info.name,
            info.sentence,
            info.frame,
            image.numpy().tobytes(),
            words.numpy().tobytes(),
            word_mask.numpy().tobytes(),
            target.numpy().tobytes(),
        )
        for info, image, words, word_mask, target in zip(
            batch.info, batch.image, batch.words, batch.word_mask, batch.target
        )
    ]


def steps_of(loader: TrainLoader, first: int, count: int) -> list[list[Row]]:
    """The rows of each step on this rank."""
    taken = list(islice(loader.steps_from(first), count))
    assert [step for step, _ in taken] == list(range(first, first + count))
    assert all(
        len(batches) == loader.micro_batches and len({len(batch) for batch in batches}) == 1
        for _, batches in taken
    )
    return [[row for batch in batches for row in rows_of(batch)] for _, batches in taken]
