"""The table of samples, its subset, the permutation of the language-blind control; and what samples share when they are read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from coupalign.config.schema import DataConfig, Source
from coupalign.data import transforms
from coupalign.data.batch import SampleInfo
from coupalign.data.build import open_tokenizer
from coupalign.data.index import read_index
from coupalign.data.samples import SampleReader
from coupalign.data.shards import open_index
from coupalign.data.table import (
    ALL,
    RULES,
    build_table,
    evaluation_table,
    evenly_spaced,
    sentence_donors,
)
from coupalign.errors import InputError


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
        assert table.shard[number] == image.shard + len(first.shards) * table.index[number]
        assert (
            table.label(number)
            == f"{image.refs[table.ref[number]].set}/{image.refs[table.ref[number]].ref_id}"
        )


@pytest.mark.parametrize(
    "fields, words",
    [
        (
            {"split": "trian"},
            r"no sample of \*/\*, split 'trian'; it holds: .*refcoco/unc train \(16 refs, 41 sentences\)",
        ),
        ({"split": "train", "dataset": "refcoco+"}, r"no sample of refcoco\+/\*"),
        ({"split": "train", "split_by": "google"}, r"no sample of \*/google"),
    ],
)
def test_an_empty_split_and_an_unknown_set_are_refused(packed: Path, fields: dict, words: str):
    with pytest.raises(InputError, match=words):
        build_table((Source(index=str(packed), **fields),), (read_index(packed),), "ref")


def test_a_limit_is_spread_evenly():
    for samples in range(1, 40):
        for limit in range(1, 45):
            taken = evenly_spaced(samples, limit)
            assert len(set(taken)) == min(samples, limit) and taken[0] == 0 and taken[-1] < samples


def test_the_control_is_a_permutation_that_leads_to_other_images(packed: Path):
    table = build_table(
        (Source(index=str(packed), split="train"),), (read_index(packed),), "sentence"
    )
    dice = np.random.default_rng(0)
    for size in (2, 3, 5, 8, 20, len(table)):
        for _ in range(20):
            some = table.take(dice.choice(len(table), size, replace=False))
            other, image = sentence_donors(some), some.image_ids
            assert sorted(other) == list(range(size)) and (other != np.arange(size)).all()
            largest = np.unique(image, return_counts=True)[1].max()
            assert (image[other] == image).sum() == max(0, 2 * largest - size)


def test_the_sentence_rules_share_their_samples(packed: Path):
    sources, indexes = (Source(index=str(packed), split="train"),), (read_index(packed),)
    each, numbers = evaluation_table(sources, indexes, ["each"])
    plain = build_table(sources, indexes, "sentence")
    assert each.sentence.tolist() == plain.sentence.tolist() and numbers["each"].tolist() == list(
        range(len(plain))
    )
    table, members = evaluation_table(sources, indexes, RULES)
    refs = len(build_table(sources, indexes, "ref"))
    assert len(table) == len(plain) + refs, "a first sentence is not read twice"
    assert set(members["first"]) < set(members["each"]) and not set(members["concatenated"]) & set(
        members["each"]
    )
    assert table.take(members["each"]).sentence.tolist() == plain.sentence.tolist()
    for rule, sentence in (("first", 0), ("concatenated", ALL)):
        assert set(table.sentence[members[rule]]) == {sentence}
        labels = [table.label(number) for number in members[rule]]
        assert len(set(labels)) == len(labels) == refs
    assert (
        len(evaluation_table(sources, indexes, ["first"])[0])
        == len(evaluation_table(sources, indexes, ["concatenated"])[0])
        == refs
    )
    _, few = evaluation_table(sources, indexes, RULES, limit=5)
    assert {rule: len(numbers) for rule, numbers in few.items()} == dict.fromkeys(RULES, 5)


def test_the_control_exchanges_joined_sentences_among_themselves(packed: Path):
    table, members = evaluation_table(
        (Source(index=str(packed), split="train"),), (read_index(packed),), RULES
    )
    other = sentence_donors(table)
    assert sorted(other) == list(range(len(table)))
    for rule in ("each", "concatenated"):
        assert set(other[members[rule]]) == set(members[rule])


# ---------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("resize", ["squash", "letterbox"])
def test_sentences_about_a_photograph_share_its_decoding_and_nothing_else(
    packed: Path, resize: str, monkeypatch: pytest.MonkeyPatch
):
    config = DataConfig(
        train=[Source(index=str(packed), split="train")], image_size=64, resize=resize
    )
    table = build_table(config.train, [open_index(str(packed))], "sentence")
    tokenizer, decoded = open_tokenizer(config), []
    decode = transforms.decode_image
    monkeypatch.setattr(
        transforms,
        "decode_image",
        lambda data, frame=None: decoded.append(len(data)) or decode(data, frame),
    )
    numbers = [*range(len(table)), *np.random.default_rng(0).integers(len(table), size=40).tolist()]

    def read(reader: SampleReader, number: int) -> tuple[np.ndarray, SampleInfo]:
        square = np.empty((64, 64, 3), np.uint8)
        return square, reader.read_eval_sample(number, None, with_image=True, square=square)

    shared = SampleReader(config, table, tokenizer)
    found = [read(shared, number) for number in numbers]
    in_a_row = 1 + np.count_nonzero(np.diff(table.image[numbers]))
    assert len(decoded) == in_a_row < len(numbers)
    for number, (pixels, info) in zip(numbers, found):
        expected, alone = read(SampleReader(config, table, tokenizer), number)
        assert (
            np.array_equal(pixels, expected)
            and np.array_equal(info.image, alone.image)
            and np.array_equal(info.truth, alone.truth)
        )
        assert replace(info, image=None, truth=None) == replace(alone, image=None, truth=None)
