"""Two runs compared: the sign of every number, McNemar's test by hand, and what is refused."""

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


def rows_of(seed: int, samples: int = 40) -> Rows:
    """Rows of a run on samples of four per image; the truths are the same for every seed."""
    random, numbers = np.random.default_rng(seed), np.arange(samples)
    union = 200 + numbers
    band_union = random.integers(10, 50, samples)
    columns = [
        numbers,
        random.integers(0, union + 1),
        union,
        random.integers(0, band_union + 1),
        band_union,
        numbers // 4,
        100 + numbers,
        np.full(samples, 4096),
        numbers % 3,
    ]
    texts = [(f"refcoco/unc/{number // 2}/{number}", f"sentence {number}") for number in numbers]
    return Rows.from_integers(np.column_stack(columns).astype(np.int64), texts)


def write_scored_run(run: Path, rows: Rows, protocol: str = "ris-v1") -> Path:
    write_rows(rows_path(run, "val", protocol), rows)
    return run


# ---------------------------------------------------------------------------------------- McNemar


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


@pytest.mark.parametrize("b", range(8))
@pytest.mark.parametrize("c", range(8))
def test_mcnemar_equals_binomial_sum(b: int, c: int):
    tail = sum(Fraction(comb(b + c, heads), 2 ** (b + c)) for heads in range(min(b, c) + 1))

    assert mcnemar_p_value(b, c) == float(min(Fraction(1), 2 * tail))


def test_mcnemar_holds_for_many_samples():
    assert mcnemar_p_value(5000, 5000) == 1.0
    assert 0 < mcnemar_p_value(2400, 2600) < 0.01
    assert mcnemar_p_value(0, 5000) == 0.0


# ------------------------------------------------------------------------------------- comparison


def test_differences_are_b_minus_a_with_intervals_of_slow_loop():
    a, b = rows_of(1), rows_of(2)

    comparison = compare_rows(a, b, bootstrap=30, seed=5)

    images = np.unique(a.image_ids)
    slow = []
    for draw in np.random.default_rng(5).integers(len(images), size=(30, len(images))):
        indexes = [np.flatnonzero(a.image_ids == images[index]) for index in draw]
        taken = np.concatenate(indexes)
        of_a, of_b = (summarize(rows.counts[taken], bootstrap=0) for rows in (a, b))
        slow.append([of_b[name] - of_a[name] for name in METRICS])
    low, high = np.percentile(slow, [2.5, 97.5], axis=0)

    whole_a, whole_b = (summarize(rows.counts, bootstrap=0) for rows in (a, b))
    for index, name in enumerate(METRICS):
        metric = comparison.metrics[name]
        expected = (whole_a[name], whole_b[name])
        assert (metric.a, metric.b) == pytest.approx(expected, abs=1e-12)
        assert (metric.low, metric.high) == pytest.approx((low[index], high[index]), abs=1e-12)
    assert (comparison.samples, comparison.images) == (40, 10)


def test_wins_losses_and_ties_by_hand():
    a = rows_of(1, 6)
    a.counts[:, 1:3] = [[1, 2], [0, 7], [3, 4], [2, 3], [1, 4], [9, 10]]
    b = replace(a, counts=a.counts.copy())
    # Equal as fractions, won, lost, lost, won, lost.
    b.counts[:, 1:3] = [[2, 4], [7, 7], [1, 4], [1, 2], [1, 2], [8, 9]]

    comparison = compare_rows(a, b, bootstrap=5)

    assert (comparison.won, comparison.lost, comparison.tied) == (2, 3, 1)
    assert [(sample.name, sample.a, sample.b) for sample in comparison.most_won] == [
        ("refcoco/unc/0/1", 0, 1),
        ("refcoco/unc/2/4", 0.25, 0.5),
    ]
    lost = [sample.sentence for sample in comparison.most_lost]
    assert lost == ["sentence 2", "sentence 3", "sentence 5"]

    # Sample 2 falls below 0.5, samples 1 and 4 reach it.
    assert (comparison.only_a, comparison.only_b, comparison.p_value) == (1, 2, 1.0)


def test_run_compared_with_itself_differs_nowhere():
    comparison = compare_rows(rows_of(3), rows_of(3))

    for metric in comparison.metrics.values():
        assert (metric.b - metric.a, metric.low, metric.high) == (0, 0, 0)
    assert (comparison.won, comparison.lost, comparison.tied) == (0, 0, 40)
    assert comparison.p_value == 1.0
    assert comparison.most_won == ()


def test_empty_union_counts_as_protocol_says():
    a, b = rows_of(1, 4), rows_of(1, 4)
    b.counts[0, 1:] = 0

    one = compare_rows(a, b, "one", bootstrap=5)
    zero = compare_rows(a, b, "zero", bootstrap=5)

    assert one.metrics["mIoU"].b > zero.metrics["mIoU"].b


# -------------------------------------------------------------------------------------- alignment


