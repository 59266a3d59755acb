"""Evaluation: every sentence once, whatever ranks, batches and workers, with the facts that the scores are grouped by."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from coupalign.data.index import read_index
from coupalign.data.table import RULES
from coupalign.data.tokenizer import Tokenizer
from coupalign.errors import InputError
from tests.unit.data.batches import config_of, evaluate, train


@pytest.mark.parametrize("ranks, batch", [(1, 3), (2, 3), (3, 2), (5, 4), (7, 1), (20, 2)])
def test_every_sentence_is_scored_and_every_rank_gives_the_same_number_of_batches(
    packed: Path, ranks: int, batch: int
):
    config = config_of(packed)
    loaders = [evaluate(config, batch=batch, rank=rank, ranks=ranks) for rank in range(ranks)]
    batches = [list(loader) for loader in loaders]
    assert (
        {len(part) for part in batches}
        == {len(loaders[0])}
        == {math.ceil(math.ceil(17 / ranks) / batch)}
    )
    assert {info.number for part in batches for one in part for info in one.info} == set(range(17))
    for rank, part in enumerate(batches):
        for place, one in enumerate(part[:-1]):
            first = (place * ranks + rank) * batch
            assert [info.number for info in one.info] == list(range(first, first + batch)), (
                "sentences about a photograph stay together"
            )
    assert {loader.samples for loader in loaders} == {17} and len(
        {loader.fingerprint for loader in loaders}
    ) == 1
    names = [name for name, _ in loaders[0].names_and_sentences]
    assert len(set(names)) == 17
    for part in batches:
        for one in part:
            assert len(one) <= batch and one.target is None
            for info in one.info:
                assert (
                    loaders[0].names_and_sentences[info.number] == (info.name, info.sentence)
                    and info.image is None
                )
                assert (
                    info.truth.dtype == bool
                    and info.truth.shape == (info.frame.height, info.frame.width)
                    and info.truth.any()
                )


def test_workers_do_not_change_an_evaluation(packed: Path):
    both = []
    for workers in (0, 2):
        batches = evaluate(config_of(packed, workers=workers), batch=4)
        both.append(
            [
                (info.number, info.sentence, info.truth.tobytes(), image.numpy().tobytes())
                for batch in batches
                for info, image in zip(batch.info, batch.image)
            ]
        )
    assert both[0] == both[1] and [row[0] for row in both[0]] == list(range(17))


def test_pictures_come_where_asked_for(packed: Path):
    for batch in evaluate(config_of(packed), images=True):
        assert all(
            info.image.shape == (info.frame.height, info.frame.width, 3) for info in batch.info
        )


def test_a_limit_takes_evenly_spaced_samples(packed: Path):
    whole, few = evaluate(config_of(packed)), evaluate(config_of(packed), limit=5)
    assert few.samples == 5 and few.names_and_sentences == tuple(
        whole.names_and_sentences[n] for n in (0, 3, 6, 10, 13)
    )
    assert [info.number for batch in few for info in batch.info] == list(range(5))
    assert evaluate(config_of(packed), limit=99).samples == 17


def test_the_language_blind_control_exchanges_sentences(packed: Path):
    plain = {info.number: info for batch in evaluate(config_of(packed)) for info in batch.info}
    blind = {
        info.number: info
        for batch in evaluate(config_of(packed), shuffle_sentences=True)
        for info in batch.info
    }
    assert Counter(info.sentence for info in plain.values()) == Counter(
        info.sentence for info in blind.values()
    )
    assert sum(plain[n].sentence != blind[n].sentence for n in plain) > 10
    for n in plain:
        assert plain[n].name == blind[n].name and np.array_equal(plain[n].truth, blind[n].truth)
    second = evaluate(config_of(packed), shuffle_sentences=True, rank=1, ranks=2)
    again = [(info.number, info.sentence) for batch in second for info in batch.info]
    assert 4 <= len(again) < 17 and all(
        sentence == blind[number].sentence for number, sentence in again
    )
    with pytest.raises(InputError, match="needs two or more"):
        evaluate(config_of(packed), limit=1, shuffle_sentences=True)


def test_all_sentences_of_a_ref_joined_are_one_more_sample(packed: Path):
    loader = evaluate(config_of(packed, max_tokens=30), rules=RULES)
    infos = {info.number: info for batch in loader for info in batch.info}
    assert [
        (infos[number].name, infos[number].sentence) for number in range(loader.samples)
    ] == list(loader.names_and_sentences)
    for number in loader.members["concatenated"]:
        ref, _, last = infos[number].name.rpartition("/")
        own = [infos[n] for n in loader.members["each"] if infos[n].name.rpartition("/")[0] == ref]
        assert last == "all" and infos[number].sentence == " ".join(info.sentence for info in own)
        assert np.array_equal(infos[number].truth, own[0].truth)
    firsts = [infos[number].name for number in loader.members["first"]]
    assert all(name.rpartition("/")[2].endswith("0") for name in firsts), (
        "sentence ids of a ref begin at a multiple of ten"
    )


def test_objects_of_the_same_class_are_known_or_said_to_be_unknown(packed: Path):
    known = {
        info.name: info.same_class for batch in evaluate(config_of(packed)) for info in batch.info
    }
    assert set(known.values()) == {0}, "one person and one bird an image"
    index = read_index(packed)
    old = index.images[8]
    with open(packed / index.shards[old.shard].url, "r+b") as file:
        file.seek(old.json[0])
        text = file.read(old.json[1])
        file.seek(old.json[0])
        file.write(text.replace(b'"same_class":0,', b"               "))
    again = {
        info.image_id: info.same_class
        for batch in evaluate(config_of(packed))
        for info in batch.info
    }
    assert again[old.image_id] == -1 and set(again.values()) == {0, -1}, (
        "a shard of before the key was added is still read"
    )


def test_a_long_sentence_is_marked_as_cut(packed: Path):
    infos = [
        info for batch in evaluate(config_of(packed, max_tokens=5), batch=17) for info in batch.info
    ]
    tokenizer = Tokenizer.open(packed / "vocab.txt")
    assert {info.cut for info in infos} == {True, False}
    assert all(info.cut == (len(tokenizer.tokens(info.sentence)) > 3) for info in infos)


def test_a_batch_moves_as_a_whole(packed: Path):
    _, [batch] = next(train(config_of(packed)).steps_from(0))
    assert (
        batch.image.dtype == torch.uint8
        and batch.image.shape == (6, 3, 32, 32)
        and batch.target.is_contiguous()
    )
    assert (
        batch.words.shape == batch.word_mask.shape == (6, 8)
        and batch.target.dtype == torch.bool
        and len(batch) == 6
    )
    moved = batch.to("meta")
    assert (
        moved.image.device.type == moved.target.device.type == "meta" and moved.info is batch.info
    )
    assert moved.image.stride() == batch.image.stride()
