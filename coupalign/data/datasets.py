"""What runs in a worker process: the keys of a micro-batch in, a batch out.

A worker receives (epoch, sample number) keys and holds no state, so any worker can read any batch.
A training sample that cannot be read is treated as `data.bad_samples` says; an evaluation leaves no
sample out. What a user must fix leaves the worker as a `Failure`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch.utils.data import Dataset

from coupalign.data.batch import Batch, SampleInfo
from coupalign.data.samples import BadSample, Key, SampleReader
from coupalign.data.workers import Failure
from coupalign.errors import InputError

# Samples that pass through each stage of reading together. Their JPEGs are held in memory.
GROUP_SIZE = 32

MAX_REPLACEMENTS = 100  # bad samples in a row


class TrainSamples(Dataset):
    """Reads training micro-batches, under the policy for bad samples."""

    def __init__(self, reader: SampleReader, seed: int) -> None:
        self.reader = reader
        self._seed = seed

    def __getitem__(self, keys: Sequence[Key]) -> Batch | Failure:
        try:
            return self._read_batch(keys)
        except InputError as error:
            return Failure(str(error))

    def _read_batch(self, keys: Sequence[Key]) -> Batch:
        buffers = self.reader.allocate(len(keys), target=True)
        assert buffers.target is not None
        image, target = buffers.image.numpy(), buffers.target.numpy()

        infos: list[SampleInfo] = []
        bad: list[str] = []
        for first in range(0, len(keys), GROUP_SIZE):
            group = slice(first, first + GROUP_SIZE)
            infos += self._read_group(keys[group], image[group], target[group], bad)
        return self.reader.collate(buffers, infos, bad)

    def _read_group(
        self, keys: Sequence[Key], image: np.ndarray, target: np.ndarray, bad: list[str]
    ) -> list[SampleInfo]:
        """Write some samples, and add those that had to be replaced to `bad`."""
        try:
            return self.reader.read_train_samples(self._seed, keys, image, target)
        except BadSample:
            # Read one at a time, to replace only those that cannot be read.
            infos = []
            for row, key in enumerate(keys):
                own = slice(row, row + 1)
                infos.append(self._read_or_replace(key, image[own], target[own], bad))
            return infos

    def _read_or_replace(
        self, key: Key, image: np.ndarray, target: np.ndarray, bad: list[str]
    ) -> SampleInfo:
        """Write a sample, or the next one that can be read: the size of a batch is fixed."""
        epoch, number = key
        samples = len(self.reader.table)
        for offset in range(min(samples, MAX_REPLACEMENTS)):
            candidate = (epoch, (number + offset) % samples)
            try:
                return self.reader.read_train_samples(self._seed, [candidate], image, target)[0]
            except BadSample as error:
                if self.reader.config.bad_samples == "fail":
                    raise InputError(
                        f"unreadable sample {error}. "
                        "Pack the shard again, or set data.bad_samples=skip"
                    ) from error
                bad.append(str(error))

        raise InputError(
            f"{len(bad)} samples in a row cannot be read, the last one {bad[-1]}. "
            "`coupalign verify` lists what is damaged"
        )


class EvalSamples(Dataset):
    """Reads evaluation batches, given the numbers of their samples.

    Args:
        donors: int64 [n], the sample whose sentence each sample gets. None: its own.
        images: also return each image at its original size.
    """

    def __init__(self, reader: SampleReader, donors: np.ndarray | None, images: bool) -> None:
        self.reader = reader
        self._donors = donors
        self._images = images

    def __getitem__(self, numbers: Sequence[int]) -> Batch | Failure:
        try:
            return self._read_batch(numbers)
        except BadSample as error:
            return Failure(
                f"unreadable sample {error}. "
                "An evaluation leaves no sample out: pack the shard again"
            )
        except InputError as error:
            return Failure(str(error))

    def _read_batch(self, numbers: Sequence[int]) -> Batch:
        buffers = self.reader.allocate(len(numbers), target=False)

        infos = []
        for number, square in zip(numbers, buffers.image.numpy()):
            donor = None if self._donors is None else int(self._donors[number])
            infos.append(
                self.reader.read_eval_sample(number, donor, with_image=self._images, square=square)
            )
        return self.reader.collate(buffers, infos)
