"""Score a model on a data set over any number of ranks.

One pass over the data serves all protocols and sentence rules. Each rank counts pixels on the
device of the logits (`counting`) and reads the counts of a batch while the next one is running, so
nobody waits for the device. Then the rows of all ranks are gathered and rank 0 computes the scores.

Every sample is counted once. A rank that has fewer batches than another runs spare batches through
the model, which may be collective, and drops them.

A row is the same for any number of ranks, because batches are composed before they are dealt. In
floating point it may depend on the other samples of its batch, and so on the size of batches: a
logit near the threshold can fall on its other side.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor
from tqdm import tqdm

from coupalign.distributed.watchdog import doing
from coupalign.distributed.world import World, gather_rows
from coupalign.errors import InputError, RunError
from coupalign.evaluation.counting import (
    CountedBatch,
    count_batch,
    counted_width,
    rows_for_protocol,
)
from coupalign.evaluation.metrics import (
    METRICS,
    Score,
    boundary_ious,
    ious,
    summarize,
)
from coupalign.evaluation.protocols import Protocol
from coupalign.evaluation.rows import ROW_WIDTH
from coupalign.evaluation.shelf import Picture, prune_shelf
from coupalign.evaluation.transfer import lag_by_one

if TYPE_CHECKING:
    from coupalign.data.batch import Batch
    from coupalign.data.loader import EvalLoader
    from coupalign.data.table import Rule


class Stopped(Exception):
    """The scoring was asked to end early."""


@dataclass(frozen=True)
class Evaluation:
    """The result of a scoring under one protocol and sentence rule.

    Attributes:
        score: on rank 0; None on the other ranks.
        rows: int64 [n, 9] of all ranks, sorted by number: number, I, U, bI, bU, image id, area,
            pixels, same class; see `rows`.
        pictures: kept by this rank, with the first protocol and rule only.
    """

    score: Score | None
    rows: np.ndarray
    pictures: tuple[Picture, ...] = ()


def evaluate(
    infer: Callable[[Batch], Tensor],
    loader: EvalLoader,
    protocols: Sequence[Protocol],
    *,
    world: World | None = None,
    bootstrap: int = 1000,
    pictures: int = 0,
    columns: Collection[tuple[str, Rule]] | None = None,
    conditions: Callable[[Protocol, Rule], Mapping[str, str]] = lambda protocol, rule: {},
    title: str = "scoring",
    stopped: Callable[[], bool] = lambda: False,
) -> dict[tuple[str, Rule], Evaluation]:
    """Score every sample of `loader` once under all protocols; collective over `world`.

    Args:
        infer: batch of the loader -> logits float [B, S, S], in the model's evaluation mode,
            without gradients.
        loader: this rank's share; build it with images=True if you want pictures.
        protocols: at least one; all of them count on the same logits.
        world: the ranks that share the work. Default: this process alone.
        bootstrap: resamples of whole images for the intervals; 0 leaves them out.
        pictures: samples per group (see `shelf.choose_pictures`) that this rank keeps.
        columns: the (protocol name, sentence rule) pairs that are wanted. None: all.
        conditions: text printed with each score, see `protocols.describe_conditions`.
        title: of the progress bar, which rank 0 shows.
        stopped: asked before each batch, on every rank. True, which must be on all ranks at the
            same batch, ends the scoring.

    Returns:
        Evaluations by (protocol name, sentence rule): protocols in the order of `protocols`, rules
        in that of `loader.members`.

    Raises:
        InputError: the loader is empty.
        Stopped: `stopped` returned true.
        RunError: the model gave NaN or infinity; names the samples. On every rank.
        AssertionError: a sample was not counted exactly once; names it.
    """
    if not loader.samples:
        raise InputError("nothing to score: the split holds no samples")
    is_main = world is None or world.is_main

    # Pictures are chosen among the samples of the first sentence rule.
    shown: frozenset[int] = frozenset()
    if pictures:
        first_rule = next(iter(loader.members.values()))
        shown = frozenset(first_rule.tolist())

    def count_batches() -> Iterator[CountedBatch]:
        batches = tqdm(loader, desc=title, unit="batch", disable=not is_main, leave=False)
        for number, batch in enumerate(batches, 1):
            if stopped():
                raise Stopped
            doing(f"{title}: batch {number}")
            logits = infer(batch)
            if not batch.spare:
                yield count_batch(logits, batch.info, protocols, keep_predictions=shown)

    # Count this rank's share, reading each batch after the next one has been started.
    shares = [np.empty((0, counted_width(len(protocols))), np.int64)]
    shelf: list[Picture] = []
    for counted in lag_by_one(count_batches()):
        rows = counted.rows()
        shares.append(rows)
        shelf.extend(_pictures_of(counted, rows, protocols[0]))
        shelf = prune_shelf(shelf, pictures)

    doing(f"{title}: gathering the rows")
    gathered = np.concatenate(shares)
    if world is not None:
        gathered = gather_rows(gathered, world)
    gathered = gathered[np.argsort(gathered[:, 0], kind="stable")]

    # Every rank checks the rows, rank 0 computes the scores.
    _check_complete(gathered, loader)
    results: dict[tuple[str, Rule], Evaluation] = {}
    for index, protocol in enumerate(protocols):
        counted_rows = rows_for_protocol(gathered, index)
        for rule, numbers in loader.members.items():
            if columns is not None and (protocol.name, rule) not in columns:
                continue
            rows = counted_rows[numbers]
            score = None
            if is_main:
                score = _score_rows(
                    rows,
                    protocol,
                    conditions=conditions(protocol, rule),
                    fingerprint=loader.fingerprint,
                    bootstrap=bootstrap,
                    rule=rule,
                )
            kept = () if results else tuple(shelf)
            results[protocol.name, rule] = Evaluation(score, rows[:, :ROW_WIDTH], kept)
    return results


def with_language_blind(score: Score, blind: Score) -> Score:
    """Add to `score` the score of the same model and samples with shuffled sentences."""
    for name in ("protocol", "sentences", "samples", "fingerprint"):
        assert getattr(score, name) == getattr(blind, name), (
            "the language-blind score was taken on other samples or under another protocol"
        )
    return replace(score, language_blind=blind)


def _pictures_of(counted: CountedBatch, rows: np.ndarray, protocol: Protocol) -> Iterator[Picture]:
    """Yield the samples of a batch that are kept to look at.

    Args:
        rows: the counted rows of the batch.
        protocol: the first one.
    """
    counts = rows_for_protocol(rows, 0)[:, :5]
    values = ious(counts, protocol.iou_rule).tolist()
    boundary_values = boundary_ious(counts, protocol.iou_rule).tolist()

    for index, prediction in counted.predictions.items():
        info = counted.infos[index]
        assert info.image is not None, f"{info.name}: pictures need a loader with images=True"
        yield Picture(
            number=info.number,
            name=info.name,
            sentence=info.sentence,
            iou=values[index],
            image=info.image,
            truth=info.truth,
            prediction=prediction.numpy(),
            same_class=info.same_class,
            boundary=boundary_values[index],
        )


def _check_complete(rows: np.ndarray, loader: EvalLoader) -> None:
    """Check counted rows, sorted by number: each sample is there once, with finite logits."""
    numbers = rows[:, 0]
    missing = np.setdiff1d(np.arange(loader.samples), numbers)
    if len(missing):
        raise AssertionError(
            f"{len(missing)} of {loader.samples} samples were not scored: "
            f"{_first_names(missing, loader)}"
        )
    assert len(rows) == loader.samples, (
        f"{len(rows)} rows of {loader.samples} samples: a sample was counted twice, or is not one "
        "that the loader lists"
    )

    broken = numbers[rows_for_protocol(rows, 0)[:, -1] > 0]
    if len(broken):
        raise RunError(
            f"the model gave NaN or infinity on {len(broken)} of {loader.samples} samples: "
            f"{_first_names(broken, loader)}. Score with precision=fp32, or score an earlier "
            "checkpoint"
        )


def _first_names(numbers: np.ndarray, loader: EvalLoader, limit: int = 5) -> str:
    names = [loader.names_and_sentences[number][0] for number in numbers[:limit]]
    return ", ".join(names) + (" …" if len(numbers) > limit else "")


def _score_rows(
    rows: np.ndarray,
    protocol: Protocol,
    *,
    conditions: Mapping[str, str],
    fingerprint: str,
    bootstrap: int,
    rule: Rule,
) -> Score:
    """Compute the score of rows int64 [n, 12] of `counting.rows_for_protocol`."""
    image_ids, areas, cut, unknown = rows[:, 5], rows[:, 6], rows[:, -3], rows[:, -2]
    summary = summarize(rows[:, :5], bootstrap, clusters=image_ids, iou_rule=protocol.iou_rule)

    conditions = dict(conditions)
    sentences_cut = int(cut.sum())
    if sentences_cut:
        conditions["cut"] = (
            f"{sentences_cut:,} sentences were longer than the token limit and were cut"
        )
    sentences_unknown = int(unknown.sum())
    if sentences_unknown:
        conditions["unknown"] = (
            f"{sentences_unknown:,} sentences have no word that the model's vocabulary knows"
        )
    empty_truths = int((areas == 0).sum())
    if empty_truths:
        conditions["empty truths"] = _describe_empty_truths(empty_truths, len(rows), protocol)
    return Score(
        protocol=protocol.name,
        metrics={name: summary[name] for name in METRICS},
        samples=summary["samples"],
        images=summary["images"],
        intervals=summary["intervals"],
        conditions=conditions,
        fingerprint=fingerprint,
        sentences=rule,
    )


def _describe_empty_truths(empty: int, samples: int, protocol: Protocol) -> str:
    """Say how many samples have a truth without a pixel, and how they count."""
    text = f"{empty:,} of {samples:,} samples have an empty truth; each counts as IoU "
    text += "1 if its prediction is empty too, else 0" if protocol.iou_rule == "one" else "0"
    if empty == samples:
        text += ". No sample has a true pixel, so these numbers say nothing about the model"
    return text
