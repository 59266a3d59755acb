"""The leak guard: refuses, excludes or marks, for any mixture; what it says of a score is exact."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from coupalign.config.schema import DataConfig, Source
from coupalign.data.index import ShardIndex, read_index
from coupalign.data.leak import (
    TrainedOn,
    apply_leak_policy,
    count_overlaps,
    photos_of,
    read_trained_on,
)
from coupalign.data.photos import PhotoMark, Photos, distinct_photos
from coupalign.data.table import build_table
from coupalign.errors import InputError
from tests.unit.data.batches import evaluate, train
from tests.unit.data.conftest import IMAGE_IDS

UNC = {"dataset": "refcoco", "split_by": "unc"}
UMD = {"dataset": "refcocog", "split_by": "umd"}


def config_of(
    shards: Path, train_on: list[dict], score: list[dict], **fields: object
) -> DataConfig:
    return DataConfig.model_validate(
        {
            "train": [{"index": str(shards), **source} for source in train_on],
            "evaluate": [{"index": str(shards), **source} for source in score],
            "image_size": 32,
            "workers": 0,
            **fields,
        }
    )


def image_ids_of(index: ShardIndex, *splits: tuple[str, str]) -> set[int]:
    """Those of some (set, split), by the index alone."""
    image_ids = set()
    for image in index.images:
        if any((ref.set, ref.split) in splits for ref in image.refs):
            image_ids.add(image.image_id)
    return image_ids


def test_one_set_does_not_leak_into_itself(packed: Path) -> None:
    config = config_of(packed, [{**UNC, "split": "train"}], [{**UNC, "split": "val"}])

    loader = train(config, global_batch=2)

    assert loader.leaks == []
    assert len(loader.trained_on.photos) == 8


def test_training_on_scored_photographs_is_refused_with_numbers(packed: Path) -> None:
    config = config_of(packed, [{**UNC, "split": "train"}], [{**UMD, "split": "val"}])

    with pytest.raises(
        InputError,
        match=r"1 of \d photographs of refcocog/umd val.*data.leaks=exclude.*data.leaks=allow",
    ):
        train(config, global_batch=2)


def test_other_splits_of_every_trained_set_are_held_out(packed: Path) -> None:
    """G-Ref's val is not scored here, but whoever trains on G-Ref reports it."""
    config = config_of(packed, [{**UNC, "split": "train"}, {**UMD, "split": "train"}], [])

    with pytest.raises(InputError, match="refcocog/umd val"):
        train(config, global_batch=2)


def test_exclude_drops_exactly_the_samples_on_held_out_photographs(packed: Path) -> None:
    config = config_of(
        packed,
        [{**UNC, "split": "train"}, {**UMD, "split": "train"}],
        [{**UMD, "split": "val"}],
        leaks="exclude",
    )
    index = read_index(packed)
    table = build_table(config.train, [index, index], "ref")

    kept, messages = apply_leak_policy(config, table, [index, index], [index])

    held_out = image_ids_of(
        index,
        ("refcoco/unc", "val"),
        ("refcoco/unc", "testA"),
        ("refcoco/unc", "testB"),
        ("refcocog/umd", "val"),
        ("refcocog/umd", "test"),
    )
    assert IMAGE_IDS[0] in held_out and 0 < len(kept) < len(table)
    assert kept.image_ids.tolist() == [
        image_id for image_id in table.image_ids.tolist() if image_id not in held_out
    ]
    assert f"{len(table) - len(kept)} of {len(table)} training samples" in messages[0]


def test_exclude_changes_the_fingerprint(packed: Path) -> None:
    sources = [{**UNC, "split": "train"}, {**UMD, "split": "train"}], [{**UMD, "split": "val"}]

    excluding = train(config_of(packed, *sources, leaks="exclude"), global_batch=2)
    allowing = train(config_of(packed, *sources, leaks="allow"), global_batch=2)

    assert excluding.fingerprint != allowing.fingerprint


def test_overlap_inside_one_partition_is_found(packed: Path) -> None:
    """As in G-Ref google, whose train and val share photographs: two refs of one, in two splits."""
    index = read_index(packed)
    first = index.images[0]
    both_splits = [
        replace(ref, set="refcocog/google", split=split)
        for ref, split in zip(first.refs, ("train", "val"))
    ]
    google = replace(index, images=(replace(first, refs=tuple(both_splits)), *index.images[1:]))
    source = {"dataset": "refcocog", "split_by": "google", "split": "train"}
    config = config_of(packed, [source], [])
    table = build_table(config.train, [google], "ref")

    with pytest.raises(InputError, match="1 of 1 photographs of refcocog/google val"):
        apply_leak_policy(config, table, [google], [])

    allowing = config.model_copy(update={"leaks": "allow"})
    kept, messages = apply_leak_policy(allowing, table, [google], [])
    assert len(kept) == len(table) and "LEAKY" in messages[0]

    shared = count_overlaps([google]).shared
    assert shared["refcocog/google train", "refcocog/google val"] == 1


def test_excluding_everything_is_refused(packed: Path) -> None:
    val = [{**UMD, "split": "val"}]

    with pytest.raises(InputError, match="leaves nothing to train on"):
        train(config_of(packed, val, val, leaks="exclude"), global_batch=2)


# -------------------------------------------------------------------------- what a run has seen


