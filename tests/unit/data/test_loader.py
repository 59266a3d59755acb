"""The loader over random topologies: the same samples, bytes and order whatever ranks, micro-batches and workers."""
from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from coupalign.config.schema import Augmentation, DataConfig, Source
from coupalign.data import masks, transforms
from coupalign.data.batch import Batch
from coupalign.data.index import read_index
from coupalign.data.loader import EvalLoader, TrainLoader, build_eval_loader, build_train_loader, open_tokenizer
from coupalign.data.samples import RULES
from coupalign.data.tokenizer import Tokenizer
from coupalign.errors import InputError

Row = tuple


def config_of(packed: Path, **fields) -> DataConfig:
    source = Source(index=str(packed), dataset="refcoco", split="train")
    return DataConfig(**{"train": (source,), "image_size": 32, "max_tokens": 8, "workers": 0, "shuffle_window": 2,
                         "augment": Augmentation(flip=0.5, color_jitter=0.4), **fields})


def train(config: DataConfig, global_batch: int = 6, micro: int | None = None, rank: int = 0, ranks: int = 1,
          seed: int = 0) -> TrainLoader:
    return build_train_loader(config, seed, global_batch, micro, rank, ranks, open_tokenizer(config))


def evaluate(config: DataConfig, split: str = "val", dataset: str | None = None, batch: int = 3, rank: int = 0, ranks: int = 1,
             **fields) -> EvalLoader:
    source = Source(index=config.train[0].index, dataset=dataset, split=split)
    return build_eval_loader(config, (source,), batch, rank, ranks, open_tokenizer(config), **fields)


def rows_of(batch: Batch) -> list[Row]:
    """All that there is of each sample, as bytes."""
    return [(info.number, info.name, info.sentence, info.frame, image.numpy().tobytes(), words.numpy().tobytes(),
             word_mask.numpy().tobytes(), target.numpy().tobytes())
            for info, image, words, word_mask, target in zip(batch.info, batch.image, batch.words, batch.word_mask, batch.target)]


def steps_of(loader: TrainLoader, first: int, count: int) -> list[list[Row]]:
    """The rows of each step on this rank."""
    taken = list(islice(loader.steps_from(first), count))
    assert [step for step, _ in taken] == list(range(first, first + count))
    assert all(len(batches) == loader.micro_batches and len({len(batch) for batch in batches}) == 1 for _, batches in taken)
    return [[row for batch in batches for row in rows_of(batch)] for _, batches in taken]