def test_order_of_rows_does_not_matter():
    a, b = rows_of(1), rows_of(2)
    shuffled = b.take(np.random.default_rng(0).permutation(len(b)))

    first, second = align_rows(a, shuffled)

    assert first is a
    assert second.names == b.names
    assert second.counts.tolist() == b.counts.tolist()


def test_different_samples_are_refused_by_name_and_number():
    a = rows_of(1)
    without_two = a.take(np.asarray([*range(3), *range(5, 40)]))
    without_first = a.take(np.arange(1, 40))

    message = (
        "x and y were not scored on the same samples: 40 and 38 samples, 2 and 0 "
        ".*refcoco/unc/1/3, only in x"
    )
    with pytest.raises(InputError, match=message):
        align_rows(a, without_two, name_a="x", name_b="y")
    message = "39 and 40 samples, 0 and 1 .*refcoco/unc/0/0, only in B"
    with pytest.raises(InputError, match=message):
        align_rows(without_first, a)


@pytest.mark.parametrize("field", ["area", "pixels", "image_ids"])
def test_different_truths_are_refused(field: str):
    a, b = rows_of(1), rows_of(2)
    getattr(b, field)[[7, 9]] += 5

    message = f"2 samples differ in {field}, the first is refcoco/unc/3/7"
    with pytest.raises(InputError, match=message):
        align_rows(a, b)


def test_sample_listed_twice_is_named():
    a = rows_of(1)
    twice = replace(a, names=(*a.names[:-1], a.names[0]))

    with pytest.raises(InputError, match=f"theirs: its rows list '{a.names[0]}' 2 times"):
        align_rows(a, twice, name_b="theirs")


def test_foreign_sentence_does_not_move_the_cursor():
    a, b = rows_of(1), rows_of(2)
    sentences = ("wipe \x1b[2J\r\nit, Ünï \u202e",) * len(a)

    table = compare_rows(replace(a, sentences=sentences), replace(b, sentences=sentences)).table()

    assert r"wipe \x1b[2J\r\nit, Ünï \u202e" in table
    assert "\x1b" not in table and "\r" not in table


def test_missing_rows_name_what_there_is(tmp_path: Path):
    a = write_scored_run(tmp_path / "a", rows_of(1), protocol="lavt")
    b = write_scored_run(tmp_path / "b", rows_of(2))

    message = (
        "a: no scores/val-ris-v1.csv; its scores/ holds val-lavt.csv; make it with `coupalign eval"
    )
    with pytest.raises(InputError, match=message):
        compare(str(a), str(b))
    with pytest.raises(InputError, match="no such run directory"):
        compare(str(tmp_path / "absent"), str(b))


# ---------------------------------------------------------------------------- command and MLflow


def test_command_prints_table_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    a = write_scored_run(tmp_path / "a", rows_of(1))
    b = write_scored_run(tmp_path / "b", rows_of(2))

    assert main(["compare", str(a), str(b), "--json"]) == 0

    *text, line = capsys.readouterr().out.splitlines()
    value = json.loads(line)
    assert value["metrics"]["bIoU"].keys() == {"a", "b", "low", "high"}
    assert len(value["most_won"]) == len(value["most_lost"]) == 5
    assert value["won"] + value["lost"] + value["tied"] == 40
    assert value["protocol"] == "ris-v1"

    shown = "\n".join(text)
    assert "McNemar" in shown
    assert "most won by B" in shown
    assert value["most_lost"][0]["sentence"] in shown

    assert main(["compare", str(a), str(tmp_path)]) == 2


def test_runs_are_fetched_from_tracking_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    with pytest.raises(InputError, match="mlflow.db does not exist.*--tracking-uri"):
        compare("first", "second", tracking_uri=uri)

    # Two of the three runs have the same name.
    runs = {}
    for seed, folder in enumerate(("first", "second", "twin")):
        run = write_scored_run(tmp_path / "runs" / folder, rows_of(seed))
        name = "second" if folder == "twin" else folder
        with open_tracker(MlflowTracking(uri=uri), run, name, rank=0) as tracker:
            tracker.artifact(run / "scores", "scores")
        runs[folder] = run
    first, second = str(runs["first"]), str(runs["second"])
    second_id = Outbox.read(runs["second"]).run_id

    expected = compare(first, second)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert compare("first", second_id) == expected
    assert compare(first, second_id, tracking_uri=uri) == expected

    message = f"second: 2 runs on .* name one by its id: .*{second_id}"
    with pytest.raises(InputError, match=message):
        compare("first", "second")
    with pytest.raises(InputError, match="third: neither a run directory nor the name of a run"):
        compare("first", "third")
    message = "run first .*has no artifact scores/testA-ris-v1.csv; it has scores/val-ris-v1.csv"
    with pytest.raises(InputError, match=message):
        compare("first", "first", split="testA")
    with pytest.raises(InputError, match="run 0{32}: .* cannot be fetched"):
        compare("first", "0" * 32)
