"""Scores a model on a data set over any number of ranks: integers are gathered, repeats removed, one rank does the sums.

The file of rows that a scoring leaves behind:

    sample_id,intersection,union,iou
    refcoco/unc/1/5,1200,1500,0.800000
"""
from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from coupalign.errors import InputError
from coupalign.evaluation.metrics import Empty, Score, deduplicate, ious, summarize
from coupalign.evaluation.pictures import Picture, prune
from coupalign.evaluation.protocols import Protocol, logits_at_original_size
from coupalign.files import whole_file
from coupalign.watch import doing

if TYPE_CHECKING:
    from coupalign.data.batch import Batch, SampleInfo
    from coupalign.data.loader import EvalLoader

_COLUMNS = ("sample_id", "intersection", "union", "iou")
_GPU_SLACK = 0.01  # share of the union by which a sample that two ranks scored may differ on a GPU


class Stopped(Exception):
    """The scoring was asked to end early."""


@dataclass(frozen=True)
class Evaluation:
    """What a scoring gives: `score` on rank 0 (none elsewhere), `rows` int64 [n, 3] of all ranks, `pictures` of this rank."""

    score: Score | None
    rows: np.ndarray
    pictures: tuple[Picture, ...] = ()


def evaluate(infer: Callable[[Batch], Tensor], loader: EvalLoader, protocol: Protocol, *,
             gather: Callable[[np.ndarray], np.ndarray] = lambda rows: rows, rank: int = 0,
             device: torch.device | str | None = None, bootstrap: int = 1000, seed: int = 0, pictures: int = 0,
             conditions: Mapping[str, str] | None = None, title: str = "scoring",
             stopped: Callable[[], bool] = lambda: False) -> Evaluation:
    """Score every sample of `loader`; collective over the ranks whose rows `gather` brings together.

    Args:
        infer: batch -> logits float [B, S, S], in the model's evaluation mode, without gradients.
        loader: this rank's share; built with images=True where pictures are wanted.
        gather: int64 [n, k] of this rank -> the rows of all ranks, on every rank.
        device: where batches are sent first; none: `infer` does it.
        bootstrap: resamples of whole images for the intervals; 0: none.
        pictures: how many samples of each kind (see `pictures.choose_pictures`) this rank keeps.
        conditions: words printed with the score, from `protocols.describe_conditions`.
        title: of the progress bar, which rank 0 shows.
        stopped: asked before each batch, on every rank; true on all of them ends the scoring.

    Raises:
        InputError: the loader is empty.
        Stopped: `stopped` said so.
        FloatingPointError: the model gave NaN or infinity; names the samples. The same on every rank.
        AssertionError: a sample is missing, or two ranks disagree about one; names it.
    """
    if not loader.samples:
        raise InputError("nothing to score: the split holds no samples")
    rows: list[tuple[int, ...]] = []
    shelf: list[Picture] = []
    slack = 0.0
    for place, batch in enumerate(tqdm(loader, desc=title, unit="batch", disable=rank != 0, leave=False)):
        if stopped():
            raise Stopped
        doing(f"{title}: batch {place + 1}")
        logits = infer(batch if device is None else batch.to(device))
        slack = _GPU_SLACK if logits.is_cuda else slack
        for info, one in zip(batch.info, logits):
            rows.append(_score_sample(one, info, protocol))
            if pictures:
                shelf.append(_picture(one, info, rows[-1], protocol))
        shelf = prune(shelf, pictures)
    doing(f"{title}: gathering the rows")
    gathered = gather(np.asarray(rows, dtype=np.int64).reshape(-1, 6))
    kept = deduplicate(gathered, slack)
    _check_complete(kept, loader)
    score = _score(kept, loader, protocol, bootstrap, seed, conditions or {}) if rank == 0 else None
    return Evaluation(score, kept[:, :3], tuple(shelf))


