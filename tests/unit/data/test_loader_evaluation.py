"""The evaluation loader: every sentence once, for any ranks, batches and workers."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from coupalign.data.index import read_index
from coupalign.data.table import RULES
from coupalign.data.tokenizer import Tokenizer
from coupalign.errors import InputError
from tests.unit.data.batches import config_of, evaluate, world_of
from tests.unit.data.conftest import change_index


@pytest.mark.parametrize("ranks, batch", [(1, 3), (2, 3), (3, 2), (5, 4), (7, 1), (20, 2)])
def test_every_sentence_is_scored_in_equally_many_batches_per_rank(
    packed: Path, ranks: int, batch: int
):
    config = config_of(packed)
    loaders = [evaluate(config, batch=batch, world=world_of(rank, ranks)) for rank in range(ranks)]

    batches = [list(loader) for loader in loaders]

    # Every rank yields the same number of batches. Those that are not spare have each sample once.
    assert {len(own) for own in batches} == {len(loaders[0])}
    assert len(loaders[0]) == math.ceil(math.ceil(17 / ranks) / batch)
    own_batches = [one for own in batches for one in own if not one.spare]
    numbers = [info.number for one in own_batches for info in one.info]
    assert sorted(numbers) == list(range(17))
    assert len(own_batches) == math.ceil(17 / batch)

    # Neighbors, which are sentences about one photograph, stay together.
    for rank, own in enumerate(batches):
        for position, one in enumerate(own[:-1]):
            first = (position * ranks + rank) * batch
            assert [info.number for info in one.info] == list(range(first, first + batch))


@pytest.mark.parametrize("ranks, batch", [(1, 3), (2, 3), (3, 2), (5, 4), (7, 1), (20, 2)])
def test_ranks_agree_about_names_and_yield_truths(packed: Path, ranks: int, batch: int):
    config = config_of(packed)
    loaders = [evaluate(config, batch=batch, world=world_of(rank, ranks)) for rank in range(ranks)]

    assert {loader.samples for loader in loaders} == {17}
    assert len({loader.fingerprint for loader in loaders}) == 1
    known = loaders[0].names_and_sentences
    assert len({name for name, _ in known}) == 17

    for one in (one for loader in loaders for one in loader):
        assert len(one) <= batch and one.target is None
        for info in one.info:
            assert known[info.number] == (info.name, info.sentence)
            assert info.image is None
            assert info.truth.dtype == bool and info.truth.any()
            assert info.truth.shape == (info.frame.height, info.frame.width)


def test_workers_do_not_change_an_evaluation(packed: Path):
    both = []
    for workers in (0, 2):
        samples = []
        for batch in evaluate(config_of(packed, workers=workers), batch=4):
            for info, image in zip(batch.info, batch.image):
                truth, pixels = info.truth.tobytes(), image.numpy().tobytes()
                samples.append((info.number, info.sentence, truth, pixels))
        both.append(samples)

    assert both[0] == both[1]
    assert [number for number, *_ in both[0]] == list(range(17))


def test_images_come_if_requested(packed: Path):
    for batch in evaluate(config_of(packed), images=True):
        for info in batch.info:
            assert info.image.shape == (info.frame.height, info.frame.width, 3)


def test_limit_takes_evenly_spaced_samples(packed: Path):
    whole = evaluate(config_of(packed))

    few = evaluate(config_of(packed), limit=5)

    spaced = tuple(whole.names_and_sentences[number] for number in (0, 3, 6, 10, 13))
    assert few.samples == 5
    assert few.names_and_sentences == spaced
    assert [info.number for batch in few for info in batch.info] == list(range(5))
    assert evaluate(config_of(packed), limit=99).samples == 17


# ---------------------------------------------------------------------- language-blind control


def infos_of(packed: Path, **options) -> dict:
    """The samples of an evaluation, by number."""
    loader = evaluate(config_of(packed), **options)
    return {info.number: info for batch in loader for info in batch.info}


def test_language_blind_control_exchanges_sentences_only(packed: Path):
    plain = infos_of(packed)

    blind = infos_of(packed, shuffle_sentences=True)

    sentences = Counter(info.sentence for info in plain.values())
    assert Counter(info.sentence for info in blind.values()) == sentences
    assert sum(plain[n].sentence != blind[n].sentence for n in plain) > 10
    for number, info in plain.items():
        assert info.name == blind[number].name
        assert np.array_equal(info.truth, blind[number].truth)


def test_language_blind_control_is_the_same_for_any_ranks(packed: Path):
    blind = infos_of(packed, shuffle_sentences=True)

    second = infos_of(packed, shuffle_sentences=True, world=world_of(1, 2))

    assert 4 <= len(second) < 17
    for number, info in second.items():
        assert info.sentence == blind[number].sentence


def test_language_blind_control_needs_two_samples(packed: Path):
    with pytest.raises(InputError, match="needs two or more"):
        evaluate(config_of(packed), limit=1, shuffle_sentences=True)


# --------------------------------------------------------------------------- facts of a sample


def test_all_sentences_of_a_ref_joined_are_one_more_sample(packed: Path):
    loader = evaluate(config_of(packed, max_tokens=30), rules=RULES)
    infos = {info.number: info for batch in loader for info in batch.info}

    names = [(infos[number].name, infos[number].sentence) for number in range(loader.samples)]
    assert names == list(loader.names_and_sentences)

    for number in loader.members["concatenated"]:
        ref, _, last = infos[number].name.rpartition("/")
        own = [infos[n] for n in loader.members["each"] if infos[n].name.rpartition("/")[0] == ref]
        assert last == "all"
        assert infos[number].sentence == " ".join(info.sentence for info in own)
        assert np.array_equal(infos[number].truth, own[0].truth)

    # The sentence ids of a ref begin at a multiple of ten.
    firsts = [infos[number].name for number in loader.members["first"]]
    assert all(name.rpartition("/")[2].endswith("0") for name in firsts)


def test_number_of_same_class_objects_is_known_or_minus_one(packed: Path):
    def same_class() -> dict[int, int]:
        loader = evaluate(config_of(packed))
        return {info.image_id: info.same_class for batch in loader for info in batch.info}

    assert set(same_class().values()) == {0}, "one person and one bird per image"

    # Make one record as it was before the key was added, and before there were checksums.
    change_index(packed, lambda tree: [image.pop("crc") for image in tree["images"]])
    index = read_index(packed)
    old = index.images[8]
    with open(packed / index.shards[old.shard].url, "r+b") as file:
        file.seek(old.json[0])
        text = file.read(old.json[1])
        file.seek(old.json[0])
        file.write(text.replace(b'"same_class":0,', b"               "))

    found = same_class()
    assert found[old.image_id] == -1
    assert set(found.values()) == {0, -1}


def test_long_sentence_is_marked_as_cut(packed: Path):
    tokenizer = Tokenizer.open(packed / "vocab.txt")

    [batch] = evaluate(config_of(packed, max_tokens=5), batch=17)

    assert {info.cut for info in batch.info} == {True, False}
    for info in batch.info:
        assert info.cut == (len(tokenizer.tokens(info.sentence)) > 3)
