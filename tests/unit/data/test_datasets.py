"""Bad samples: they end a run by name, or are replaced; an evaluation leaves no sample out."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest

from coupalign.data import datasets
from coupalign.data.index import read_index
from coupalign.errors import InputError
from tests.unit.data.batches import (
    blank,
    config_of,
    cut_in_half,
    damage,
    evaluate,
    rows_of,
    steps_of,
    train,
)


def break_json(data: bytes) -> bytes:
    return b"!" + data[1:]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    "file, change, reason",
    [
        ("jpg", cut_in_half, ""),
        ("jpg", blank, "beginning is damaged"),
        ("json", break_json, "Expecting value"),
    ],
)
def test_bad_sample_ends_the_run_with_its_name(
    packed: Path, file: str, change, reason: str, workers: int
):
    damage(packed, 72, file, change)
    loader = train(config_of(packed, workers=workers))
    place = rf"refcoco/unc/[45]: 000000000072.{file} \(image 72\) in .*shard-0000"

    with pytest.raises(InputError, match=rf"unreadable sample {place}.*{reason}") as info:
        steps_of(loader, 0, 3)

    assert "Traceback" not in str(info.value)
    assert "data.bad_samples=skip" in str(info.value)
    loader.close()


@pytest.mark.parametrize(
    "old, new, reason",
    [
        (b'"rle"', b'"rlx"', "it has no field 'rle'"),
        (b'"image_id":72', b'"image_id":73', "the record is of image 73"),
        (b'"height":', b'"heighx":', "height is None, not a number of pixels"),
    ],
)
def test_record_that_parses_may_be_bad_too(packed: Path, old: bytes, new: bytes, reason: str):
    damage(packed, 72, "json", lambda data: data.replace(old, new))

    with pytest.raises(InputError, match=rf"000000000072.json \(image 72\).*{reason}"):
        steps_of(train(config_of(packed)), 0, 3)


@pytest.mark.parametrize("file", ["jpg", "json"])
def test_group_size_changes_nothing(packed: Path, file: str, monkeypatch: pytest.MonkeyPatch):
    damage(packed, 72, file, blank)

    found = []
    for size in (1, 3, 8, 32):
        monkeypatch.setattr(datasets, "GROUP_SIZE", size)
        loader = train(config_of(packed, bad_samples="skip", max_bad_share=1), 8)
        steps = []
        for _, [batch] in islice(loader.steps_from(0), 6):
            bad = [reason.partition(": ")[0] for reason in batch.bad]
            steps.append((rows_of(batch), bad))
        found.append(steps)

    assert found.count(found[0]) == len(found)
    bad = {name for _, names in found[0] for name in names}
    assert bad == {"refcoco/unc/4", "refcoco/unc/5"}


def test_shard_that_ends_too_early_ends_the_run(packed: Path):
    index = read_index(packed)
    with open(index.address(0), "r+b") as file:
        file.truncate(index.shards[0].bytes // 2)

    with pytest.raises(
        InputError, match="shard-000000.tar has .* bytes, its index says .* cut short"
    ):
        steps_of(train(config_of(packed)), 0, 3)


def test_missing_shard_is_never_skipped(packed: Path):
    Path(read_index(packed).address(0)).unlink()

    with pytest.raises(InputError, match="shard-000000.tar cannot be opened"):
        steps_of(train(config_of(packed, bad_samples="skip")), 0, 3)


def test_evaluation_never_leaves_a_sample_out(packed: Path):
    config = config_of(packed, bad_samples="skip", max_bad_share=1)
    damage(packed, 40961, "jpg", cut_in_half)

    with pytest.raises(InputError, match=r"\(image 40961\).*leaves no sample out"):
        list(evaluate(config))


def test_names_of_an_evaluation_need_readable_records(packed: Path):
    damage(packed, 40961, "json", break_json)

    with pytest.raises(InputError, match=r"40961.json"):
        _ = evaluate(config_of(packed)).names_and_sentences
