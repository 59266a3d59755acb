"""Counting refs per split and comparing with the published numbers."""

from __future__ import annotations

from coupalign.data.packing.counts import (
    PUBLISHED,
    counts_table,
    differences_from_published,
    split_order,
)


def published_counts() -> dict[str, dict[str, dict[str, int]]]:
    counts: dict[str, dict[str, dict[str, int]]] = {}
    for name, splits in PUBLISHED.items():
        for split, (images, refs, sentences) in splits.items():
            numbers = {"images": images, "refs": refs, "sentences": sentences or 7}
            counts.setdefault(name, {})[split] = numbers
    return counts


def test_published_counts_have_no_differences() -> None:
    assert differences_from_published(published_counts()) == []


def test_differences_have_both_numbers() -> None:
    counts = published_counts()
    counts["refcoco/unc"]["val"]["refs"] = 3800
    counts["refcoco/google"].pop("test")
    counts["mine/unc"] = {"train": {"images": 1, "refs": 1, "sentences": 1}}

    lines = differences_from_published(counts)

    assert len(lines) == 2
    assert "refcoco/unc val" in lines[0]
    assert "3,800 refs" in lines[0]
    assert "1,500 / 3,811 / 10,834" in lines[0]
    assert "refcoco/google test: 0 images" in lines[1]
    assert "4,527 / 5,000 / ?" in lines[1]

    table = counts_table(counts)
    assert "142,210" not in table
    assert "16,994 / 42,404 / 120,624" in table


def test_splits_have_the_customary_order() -> None:
    splits = ["zoo", "test", "testB", "testA", "val", "train", "extra"]

    ordered = sorted(splits, key=split_order)

    assert ordered == ["train", "val", "testA", "testB", "test", "extra", "zoo"]
