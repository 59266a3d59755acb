"""The training loader over random topologies: the same samples, bytes and order for all of them."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from coupalign.config.schema import Source
from coupalign.data import transforms
from coupalign.errors import InputError
from tests.unit.data.batches import (
    blank,
    config_of,
    cut_in_half,
    damage,
    rows_of,
    steps_of,
    train,
    world_of,
)
from tests.unit.data.conftest import IMAGE_IDS


@pytest.mark.parametrize("unit, samples", [("ref", 16), ("sentence", 41)])
def test_every_sample_comes_once_per_epoch(packed: Path, unit: str, samples: int):
    loader = train(config_of(packed, unit=unit), global_batch=5)
    assert loader.samples == samples

    steps = steps_of(loader, 0, 3 * samples // 5 + 1)

    numbers = [row.number for step in steps for row in step]
    for epoch in range(3):
        assert sorted(numbers[epoch * samples : (epoch + 1) * samples]) == list(range(samples))
    assert numbers[:samples] != numbers[samples : 2 * samples]


@pytest.mark.parametrize("parts", [1, 4])
def test_step_is_the_same_for_every_topology(packed: Path, parts: int):
    """Random ranks, micro-batches, workers and first steps equal one process, byte by byte."""
    generator = random.Random(1)
    expected = steps_of(train(config_of(packed, canonical_nodes=parts), global_batch=12), 0, 6)

    for trial in range(10):
        ranks = generator.choice([1, 2, 3, 4, 6, 12])
        micro = generator.choice([None, 1, 2, 5])
        first = generator.randrange(4)
        workers = 2 if trial in (3, 7) else 0
        config = config_of(packed, workers=workers, canonical_nodes=parts)

        # With workers, which are slow to start, read the first two ranks only.
        ranks_read = min(ranks, 2) if workers else ranks
        read = []
        for rank in range(ranks_read):
            loader = train(config, 12, micro, world=world_of(rank, ranks))
            read.append(steps_of(loader, first, 2))
            loader.close()

        for step in range(2):
            found = sum((steps[step] for steps in read), [])
            assert found == expected[first + step][: len(found)]
            assert len(found) == 12 * ranks_read // ranks


def test_resume_decodes_nothing_of_earlier_steps(packed: Path, monkeypatch: pytest.MonkeyPatch):
    expected = steps_of(train(config_of(packed)), 0, 40)
    decoded: list[int] = []
    decode = transforms.decode_image
    monkeypatch.setattr(
        transforms,
        "decode_image",
        lambda data, frame: decoded.append(len(data)) or decode(data, frame),
    )

    found = steps_of(train(config_of(packed)), 37, 2)

    assert found == expected[37:39]
    assert len(decoded) == 12


def test_second_iteration_ends_the_first_and_keeps_the_workers(packed: Path):
    expected = steps_of(train(config_of(packed)), 0, 8)
    loader = train(config_of(packed, workers=2), micro=2)

    first = loader.steps_from(0)
    _, batches = next(first)
    workers = loader.worker_pids
    again = steps_of(loader, 5, 3)

    assert [row for batch in batches for row in rows_of(batch)] == expected[0]
    assert again == expected[5:]
    assert next(first, None) is None
    assert loader.worker_pids == workers and len(workers) == 2
    loader.close()


def test_close_ends_the_worker_processes(packed: Path):
    loader = train(config_of(packed, workers=2), micro=2)
    next(loader.steps_from(0))
    workers = loader._loader._iterator._workers

    loader.close()

    for worker in workers:
        worker.join(10)
        assert not worker.is_alive()


def test_seed_changes_sentences_and_pictures(packed: Path):
    one, other = (
        sorted(steps_of(train(config_of(packed), 16, seed=seed), 0, 1)[0]) for seed in (0, 1)
    )

    assert sum(a.sentence != b.sentence for a, b in zip(one, other)) > 3


def test_epoch_changes_sentences(packed: Path):
    first, second = steps_of(train(config_of(packed), 16), 0, 2)

    by_number = {row.number: row for row in second}
    assert sum(row.sentence != by_number[row.number].sentence for row in first) > 3


def test_each_sentence_of_each_ref_is_drawn(packed: Path):
    steps = steps_of(train(config_of(packed), 16), 0, 30)

    drawn = Counter(row.name for step in steps for row in step)
    assert len(drawn) == 41 and max(drawn.values()) < 28


def test_mixture_has_samples_of_every_source(packed: Path):
    sources = (
        Source(index=str(packed), dataset="refcoco", split_by="unc", split="train"),
        Source(index=f"{packed}/index.json", dataset="refcocog", split="val"),
    )

    loader = train(config_of(packed, train=sources, leaks="allow"), global_batch=9)

    sets = [row.name.rsplit("/", 2)[0] for step in steps_of(loader, 0, 2) for row in step]
    assert loader.samples == 18
    assert Counter(sets) == {"refcoco/unc": 16, "refcocog/umd": 2}


# --------------------------------------------------------------------------------- bad samples


def test_skipped_samples_are_replaced_and_named(packed: Path):
    whole = steps_of(train(config_of(packed), 4), 0, 8)
    damage(packed, 72, "jpg", cut_in_half)
    loader = train(config_of(packed, bad_samples="skip", max_bad_share=0.5), 4)

    found = steps_of(loader, 0, 8)

    # Image 72 has the refs 4 and 5; ref 6 is the next one.
    assert sorted(loader.bad) == ["refcoco/unc/4", "refcoco/unc/5"]
    assert "(image 72)" in loader.bad["refcoco/unc/4"]
    for before, after in zip(whole, found):
        assert len(after) == 4
        for a, b in zip(before, after):
            if "/4/" in a.name or "/5/" in a.name:
                assert b.name.split("/")[2] == "6"
            else:
                assert a == b


def test_skipped_samples_do_not_depend_on_the_topology(packed: Path):
    damage(packed, 72, "jpg", cut_in_half)
    config = config_of(packed, bad_samples="skip", max_bad_share=0.5)
    expected = steps_of(train(config, 4), 0, 8)

    ranks = [steps_of(train(config, 4, 1, world=world_of(rank, 2)), 0, 8) for rank in range(2)]

    assert [a + b for a, b in zip(*ranks)] == expected


def test_too_many_bad_samples_end_the_run(packed: Path):
    damage(packed, 72, "jpg", cut_in_half)
    loader = train(config_of(packed, bad_samples="skip", max_bad_share=0.1), 4)

    with pytest.raises(
        InputError,
        match="samples drawn cannot be read, more than data.max_bad_share=0.1: refcoco/unc/",
    ):
        steps_of(loader, 0, 10)


def test_only_bad_samples_end_the_run(packed: Path):
    for image_id in IMAGE_IDS:
        damage(packed, image_id, "jpg", blank)

    with pytest.raises(InputError, match="16 samples in a row cannot be read"):
        steps_of(train(config_of(packed, bad_samples="skip", max_bad_share=1), 4), 0, 1)
