"""The layout of a shard set: which refs and images go into which tar."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from coupalign.data.index import read_index
from coupalign.data.packing.layout import lay_out, read_sources
from coupalign.data.packing.verify import verify
from coupalign.errors import InputError
from tests.unit.data.packing.small_set import SETS, pack_quietly, recipe_of


def test_image_of_two_sets_is_one_sample_with_sorted_refs(refer_root: Path) -> None:
    recipe = recipe_of(refer_root, sets=SETS[::-1])

    layout = lay_out(recipe, read_sources(recipe, skip_missing=False))

    samples = [sample for shard in layout.shards for sample in shard.samples]
    image_ids = [sample.image_id for sample in samples]
    assert image_ids == sorted(set(image_ids))
    first = [(ref.dataset, ref.ref_id) for ref in samples[0].referrals]
    assert first == [("refcoco", 0), ("refcoco", 1), ("refcocog", 0), ("refcocog", 1)]


def test_changed_sentence_changes_the_fingerprints(
    refer_root: Path, packed: Path, tmp_path: Path
) -> None:
    file = refer_root / "refcocog" / "refs(umd).json"
    file.write_text(file.read_text().replace("The left box", "The left Box", 1))

    pack_quietly(recipe_of(refer_root), tmp_path / "out")

    new, old = read_index(tmp_path / "out"), read_index(packed)
    assert new.source_fingerprint != old.source_fingerprint
    assert new.fingerprint != old.fingerprint


def change_images(refer_root: Path, dataset: str, change: Callable[[dict], object]) -> None:
    file = refer_root / dataset / "instances.json"
    tree = json.loads(file.read_text())
    for image in tree["images"]:
        change(image)
    file.write_text(json.dumps(tree))


def test_sets_that_number_different_pictures_alike_are_refused(refer_root: Path) -> None:
    change_images(
        refer_root, "refcocog", lambda image: image.update(file_name=f"{image['id']}.jpg")
    )

    with pytest.raises(
        InputError,
        match="image_id 9 is 'COCO_train2014_000000000009.jpg' in refcoco/unc and '9.jpg' in "
        "refcocog/umd; give different pictures different ids",
    ):
        read_sources(recipe_of(refer_root), skip_missing=False)


def test_both_names_of_a_coco_picture_are_one_picture(refer_root: Path) -> None:
    change_images(
        refer_root, "refcocog", lambda image: image.update(file_name=f"{image['id']:012d}.jpg")
    )

    sources = read_sources(recipe_of(refer_root), skip_missing=False)

    assert len(sources.images) == 12 and not sources.missing_images


def test_one_file_under_two_image_ids_is_refused(refer_root: Path) -> None:
    name = "COCO_train2014_000000000025.jpg"
    change_images(
        refer_root,
        "refcoco",
        lambda image: image.update(file_name=name) if image["id"] == 9 else None,
    )

    with pytest.raises(InputError, match=f"{name}: is the picture of image_id 9 and of image"):
        read_sources(recipe_of(refer_root, sets=SETS[:1]), skip_missing=False)


def test_shards_are_limited_by_bytes_and_by_images(refer_root: Path, tmp_path: Path) -> None:
    sizes = [file.stat().st_size for file in sorted((refer_root / "images/train2014").iterdir())]
    max_bytes = 2.5 * max(sizes)
    by_bytes = recipe_of(refer_root, max_images=None, shard_mb=max_bytes / 1e6)
    one_per_shard = recipe_of(refer_root, max_images=None, shard_mb=1e-6)
    by_images = recipe_of(refer_root, max_images=5)

    report = pack_quietly(by_bytes, tmp_path / "bytes")

    images = read_index(tmp_path / "bytes").images
    packed_sizes = [
        [image.jpg[1] for image in images if image.shard == number]
        for number in range(report.shards)
    ]
    assert [size for shard in packed_sizes for size in shard] == sizes
    assert all(sum(shard) <= max_bytes for shard in packed_sizes)
    # No shard could have taken the first image of the next one.
    for shard, next_shard in zip(packed_sizes, packed_sizes[1:]):
        assert sum(shard) + next_shard[0] > max_bytes

    assert pack_quietly(one_per_shard, tmp_path / "one").shards == 12
    assert pack_quietly(by_images, tmp_path / "images").shards == 3
    assert verify(tmp_path / "one").ok
    assert verify(tmp_path / "images").ok
