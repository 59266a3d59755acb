"""The table of samples, its subsets, and the permutation of the language-blind control."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coupalign.config.schema import Source
from coupalign.data.index import RefEntry, ShardIndex, read_index
from coupalign.data.table import (
    ALL,
    RANDOM,
    RULES,
    build_table,
    evaluation_table,
    evenly_spaced,
    matches_source,
    sentence_donors,
)
from coupalign.errors import InputError


def train_source(packed: Path) -> tuple[Source, ...]:
    return (Source(index=str(packed), split="train"),)


@pytest.fixture
def packed_index(packed: Path) -> ShardIndex:
    return read_index(packed)


def test_shards_are_numbered_over_all_indexes(packed: Path):
    first, second = read_index(packed), read_index(packed / "index.json")
    other = replace(second, fingerprint="another")
    sources = [
        Source(index="a", dataset="refcocog", split="val"),
        Source(index="a", split="train"),
        Source(index="b", split="testA"),
    ]

    table = build_table(sources, (first, first, other), "sentence")

    assert table.indexes == (first, other)
    for number in range(len(table)):
        image = table.indexes[table.index[number]].images[table.image[number]]
        ref = image.refs[table.ref[number]]
        assert table.shard[number] == image.shard + len(first.shards) * table.index[number]
        assert table.label(number) == f"{ref.set}/{ref.ref_id}"


@given(st.lists(st.lists(st.integers(0, 4), max_size=4), min_size=1, max_size=5))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_samples_are_listed_in_the_order_of_images_refs_and_sentences(
    packed_index: ShardIndex, sentences: list[list[int]]
):
    """`sentences` has the number of sentences of each ref of each image."""
    images = []
    for number, of_refs in enumerate(sentences):
        refs = [RefEntry("a/b", "train", ref_no, count) for ref_no, count in enumerate(of_refs)]
        images.append(replace(packed_index.images[0], image_id=number, refs=tuple(refs)))
    index = replace(packed_index, images=tuple(images))
    source = Source(index="a", split="train")

    expected: dict[str, list[tuple[int, int, int]]] = {"ref": [], "sentence": []}
    expected["sentence and all"] = []
    for image_no, of_refs in enumerate(sentences):
        for ref_no, count in enumerate(of_refs):
            each = [(image_no, ref_no, sentence) for sentence in range(count)]
            expected["sentence"] += each
            if count:
                expected["ref"].append((image_no, ref_no, RANDOM))
                expected["sentence and all"] += [*each, (image_no, ref_no, ALL)]

    for unit, rows in expected.items():
        if not rows:
            with pytest.raises(InputError, match="has no sample"):
                build_table([source], [index], unit)
            continue
        table = build_table([source], [index], unit)
        found = np.stack([table.image, table.ref, table.sentence], 1)
        assert [tuple(row) for row in found.tolist()] == rows


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"split": "trian"},
            r"no sample of \*/\*, split 'trian'; "
            r"it holds: .*refcoco/unc train \(16 refs, 41 sentences\)",
        ),
        ({"split": "train", "dataset": "refcoco+"}, r"no sample of refcoco\+/\*"),
        ({"split": "train", "split_by": "google"}, r"no sample of \*/google"),
    ],
)
def test_source_without_samples_is_refused(packed: Path, fields: dict, message: str):
    with pytest.raises(InputError, match=message):
        build_table((Source(index=str(packed), **fields),), (read_index(packed),), "ref")


def test_source_matches_by_dataset_partition_and_split():
    any_set = Source(index="a", split="val")
    assert matches_source(any_set, "refcoco/unc", "val")
    assert not matches_source(any_set, "refcoco/unc", "train")

    one_set = Source(index="a", dataset="refcocog", split_by="umd", split="val")
    assert matches_source(one_set, "refcocog/umd", "val")
    assert not matches_source(one_set, "refcocog/google", "val")
    assert not matches_source(one_set, "refcoco/umd", "val")


def test_limit_is_spread_evenly():
    for samples in range(1, 40):
        for limit in range(1, 45):
            taken = evenly_spaced(samples, limit)
            assert len(set(taken)) == min(samples, limit)
            assert taken[0] == 0 and taken[-1] < samples


def test_donors_are_a_permutation_that_leads_to_other_images(packed: Path):
    table = build_table(train_source(packed), (read_index(packed),), "sentence")
    generator = np.random.default_rng(0)

    for size in (2, 3, 5, 8, 20, len(table)):
        for _ in range(20):
            some = table.take(generator.choice(len(table), size, replace=False))
            donors, image = sentence_donors(some), some.image_ids

            assert sorted(donors) == list(range(size))
            assert (donors != np.arange(size)).all()

            # As few as possible stay on the same image.
            largest = np.unique(image, return_counts=True)[1].max()
            assert (image[donors] == image).sum() == max(0, 2 * largest - size)


def test_donors_of_joined_sentences_are_joined_sentences(packed: Path):
    table, members = evaluation_table(train_source(packed), (read_index(packed),), RULES)

    donors = sentence_donors(table)

    assert sorted(donors) == list(range(len(table)))
    for rule in ("each", "concatenated"):
        assert set(donors[members[rule]]) == set(members[rule])


def test_rule_each_has_every_sentence_in_order(packed: Path):
    sources, indexes = train_source(packed), (read_index(packed),)

    each, members = evaluation_table(sources, indexes, ["each"])

    plain = build_table(sources, indexes, "sentence")
    assert each.sentence.tolist() == plain.sentence.tolist()
    assert members["each"].tolist() == list(range(len(plain)))


def test_sentence_rules_share_their_samples(packed: Path):
    sources, indexes = train_source(packed), (read_index(packed),)
    plain = build_table(sources, indexes, "sentence")
    refs = len(build_table(sources, indexes, "ref"))

    table, members = evaluation_table(sources, indexes, RULES)

    assert len(table) == len(plain) + refs, "a first sentence is not read twice"
    assert set(members["first"]) < set(members["each"])
    assert not set(members["concatenated"]) & set(members["each"])
    assert table.take(members["each"]).sentence.tolist() == plain.sentence.tolist()
    for rule, sentence in (("first", 0), ("concatenated", ALL)):
        assert set(table.sentence[members[rule]]) == {sentence}
        labels = [table.label(number) for number in members[rule]]
        assert len(set(labels)) == len(labels) == refs


def test_single_sentence_rule_has_one_sample_per_ref(packed: Path):
    sources, indexes = train_source(packed), (read_index(packed),)
    refs = len(build_table(sources, indexes, "ref"))

    for rule in ("first", "concatenated"):
        table, _ = evaluation_table(sources, indexes, [rule])
        assert len(table) == refs


def test_limit_applies_to_each_rule(packed: Path):
    _, members = evaluation_table(train_source(packed), (read_index(packed),), RULES, limit=5)

    assert {rule: len(numbers) for rule, numbers in members.items()} == dict.fromkeys(RULES, 5)
