"""Two runs side by side: the sign of every number, McNemar's test by hand, intervals beside a slow loop, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from math import comb
from pathlib import Path

import numpy as np
import pytest

from coupalign.cli.parser import main
from coupalign.config.schema import MlflowTracking
from coupalign.errors import InputError
from coupalign.evaluation.metrics import METRICS, summarize
from coupalign.evaluation.rows import Rows, rows_path, write_rows
from coupalign.report.compare import align_rows, compare, compare_rows, mcnemar_p_value
from coupalign.tracking import open_tracker
from coupalign.tracking.outbox import Outbox


def rows_of(seed: int, many: int = 40) -> Rows:
    """Scores of a run on `many` samples, four an image; the truths are the same for every seed."""
    random, numbers = np.random.default_rng(seed), np.arange(many)
    area, union = 100 + numbers, 200 + numbers
    band = random.integers(10, 50, many)
    integers = [
        numbers,
        random.integers(0, union + 1),
        union,
        random.integers(0, band + 1),
        band,
        numbers // 4,
        area,
        0 * area + 4096,
        numbers % 3,
    ]
    words = [
        (f"refcoco/unc/{number // 2}/{number}", f"sentence {number}") for number in range(many)
    ]
    return Rows.from_integers(np.column_stack(integers).astype(np.int64), words)


def keep(run: Path, rows: Rows, split: str = "val", protocol: str = "ris-v1") -> Path:
    write_rows(rows_path(run, split, protocol), rows)
    return run


# -------------------------------------------------------------------------------------------------------- McNemar


@pytest.mark.parametrize(
    "b, c, p",
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (0, 5, 2 / 32),
        (1, 9, 2 * (1 + 10) / 1024),
        (3, 7, 2 * (1 + 10 + 45 + 120) / 1024),
        (5, 5, 1.0),
        (0, 20, 2 / 2**20),
    ],
)
def test_mcnemar_by_hand(b: int, c: int, p: float):
    assert mcnemar_p_value(b, c) == mcnemar_p_value(c, b) == p


def test_mcnemar_equals_the_sum_and_holds_for_many_samples():
    for b in range(8):
        for c in range(8):
            tail = sum(Fraction(comb(b + c, heads), 2 ** (b + c)) for heads in range(min(b, c) + 1))
            assert mcnemar_p_value(b, c) == float(min(Fraction(1), 2 * tail))
    assert (
        mcnemar_p_value(5000, 5000) == 1.0
        and 0 < mcnemar_p_value(2400, 2600) < 0.01
        and mcnemar_p_value(0, 5000) == 0.0
    )


# ------------------------------------------------------------------------------------------------------ comparison


def test_every_difference_is_b_minus_a_with_the_interval_of_a_slow_loop():
    a, b = rows_of(1), rows_of(2)
    found = compare_rows(a, b, bootstrap=30, seed=5)
    images = np.unique(a.image_ids)
    draws = np.random.default_rng(5).integers(len(images), size=(30, len(images)))
    slow = []
    for draw in draws:
        taken = np.concatenate([np.flatnonzero(a.image_ids == images[place]) for place in draw])
        one, other = (
            summarize(a.counts[taken], bootstrap=0),
            summarize(b.counts[taken], bootstrap=0),
        )
        slow.append([other[name] - one[name] for name in METRICS])
    low, high = np.percentile(slow, [2.5, 97.5], axis=0)
    for place, name in enumerate(METRICS):
        one = found.metrics[name]
        assert (one.a, one.b) == pytest.approx(
            [summarize(rows.counts, bootstrap=0)[name] for rows in (a, b)], abs=1e-12
        )
        assert (one.low, one.high) == pytest.approx((low[place], high[place]), abs=1e-12)
    assert (found.samples, found.images) == (40, 10)


def test_wins_losses_ties_and_their_samples_by_hand():
    a = rows_of(1, 6)
    a.counts[:, 1:3] = [[1, 2], [0, 7], [3, 4], [2, 3], [1, 4], [9, 10]]
    b = replace(a, counts=a.counts.copy())
    b.counts[:, 1:3] = [
        [2, 4],
        [7, 7],
        [1, 4],
        [1, 2],
        [1, 2],
        [8, 9],
    ]  # equal as fractions, won, lost, lost, won, lost
    found = compare_rows(a, b, bootstrap=5)
    assert (found.won, found.lost, found.tied) == (2, 3, 1)
    assert [(one.name, one.a, one.b) for one in found.most_won] == [
        ("refcoco/unc/0/1", 0, 1),
        ("refcoco/unc/2/4", 0.25, 0.5),
    ]
    assert [one.sentence for one in found.most_lost] == ["sentence 2", "sentence 3", "sentence 5"]
    assert (found.only_a, found.only_b, found.p_value) == (
        1,
        2,
        1.0,
    )  # sample 2 falls below 0.5, samples 1 and 4 reach it


def test_a_run_compared_with_itself_differs_nowhere():
    found = compare_rows(rows_of(3), rows_of(3))
    assert {(one.b - one.a, one.low, one.high) for one in found.metrics.values()} == {(0, 0, 0)}
    assert (found.won, found.lost, found.tied, found.p_value, found.most_won) == (0, 0, 40, 1.0, ())


def test_an_empty_union_counts_as_the_protocol_says():
    a, b = rows_of(1, 4), rows_of(1, 4)
    b.counts[0, 1:] = 0
    assert (
        compare_rows(a, b, "one", bootstrap=5).metrics["mIoU"].b
        > compare_rows(a, b, "zero", bootstrap=5).metrics["mIoU"].b
    )


# -------------------------------------------------------------------------------------------------------- pairing


def test_the_order_of_the_rows_does_not_matter():
    a, b = rows_of(1), rows_of(2)
    shuffled = b.take(np.random.default_rng(0).permutation(len(b)))
    first, second = align_rows(a, shuffled)
    assert first is a and second.names == b.names and second.counts.tolist() == b.counts.tolist()


def test_other_samples_are_refused_by_name_and_count():
    a = rows_of(1)
    with pytest.raises(
        InputError,
        match=r"x and y were not scored on the same samples: 40 and 38 samples, 2 and 0 .*refcoco/unc/1/3, only in x",
    ):
        align_rows(a, a.take(np.asarray([*range(3), *range(5, 40)])), name_a="x", name_b="y")
    with pytest.raises(
        InputError, match=r"39 and 40 samples, 0 and 1 .*refcoco/unc/0/0, only in B"
    ):
        align_rows(a.take(np.arange(1, 40)), a)


@pytest.mark.parametrize("field", ["area", "pixels", "image_ids"])
def test_other_truths_are_refused(field: str):
    a, b = rows_of(1), rows_of(2)
    getattr(b, field)[[7, 9]] += 5
    with pytest.raises(
        InputError, match=f"2 samples differ in {field}, the first is refcoco/unc/3/7"
    ):
        align_rows(a, b)


def test_another_protocol_is_refused(tmp_path: Path):
    one, other = keep(tmp_path / "a", rows_of(1), protocol="lavt"), keep(tmp_path / "b", rows_of(2))
    with pytest.raises(
        InputError,
        match=r"a: no scores/val-ris-v1.csv; its scores/ holds val-lavt.csv; make it with `coupalign eval",
    ):
        compare(str(one), str(other))
    with pytest.raises(InputError, match="no such run directory"):
        compare(str(tmp_path / "absent"), str(other))


def test_the_verb_prints_and_gives_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    one, other = keep(tmp_path / "a", rows_of(1)), keep(tmp_path / "b", rows_of(2))
    assert main(["compare", str(one), str(other), "--json"]) == 0
    *text, line = capsys.readouterr().out.splitlines()
    value = json.loads(line)
    assert (
        value["metrics"]["bIoU"].keys() == {"a", "b", "low", "high"}
        and len(value["most_won"]) == len(value["most_lost"]) == 5
    )
    assert value["won"] + value["lost"] + value["tied"] == 40 and value["protocol"] == "ris-v1"
    shown = "\n".join(text)
    assert (
        "McNemar" in shown
        and "most won by B" in shown
        and value["most_lost"][0]["sentence"] in shown
    )
    assert main(["compare", str(one), str(tmp_path)]) == 2


# --------------------------------------------------------------------------------------------------------- MLflow


def test_runs_are_fetched_from_a_tracking_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    with pytest.raises(InputError, match="mlflow.db does not exist.*--tracking-uri"):
        compare("first", "second", tracking_uri=uri)
    runs = {
        name: keep(tmp_path / "runs" / name, rows_of(seed))
        for seed, name in enumerate(("first", "second", "twin"))
    }
    for name, run in runs.items():
        with open_tracker(
            MlflowTracking(uri=uri), run, "second" if name == "twin" else name, rank=0
        ) as tracker:
            tracker.artifact(run / "scores", "scores")
    run_id = Outbox.read(runs["second"]).run_id
    expected = compare(str(runs["first"]), str(runs["second"]))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert (
        compare("first", run_id)
        == expected
        == compare(str(runs["first"]), run_id, tracking_uri=uri)
    )
    with pytest.raises(InputError, match=f"second: 2 runs on .* name one by its id: .*{run_id}"):
        compare("first", "second")
    with pytest.raises(InputError, match="third: neither a run directory nor the name of a run"):
        compare("first", "third")
    with pytest.raises(
        InputError,
        match="run first .*has no artifact scores/testA-ris-v1.csv; it has scores/val-ris-v1.csv",
    ):
        compare("first", "first", split="testA")
    with pytest.raises(InputError, match="run 0{32}: .* cannot be fetched"):
        compare("first", "0" * 32)
