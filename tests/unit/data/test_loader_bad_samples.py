"""Bad samples: the run ends with their names, or they are replaced, counted and named; an evaluation leaves none out."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest

from coupalign.data import datasets
from coupalign.data.index import read_index
from coupalign.errors import InputError
from tests.unit.data.batches import config_of, evaluate, rows_of, steps_of, train


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


DAMAGES = [
    ("jpg", lambda data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2), ""),
    ("jpg", lambda data: bytes(len(data)), "cannot identify image"),
    ("json", lambda data: b"!" + data[1:], "Expecting value"),
    ("json", lambda data: data.replace(b'"rle"', b'"rlx"'), "KeyError 'rle'"),
    (
        "json",
        lambda data: data.replace(b'"image_id":72', b'"image_id":73'),
        "not the one that its index describes",
    ),
    ("json", lambda data: data.replace(b'"height":', b'"heighx":'), "KeyError 'height'"),
]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("part, change, words", DAMAGES[:3])
def test_a_bad_sample_ends_the_run_with_its_name(
    packed: Path, part: str, change, words: str, workers: int
):
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
    assert (
        sorted(loader.bad) == ["refcoco/unc/4", "refcoco/unc/5"]
        and "(image 72)" in loader.bad["refcoco/unc/4"]
    )
    for before, after in zip(whole, found):
        assert len(after) == 4
        for a, b in zip(before, after):
            assert a == b if "/4/" not in a[1] and "/5/" not in a[1] else b[1].split("/")[2] == "6"
    parts = [steps_of(train(config, 4, 1, rank, 2), 0, 8) for rank in range(2)]
    assert [a + b for a, b in zip(*parts)] == found


@pytest.mark.parametrize("part", ["jpg", "json"])
def test_how_many_are_read_side_by_side_changes_nothing(
    packed: Path, part: str, monkeypatch: pytest.MonkeyPatch
):
    damage(packed, 72, part, DAMAGES[1][1])
    found = []
    for together in (1, 3, 8, 32):
        monkeypatch.setattr(datasets, "GROUP_SIZE", together)
        loader = train(config_of(packed, bad_samples="skip", max_bad_share=1), 8)
        batches = [batches[0] for _, batches in islice(loader.steps_from(0), 6)]
        found.append(
            [
                (rows_of(batch), [reason.partition(": ")[0] for reason in batch.bad])
                for batch in batches
            ]
        )
    assert found.count(found[0]) == len(found)
    assert {name for _, bad in found[0] for name in bad} == {"refcoco/unc/4", "refcoco/unc/5"}


def test_too_many_bad_samples_end_the_run(packed: Path):
    damage(packed, 72, "jpg", DAMAGES[0][1])
    loader = train(config_of(packed, bad_samples="skip", max_bad_share=0.1), 4)
    with pytest.raises(
        InputError,
        match=r"samples drawn cannot be read, more than data.max_bad_share=0.1: refcoco/unc/",
    ):
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
    with pytest.raises(
        InputError, match=r"shard-000000.tar cannot be opened"
    ):  # never merely skipped
        steps_of(train(config_of(packed, bad_samples="skip")), 0, 3)


def test_an_evaluation_never_leaves_a_sample_out(packed: Path):
    config = config_of(packed, bad_samples="skip", max_bad_share=1)
    damage(packed, 40961, "jpg", DAMAGES[0][1])
    with pytest.raises(InputError, match=r"\(image 40961\).*leaves no sample out"):
        list(evaluate(config))
    damage(packed, 40961, "json", DAMAGES[2][1])
    with pytest.raises(InputError, match=r"40961.json"):
        evaluate(config).names_and_sentences  # noqa: B018