def test_leak_message_counts_the_shared_photographs(packed: Path) -> None:
    config = config_of(
        packed, [{**UNC, "split": "train"}], [{**UMD, "split": "val"}], leaks="allow"
    )
    loader = train(config, global_batch=2)
    assert "LEAKY" in loader.leaks[0] and loader.trained_on.mix == "leaky"

    scored = evaluate(config, "val", "refcocog").photos
    message = f"LEAKY: 1 of {len(scored)} scored photographs were trained on"
    assert loader.trained_on.leak_message(scored) == message

    val = Source(index=str(packed), **UNC, split="val")
    other = photos_of(build_table([val], [read_index(packed)], "sentence"))
    assert loader.trained_on.leak_message(other) == "none: no scored photograph was trained on"


def photos(*numbers: int) -> Photos:
    """Photographs of COCO with these numbers, whose hashes are as different."""
    marks = []
    for number in numbers:
        digest = hashlib.sha256(str(number).encode()).hexdigest()
        marks.append(PhotoMark(number, digest[:16], digest))
    found, _ = distinct_photos([(mark, "refcoco", mark.number, 1) for mark in marks])
    return found


def test_leak_message_names_leaky_weights() -> None:
    seen = TrainedOn(photos(), None, ("the encoder has seen COCO",))

    message = seen.leak_message(photos(1))

    assert message.startswith("none:") and message.endswith("; the encoder has seen COCO")


def test_trained_on_is_read_as_it_was_written(tmp_path: Path) -> None:
    old, _ = distinct_photos([(None, "shapes", 9, 1234), (None, "refcoco", 9, 1)])
    seen = TrainedOn(Photos.join([photos(9, 25), old]), "leaky", ("a sentence",))

    seen.write(tmp_path)

    again = read_trained_on(tmp_path)
    assert again.photos.to_json() == seen.photos.to_json()
    assert (again.mix, again.weights) == ("leaky", ("a sentence",))
    assert again.photos.hashed.tolist() == [True, True, False, False]
    assert read_trained_on(tmp_path / "nowhere") is None


def test_trained_on_includes_what_the_initial_weights_have_seen(tmp_path: Path) -> None:
    TrainedOn(photos(9, 25), "leaky").write(tmp_path)
    now = TrainedOn(photos(25, 72), None, ("b",))

    started = now.including(
        [tmp_path / "weights.safetensors", tmp_path / "nowhere" / "swin.pth"], ["a", "b"]
    )

    assert sorted(started.photos.number.tolist()) == [9, 25, 72]
    assert (started.mix, started.weights) == ("leaky", ("b", "a"))


def test_initial_weights_without_their_list_are_unknown(tmp_path: Path) -> None:
    """Somebody copied the weights of a run, but not the list of its photographs."""
    alone, swin = tmp_path / "weights.safetensors", tmp_path / "swin.pth"

    started = TrainedOn(photos(25)).including([alone, swin], [], [alone])
    started.write(tmp_path / "run")

    again = read_trained_on(tmp_path / "run")
    assert again.unlisted == (str(alone),)
    assert again.leak_message(photos(1)).startswith(f"unknown: the initial weights {alone} come")
    assert again.leak_message(photos(25)).startswith("LEAKY: 1 of 1")

    # A third run starts from the second.
    third = TrainedOn(photos(72)).including([tmp_path / "run" / "weights.safetensors"])
    assert third.unlisted == (str(alone),)


def test_damaged_trained_on_is_refused(tmp_path: Path) -> None:
    (tmp_path / "trained_on.json").write_text("{")
    with pytest.raises(InputError, match="trained_on.json: cannot be read as .* has a copy"):
        read_trained_on(tmp_path)

    (tmp_path / "trained_on.json").write_text("{}")
    with pytest.raises(InputError, match="trained_on.json: damaged .*another checkpoint"):
        read_trained_on(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.update(format=3),
        lambda record: record.update(format=1),
        lambda record: record.update(mix="x"),
        lambda record: record.update(weights=[5]),
        lambda record: record["photos"].pop("look"),
        lambda record: record["photos"].update(coco=[9]),
        lambda record: record["photos"].update(coco=[9, -2]),
        lambda record: record["photos"].update(coco=[9, 10**30]),
        lambda record: record["photos"].update(sha256="0" * 31),
        lambda record: record["photos"].update(sha256="x" * 32),
        lambda record: record["photos"].update(look=None),
    ],
)
def test_every_damaged_field_of_trained_on_is_refused(tmp_path: Path, change) -> None:
    TrainedOn(photos(9, 25)).write(tmp_path)
    file = tmp_path / "trained_on.json"
    record = json.loads(file.read_text())
    change(record)
    file.write_text(json.dumps(record))

    with pytest.raises(InputError, match="trained_on.json: damaged .*another checkpoint"):
        read_trained_on(tmp_path)


# ------------------------------------------------------------------------------------- overlaps


def test_overlaps_count_photographs(packed: Path) -> None:
    index = read_index(packed)

    found = count_overlaps([index])

    assert found.shared["refcoco/unc train", "refcocog/umd val"] == 1
    for (one, other), count in found.shared.items():
        first = image_ids_of(index, tuple(one.split()))
        second = image_ids_of(index, tuple(other.split()))
        assert count == len(first & second)


def test_table_of_overlaps_shows_what_a_train_split_leaks_into(packed: Path) -> None:
    table = count_overlaps([read_index(packed)]).table()

    row = next(line for line in table.splitlines() if line.startswith("refcoco/unc train  "))
    assert "8 photographs" in row
    assert any(
        line.split() == "refcoco/unc train refcocog/umd val 1 100.0% 9 = 9".split()
        for line in table.splitlines()
    )


def test_table_without_overlaps_says_so() -> None:
    assert "no photograph of a train split is in another split" in count_overlaps([]).table()


def test_overlap_of_a_set_with_itself_counts_each_photograph_once(packed: Path) -> None:
    index = read_index(packed)

    assert count_overlaps([index, index]) == count_overlaps([index])
