"""Scoring over ranks: the same integers for any number of them, nothing missing, nothing twice."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coupalign.data.batch import Batch, SampleInfo
from coupalign.distributed.world import World
from coupalign.errors import InputError, RunError
from coupalign.evaluation.counting import CountedBatch
from coupalign.evaluation.evaluator import Evaluation, Stopped, evaluate, with_language_blind
from coupalign.evaluation.metrics import summarize
from coupalign.evaluation.protocols import PROTOCOLS, count_pixels, find_protocol
from tests.unit.evaluation.examples import SIZE, ExampleLoader, evaluate_one, infer, world_of

RIS = find_protocol("ris-v1")
GATHER = "coupalign.evaluation.evaluator.gather_rows"
EXAMPLES = ExampleLoader()


class Gathered(Exception):
    """A rank has counted its share."""


def evaluate_over(
    ranks: int,
    protocol: str = "ris-v1",
    model: Callable[[Batch], torch.Tensor] = infer,
    loader: ExampleLoader = EXAMPLES,
) -> list[Evaluation]:
    """The evaluation of each of `ranks` ranks, one after another in this process."""
    worlds = [world_of(rank, ranks) for rank in range(ranks)]
    loaders = [replace(loader, rank=rank, ranks=ranks) for rank in range(ranks)]
    shares: list[np.ndarray] = []

    def collect(rows: np.ndarray, world: World) -> np.ndarray:
        shares.append(rows)
        raise Gathered

    # Let each rank count its share.
    with patch(GATHER, collect):
        for world, own in zip(worlds, loaders):
            with pytest.raises(Gathered):
                evaluate_one(own, protocol, model, world=world)

    everybody = np.concatenate(shares)
    with patch(GATHER, lambda rows, world: everybody):
        return [
            evaluate_one(own, protocol, model, world=world, bootstrap=20)
            for world, own in zip(worlds, loaders)
        ]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_any_number_of_ranks_gives_same_integers(protocol: str):
    alone = evaluate_over(1, protocol)[0]

    assert alone.rows[:, 0].tolist() == list(range(23))
    for ranks in (2, 3):
        for rank, result in enumerate(evaluate_over(ranks, protocol)):
            assert result.rows.tolist() == alone.rows.tolist()
            assert result.score == (alone.score if rank == 0 else None)


PRECISIONS = st.sampled_from([torch.float32, torch.bfloat16])
FEW = st.integers(1, 9)  # ranks, or samples per batch


@settings(max_examples=40, deadline=None)
@given(samples=st.integers(1, 30), ranks=FEW, batch=FEW, precision=PRECISIONS)
def test_rows_do_not_depend_on_ranks_even_if_a_model_sees_its_whole_batch(
    samples: int, ranks: int, batch: int, precision: torch.dtype
):
    """As with rounding on a device, where a logit depends a little on the size of the batch."""

    def rounding_infer(part: Batch) -> torch.Tensor:
        neighbors = sum(info.number + 1 for info in part.info)
        return (infer(part) + 0.3 * math.sin(neighbors)).to(precision).float()

    loader = ExampleLoader(samples=samples, batch=batch)
    alone = evaluate_over(1, model=rounding_infer, loader=loader)[0]

    results = evaluate_over(ranks, model=rounding_infer, loader=loader)

    assert alone.rows[:, 0].tolist() == list(range(samples))
    assert all(result.rows.tolist() == alone.rows.tolist() for result in results)
    assert results[0].score == alone.score


@settings(max_examples=40, deadline=None)
@given(samples=st.integers(1, 30), ranks=FEW, batch=FEW, precision=PRECISIONS)
def test_rows_do_not_depend_on_batch_size_if_samples_do_not_see_each_other(
    samples: int, ranks: int, batch: int, precision: torch.dtype
):
    def rounding_infer(part: Batch) -> torch.Tensor:
        return infer(part).to(precision).float()

    one_by_one = ExampleLoader(samples=samples, batch=1)
    expected = evaluate_over(1, model=rounding_infer, loader=one_by_one)[0]

    loader = ExampleLoader(samples=samples, batch=batch)
    results = evaluate_over(ranks, model=rounding_infer, loader=loader)

    assert all(result.rows.tolist() == expected.rows.tolist() for result in results)


def test_spare_batch_passes_through_the_model_and_is_not_counted():
    """A collective forward pass needs it, and its logits may be broken."""
    passes: list[int] = []
    worlds = [world_of(rank, 3) for rank in range(3)]

    def noting_infer(part: Batch) -> torch.Tensor:
        passes[-1] += 1
        logits = infer(part)
        return logits * math.nan if part.spare else logits

    shares = []
    for world in worlds:
        passes.append(0)
        loader = replace(ExampleLoader(samples=5, batch=4), rank=world.rank, ranks=3)

        with patch(GATHER, lambda rows, world: shares.append(rows) or everything()):
            evaluate_one(loader, model=noting_infer, world=world)

    assert passes == [1, 1, 1]
    assert [len(share) for share in shares] == [4, 1, 0]


def everything() -> np.ndarray:
    """The counted rows of all five samples of a small loader."""
    rows: list[np.ndarray] = []
    with patch(GATHER, lambda share, world: rows.append(share) or share):
        evaluate_one(ExampleLoader(samples=5, batch=4), world=world_of(0, 1))
    return rows[0]


def test_score_summarizes_rows_by_image():
    result = evaluate_over(1)[0]

    score = result.score
    expected = summarize(result.rows[:, :5], 20, clusters=np.arange(23) // 4)
    assert score.metrics == {name: expected[name] for name in score.metrics}
    assert dict(score.intervals) == expected["intervals"]
    assert (score.samples, score.images, score.fingerprint) == (23, 6, "f" * 64)
    assert score.conditions["cut"].startswith("5 sentences")
    assert score.conditions["unknown"].startswith("3 sentences have no word")
    assert "empty truths" not in score.conditions


@pytest.mark.parametrize(
    "protocol, counts_as",
    [
        ("ris-v1", "each counts as IoU 1 if its prediction is empty too, else 0"),
        ("lavt", "each counts as IoU 0"),
        ("cris", "each counts as IoU 0"),
    ],
)
def test_empty_truths_are_counted_and_never_make_a_whole_score(protocol: str, counts_as: str):
    @dataclass
    class EmptyTruths(ExampleLoader):
        empty: int = 23

        def info(self, number: int) -> SampleInfo:
            info = super().info(number)
            is_empty = number < self.empty
            return replace(info, truth=np.zeros_like(info.truth)) if is_empty else info

    def nothing(batch: Batch) -> torch.Tensor:
        return torch.full((len(batch), SIZE, SIZE), -4.0)

    some = evaluate_one(EmptyTruths(empty=5), protocol, nothing).score
    every = evaluate_one(EmptyTruths(), protocol, nothing).score

    assert some.conditions["empty truths"] == f"5 of 23 samples have an empty truth; {counts_as}"
    assert some.metrics["oIoU"] == every.metrics["oIoU"] == 0.0
    assert every.conditions["empty truths"].endswith("say nothing about the model")
    assert every.metrics["mIoU"] == (1.0 if protocol == "ris-v1" else 0.0)


def test_rows_equal_protocol_sample_by_sample():
    loader = ExampleLoader()

    rows = evaluate_one(loader).rows

    for number, *counts, image_id, area, pixels, same_class in rows.tolist():
        info = loader.info(number)
        prediction = RIS.predict(infer(loader.collate([number])), info.frame)
        truth = torch.from_numpy(info.truth)[None]
        assert counts == count_pixels(prediction, truth)[0].tolist()
        assert (image_id, same_class) == (number // 4, number % 3 - 1)
        assert (area, pixels) == (info.truth.sum(), info.truth.size)


def test_one_pass_equals_a_pass_per_protocol_and_infers_once():
    inferred: list[int] = []

    def noting_infer(batch: Batch) -> torch.Tensor:
        inferred.extend(info.number for info in batch.info)
        return infer(batch)

    loader = ExampleLoader(both_rules=True)
    together = evaluate(noting_infer, loader, list(PROTOCOLS.values()), bootstrap=20)

    assert sorted(inferred) == list(range(23))
    assert list(together) == [(name, rule) for name in PROTOCOLS for rule in ("each", "first")]
    for name in PROTOCOLS:
        alone = evaluate_one(ExampleLoader(), name, bootstrap=20)
        assert together[name, "each"].rows.tolist() == alone.rows.tolist()
        assert together[name, "each"].score == alone.score

        first = together[name, "first"]
        assert first.rows.tolist() == alone.rows[::2].tolist()
        assert first.score.protocol == name
        assert (first.score.sentences, first.score.samples) == ("first", 12)
        expected = summarize(alone.rows[::2, :5], 0)
        assert first.score.metrics["bIoU"] == pytest.approx(expected["bIoU"], abs=1e-12)


def test_counts_are_read_after_next_batch_started(monkeypatch: pytest.MonkeyPatch):
    """So that a GPU has work while the host waits for the counts of the batch before."""
    events: list[str] = []
    read_rows = CountedBatch.rows

    def noting_infer(batch: Batch) -> torch.Tensor:
        events.append(f"infer {batch.info[0].number}")
        return infer(batch)

    def noting_rows(counted: CountedBatch) -> np.ndarray:
        events.append(f"read {min(info.number for info in counted.infos)}")
        return read_rows(counted)

    monkeypatch.setattr(CountedBatch, "rows", noting_rows)
    evaluate_one(ExampleLoader(samples=12), model=noting_infer)

    assert events == ["infer 0", "infer 4", "read 0", "infer 8", "read 4", "read 8"]


def test_stop_is_asked_for_before_each_batch():
    events: list[str] = []
    answers = iter([False, False, True])

    def noting_infer(batch: Batch) -> torch.Tensor:
        events.append("batch")
        return infer(batch)

    def stopped() -> bool:
        events.append("stopped?")
        return next(answers)

    with pytest.raises(Stopped):
        evaluate_one(ExampleLoader(), model=noting_infer, stopped=stopped)

    assert events == ["stopped?", "batch", "stopped?", "batch", "stopped?"]


def test_conditions_are_printed_with_score():
    score = evaluate_one(
        ExampleLoader(),
        conditions=lambda protocol, rule: {"threshold": protocol.threshold, "rule": rule},
    ).score

    table = score.table()
    assert "p > 0.5" in table
    assert "ris-v1" in table
    assert "rule       each" in table


def test_missing_samples_are_named():
    message = "2 of 23 samples were not scored: refshapes/none/1/3, refshapes/none/8/17"

    with pytest.raises(AssertionError, match=message):
        evaluate_one(ExampleLoader(skip=(3, 17)))


def test_sample_that_two_ranks_counted_is_found():
    def gather(rows: np.ndarray, world: World) -> np.ndarray:
        return np.concatenate([rows, rows[5:6]])

    with patch(GATHER, gather), pytest.raises(AssertionError, match="24 rows of 23 samples"):
        evaluate(infer, ExampleLoader(), [RIS], world=world_of(0, 1))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_logits_are_named_and_never_scored(value: float):
    def broken_infer(batch: Batch) -> torch.Tensor:
        logits = infer(batch)
        logits[[info.number in (2, 9) for info in batch.info], 0, 0] = value
        return logits

    message = "2 of 23 samples: refshapes/none/1/2, refshapes/none/4/9. Score with precision=fp32"
    with pytest.raises(RunError, match=message):
        evaluate_one(ExampleLoader(), model=broken_infer)


def test_empty_split_is_refused():
    with pytest.raises(InputError, match="no samples"):
        evaluate_one(ExampleLoader(samples=0))


def test_language_blind_score_must_be_of_same_samples():
    score, other = (evaluate_one(ExampleLoader(samples=samples)).score for samples in (8, 9))

    both = with_language_blind(score, score)

    assert both.to_json()["language_blind_oIoU"] == score.metrics["oIoU"]
    with pytest.raises(AssertionError, match="other samples"):
        with_language_blind(score, other)
