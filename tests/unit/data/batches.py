"""Loaders over the packed small set, what they yield as bytes, and ways to damage the set."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch

from coupalign.config.schema import Augmentation, DataConfig, Source
from coupalign.data.batch import Batch, Frame
from coupalign.data.build import build_eval_loader, build_train_loader, open_tokenizer
from coupalign.data.index import read_index
from coupalign.data.loader import EvalLoader, TrainLoader
from coupalign.distributed.world import World
from tests.unit.data.conftest import change_index


class Row(NamedTuple):
    """Everything about a training sample, its tensors as bytes."""

    number: int
    name: str
    sentence: str
    frame: Frame
    image: bytes  # uint8 [3, S, S]
    words: bytes
    word_mask: bytes
    target: bytes  # bool [S, S]


def world_of(rank: int = 0, ranks: int = 1) -> World:
    """One rank of a job, without a process group."""
    return World(
        rank=rank, size=ranks, local_rank=rank, local_size=ranks, device=torch.device("cpu")
    )


def config_of(packed: Path, **fields) -> DataConfig:
    defaults = {
        "train": (Source(index=str(packed), dataset="refcoco", split="train"),),
        "image_size": 32,
        "max_tokens": 8,
        "workers": 0,
        "shuffle_window": 2,
        "augment": Augmentation(flip=0.5, color_jitter=0.4),
    }
    return DataConfig(**{**defaults, **fields})


def train(
    config: DataConfig,
    global_batch: int = 6,
    micro: int | None = None,
    *,
    world: World | None = None,
    seed: int = 0,
) -> TrainLoader:
    return build_train_loader(
        config,
        seed=seed,
        global_batch=global_batch,
        max_micro_batch=micro,
        world=world or world_of(),
        tokenizer=open_tokenizer(config),
    )


def evaluate(
    config: DataConfig,
    split: str = "val",
    dataset: str | None = None,
    *,
    batch: int = 3,
    world: World | None = None,
    **fields,
) -> EvalLoader:
    source = Source(index=config.train[0].index, dataset=dataset, split=split)
    return build_eval_loader(
        config,
        (source,),
        batch=batch,
        world=world or world_of(),
        tokenizer=open_tokenizer(config),
        **fields,
    )


def rows_of(batch: Batch) -> list[Row]:
    rows = []
    for number, info in enumerate(batch.info):
        rows.append(
            Row(
                number=info.number,
                name=info.name,
                sentence=info.sentence,
                frame=info.frame,
                image=batch.image[number].numpy().tobytes(),
                words=batch.words[number].numpy().tobytes(),
                word_mask=batch.word_mask[number].numpy().tobytes(),
                target=batch.target[number].numpy().tobytes(),
            )
        )
    return rows


def steps_of(loader: TrainLoader, first: int, count: int) -> list[list[Row]]:
    """The rows of each step on this rank."""
    taken = list(islice(loader.steps_from(first), count))
    assert [step for step, _ in taken] == list(range(first, first + count))

    steps = []
    for _, batches in taken:
        # All micro-batches of a step are of one size.
        assert len(batches) == loader.micro_batches
        assert len({len(batch) for batch in batches}) == 1
        steps.append([row for batch in batches for row in rows_of(batch)])
    return steps


def damage(packed: Path, image_id: int, file: str, change: Callable[[bytes], bytes]) -> None:
    """Change the bytes of a file ("jpg" or "json") inside its shard, but not their number.

    The index gets their checksum, so that only their meaning gives the damage away.
    """
    index = read_index(packed)
    entry = next(image for image in index.images if image.image_id == image_id)
    offset, length = getattr(entry, file)

    with open(index.address(entry.shard), "r+b") as stream:
        stream.seek(offset)
        data = change(stream.read(length))
        assert len(data) == length
        stream.seek(offset)
        stream.write(data)

    def update_checksum(tree: dict) -> None:
        record = next(image for image in tree["images"] if image["id"] == image_id)
        record["crc"][["jpg", "json"].index(file)] = zlib.crc32(data)

    change_index(packed, update_checksum)


def cut_in_half(data: bytes) -> bytes:
    half = len(data) // 2
    return data[:half] + bytes(len(data) - half)


def blank(data: bytes) -> bytes:
    return bytes(len(data))
