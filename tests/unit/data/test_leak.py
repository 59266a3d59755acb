"""The leak guard: refuses, excludes or marks, for any mixture; what it says of a score is exact."""

from __future__ import annotations

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


def test_leak_message_names_leaky_weights() -> None:
    seen = TrainedOn(frozenset(), None, ("the encoder has seen COCO",))

    assert seen.leak_message([]).endswith("; the encoder has seen COCO")


def test_trained_on_is_read_as_it_was_written(tmp_path: Path) -> None:
    photos = {("coco", 9, 0), ("coco", 25, 0), ("shapes", 9, 1234)}
    seen = TrainedOn(frozenset(photos), "leaky", ("a sentence",))

    seen.write(tmp_path)

    assert read_trained_on(tmp_path) == seen
    assert read_trained_on(tmp_path / "nowhere") is None


def test_trained_on_includes_what_the_initial_weights_have_seen(tmp_path: Path) -> None:
    earlier = TrainedOn(frozenset({("coco", 9, 0)}), "leaky")
    earlier.write(tmp_path)
    now = TrainedOn(frozenset({("coco", 25, 0)}), None, ("b",))

    started = now.including(
        [tmp_path / "weights.safetensors", tmp_path / "nowhere" / "swin.pth"], ["a", "b"]
    )

    assert started == TrainedOn(earlier.photos | now.photos, "leaky", ("b", "a"))


def test_damaged_trained_on_is_refused(tmp_path: Path) -> None:
    (tmp_path / "trained_on.json").write_text("{")
    with pytest.raises(InputError, match="trained_on.json: cannot be read as .* has a copy"):
        read_trained_on(tmp_path)

    (tmp_path / "trained_on.json").write_text("{}")
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
        line.split() == ["refcoco/unc", "train", "refcocog/umd", "val", "1", "100.0%"]
        for line in table.splitlines()
    )


def test_table_without_overlaps_says_so() -> None:
    assert "no photograph of a train split is in another split" in count_overlaps([]).table()


def test_photographs_of_other_collections_differ_by_file_length(packed: Path) -> None:
    """Two RefShapes of different seeds number their scenes alike, but share none."""
    index = read_index(packed)

    def renamed(name: str, split: str, longer: int) -> ShardIndex:
        images = []
        for image in index.images:
            offset, length = image.jpg
            refs = tuple(replace(ref, set=f"{name}/all", split=split) for ref in image.refs)
            images.append(replace(image, jpg=(offset, length + longer), refs=refs))
        return replace(index, images=tuple(images))

    shapes = [
        renamed("shapes", "train", 0),
        renamed("shapes", "val", 0),
        renamed("shapes", "test", 1),
    ]
    found = count_overlaps(shapes)
    assert found.shared["shapes/all train", "shapes/all val"] == len(IMAGE_IDS)
    assert ("shapes/all train", "shapes/all test") not in found.shared

    # A COCO photograph may be stored in other bytes.
    coco = count_overlaps([renamed("refcoco", "train", 0), renamed("refcocog", "val", 1)])
    assert coco.shared["refcoco/all train", "refcocog/all val"] == len(IMAGE_IDS)
