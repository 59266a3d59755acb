"""The leak guard: refuses, cleans or marks, for any mixture; what it says of a score is exact."""

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


def data(shards: Path, train: list[dict], evaluate: list[dict], **more: object) -> DataConfig:
    return DataConfig.model_validate(
        {
            "train": [{"index": str(shards), **one} for one in train],
            "image_size": 32,
            "workers": 0,
            "evaluate": [{"index": str(shards), **one} for one in evaluate],
            **more,
        }
    )


def loader(config: DataConfig):
    return train(config, global_batch=2)


def images_of(index: ShardIndex, *wanted: tuple[str, str]) -> set[int]:
    """By the index alone, one image after the other."""
    return {
        image.image_id
        for image in index.images
        for ref in image.refs
        if (ref.set, ref.split) in wanted
    }


def test_one_set_by_itself_does_not_leak(packed: Path) -> None:
    clean = loader(data(packed, [{**UNC, "split": "train"}], [{**UNC, "split": "val"}]))
    assert clean.leaks == [] and len(clean.trained_on.photos) == 8


def test_training_on_what_is_scored_is_refused_with_the_numbers(packed: Path) -> None:
    with pytest.raises(
        InputError,
        match=r"1 of \d photographs of refcocog/umd val.*data.leaks=exclude.*data.leaks=allow",
    ):
        loader(data(packed, [{**UNC, "split": "train"}], [{**UMD, "split": "val"}]))


def test_a_mixture_is_held_against_the_other_splits_of_every_set_in_it(packed: Path) -> None:
    """G-Ref's val is not scored here, but it will be: whoever trains on G-Ref reports it."""
    with pytest.raises(InputError, match="refcocog/umd val"):
        loader(data(packed, [{**UNC, "split": "train"}, {**UMD, "split": "train"}], []))


def test_the_clean_mix_drops_exactly_the_samples_on_held_out_photographs(packed: Path) -> None:
    config = data(
        packed,
        [{**UNC, "split": "train"}, {**UMD, "split": "train"}],
        [{**UMD, "split": "val"}],
        leaks="exclude",
    )
    index = read_index(packed)
    table = build_table(config.train, [index, index], "ref")
    kept, told = apply_leak_policy(config, table, [index, index], [index])
    held = images_of(
        index,
        ("refcoco/unc", "val"),
        ("refcoco/unc", "testA"),
        ("refcoco/unc", "testB"),
        ("refcocog/umd", "val"),
        ("refcocog/umd", "test"),
    )
    assert kept.image_ids.tolist() == [
        number for number in table.image_ids.tolist() if number not in held
    ]
    assert IMAGE_IDS[0] in held and 0 < len(kept) < len(table)
    assert f"{len(table) - len(kept)} of {len(table)} training samples" in told[0]
    assert (
        loader(config).fingerprint
        != loader(config.model_copy(update={"leaks": "allow"})).fingerprint
    )


def test_the_inner_overlap_of_one_partition_is_found_and_told(packed: Path) -> None:
    """As in G-Ref google, whose train and val share photographs: two refs of an image, in different splits."""
    index = read_index(packed)
    first = index.images[0]
    both = replace(
        first,
        refs=tuple(
            replace(ref, set="refcocog/google", split=split)
            for ref, split in zip(first.refs, ("train", "val"))
        ),
    )
    google = replace(index, images=(both, *index.images[1:]))
    config = data(packed, [{"dataset": "refcocog", "split_by": "google", "split": "train"}], [])
    table = build_table(config.train, [google], "ref")
    with pytest.raises(InputError, match="1 of 1 photographs of refcocog/google val"):
        apply_leak_policy(config, table, [google], [])
    kept, told = apply_leak_policy(
        config.model_copy(update={"leaks": "allow"}), table, [google], []
    )
    assert len(kept) == len(table) and "LEAKY" in told[0]
    assert count_overlaps([google]).shared["refcocog/google train", "refcocog/google val"] == 1


def test_a_clean_mix_of_nothing_is_an_error(packed: Path) -> None:
    with pytest.raises(InputError, match="leaves nothing to train on"):
        loader(data(packed, [{**UMD, "split": "val"}], [{**UMD, "split": "val"}], leaks="exclude"))


def test_a_leaky_mix_marks_every_score_with_what_it_shares(packed: Path, tmp_path: Path) -> None:
    config = data(packed, [{**UNC, "split": "train"}], [{**UMD, "split": "val"}], leaks="allow")
    trained = loader(config)
    assert "LEAKY" in trained.leaks[0]
    scored = evaluate(config, dataset="refcocog").photos
    assert (
        trained.trained_on.leak_message(scored)
        == f"LEAKY: 1 of {len(scored)} scored photographs were trained on"
    )
    index = read_index(packed)
    other = photos_of(
        build_table([Source(index=str(packed), **UNC, split="val")], [index], "sentence")
    )
    assert trained.trained_on.leak_message(other) == "none: no scored photograph was trained on"
    trained.trained_on.write(tmp_path)
    assert read_trained_on(tmp_path) == trained.trained_on
    assert read_trained_on(tmp_path / "nowhere") is None
    started = TrainedOn(scored, None, ("b",)).including(
        [tmp_path / "weights.safetensors", tmp_path / "nowhere" / "swin.pth"], ["a", "b"]
    )
    assert started == TrainedOn(scored | trained.trained_on.photos, "leaky", ("b", "a"))
    (tmp_path / "trained_on.json").write_text("{")
    with pytest.raises(InputError, match="trained_on.json: cannot be read as .* has a copy"):
        read_trained_on(tmp_path)
    (tmp_path / "trained_on.json").write_text("{}")
    with pytest.raises(InputError, match="trained_on.json: damaged .*another checkpoint"):
        read_trained_on(tmp_path)


def test_the_table_of_overlaps_counts_photographs(packed: Path) -> None:
    index = read_index(packed)
    found = count_overlaps([index])
    for (a, b), count in found.shared.items():
        assert count == len(images_of(index, tuple(a.split())) & images_of(index, tuple(b.split())))
    assert found.shared["refcoco/unc train", "refcocog/umd val"] == 1
    assert "refcoco/unc train" in found.table() and "refcocog/umd val" in found.table()


def test_other_collections_are_told_apart_by_the_length_of_their_files(packed: Path) -> None:
    """Two RefShapes of different seeds number their scenes alike; they share none."""

    def renamed(name: str, split: str, grown: int) -> ShardIndex:
        return replace(
            index,
            images=tuple(
                replace(
                    image,
                    jpg=(image.jpg[0], image.jpg[1] + grown),
                    refs=tuple(replace(ref, set=f"{name}/all", split=split) for ref in image.refs),
                )
                for image in index.images
            ),
        )

    index = read_index(packed)
    train, same, other = (
        renamed("shapes", "train", 0),
        renamed("shapes", "val", 0),
        renamed("shapes", "test", 1),
    )
    found = count_overlaps([train, same, other])
    assert found.shared["shapes/all train", "shapes/all val"] == len(IMAGE_IDS)
    assert ("shapes/all train", "shapes/all test") not in found.shared
    coco = count_overlaps([renamed("refcoco", "train", 0), renamed("refcocog", "val", 1)])
    assert coco.shared["refcoco/all train", "refcocog/all val"] == len(IMAGE_IDS), (
        "a COCO photograph may be stored in other bytes"
    )
