"""Scores from integers: golden values, exact thresholds, intervals against a plain resampling loop."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from coupalign.evaluation.metrics import (
    METRICS,
    Score,
    deduplicate,
    ious,
    paired_intervals,
    reaches_thresholds,
    side_by_side,
    summarize,
)


def table(*pairs: tuple[int, ...]) -> np.ndarray:
    """Rows of (I, U) or (I, U, bI, bU), numbered; without a boundary of its own a sample has that of its mask."""
    return np.asarray(
        [(number, *pair, *pair)[:5] for number, pair in enumerate(pairs)], dtype=np.int64
    ).reshape(-1, 5)


def random_rows(random: np.random.Generator, many: int, largest: int = 1000) -> np.ndarray:
    union, band = random.integers(1, largest, (2, many))
    return np.column_stack(
        [np.arange(many), random.integers(0, union + 1), union, random.integers(0, band + 1), band]
    ).astype(np.int64)


def test_golden_values():
    values = summarize(
        table((90, 100, 1, 4), (5, 10, 0, 3), (0, 40, 0, 8), (7, 10, 2, 4)), bootstrap=0
    )
    assert values["oIoU"] == 102 / 160
    assert values["mIoU"] == pytest.approx((0.9 + 0.5 + 0 + 0.7) / 4, abs=1e-15)
    assert [values[f"P@0.{x}"] for x in (5, 6, 7, 8, 9)] == [0.75, 0.5, 0.5, 0.25, 0.25]
    assert values["bIoU"] == 0.75 / 4
    assert (values["samples"], values["images"], values["intervals"]) == (4, 4, {})


@pytest.mark.parametrize("size", [1, 3, 7, 10**9])
def test_thresholds_are_decided_exactly(size: int):
    """The oracle is rational arithmetic; floating point would lose 7/10 >= 0.7 and its neighbors for some sizes."""
    rows = table(
        *[(tenth * size + change, 10 * size) for tenth in (5, 6, 7, 8, 9) for change in (-1, 0, 1)]
    )
    expected = [
        [Fraction(int(i), int(u)) >= Fraction(x, 10) for x in (5, 6, 7, 8, 9)]
        for _, i, u, *_ in rows
    ]
    assert reaches_thresholds(rows).tolist() == expected


def test_empty_union_counts_as_told():
    rows = table((0, 0), (1, 4))
    one, zero = summarize(rows, 0), summarize(rows, 0, empty="zero")
    assert ious(rows).tolist() == [1, 0.25] and ious(rows, "zero").tolist() == [0, 0.25]
    assert (one["mIoU"], one["P@0.9"], one["oIoU"], one["bIoU"]) == (0.625, 0.5, 0.25, 0.625)
    assert (zero["mIoU"], zero["P@0.9"], zero["oIoU"], zero["bIoU"]) == (0.125, 0.0, 0.25, 0.125)
    assert (
        summarize(table((0, 0)), 0)["oIoU"] == 1.0
        and summarize(table((0, 0)), 0, empty="zero")["oIoU"] == 0.0
    )


def test_sums_stay_exact_where_float32_would_not():
    rows = table(*[(2**24 + 1, 2**24 + 2)] * 1000)
    assert summarize(rows, 0)["oIoU"] == (2**24 + 1) / (2**24 + 2)


def test_intervals_equal_a_plain_loop_over_the_same_draws():
    random = np.random.default_rng(3)
    rows, images = random_rows(random, 60), random.integers(0, 20, 60)
    result = summarize(rows, bootstrap=50, seed=7, clusters=images)
    names = np.unique(images)
    draws = np.random.default_rng(7).integers(len(names), size=(50, len(names)))
    samples = [np.concatenate([rows[images == names[place]] for place in draw]) for draw in draws]
    slow = [summarize(s, bootstrap=0) for s in samples]
    for name in METRICS:
        low, high = np.percentile([values[name] for values in slow], [2.5, 97.5])
        assert result["intervals"][name] == pytest.approx((low, high), abs=1e-12)


def test_intervals_know_that_sentences_of_one_image_are_not_independent():
    rows = random_rows(np.random.default_rng(0), 100)
    fourfold = np.repeat(rows, 4, axis=0)
    fourfold[:, 0] = np.arange(400)
    honest = summarize(fourfold, 300, clusters=np.repeat(np.arange(100), 4))
    alone = summarize(rows, 300)["intervals"]
    assert all(honest["intervals"][name] == pytest.approx(alone[name]) for name in METRICS)
    width = {name: high - low for name, (low, high) in honest["intervals"].items()}
    naive = summarize(fourfold, 300)["intervals"]["mIoU"]
    assert (
        0.35 < (naive[1] - naive[0]) / width["mIoU"] < 0.65
    )  # a false half, as the square root of 4 says
    assert (honest["samples"], honest["images"]) == (400, 100)


def test_intervals_hold_the_score_and_depend_on_the_seed_only():
    rows = random_rows(np.random.default_rng(1), 300)
    first, again, other = (summarize(rows, 250, seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    assert all(low <= first[name] <= high for name, (low, high) in first["intervals"].items())


def test_the_interval_covers_as_often_as_it_says():
    random = np.random.default_rng(5)
    covered = 0
    for trial in range(200):
        inside = random.integers(0, 101, 80)
        low, high = summarize(table(*[(int(i), 100) for i in inside]), 200, seed=trial)[
            "intervals"
        ]["mIoU"]
        covered += low <= 0.5 <= high
    assert 176 <= covered <= 200  # 95 % of 200 is 190; the binomial's standard deviation is 3


def test_deduplicate_sorts_and_keeps_one_of_each():
    rows = table((1, 2), (3, 4), (5, 6))
    repeated = np.concatenate([rows[::-1], rows[:2]])
    assert deduplicate(repeated).tolist() == rows.tolist()
    wide = np.column_stack([repeated, repeated[:, 0] * 10])
    assert deduplicate(wide)[:, 5].tolist() == [0, 10, 20]
    assert deduplicate(rows[:0]).shape == (0, 5)


def test_deduplicate_names_the_sample_that_two_ranks_disagree_about():
    rows = np.concatenate([table((1, 2), (3, 4)), np.asarray([[1, 2, 4, 3, 4]], dtype=np.int64)])
    with pytest.raises(
        AssertionError, match=r"sample 1 was scored twice.*\[3, 4, 3, 4\] and \[2, 4, 3, 4\]"
    ):
        deduplicate(rows)


def test_deduplicate_forgives_rounding_up_to_the_slack_only():
    first, near, far = (
        [[0, 500, 1000, 40, 80, 9]],
        [[0, 509, 1010, 50, 90, 9]],
        [[0, 511, 1000, 40, 80, 9]],
    )
    join = lambda *parts: np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])  # noqa: E731
    assert deduplicate(join(first, near), slack=0.01).tolist() == first
    with pytest.raises(AssertionError, match="sample 0"):
        deduplicate(join(first, far), slack=0.01)
    with pytest.raises(AssertionError, match="sample 0"):
        deduplicate(join(first, [[0, 500, 1000, 40, 80, 8]]), slack=0.01)
    with pytest.raises(AssertionError, match="sample 0"):
        deduplicate(join(first, [[0, 500, 1000, 41, 80, 9]]))


@pytest.mark.parametrize("bad", [(5, 4), (-1, 4), (2, 4, 2, 1)])
def test_impossible_rows_are_refused(bad: tuple[int, ...]):
    with pytest.raises(AssertionError, match="sample 1: (boundary )?intersection"):
        summarize(table((1, 2), bad))


def test_paired_intervals_equal_a_plain_loop_over_the_same_draws():
    random = np.random.default_rng(4)
    rows, others, images = (
        random_rows(random, 50),
        random_rows(random, 50),
        random.integers(0, 15, 50),
    )
    found = paired_intervals(rows, others, 40, 9, images)
    names = np.unique(images)
    draws = np.random.default_rng(9).integers(len(names), size=(40, len(names)))
    places = [
        np.concatenate([np.flatnonzero(images == names[place]) for place in draw]) for draw in draws
    ]
    slow = [
        (summarize(rows[taken], bootstrap=0), summarize(others[taken], bootstrap=0))
        for taken in places
    ]
    for name in METRICS:
        expected = np.percentile([b[name] - a[name] for a, b in slow], [2.5, 97.5])
        assert found[name] == pytest.approx(tuple(expected), abs=1e-12)


def test_a_pair_of_the_same_rows_has_no_difference_at_all():
    rows = random_rows(np.random.default_rng(2), 30)
    assert set(paired_intervals(rows, rows, 30).values()) == {(0.0, 0.0)}


def test_a_score_of_nothing_is_refused():
    with pytest.raises(AssertionError, match="no samples"):
        summarize(table())


def example_score(blind: bool = True) -> Score:
    values = summarize(table((90, 100), (5, 10)), bootstrap=20)
    samples, images, intervals = (
        values.pop("samples"),
        values.pop("images"),
        values.pop("intervals"),
    )
    other = example_score(False) if blind else None
    return Score(
        protocol="ris-v1",
        metrics=values,
        samples=samples,
        images=images,
        intervals=intervals,
        conditions={"truth": "original resolution", "threshold": "p > 0.5"},
        fingerprint="ab" * 32,
        language_blind=other,
    )


def test_json_has_the_promised_keys_and_comes_back():
    score = example_score()
    text = json.dumps(score.to_json())
    value = json.loads(text)
    assert set(METRICS) | {"protocol", "samples", "language_blind_oIoU"} <= value.keys()
    assert value["language_blind_oIoU"] == value["language_blind"]["oIoU"]
    assert value["leak"] == "not checked"
    assert Score.from_json(value) == score
    assert "language_blind_oIoU" not in example_score(False).to_json()


def test_scores_side_by_side_say_what_they_share_and_what_they_do_not():
    score = example_score()
    other = replace(
        example_score(False),
        protocol="lavt",
        conditions={**score.conditions, "truth": "nearest-resized"},
    )
    text = side_by_side({("ris-v1", "each"): score, ("lavt", "each"): other})
    lines = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line}
    assert (
        lines["sentences"] == ["each", "each"]
        and lines["oIoU"] == ["86.36", "86.36"]
        and lines["samples"][:2] == ["2", "(image,"]
    )
    assert (
        "truth      original resolution  [ris-v1]" in text
        and "truth      nearest-resized  [lavt]" in text
    )
    assert "threshold  p > 0.5\n" in text and "oIoU, shuffled" in text


def test_the_table_always_prints_the_protocol():
    text = example_score().table()
    for words in (
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
        assert words in text
    assert "language-blind" not in example_score(False).table()
