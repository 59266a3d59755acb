"""Scores a model on a data set over any number of ranks, in one pass for all protocols and sentence rules.

Each rank counts pixels where the logits lie (`counting`); the integers of a batch are read once the next batch is under way, so that
nobody waits for the device. They are gathered, repeats removed, and one rank does the sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from coupalign.distributed.watchdog import doing
from coupalign.errors import InputError
from coupalign.evaluation.counting import Counted, count_batch, row_width, rows_under
from coupalign.evaluation.metrics import Score, boundary_ious, deduplicate, ious, summarize
from coupalign.evaluation.protocols import Protocol
from coupalign.evaluation.rows import WIDTH
from coupalign.evaluation.shelf import Picture, prune
from coupalign.evaluation.transfer import lag_by_one

if TYPE_CHECKING:
    from coupalign.data.batch import Batch
    from coupalign.data.loader import EvalLoader
    from coupalign.data.table import Rule

_GPU_SLACK = 0.01  # share of the union by which a sample that two ranks scored may differ on a GPU


class Stopped(Exception):
    """The scoring was asked to end early."""


@dataclass(frozen=True)
class Evaluation:
    """What a scoring gives under one protocol and sentence rule.

    Attributes:
        score: on rank 0; none elsewhere.
        rows: int64 [n, 9] of all ranks, sorted: number, I, U, bI, bU, image id, area, pixels, same class; see `facts`.
        pictures: of this rank, with the first protocol and rule only.
    """

    score: Score | None
    rows: np.ndarray
    pictures: tuple[Picture, ...] = ()


def evaluate(
    infer: Callable[[Batch], Tensor],
    loader: EvalLoader,
    protocols: Sequence[Protocol],
    *,
    gather: Callable[[np.ndarray], np.ndarray] = lambda rows: rows,
    rank: int = 0,
    device: torch.device | str | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
    pictures: int = 0,
    conditions: Callable[[Protocol, Rule], Mapping[str, str]] = lambda protocol, rule: {},
    title: str = "scoring",
    stopped: Callable[[], bool] = lambda: False,
) -> dict[tuple[str, Rule], Evaluation]:
    """Score every sample of `loader` once under all protocols; collective over the ranks whose rows `gather` brings together.

    Args:
        infer: batch -> logits float [B, S, S], in the model's evaluation mode, without gradients.
        loader: this rank's share; built with images=True where pictures are wanted.
        protocols: each counts on the same logits; at least one.
        gather: int64 [n, k] of this rank -> the rows of all ranks, on every rank.
        device: where batches are sent first; none: `infer` does it.
        bootstrap: resamples of whole images for the intervals; 0: none.
        pictures: how many samples of each kind (see `pictures.choose_pictures`) this rank keeps.
        conditions: words printed with each score, as `protocols.describe_conditions` makes them.
        title: of the progress bar, which rank 0 shows.
        stopped: asked before each batch, on every rank; true on all of them ends the scoring.

    Returns:
        by (name of the protocol, sentence rule), protocols in the order asked for, rules in that of `loader.members`.

    Raises:
        InputError: the loader is empty.
        Stopped: `stopped` said so.
        FloatingPointError: the model gave NaN or infinity; names the samples. The same on every rank.
        AssertionError: a sample is missing, or two ranks disagree about one; names it.
    """
    if not loader.samples:
        raise InputError("nothing to score: the split holds no samples")
    shown = frozenset(next(iter(loader.members.values())).tolist()) if pictures else frozenset()
    rows: list[np.ndarray] = []
    shelf: list[Picture] = []
    slack = 0.0

    def counted() -> Iterator[Counted]:
        for place, batch in enumerate(
            tqdm(loader, desc=title, unit="batch", disable=rank != 0, leave=False)
        ):
            if stopped():
                raise Stopped
            doing(f"{title}: batch {place + 1}")
            yield count_batch(
                infer(batch if device is None else batch.to(device)), batch.info, protocols, shown
            )

    for batch in lag_by_one(counted()):
        rows.append(batch.rows())
        slack = _GPU_SLACK if batch.on_gpu else slack
        shelf = prune([*shelf, *_pictures(batch, rows[-1], protocols[0])], pictures)
    doing(f"{title}: gathering the rows")
    gathered = gather(
        np.concatenate(rows) if rows else np.empty((0, row_width(len(protocols))), np.int64)
    )
    results: dict[tuple[str, Rule], Evaluation] = {}
    for place, protocol in enumerate(protocols):
        kept = deduplicate(rows_under(gathered, place), slack)
        _check_complete(kept, loader)
        for rule, numbers in loader.members.items():
            words = conditions(protocol, rule)
            score = (
                _score(kept[numbers], loader, protocol, rule, bootstrap, seed, words)
                if rank == 0
                else None
            )
            results[protocol.name, rule] = Evaluation(
                score, kept[numbers, :WIDTH], () if results else tuple(shelf)
            )
    return results


def with_language_blind(score: Score, blind: Score) -> Score:
    """`score` with the score of the same model on the same samples with shuffled sentences beside it."""
    same = all(
        getattr(score, name) == getattr(blind, name)
        for name in ("protocol", "sentences", "samples", "fingerprint")
    )
    assert same, "the language-blind score was taken on other samples or under another protocol"
    return replace(score, language_blind=blind)


def _pictures(batch: Counted, rows: np.ndarray, protocol: Protocol) -> Iterator[Picture]:
    """Those of the batch that were asked for; `rows` are its rows, `protocol` is the first."""
    counts = rows_under(rows, 0)[:, :5]
    values, boundaries = (
        ious(counts, protocol.empty).tolist(),
        boundary_ious(counts, protocol.empty).tolist(),
    )
    for place, prediction in batch.predictions.items():
        info = batch.infos[place]
        assert info.image is not None, f"{info.name}: pictures need a loader with images=True"
        yield Picture(
            info.number,
            info.name,
            info.sentence,
            values[place],
            info.image,
            info.truth,
            prediction.numpy(),
            info.same_class,
            boundaries[place],
        )


def _check_complete(rows: np.ndarray, loader: EvalLoader) -> None:
    missing = np.setdiff1d(np.arange(loader.samples), rows[:, 0])
    assert not len(missing), (
        f"{len(missing)} of {loader.samples} samples were not scored: {_first_names(missing, loader)}"
    )
    assert len(rows) == loader.samples, (
        f"scored samples that the loader does not list: number {rows[-1, 0]} of {loader.samples}"
    )
    broken = rows[rows[:, -1] > 0, 0]
    if len(broken):
        first = _first_names(broken, loader)
        raise FloatingPointError(
            f"the model gave NaN or infinity on {len(broken)} of {loader.samples} samples: {first}"
        )


def _first_names(numbers: np.ndarray, loader: EvalLoader) -> str:
    return ", ".join(loader.words[number][0] for number in numbers[:5]) + (
        " …" if len(numbers) > 5 else ""
    )


def _score(
    rows: np.ndarray,
    loader: EvalLoader,
    protocol: Protocol,
    rule: Rule,
    bootstrap: int,
    seed: int,
    conditions: Mapping[str, str],
) -> Score:
    values = summarize(rows[:, :5], bootstrap, seed, clusters=rows[:, 5], empty=protocol.empty)
    samples, images, intervals = (
        values.pop("samples"),
        values.pop("images"),
        values.pop("intervals"),
    )
    words = dict(conditions)
    if cut := int(rows[:, -2].sum()):
        words["cut"] = f"{cut:,} sentences were longer than the token limit and were cut"
    return Score(
        protocol=protocol.name,
        metrics=values,
        samples=samples,
        images=images,
        intervals=intervals,
        conditions=words,
        fingerprint=loader.fingerprint,
        sentences=rule,
    )