# --------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("unit, samples", [("ref", 16), ("sentence", 41)])
def test_every_sample_once_an_epoch(packed: Path, unit: str, samples: int):
    loader = train(config_of(packed, unit=unit), global_batch=5)
    assert loader.samples == samples
    numbers = [row[0] for step in steps_of(loader, 0, 3 * samples // 5 + 1) for row in step]
    for epoch in range(3):
        assert sorted(numbers[epoch * samples:(epoch + 1) * samples]) == list(range(samples))
    assert numbers[:samples] != numbers[samples:2 * samples]


@pytest.mark.parametrize("parts", [1, 4])
def test_a_step_is_the_same_for_every_topology(packed: Path, parts: int):
    """Random ranks, micro-batches, workers and first steps against one process, byte by byte and in the same order."""
    dice = random.Random(1)
    expected = steps_of(train(config_of(packed, canonical_nodes=parts), global_batch=12), 0, 6)
    for trial in range(10):
        ranks = dice.choice([1, 2, 3, 4, 6, 12])
        micro, workers, first = dice.choice([None, 1, 2, 5]), 2 if trial in (3, 7) else 0, dice.randrange(4)
        config = config_of(packed, workers=workers, canonical_nodes=parts)
        read = []
        for rank in range(ranks if workers == 0 else min(ranks, 2)):
            loader = train(config, 12, micro, rank, ranks)
            read.append(steps_of(loader, first, 2))
            loader.close()
        for step in range(2):
            found = sum((steps[step] for steps in read), [])
            assert found == expected[first + step][:len(found)] and (workers or len(found) == 12)


def test_a_resumed_run_decodes_nothing_that_was_skipped(packed: Path, monkeypatch: pytest.MonkeyPatch):
    expected = steps_of(train(config_of(packed)), 0, 40)
    decoded: list[int] = []
    decode = transforms.decode_image
    monkeypatch.setattr(transforms, "decode_image", lambda data: decoded.append(len(data)) or decode(data))
    assert steps_of(train(config_of(packed)), 37, 2) == expected[37:39]
    assert len(decoded) == 12


def test_one_loader_may_begin_again(packed: Path):
    """A second iteration ends the first, with worker processes that keep running."""
    expected = steps_of(train(config_of(packed)), 0, 8)
    loader = train(config_of(packed, workers=2), micro=2)
    first = loader.steps_from(0)
    assert [row for batch in next(first)[1] for row in rows_of(batch)] == expected[0]
    assert steps_of(loader, 5, 3) == expected[5:]
    assert next(first, None) is None
    workers = loader._loader._iterator._workers
    loader.close()
    del first
    for worker in workers:
        worker.join(10)
        assert not worker.is_alive()


def test_a_signal_for_the_run_does_not_end_the_workers(packed: Path):
    expected = steps_of(train(config_of(packed)), 0, 30)
    loader = train(config_of(packed, workers=1))
    steps = loader.steps_from(0)
    next(steps)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        os.kill(loader._loader._iterator._workers[0].pid, number)
    assert [rows_of(batch) for _, [batch] in islice(steps, 29)] == expected[1:]
    loader.close()


ABANDONED = """
import sys
from coupalign.config.schema import DataConfig, Source
from coupalign.data.loader import build_eval_loader, build_train_loader, open_tokenizer
source = Source(index=sys.argv[1], dataset="refcoco", split="train")
config = DataConfig(train=(source,), image_size=32, workers=1)
tokenizer = open_tokenizer(config)
train = build_train_loader(config, 0, 4, None, 0, 1, tokenizer).steps_from(0)
evaluation = iter(build_eval_loader(config, (source,), 2, 0, 1, tokenizer))
next(train), next(evaluation)
sys.exit("gone")
"""


def test_a_program_that_leaves_its_loaders_open_ends(packed: Path):
    done = subprocess.run([sys.executable, "-c", ABANDONED, str(packed)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr == "gone\n"


def test_the_global_random_state_is_left_alone(packed: Path):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    loader = train(config_of(packed, workers=1))
    steps_of(loader, 0, 1)
    loader.close()
    list(evaluate(config_of(packed)))
    assert torch.equal(before, torch.get_rng_state())


def test_seed_and_epoch_change_sentences_and_pictures(packed: Path):
    rows = [sorted(steps_of(train(config_of(packed), 16, seed=seed), 0, 1)[0]) for seed in (0, 1)]
    assert sum(a[2] != b[2] for a, b in zip(*rows)) > 3
    first, second = steps_of(train(config_of(packed), 16), 0, 2)
    second = {row[0]: row for row in second}
    assert sum(row[2] != second[row[0]][2] for row in first) > 3
    chosen = Counter(row[1] for step in steps_of(train(config_of(packed), 16), 0, 30) for row in step)
    assert len(chosen) == 41 and max(chosen.values()) < 28        # each sentence of each ref is drawn


def test_a_flip_mirrors_picture_mask_and_sentence(packed: Path):
    configs = [config_of(packed, unit="sentence", augment=Augmentation(flip=flip)) for flip in (0, 1)]
    plain, mirrored = (steps_of(train(config, 41), 0, 1)[0] for config in configs)
    for a, b in zip(plain, mirrored):
        assert b[2] == transforms.mirror_sentence(a[2])
        for place, shape in ((4, (3, 32, 32)), (7, (32, 32))):
            before, after = (np.frombuffer(row[place], np.uint8).reshape(shape) for row in (a, b))
            assert np.array_equal(before[..., ::-1], after)
    assert any(a[2] != b[2] for a, b in zip(plain, mirrored))


@pytest.mark.parametrize("resize", ["squash", "letterbox"])
def test_a_sample_is_what_the_annotation_says(packed: Path, refer_root: Path, resize: str):
    """Against the `refer` files themselves, which the loader never saw."""
    refs = {ref["ref_id"]: ref for ref in json.loads((refer_root / "refcocog" / "refs(umd).json").read_text(encoding="utf-8"))}
    instances = json.loads((refer_root / "refcoco" / "instances.json").read_text())
    annotations = {annotation["id"]: annotation for annotation in instances["annotations"]}
    files = {image["id"]: image["file_name"] for image in instances["images"]}
    source = Source(index=str(packed), dataset="refcocog", split="train")
    _, [batch] = next(train(config_of(packed, resize=resize, train=(source,), augment=Augmentation())).steps_from(0))
    for row, info in enumerate(batch.info):
        ref = refs[int(info.name.split("/")[2])]
        image = Image.open(refer_root / "images" / "train2014" / files[ref["image_id"]]).convert("RGB")
        mask = masks.decode(masks.rle_from_segmentation(annotations[ref["ann_id"]]["segmentation"], image.height, image.width))
        assert info.image_id == ref["image_id"] and info.sentence in [sentence["sent"] for sentence in ref["sentences"]]
        assert np.array_equal(batch.image[row].permute(1, 2, 0), transforms.image_to_square(image, info.frame))
        assert np.array_equal(batch.target[row], transforms.mask_to_square(mask, info.frame))


def test_the_text_may_be_the_raw_one(packed: Path):
    config = config_of(packed, unit="sentence", sentence="raw", augment=Augmentation())
    raw = {row[2] for row in steps_of(train(config, 41), 0, 1)[0]}
    assert any(sentence.startswith("The ") for sentence in raw) and any(sentence.endswith(".") for sentence in raw)


def test_a_mixture_holds_every_source(packed: Path, tmp_path: Path):
    sources = (Source(index=str(packed), dataset="refcoco", split_by="unc", split="train"),
               Source(index=f"{packed}/index.json", dataset="refcocog", split="val"))
    loader = train(config_of(packed, train=sources, mix="leaky"), global_batch=9)
    names = Counter(row[1].rsplit("/", 2)[0] for step in steps_of(loader, 0, 2) for row in step)
    assert loader.samples == 18 and names == {"refcoco/unc": 16, "refcocog/umd": 2}
    assert loader.fingerprint != train(config_of(packed)).fingerprint
    assert train(config_of(packed)).fingerprint == train(config_of(packed)).fingerprint


def test_other_wrong_settings(packed: Path):
    with pytest.raises(InputError, match="cannot be shared evenly by 4 processes: use 4 or 8"):
        train(config_of(packed), global_batch=6, ranks=4)
    with pytest.raises(InputError, match="train.global_batch=6 .* data.canonical_nodes=4 parts: use 12,"):
        train(config_of(packed, canonical_nodes=4), global_batch=6, ranks=6)
    with pytest.raises(InputError, match="data.canonical_nodes=17 is more than there are training samples, 16"):
        train(config_of(packed, canonical_nodes=17), global_batch=17)
    tokenizer = open_tokenizer(config_of(packed))
    with pytest.raises(InputError, match="data.train is empty"):
        build_train_loader(config_of(packed, train=()), 0, 2, None, 0, 1, tokenizer)
    with pytest.raises(InputError, match="data.evaluate"):
        build_eval_loader(config_of(packed), (), 2, 0, 1, tokenizer)
    with pytest.raises(InputError, match="no vocabulary"):
        open_tokenizer(DataConfig())


@pytest.mark.parametrize("parts, shards", [(1, 1), (2, 2)])
def test_a_small_cache_is_pointed_out(packed: Path, parts: int, shards: int, caplog: pytest.LogCaptureFixture,
                                      monkeypatch: pytest.MonkeyPatch):
    """One rank reads all the parts, each in a window of its own."""
    from dataclasses import replace

    from coupalign.data import loader
    index = replace(read_index(packed), location="https://example.org/set")
    monkeypatch.setattr(loader, "open_index", lambda location: index)
    needed = sum(sorted(shard.bytes for shard in index.shards)[-shards:])
    for spare, warned in ((-1, True), (1, False)):
        caplog.clear()
        config = config_of(packed, cache_gb=(needed + spare) / 1e9, cache_dir=packed / "cache", shuffle_window=1, canonical_nodes=parts)
        build_train_loader(config, 0, 2, None, 0, 1, Tokenizer.open(packed / "vocab.txt"))
        assert ("is less than the" in caplog.text) == warned


# ------------------------------------------------------------------------------------------------------ bad samples


def damage(packed: Path, image_id: int, part: str, change) -> None:
    """Replace bytes of one file inside its shard; `change` keeps the length."""
    index = read_index(packed)
    entry = next(image for image in index.images if image.image_id == image_id)
    offset, length = getattr(entry, part)
    with open(index.address(entry.shard), "r+b") as file:
        file.seek(offset)
        data = change(file.read(length))
        assert len(data) == length
        file.seek(offset)
        file.write(data)


DAMAGES = [("jpg", lambda data: data[:len(data) // 2] + bytes(len(data) - len(data) // 2), ""),
           ("jpg", lambda data: bytes(len(data)), "cannot identify image"),
           ("json", lambda data: b"!" + data[1:], "Expecting value"),
           ("json", lambda data: data.replace(b'"rle"', b'"rlx"'), "KeyError 'rle'"),
           ("json", lambda data: data.replace(b'"image_id":72', b'"image_id":73'), "not the one that its index describes"),
           ("json", lambda data: data.replace(b'"height":', b'"heighx":'), "KeyError 'height'")]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("part, change, words", DAMAGES[:3])
def test_a_bad_sample_ends_the_run_with_its_name(packed: Path, part: str, change, words: str, workers: int):
    damage(packed, 72, part, change)
    loader = train(config_of(packed, workers=workers))
    named = rf"unreadable sample refcoco/unc/[45]: 000000000072.{part} \(image 72\) in .*shard-0000.*{words}"
    with pytest.raises(InputError, match=named) as info:
        steps_of(loader, 0, 3)
    assert "Traceback" not in str(info.value) and "data.bad_samples=skip" in str(info.value)
    loader.close()


@pytest.mark.parametrize("part, change, words", DAMAGES[3:])
def test_a_record_that_parses_may_be_bad_too(packed: Path, part: str, change, words: str):
    damage(packed, 72, part, change)
    with pytest.raises(InputError, match=rf"000000000072.{part} \(image 72\).*{words}"):
        steps_of(train(config_of(packed)), 0, 3)


def test_skip_replaces_counts_and_names(packed: Path):
    whole = steps_of(train(config_of(packed), 4), 0, 8)
    damage(packed, 72, "jpg", DAMAGES[0][1])
    config = config_of(packed, bad_samples="skip", max_bad_share=0.5)
    loader = train(config, 4)
    found = steps_of(loader, 0, 8)
    assert sorted(loader.bad) == ["refcoco/unc/4", "refcoco/unc/5"] and "(image 72)" in loader.bad["refcoco/unc/4"]
    for before, after in zip(whole, found):
        assert len(after) == 4
        for a, b in zip(before, after):
            assert a == b if "/4/" not in a[1] and "/5/" not in a[1] else b[1].split("/")[2] == "6"
    parts = [steps_of(train(config, 4, 1, rank, 2), 0, 8) for rank in range(2)]
    assert [a + b for a, b in zip(*parts)] == found


def test_too_many_bad_samples_end_the_run(packed: Path):
    damage(packed, 72, "jpg", DAMAGES[0][1])
    loader = train(config_of(packed, bad_samples="skip", max_bad_share=0.1), 4)
    with pytest.raises(InputError, match=r"samples drawn cannot be read, more than data.max_bad_share=0.1: refcoco/unc/"):
        steps_of(loader, 0, 10)
    for image_id in {image.image_id for image in read_index(packed).images}:
        damage(packed, image_id, "jpg", DAMAGES[1][1])
    with pytest.raises(InputError, match="16 samples in a row cannot be read"):
        steps_of(train(config_of(packed, bad_samples="skip", max_bad_share=1), 4), 0, 1)


def test_a_shard_that_ends_too_early_and_one_that_is_gone(packed: Path):
    index = read_index(packed)
    shard = Path(index.address(0))
    with open(shard, "r+b") as file:
        file.truncate(index.shards[0].bytes // 2)
    with pytest.raises(InputError, match=r"shard-000000.tar: the shard is cut short"):
        steps_of(train(config_of(packed)), 0, 3)
    shard.unlink()
    with pytest.raises(InputError, match=r"shard-000000.tar cannot be opened"):       # never merely skipped
        steps_of(train(config_of(packed, bad_samples="skip")), 0, 3)


def test_an_evaluation_never_leaves_a_sample_out(packed: Path):
    config = config_of(packed, bad_samples="skip", max_bad_share=1)
    damage(packed, 40961, "jpg", DAMAGES[0][1])
    with pytest.raises(InputError, match=r"\(image 40961\).*leaves no sample out"):
        list(evaluate(config))
    damage(packed, 40961, "json", DAMAGES[2][1])
    with pytest.raises(InputError, match=r"40961.json"):
        evaluate(config).words      # noqa: B018


# ------------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("ranks, batch", [(1, 3), (2, 3), (3, 2), (5, 4), (7, 1), (20, 2)])
def test_every_sentence_is_scored_and_every_rank_gives_the_same_number_of_batches(packed: Path, ranks: int, batch: int):
    config = config_of(packed)
    loaders = [evaluate(config, batch=batch, rank=rank, ranks=ranks) for rank in range(ranks)]
    batches = [list(loader) for loader in loaders]
    assert {len(part) for part in batches} == {len(loaders[0])} == {math.ceil(math.ceil(17 / ranks) / batch)}
    assert {info.number for part in batches for one in part for info in one.info} == set(range(17))
    assert {loader.samples for loader in loaders} == {17} and len({loader.fingerprint for loader in loaders}) == 1
    names = [name for name, _ in loaders[0].words]
    assert len(set(names)) == 17
    for part in batches:
        for one in part:
            assert len(one) <= batch and one.target is None
            for info in one.info:
                assert loaders[0].words[info.number] == (info.name, info.sentence) and info.image is None
                assert info.truth.dtype == bool and info.truth.shape == (info.frame.height, info.frame.width) and info.truth.any()


def test_workers_do_not_change_an_evaluation(packed: Path):
    both = []
    for workers in (0, 2):
        batches = evaluate(config_of(packed, workers=workers), batch=4)
        both.append([(info.number, info.sentence, info.truth.tobytes(), image.numpy().tobytes())
                     for batch in batches for info, image in zip(batch.info, batch.image)])
    assert both[0] == both[1] and [row[0] for row in both[0]] == list(range(17))


def test_pictures_come_where_asked_for(packed: Path):
    for batch in evaluate(config_of(packed), images=True):
        assert all(info.image.shape == (info.frame.height, info.frame.width, 3) for info in batch.info)


def test_a_limit_takes_evenly_spaced_samples(packed: Path):
    whole, few = evaluate(config_of(packed)), evaluate(config_of(packed), limit=5)
    assert few.samples == 5 and few.words == tuple(whole.words[n] for n in (0, 3, 6, 10, 13))
    assert [info.number for batch in few for info in batch.info] == list(range(5))
    assert evaluate(config_of(packed), limit=99).samples == 17


def test_the_language_blind_control_exchanges_sentences(packed: Path):
    plain = {info.number: info for batch in evaluate(config_of(packed)) for info in batch.info}
    blind = {info.number: info for batch in evaluate(config_of(packed), shuffle_sentences=True) for info in batch.info}
    assert Counter(info.sentence for info in plain.values()) == Counter(info.sentence for info in blind.values())
    assert sum(plain[n].sentence != blind[n].sentence for n in plain) > 10
    for n in plain:
        assert plain[n].name == blind[n].name and np.array_equal(plain[n].truth, blind[n].truth)
    second = evaluate(config_of(packed), shuffle_sentences=True, rank=1, ranks=2)
    again = [info.sentence for batch in second for info in batch.info]
    assert again[:8] == [blind[n].sentence for n in range(1, 17, 2)]
    with pytest.raises(InputError, match="needs two or more"):
        evaluate(config_of(packed), limit=1, shuffle_sentences=True)


def test_all_sentences_of_a_ref_joined_are_one_more_sample(packed: Path):
    loader = evaluate(config_of(packed, max_tokens=30), rules=RULES)
    infos = {info.number: info for batch in loader for info in batch.info}
    assert [(infos[number].name, infos[number].sentence) for number in range(loader.samples)] == list(loader.words)
    for number in loader.members["concatenated"]:
        ref, _, last = infos[number].name.rpartition("/")
        own = [infos[n] for n in loader.members["each"] if infos[n].name.rpartition("/")[0] == ref]
        assert last == "all" and infos[number].sentence == " ".join(info.sentence for info in own)
        assert np.array_equal(infos[number].truth, own[0].truth)
    firsts = [infos[number].name for number in loader.members["first"]]
    assert all(name.rpartition("/")[2].endswith("0") for name in firsts), "sentence ids of a ref begin at a multiple of ten"


def test_objects_of_the_same_class_are_known_or_said_to_be_unknown(packed: Path):
    known = {info.name: info.same_class for batch in evaluate(config_of(packed)) for info in batch.info}
    assert set(known.values()) == {0}, "one person and one bird an image"
    index = read_index(packed)
    old = index.images[8]
    with open(packed / index.shards[old.shard].url, "r+b") as file:
        file.seek(old.json[0])
        text = file.read(old.json[1])
        file.seek(old.json[0])
        file.write(text.replace(b'"same_class":0,', b"               "))
    again = {info.image_id: info.same_class for batch in evaluate(config_of(packed)) for info in batch.info}
    assert again[old.image_id] == -1 and set(again.values()) == {0, -1}, "a shard of before the key was added is still read"


def test_a_long_sentence_is_marked_as_cut(packed: Path):
    infos = [info for batch in evaluate(config_of(packed, max_tokens=5), batch=17) for info in batch.info]
    tokenizer = Tokenizer.open(packed / "vocab.txt")
    assert {info.cut for info in infos} == {True, False}
    assert all(info.cut == (len(tokenizer.tokens(info.sentence)) > 3) for info in infos)


def test_a_batch_moves_as_a_whole(packed: Path):
    _, [batch] = next(train(config_of(packed)).steps_from(0))
    assert batch.image.dtype == torch.uint8 and batch.image.shape == (6, 3, 32, 32) and batch.image.is_contiguous()
    assert batch.words.shape == batch.word_mask.shape == (6, 8) and batch.target.dtype == torch.bool and len(batch) == 6
    moved = batch.to("meta")
    assert moved.image.device.type == moved.target.device.type == "meta" and moved.info is batch.info
