"""Metrics from counts: values by hand, exact thresholds, intervals against a plain loop."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coupalign.evaluation.metrics import (
    METRICS,
    Score,
    boundary_ious,
    ious,
    paired_intervals,
    reaches_thresholds,
    side_by_side,
    summarize,
)


def rows_of(*counts: tuple[int, ...]) -> np.ndarray:
    """Numbered rows of (I, U) or (I, U, bI, bU). Default boundary: the counts of the mask."""
    rows = [(number, *pair, *pair)[:5] for number, pair in enumerate(counts)]
    return np.asarray(rows, dtype=np.int64).reshape(-1, 5)


def random_rows(random: np.random.Generator, samples: int, largest: int = 1000) -> np.ndarray:
    union, band_union = random.integers(1, largest, (2, samples))
    intersection = random.integers(0, union + 1)
    band_intersection = random.integers(0, band_union + 1)
    return np.column_stack(
        [np.arange(samples), intersection, union, band_intersection, band_union]
    ).astype(np.int64)


# ---------------------------------------------------------------------------------------- metrics


def test_metrics_by_hand():
    rows = rows_of((90, 100, 1, 4), (5, 10, 0, 3), (0, 40, 0, 8), (7, 10, 2, 4))

    values = summarize(rows, bootstrap=0)

    assert values["oIoU"] == 102 / 160
    assert values["mIoU"] == pytest.approx((0.9 + 0.5 + 0 + 0.7) / 4, abs=1e-15)
    assert [values[f"P@0.{tenth}"] for tenth in (5, 6, 7, 8, 9)] == [0.75, 0.5, 0.5, 0.25, 0.25]
    assert values["bIoU"] == 0.75 / 4
    assert (values["samples"], values["images"], values["intervals"]) == (4, 4, {})
    assert boundary_ious(rows).tolist() == [0.25, 0, 0, 0.5]


@pytest.mark.parametrize("size", [1, 3, 7, 10**9])
def test_thresholds_are_decided_exactly(size: int):
    """The oracle is rational arithmetic; floats would get 7/10 >= 0.7 and neighbors wrong."""
    pairs = []
    for tenth in (5, 6, 7, 8, 9):
        for change in (-1, 0, 1):
            pairs.append((tenth * size + change, 10 * size))

    reached = reaches_thresholds(rows_of(*pairs))

    expected = [
        [Fraction(intersection, union) >= Fraction(tenth, 10) for tenth in (5, 6, 7, 8, 9)]
        for intersection, union in pairs
    ]
    assert reached.tolist() == expected


def test_empty_union_counts_as_one_or_zero():
    rows = rows_of((0, 0), (1, 4))
    one, zero = summarize(rows, 0), summarize(rows, 0, iou_rule="zero")

    names = ("mIoU", "P@0.9", "oIoU", "bIoU")
    assert ious(rows).tolist() == [1, 0.25]
    assert ious(rows, "zero").tolist() == [0, 0.25]
    assert [one[name] for name in names] == [0.625, 0.5, 0.25, 0.625]
    assert [zero[name] for name in names] == [0.125, 0.0, 0.25, 0.125]

    nothing = rows_of((0, 0))
    assert summarize(nothing, 0)["oIoU"] == summarize(nothing, 0, iou_rule="zero")["oIoU"] == 0.0


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)), min_size=1))
def test_strict_rule_is_what_cris_computes_in_floating_point(pairs: list[tuple[int, int]]):
    pairs = [(min(pair), max(pair)) for pair in [*pairs, (7, 10), (0, 0), (600, 1000)]]

    reached = reaches_thresholds(rows_of(*pairs), "strict")

    ratios = np.array([intersection / (union + 1e-6) for intersection, union in pairs])
    expected = ratios[:, None] > np.array([0.5, 0.6, 0.7, 0.8, 0.9])
    assert reached.tolist() == expected.tolist()


def test_sums_are_exact_where_float32_is_not():
    rows = rows_of(*[(2**24 + 1, 2**24 + 2)] * 1000)

    assert summarize(rows, 0)["oIoU"] == (2**24 + 1) / (2**24 + 2)


def test_score_of_no_samples_is_refused():
    with pytest.raises(AssertionError, match="no samples"):
        summarize(rows_of())


@pytest.mark.parametrize("bad", [(5, 4), (-1, 4), (2, 4, 2, 1)])
def test_impossible_counts_are_refused(bad: tuple[int, ...]):
    with pytest.raises(AssertionError, match="sample 1: (boundary )?intersection"):
        summarize(rows_of((1, 2), bad))


# -------------------------------------------------------------------------------------- intervals


def draw_images(images: np.ndarray, resamples: int, seed: int) -> list[np.ndarray]:
    """Row indexes of each resample: whole images, drawn with replacement."""
    names = np.unique(images)
    draws = np.random.default_rng(seed).integers(len(names), size=(resamples, len(names)))
    return [
        np.concatenate([np.flatnonzero(images == names[index]) for index in draw]) for draw in draws
    ]


def test_intervals_equal_loop_over_same_draws():
    random = np.random.default_rng(3)
    rows, images = random_rows(random, 60), random.integers(0, 20, 60)

    result = summarize(rows, bootstrap=50, seed=7, clusters=images)

    slow = [summarize(rows[indexes], bootstrap=0) for indexes in draw_images(images, 50, seed=7)]
    for name in METRICS:
        expected = np.percentile([values[name] for values in slow], [2.5, 97.5])
        assert result["intervals"][name] == pytest.approx(tuple(expected), abs=1e-12)


def test_intervals_treat_sentences_of_one_image_as_dependent():
    rows = random_rows(np.random.default_rng(0), 100)
    fourfold = np.repeat(rows, 4, axis=0)
    fourfold[:, 0] = np.arange(400)

    by_image = summarize(fourfold, 300, clusters=np.repeat(np.arange(100), 4))
    by_sentence = summarize(fourfold, 300)["intervals"]
    single = summarize(rows, 300)["intervals"]

    for name in METRICS:
        assert by_image["intervals"][name] == pytest.approx(single[name])
    assert (by_image["samples"], by_image["images"]) == (400, 100)

    # Independent samples would halve the interval: the square root of 4.
    low, high = by_image["intervals"]["mIoU"]
    narrow_low, narrow_high = by_sentence["mIoU"]
    assert 0.35 < (narrow_high - narrow_low) / (high - low) < 0.65


def test_intervals_hold_score_and_depend_on_seed_only():
    rows = random_rows(np.random.default_rng(1), 300)

    first, again, other = (summarize(rows, 250, seed=seed) for seed in (0, 0, 1))

    assert first == again != other
    assert all(low <= first[name] <= high for name, (low, high) in first["intervals"].items())


def test_intervals_cover_as_often_as_promised():
    random = np.random.default_rng(5)
    covered = 0
    for trial in range(200):
        pairs = [(int(intersection), 100) for intersection in random.integers(0, 101, 80)]
        low, high = summarize(rows_of(*pairs), 200, seed=trial)["intervals"]["mIoU"]
        covered += low <= 0.5 <= high

    # 95 % of 200 is 190; the binomial's standard deviation is 3.
    assert 176 <= covered <= 200


def test_paired_intervals_equal_loop_over_same_draws():
    random = np.random.default_rng(4)
    rows_a, rows_b = random_rows(random, 50), random_rows(random, 50)
    images = random.integers(0, 15, 50)

    intervals = paired_intervals(rows_a, rows_b, bootstrap=40, seed=9, clusters=images)

    slow = []
    for indexes in draw_images(images, 40, seed=9):
        a, b = (summarize(rows[indexes], bootstrap=0) for rows in (rows_a, rows_b))
        slow.append([b[name] - a[name] for name in METRICS])
    for name, differences in zip(METRICS, zip(*slow)):
        expected = np.percentile(differences, [2.5, 97.5])
        assert intervals[name] == pytest.approx(tuple(expected), abs=1e-12)


def test_paired_intervals_of_same_rows_are_zero():
    rows = random_rows(np.random.default_rng(2), 30)

    assert set(paired_intervals(rows, rows, 30).values()) == {(0.0, 0.0)}


# ------------------------------------------------------------------------------------------ Score


def example_score(blind: bool = True) -> Score:
    summary = summarize(rows_of((90, 100), (5, 10)), bootstrap=20)
    return Score(
        protocol="ris-v1",
        metrics={name: summary[name] for name in METRICS},
        samples=summary["samples"],
        images=summary["images"],
        intervals=summary["intervals"],
        conditions={"truth": "original resolution", "threshold": "p > 0.5"},
        fingerprint="ab" * 32,
        language_blind=example_score(blind=False) if blind else None,
    )


def test_json_has_promised_keys_and_comes_back():
    score = example_score()

    value = json.loads(json.dumps(score.to_json()))

    assert set(METRICS) | {"protocol", "samples", "language_blind_oIoU"} <= value.keys()
    assert value["language_blind_oIoU"] == value["language_blind"]["oIoU"]
    assert value["leak"] == "not checked"
    assert Score.from_json(value) == score
    assert "language_blind_oIoU" not in example_score(blind=False).to_json()


def test_table_always_prints_protocol():
    table = example_score().table()

    for text in (
        "oIoU",
        "86.36",
        "ris-v1",
        "original resolution",
        "p > 0.5",
        "2 (image, sentence) samples",
        "abab",
        "not checked",
        "language-blind",
    ):
        assert text in table
    assert "language-blind" not in example_score(blind=False).table()


def test_table_aligns_numbers_and_starts_facts_with_their_heading():
    lines = example_score().table().splitlines()

    assert lines[0].split() == ["score", "%", "95", "%", "interval", "language-blind"]
    metrics = lines[1 : 1 + len(METRICS)]
    assert [line.split()[0] for line in metrics] == list(METRICS)
    assert len({len(line) for line in lines[: 1 + len(METRICS)]}) == 1
    assert any(line.startswith("leak  ") for line in lines)


def test_side_by_side_tells_shared_conditions_from_others():
    score = example_score()
    other = replace(
        example_score(blind=False),
        protocol="lavt",
        conditions={**score.conditions, "truth": "nearest-resized"},
    )

    table = side_by_side({("ris-v1", "each"): score, ("lavt", "each"): other})

    lines = {line.split()[0]: line.split()[1:] for line in table.splitlines() if line}
    assert lines["sentences"] == ["each", "each"]
    assert lines["oIoU"] == ["86.36", "86.36"]
    assert lines["samples"][:2] == ["2", "(image,"]
    assert "oIoU, shuffled" in table
    assert "truth      original resolution  [ris-v1]" in table
    assert "truth      nearest-resized  [lavt]" in table
    assert "threshold  p > 0.5\n" in table