def with_language_blind(score: Score, blind: Score) -> Score:
    """`score` with the score of the same model on the same samples with shuffled sentences beside it."""
    same = (score.protocol, score.samples, score.fingerprint) == (blind.protocol, blind.samples, blind.fingerprint)
    assert same, "the language-blind score was taken on other samples or under another protocol"
    return replace(score, language_blind=blind)


def write_rows(path: Path, rows: np.ndarray, names: Sequence[str], empty: Empty = "one") -> None:
    """Write rows [n, 3], sorted by sample number, as CSV: whole or not at all. `names[number]` is the sample's id."""
    with whole_file(Path(path), "w") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(_COLUMNS)
        for (number, inside, union), iou in zip(rows.tolist(), ious(rows, empty)):
            table.writerow((names[number], inside, union, f"{iou:.6f}"))


def read_rows(path: Path) -> tuple[np.ndarray, list[str]]:
    """Read what `write_rows` wrote: (rows int64 [n, 3] numbered from 0 in the order of the file, names).

    Raises:
        InputError: no such file, or not such a file; names file and line.
    """
    try:
        with open(path, encoding="utf-8", newline="") as file:
            lines = list(csv.reader(file))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    if not lines or tuple(lines[0]) != _COLUMNS:
        raise InputError(f"{path}: line 1: expected the columns {','.join(_COLUMNS)}")
    rows, names = [], []
    for number, line in enumerate(lines[1:]):
        try:
            name, inside, union, _ = line
            rows.append((number, int(inside), int(union)))
        except ValueError:
            raise InputError(f"{path}: line {number + 2}: expected {','.join(_COLUMNS)}, found {','.join(line)!r}") from None
        names.append(name)
    return np.asarray(rows, dtype=np.int64).reshape(-1, 3), names


def _score_sample(logits: Tensor, info: SampleInfo, protocol: Protocol) -> tuple[int, ...]:
    """(number, intersection, union, image id, whether the sentence was cut, whether the logits are broken)."""
    assert info.truth is not None, f"{info.name}: the loader gave no truth"
    inside, union = protocol.count(logits, info.frame, info.truth)
    return info.number, inside, union, info.image_id, int(info.cut), int(not torch.isfinite(logits).all())


def _picture(logits: Tensor, info: SampleInfo, row: tuple[int, ...], protocol: Protocol) -> Picture:
    assert info.image is not None, f"{info.name}: pictures need a loader with images=True"
    prediction = (logits_at_original_size(logits, info.frame) > 0).cpu().numpy()
    iou = float(ious(np.asarray([row[:3]], dtype=np.int64), protocol.empty)[0])
    return Picture(info.number, info.name, info.sentence, iou, info.image, info.truth, prediction)


def _check_complete(rows: np.ndarray, loader: EvalLoader) -> None:
    missing = np.setdiff1d(np.arange(loader.samples), rows[:, 0])
    assert not len(missing), f"{len(missing)} of {loader.samples} samples were not scored: {_first_names(missing, loader)}"
    assert len(rows) == loader.samples, f"scored samples that the loader does not list: number {rows[-1, 0]} of {loader.samples}"
    broken = rows[rows[:, 5] > 0, 0]
    if len(broken):
        first = _first_names(broken, loader)
        raise FloatingPointError(f"the model gave NaN or infinity on {len(broken)} of {loader.samples} samples: {first}")


def _first_names(numbers: np.ndarray, loader: EvalLoader) -> str:
    return ", ".join(loader.names[number] for number in numbers[:5]) + (" …" if len(numbers) > 5 else "")


def _score(rows: np.ndarray, loader: EvalLoader, protocol: Protocol, bootstrap: int, seed: int,
           conditions: Mapping[str, str]) -> Score:
    values = summarize(rows[:, :3], bootstrap, seed, clusters=rows[:, 3], empty=protocol.empty)
    samples, images, intervals = values.pop("samples"), values.pop("images"), values.pop("intervals")
    words = dict(conditions)
    if cut := int(rows[:, 4].sum()):
        words["cut"] = f"{cut:,} sentences were longer than the token limit and were cut"
    return Score(protocol.name, values, samples, images, intervals, words, loader.fingerprint)
