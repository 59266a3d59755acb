"""Writing shards: other tools read them, bad photographs are named, no process is left behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from coupalign.data.index import read_index
from coupalign.data.masks import decode
from coupalign.errors import InputError
from tests.unit.data.packing.small_set import contents, image_path, pack_quietly, recipe_of

ROOT = Path(__file__).resolve().parents[4]


def test_webdataset_reads_the_shards(packed: Path) -> None:
    import webdataset

    index = read_index(packed)
    urls = [str(packed / shard.url) for shard in index.shards]

    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil"))

    assert [int(sample["__key__"]) for sample in samples] == [i.image_id for i in index.images]
    for sample in samples:
        record = sample["json"]
        height, width = record["height"], record["width"]
        assert sample["jpg"].size == (width, height)
        assert all(decode(ref["rle"]).shape == (height, width) for ref in record["refs"])
    assert samples[0]["json"]["refs"][0]["sentences"][0]["raw"] == "red box at the café – left"


def test_wids_reads_the_index(packed: Path, tmp_path: Path) -> None:
    import wids

    # wids may remove what it takes for downloads.
    copy = shutil.copytree(packed, tmp_path / "copy")
    index = read_index(packed)

    data = wids.ShardListDataset(
        str(copy / "index.json"), cache_dir=str(tmp_path / "cache"), keep=True
    )

    assert len(data) == 12
    assert data.dataset_name == "small"
    for number in (0, 5, 11):
        record = data[number][".json"]
        assert record["image_id"] == index.images[number].image_id
        assert data[number][".jpg"].size == (record["width"], record["height"])


@pytest.mark.parametrize("workers", [1, 2])
def test_jpeg_cut_short_is_named_and_can_be_repaired(
    refer_root: Path, packed: Path, tmp_path: Path, workers: int
) -> None:
    out = tmp_path / "out"
    file = image_path(refer_root, 575)
    data = file.read_bytes()
    file.write_bytes(data[:-200])

    with pytest.raises(
        InputError,
        match="COCO_train2014_000000000575.jpg: the JPEG does not decode.*fetch the image again",
    ):
        pack_quietly(recipe_of(refer_root), out, workers=workers)
    assert not (out / "index.json").exists()
    assert not list(out.glob(".*.partial"))

    file.write_bytes(data)
    pack_quietly(recipe_of(refer_root), out)
    assert contents(out) == contents(packed)


def test_workers_end_when_their_parent_is_killed(
    refer_root: Path, packed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    script = tmp_path / "run.py"
    script.write_text(
        "import sys\n"
        "from coupalign.data.packing.pack import pack\n"
        "from coupalign.data.packing.recipe import Recipe\n"
        "if __name__ == '__main__':\n"
        "    recipe = Recipe.model_validate_json(sys.argv[1])\n"
        "    pack(recipe, sys.argv[2], workers=2, progress=False)\n"
    )
    arguments = [recipe_of(refer_root).model_dump_json(), str(out)]

    # Kill the parent as soon as its workers have written something.
    process = subprocess.Popen(
        [sys.executable, str(script), *arguments], env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    while not (out / "shard-000000.tar").exists():
        assert process.poll() is None
        time.sleep(0.01)
    children = _descendants(process.pid)
    process.kill()
    process.wait()

    assert len(children) >= 3  # two workers and the process that started them
    deadline = time.monotonic() + 60
    while any(_alive(child) for child in children):
        assert time.monotonic() < deadline, children
        time.sleep(0.01)

    # The next run finishes the set.
    pack_quietly(recipe_of(refer_root), out)
    assert contents(out) == contents(packed)


def _descendants(pid: int) -> list[int]:
    direct = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return direct + [below for child in direct for below in _descendants(child)]


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
