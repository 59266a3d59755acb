"""The loader over random topologies: the same samples, bytes and order whatever ranks, micro-batches and workers."""

from __future__ import annotations

import json
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

from coupalign.bench.machine import resident_gigabytes
from coupalign.config.schema import Augmentation, DataConfig, Source
from coupalign.data import masks, transforms
from coupalign.data.build import build_eval_loader, open_tokenizer
from coupalign.data.index import read_index
from coupalign.errors import InputError
from tests.unit.data.batches import config_of, evaluate, rows_of, steps_of, train, world_of


@pytest.mark.parametrize("unit, samples", [("ref", 16), ("sentence", 41)])
def test_every_sample_once_an_epoch(packed: Path, unit: str, samples: int):
    loader = train(config_of(packed, unit=unit), global_batch=5)
    assert loader.samples == samples
    numbers = [row[0] for step in steps_of(loader, 0, 3 * samples // 5 + 1) for row in step]
    for epoch in range(3):
        assert sorted(numbers[epoch * samples : (epoch + 1) * samples]) == list(range(samples))
    assert numbers[:samples] != numbers[samples : 2 * samples]


@pytest.mark.parametrize("parts", [1, 4])
def test_a_step_is_the_same_for_every_topology(packed: Path, parts: int):
    """Random ranks, micro-batches, workers and first steps against one process, byte by byte and in the same order."""
    dice = random.Random(1)
    expected = steps_of(train(config_of(packed, canonical_nodes=parts), global_batch=12), 0, 6)
    for trial in range(10):
        ranks = dice.choice([1, 2, 3, 4, 6, 12])
        micro, workers, first = (
            dice.choice([None, 1, 2, 5]),
            2 if trial in (3, 7) else 0,
            dice.randrange(4),
        )
        config = config_of(packed, workers=workers, canonical_nodes=parts)
        read = []
        for rank in range(ranks if workers == 0 else min(ranks, 2)):
            loader = train(config, 12, micro, rank, ranks)
            read.append(steps_of(loader, first, 2))
            loader.close()
        for step in range(2):
            found = sum((steps[step] for steps in read), [])
            assert found == expected[first + step][: len(found)] and (workers or len(found) == 12)


def test_a_resumed_run_decodes_nothing_that_was_skipped(
    packed: Path, monkeypatch: pytest.MonkeyPatch
):
    expected = steps_of(train(config_of(packed)), 0, 40)
    decoded: list[int] = []
    decode = transforms.decode_image
    monkeypatch.setattr(
        transforms,
        "decode_image",
        lambda data, frame: decoded.append(len(data)) or decode(data, frame),
    )
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
import sys, torch
from coupalign.config.schema import DataConfig, Source
from coupalign.data.build import build_eval_loader
from coupalign.data.build import build_train_loader
from coupalign.data.build import open_tokenizer
from coupalign.distributed.world import World
source = Source(index=sys.argv[1], dataset="refcoco", split="train")
config = DataConfig(train=(source,), image_size=32, workers=1)
tokenizer = open_tokenizer(config)
world = World(0, 1, 0, 1, torch.device("cpu"))
train = build_train_loader(
    config, seed=0, global_batch=4, max_micro_batch=None, world=world, tokenizer=tokenizer
).steps_from(0)
evaluation = iter(build_eval_loader(config, (source,), batch=2, world=world, tokenizer=tokenizer))
next(train), next(evaluation)
sys.exit("gone")
"""


def test_a_program_that_leaves_its_loaders_open_ends(packed: Path):
    done = subprocess.run(
        [sys.executable, "-c", ABANDONED, str(packed)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and done.stderr == "gone\n"


SIGNALED = """
import os, signal, sys, torch
from pathlib import Path
from coupalign.config.schema import DataConfig, Source
from coupalign.data.build import build_eval_loader
from coupalign.data.build import build_train_loader
from coupalign.data.build import open_tokenizer
from coupalign.distributed.world import World
source = Source(index=sys.argv[1], dataset="refcoco", split="train")
config = DataConfig(train=(source,), image_size=32, workers=1)
tokenizer = open_tokenizer(config)
world = World(0, 1, 0, 1, torch.device("cpu"))
loader = build_train_loader(
    config, seed=0, global_batch=4, max_micro_batch=None, world=world, tokenizer=tokenizer
)
next(loader.steps_from(0))
server = int(Path(f"/proc/{loader._loader._iterator._workers[0].pid}/stat").read_text().split()[3])
assert server != os.getpid(), "a fork of this process"
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    os.kill(server, number)
loader.close()
next(iter(build_eval_loader(config, (source,), batch=2, world=world, tokenizer=tokenizer)))
os.kill(server, 0)
"""


def test_workers_come_from_a_server_that_no_signal_ends(packed: Path):
    """A fork of the rank itself may find a lock of the interpreter held by one of its threads, for good."""
    done = subprocess.run(
        [sys.executable, "-c", SIGNALED, str(packed)], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")


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
    chosen = Counter(
        row[1] for step in steps_of(train(config_of(packed), 16), 0, 30) for row in step
    )
    assert len(chosen) == 41 and max(chosen.values()) < 28  # each sentence of each ref is drawn


def test_a_flip_mirrors_picture_mask_and_sentence(packed: Path):
    configs = [
        config_of(packed, unit="sentence", augment=Augmentation(flip=flip)) for flip in (0, 1)
    ]
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
    refs = {
        ref["ref_id"]: ref
        for ref in json.loads(
            (refer_root / "refcocog" / "refs(umd).json").read_text(encoding="utf-8")
        )
    }
    instances = json.loads((refer_root / "refcoco" / "instances.json").read_text())
    annotations = {annotation["id"]: annotation for annotation in instances["annotations"]}
    files = {image["id"]: image["file_name"] for image in instances["images"]}
    source = Source(index=str(packed), dataset="refcocog", split="train")
    _, [batch] = next(
        train(config_of(packed, resize=resize, train=(source,), augment=Augmentation())).steps_from(
            0
        )
    )
    for row, info in enumerate(batch.info):
        ref = refs[int(info.name.split("/")[2])]
        image = Image.open(refer_root / "images" / "train2014" / files[ref["image_id"]]).convert(
            "RGB"
        )
        mask = masks.decode(
            masks.rle_from_segmentation(
                annotations[ref["ann_id"]]["segmentation"], image.height, image.width
            )
        )
        assert info.image_id == ref["image_id"] and info.sentence in [
            sentence["sent"] for sentence in ref["sentences"]
        ]
        assert np.array_equal(
            batch.image[row].permute(1, 2, 0),
            transforms.image_to_square(np.asarray(image), info.frame),
        )
        assert np.array_equal(batch.target[row], transforms.mask_to_square(mask, info.frame))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_is_handed_over_as_it_was_written(packed: Path, workers: int):
    """Channels last, and from a worker in memory that both processes see; the words are copied, and can be written to."""
    loader = train(config_of(packed, workers=workers))
    _, [batch] = next(loader.steps_from(0))
    assert not batch.words.is_shared() and not batch.word_mask.is_shared()
    batch.words[:], batch.word_mask[:] = 0, False
    assert (
        batch.image.is_contiguous(memory_format=torch.channels_last)
        and batch.target.is_contiguous()
    )
    assert batch.image.is_shared() == batch.target.is_shared() == bool(workers)
    loader.close()


def test_a_drawn_picture_is_whole_and_changes_nothing(packed: Path):
    """The pictures of 64 x 48 pixels are decoded at half of their size on their way to 8 x 8."""
    config = config_of(packed).model_copy(update={"image_size": 8})
    (plain, *_), (drawn, *_) = (list(evaluate(config, images=images)) for images in (False, True))
    assert torch.equal(plain.image, drawn.image)
    for info in drawn.info:
        assert transforms.reduction(info.frame.height, info.frame.width, info.frame) > 1
        assert (
            info.image.shape == (*info.truth.shape, 3) == (info.frame.height, info.frame.width, 3)
        )


@pytest.mark.slow
def test_the_memory_of_a_worker_is_flat(packed: Path):
    """Over 200 epochs, after 100 others: by less than 4 MB, where 800 MB of samples are handed over."""
    loader = train(
        config_of(packed, workers=1, image_size=256, resize="letterbox"), global_batch=16
    )
    steps, held = loader.steps_from(0), []
    for step, _ in islice(steps, 300):
        if step in (99, 299):
            held.append(resident_gigabytes(loader.worker_pids[0]))
    loader.close()
    assert held[1] - held[0] < 0.004, held


def test_the_text_may_be_the_raw_one(packed: Path):
    config = config_of(packed, unit="sentence", sentence="raw", augment=Augmentation())
    raw = {row[2] for row in steps_of(train(config, 41), 0, 1)[0]}
    assert any(sentence.startswith("The ") for sentence in raw) and any(
        sentence.endswith(".") for sentence in raw
    )


def test_a_mixture_holds_every_source(packed: Path, tmp_path: Path):
    sources = (
        Source(index=str(packed), dataset="refcoco", split_by="unc", split="train"),
        Source(index=f"{packed}/index.json", dataset="refcocog", split="val"),
    )
    loader = train(config_of(packed, train=sources, leaks="allow"), global_batch=9)
    names = Counter(row[1].rsplit("/", 2)[0] for step in steps_of(loader, 0, 2) for row in step)
    assert loader.samples == 18 and names == {"refcoco/unc": 16, "refcocog/umd": 2}
    assert loader.fingerprint != train(config_of(packed)).fingerprint
    assert train(config_of(packed)).fingerprint == train(config_of(packed)).fingerprint


def test_other_wrong_settings(packed: Path):
    with pytest.raises(InputError, match="cannot be shared evenly by 4 processes: use 4 or 8"):
        train(config_of(packed), global_batch=6, ranks=4)
    with pytest.raises(
        InputError, match="train.global_batch=6 .* data.canonical_nodes=4 parts: use 12,"
    ):
        train(config_of(packed, canonical_nodes=4), global_batch=6, ranks=6)
    with pytest.raises(
        InputError, match="data.canonical_nodes=17 exceeds the number of training samples \(16\)"
    ):
        train(config_of(packed, canonical_nodes=17), global_batch=17)
    vocabulary = str(packed / "vocab.txt")
    with pytest.raises(InputError, match="data.train is empty"):
        train(config_of(packed, train=(), tokenizer=vocabulary))
    with pytest.raises(InputError, match="data.evaluate"):
        build_eval_loader(
            config_of(packed),
            (),
            batch=2,
            world=world_of(),
            tokenizer=open_tokenizer(config_of(packed)),
        )
    with pytest.raises(InputError, match="no vocabulary"):
        open_tokenizer(DataConfig())


@pytest.mark.parametrize("parts, shards", [(1, 1), (2, 2)])
def test_a_small_cache_is_pointed_out(
    packed: Path,
    parts: int,
    shards: int,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    """One rank reads all the parts, each in a window of its own."""
    from dataclasses import replace

    from coupalign.data import build

    index = replace(read_index(packed), location="https://example.org/set")
    monkeypatch.setattr(build, "open_index", lambda location: index)
    needed = sum(sorted(shard.bytes for shard in index.shards)[-shards:])
    for spare, warned in ((-1, True), (1, False)):
        caplog.clear()
        config = config_of(
            packed,
            cache_gb=(needed + spare) / 1e9,
            cache_dir=packed / "cache",
            shuffle_window=1,
            canonical_nodes=parts,
            tokenizer=str(packed / "vocab.txt"),
        )
        train(config, global_batch=2)
        assert ("is less than the" in caplog.text) == warned
