"""Samples made on the spot and a model that answers them, for the tests of scoring."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from coupalign.data.batch import Batch, SampleInfo
from coupalign.data.build import eval_batches
from coupalign.data.transforms import frame_of
from coupalign.distributed.world import World
from coupalign.evaluation.evaluator import Evaluation, evaluate
from coupalign.evaluation.protocols import find_protocol

SIZE = 16


def world_of(rank: int, ranks: int) -> World:
    return World(rank, ranks, rank, ranks, torch.device("cpu"))


@dataclass
class ExampleLoader:
    """Stands in for `EvalLoader`, with its way to deal batches to ranks."""

    samples: int = 23
    batch: int = 4
    rank: int = 0
    ranks: int = 1
    images: bool = False
    both_rules: bool = False
    skip: tuple[int, ...] = ()
    fingerprint: str = "f" * 64

    @property
    def names_and_sentences(self) -> list[tuple[str, str]]:
        return [
            (f"refshapes/none/{number // 2}/{number}", f'sentence {number}, "the" last')
            for number in range(self.samples)
        ]

    @property
    def members(self) -> dict[str, np.ndarray]:
        numbers = np.arange(self.samples)
        if self.both_rules:
            return {"each": numbers, "first": numbers[::2]}
        return {"each": numbers}

    def __iter__(self) -> Iterator[Batch]:
        batches, spare = eval_batches(self.samples, self.batch, world_of(self.rank, self.ranks))
        for position, numbers in enumerate(batches):
            batch = self.collate([number for number in numbers if number not in self.skip])
            yield replace(batch, spare=position >= len(batches) - spare)

    def collate(self, numbers: list[int]) -> Batch:
        # The image says the number of its sample, which is all that `infer` looks at.
        infos = tuple(self.info(number) for number in numbers)
        images = [torch.full((3, SIZE, SIZE), number, dtype=torch.uint8) for number in numbers]
        tokens = torch.zeros(len(infos), 5, dtype=torch.int64)
        return Batch(
            image=torch.stack(images),
            words=tokens,
            word_mask=tokens == 0,
            target=None,
            info=infos,
        )

    def info(self, number: int) -> SampleInfo:
        random = np.random.default_rng(number)
        height, width = random.integers(10, 30, 2).tolist()
        truth = np.zeros((height, width), bool)
        truth[height // 4 : height // 2, width // 4 : width * 3 // 4] = True

        image = np.full((height, width, 3), number, np.uint8) if self.images else None
        name, sentence = self.names_and_sentences[number]
        return SampleInfo(
            number=number,
            name=name,
            sentence=sentence,
            frame=frame_of(height, width, SIZE, "letterbox"),
            image_id=number // 4,
            category="star",
            same_class=number % 3 - 1,
            truth=truth,
            image=image,
            cut=number % 5 == 0,
            unknown=number % 8 == 0,
        )


def infer(batch: Batch) -> torch.Tensor:
    """Logits of a model whose answer to a sample depends on the sample alone."""
    logits = []
    for image in batch.image:
        random = torch.Generator().manual_seed(int(image[0, 0, 0]))
        logits.append(torch.randn(SIZE, SIZE, generator=random))
    return torch.stack(logits) + 0.3


def evaluate_one(
    loader: ExampleLoader, protocol: str = "ris-v1", model=infer, **options
) -> Evaluation:
    """The evaluation under one protocol, every sentence a sample."""
    options = {"bootstrap": 0, **options}
    results = evaluate(model, loader, [find_protocol(protocol)], **options)
    return results[protocol, "each"]
