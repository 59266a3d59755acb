"""Packing: readable by others, the same bytes always, and nothing half done."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from coupalign.data.index import read_index
from coupalign.data.masks import decode
from coupalign.data.packing import pack as packing
from coupalign.data.packing.pack import pack
from coupalign.data.packing.recipe import Recipe, read_recipe
from coupalign.data.packing.verify import verify
from coupalign.errors import InputError

ROOT = Path(__file__).resolve().parents[4]
SETS = ({"dataset": "refcoco", "split_by": "unc"}, {"dataset": "refcocog", "split_by": "umd"})


def recipe_of(root: Path, **changes: object) -> Recipe:
    dials = {
        "name": "small",
        "root": root,
        "sets": SETS,
        "max_images": 4,
        "vocabulary_size": 120,
        **changes,
    }
    return Recipe.model_validate(dials)


def pack_quietly(recipe: Recipe, out: Path, **options: object) -> packing.PackReport:
    return pack(recipe, out, progress=False, **options)


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def image(root: Path, image_id: int) -> Path:
    return root / "images/train2014" / f"COCO_train2014_{image_id:012d}.jpg"


# ---------------------------------------------------------------------------------------------------- other readers


def test_webdataset_reads_the_shards(packed: Path) -> None:
    import webdataset

    shards = [str(packed / shard.url) for shard in read_index(packed).shards]
    samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode("pil"))
    assert [int(sample["__key__"]) for sample in samples] == [
        i.image_id for i in read_index(packed).images
    ]
    for sample in samples:
        record = sample["json"]
        assert sample["jpg"].size == (record["width"], record["height"])
        assert all(
            decode(ref["rle"]).shape == (record["height"], record["width"])
            for ref in record["refs"]
        )
    assert samples[0]["json"]["refs"][0]["sentences"][0]["raw"] == "red box at the café – left"


def test_wids_reads_the_index(packed: Path, tmp_path: Path) -> None:
    import wids

    copy = shutil.copytree(packed, tmp_path / "copy")  # wids may remove what it takes for downloads
    data = wids.ShardListDataset(
        str(copy / "index.json"), cache_dir=str(tmp_path / "cache"), keep=True
    )
    index = read_index(packed)
    assert len(data) == 12 and data.dataset_name == "small"
    for number in (0, 5, 11):
        sample = data[number]
        assert sample[".json"]["image_id"] == index.images[number].image_id
        assert sample[".jpg"].size == (sample[".json"]["width"], sample[".json"]["height"])


# ------------------------------------------------------------------------------------------------- the same bytes


def test_any_number_of_workers_and_any_order_of_refs(
    refer_root: Path, packed: Path, tmp_path: Path
) -> None:
    refs_file, instances = (
        refer_root / "refcoco" / "refs(unc).p",
        refer_root / "refcoco" / "instances.json",
    )
    refs = pickle.loads(refs_file.read_bytes())
    random.Random(1).shuffle(refs)
    refs_file.write_bytes(pickle.dumps(refs, protocol=0))
    instances.write_text(
        json.dumps({key: rows[::-1] for key, rows in json.loads(instances.read_text()).items()})
    )
    moved = recipe_of(refer_root.rename(tmp_path / "moved"), sets=SETS[::-1])
    report = pack_quietly(moved, tmp_path / "three", workers=3)
    assert report.state == "packed" and report.shards == 3 and report.images == 12
    assert contents(tmp_path / "three") == contents(packed)


def test_a_changed_sentence_changes_the_fingerprints(
    refer_root: Path, packed: Path, tmp_path: Path
) -> None:
    file = refer_root / "refcocog" / "refs(umd).json"
    file.write_text(file.read_text().replace("The left box", "The left Box", 1))
    pack_quietly(recipe_of(refer_root), tmp_path / "out")
    new, old = read_index(tmp_path / "out"), read_index(packed)
    assert new.source_fingerprint != old.source_fingerprint and new.fingerprint != old.fingerprint


def test_shards_are_cut_by_bytes_and_by_images(refer_root: Path, tmp_path: Path) -> None:
    sizes = [file.stat().st_size for file in sorted((refer_root / "images/train2014").iterdir())]
    limit = 2.5 * max(sizes)
    report = pack_quietly(
        recipe_of(refer_root, max_images=None, shard_mb=limit / 1e6), tmp_path / "a"
    )
    index = read_index(tmp_path / "a")
    held = [[i.jpg[1] for i in index.images if i.shard == n] for n in range(report.shards)]
    assert [size for shard in held for size in shard] == sizes
    assert all(sum(shard) <= limit for shard in held)
    assert all(sum(shard) + after[0] > limit for shard, after in zip(held, held[1:]))
    assert (
        pack_quietly(recipe_of(refer_root, max_images=None, shard_mb=1e-6), tmp_path / "b").shards
        == 12
    )
    assert pack_quietly(recipe_of(refer_root, max_images=5), tmp_path / "c").shards == 3
    assert verify(tmp_path / "b").ok and verify(tmp_path / "c").ok


def test_the_vocabulary_is_of_the_cleaned_training_sentences(
    refer_root: Path, tmp_path: Path, monkeypatch
) -> None:
    import coupalign.data.tokenizer as tokenizer

    seen: list[list[str]] = []
    train = tokenizer.train_vocabulary

    def spy(sentences, path, size=8000) -> None:
        seen.append(sorted(sentences))
        train(seen[-1], path, size)

    monkeypatch.setattr(tokenizer, "train_vocabulary", spy)
    pack_quietly(recipe_of(refer_root, sets=SETS[:1]), tmp_path / "a")
    assert (
        len(seen[0]) == 41
        and "red box at the café – left" in seen[0]
        and not any("." in text for text in seen[0])
    )
    for file in refer_root.glob("refcoco*/refs*"):
        file.write_bytes(file.read_bytes().replace(b"train", b"other"))
    pack_quietly(recipe_of(refer_root, sets=SETS[:1]), tmp_path / "b")
    assert len(seen[1]) == 61  # no train split: all
    pack_quietly(recipe_of(refer_root, vocabulary_size=None), tmp_path / "c")
    assert (
        read_index(tmp_path / "c").vocabulary is None
        and not (tmp_path / "c/vocab.txt").exists()
        and len(seen) == 2
    )


# --------------------------------------------------------------------------------------------- interrupted, resumed


def run_until_call(number: int, recipe: Recipe, out: Path, overwrite: bool = False) -> bool:
    """Pack in a fork that kills itself with SIGKILL at its n-th call that changes or flushes a file; True where it was killed."""
    child = os.fork()
    if child == 0:
        left = number

        def deadly(function):
            def call(*args, **kwargs):
                nonlocal left
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return call

        try:
            for name in ("replace", "fsync", "mkdir", "unlink"):
                setattr(os, name, deadly(getattr(os, name)))
            pack_quietly(recipe, out, overwrite=overwrite)
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("older", [False, True], ids=["fresh", "over an older set"])
def test_killed_at_every_moment(
    refer_root: Path, packed: Path, tmp_path: Path, monkeypatch, older: bool
) -> None:
    import webdataset  # noqa: F401  the forks must not import it one by one

    recipe, expected = recipe_of(refer_root), contents(packed)
    other = tmp_path / "other"
    monkeypatch.setattr(
        os, "fsync", lambda handle: None
    )  # the disk keeps what a killed process wrote; and it is slow
    if older:
        pack_quietly(
            recipe_of(refer_root, sets=SETS[:1], max_images=3, vocabulary_size=None), other
        )
    number, killed = 0, True
    while killed:
        out = tmp_path / f"out{number}"
        if older:
            shutil.copytree(other, out)
        killed = run_until_call(number, recipe, out, overwrite=older)
        if (out / "index.json").exists():
            assert verify(out).ok  # an index is always that of a whole set
        elif out.exists():
            proved = [
                json.loads(file.read_text())["shard"] for file in out.glob(".shard-*.tar.json")
            ]
            assert all(
                (out / shard["url"]).read_bytes() == expected[shard["url"]] for shard in proved
            )
        report = pack_quietly(recipe, out, overwrite=older)
        assert contents(out) == expected, (
            f"after a kill at call {number}: {sorted(contents(out))}, {report}"
        )
        shutil.rmtree(out)
        number += 1
    assert number > 20


def test_finished_shards_are_kept_and_doubtful_ones_written_again(
    refer_root: Path, packed: Path, tmp_path: Path
) -> None:
    recipe, out = recipe_of(refer_root), tmp_path / "out"
    calls = 0
    while not (out / ".shard-000001.tar.json").exists():
        shutil.rmtree(out, ignore_errors=True)
        assert run_until_call(calls, recipe, out)
        calls += 1
    stamps = {file.name: file.stat().st_mtime_ns for file in out.glob("*.tar")}
    (out / "shard-000001.tar").write_bytes(b"damaged")
    (out / ".shard-000007.tar.json").write_text("{}")
    (out / ".shard-000002.tar.4711.partial").write_text("half")
    (out / "notes.txt").write_text("mine")
    report = pack_quietly(recipe, out)
    assert (
        report.reused == 1
        and (out / "shard-000000.tar").stat().st_mtime_ns == stamps["shard-000000.tar"]
    )
    assert contents(out) == {**contents(packed), "notes.txt": b"mine"}


def test_a_killed_parent_leaves_no_process(refer_root: Path, packed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = (
        "import sys; from coupalign.data.pack import pack; from coupalign.data.recipe import Recipe\n"
        "if __name__ == '__main__': pack(Recipe.model_validate_json(sys.argv[1]), sys.argv[2], workers=2, progress=False)"
    )
    (tmp_path / "run.py").write_text(code)
    command = [
        sys.executable,
        str(tmp_path / "run.py"),
        recipe_of(refer_root).model_dump_json(),
        str(out),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment)
    while not (out / "shard-000000.tar").exists():  # the workers have started
        assert process.poll() is None
        time.sleep(0.01)
    children = _descendants(process.pid)
    process.kill()
    process.wait()
    assert len(children) >= 3  # two workers and what started them
    deadline = time.monotonic() + 60
    while any(_alive(child) for child in children):  # no process is left waiting for work
        assert time.monotonic() < deadline, children
        time.sleep(0.01)
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


# -------------------------------------------------------------------------------------------- what is there already


def test_packed_already(refer_root: Path, packed: Path) -> None:
    before = {file.name: file.stat().st_mtime_ns for file in packed.iterdir()}
    report = pack_quietly(recipe_of(refer_root), packed)
    assert (
        report.state == "already packed"
        and "already packed" in report.table()
        and report.shards == 3
    )
    assert {file.name: file.stat().st_mtime_ns for file in packed.iterdir()} == before


def test_another_set_needs_overwrite_and_leaves_no_old_shard(
    refer_root: Path, packed: Path, tmp_path: Path
) -> None:
    other = recipe_of(refer_root, max_images=8, vocabulary_size=None)
    before = contents(packed)
    with pytest.raises(InputError, match="holds the finished set 'small'.*overwrite"):
        pack_quietly(other, packed)
    assert contents(packed) == before
    (packed / "shard-000099.tar").write_bytes(b"somebody else's")
    assert pack_quietly(other, packed, overwrite=True).state == "packed"
    pack_quietly(other, tmp_path / "clean")
    assert contents(packed) == {
        **contents(tmp_path / "clean"),
        "shard-000099.tar": b"somebody else's",
    }


def test_a_damaged_finished_set_is_not_called_packed(refer_root: Path, packed: Path) -> None:
    expected = contents(packed)
    (packed / "shard-000001.tar").write_bytes(b"short")
    with pytest.raises(
        InputError, match="shard-000001.tar is missing or truncated; pack again with --overwrite"
    ):
        pack_quietly(recipe_of(refer_root), packed)
    pack_quietly(recipe_of(refer_root), packed, overwrite=True)
    assert contents(packed) == expected


@pytest.mark.parametrize("name", ["shard-000001.tar", "vocab.txt", "index.json"])
def test_files_of_others_are_never_touched(refer_root: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("[]")
    for overwrite in (False, True):
        with pytest.raises(InputError, match=f"{name}.*(did not write|not an index)"):
            pack_quietly(recipe_of(refer_root), out, overwrite=overwrite)
        assert contents(out) == {name: b"[]"}


def test_an_index_of_another_version(refer_root: Path, packed: Path) -> None:
    expected = contents(packed)
    tree = json.loads((packed / "index.json").read_text())
    (packed / "index.json").write_text(json.dumps({**tree, "format_version": 0}))
    with pytest.raises(InputError, match="format_version 0, this tool reads 1"):
        pack_quietly(recipe_of(refer_root), packed)
    pack_quietly(recipe_of(refer_root), packed, overwrite=True)
    assert contents(packed) == expected


def test_one_process_a_directory(refer_root: Path, tmp_path: Path) -> None:
    with (
        packing._claim(tmp_path / "out"),
        pytest.raises(InputError, match="another process is packing"),
    ):
        pack_quietly(recipe_of(refer_root), tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        pack_quietly(recipe_of(refer_root), tmp_path / "file")


# ----------------------------------------------------------------------------------------------------- bad sources


def test_missing_images_are_listed_before_anything_is_written(
    refer_root: Path, tmp_path: Path
) -> None:
    for image_id in (9, 25, 72, 138, 309, 326, 575):
        image(refer_root, image_id).unlink()
    with pytest.raises(InputError) as caught:
        pack_quietly(recipe_of(refer_root), tmp_path / "out")
    text = str(caught.value)
    assert "7 of 12 images are missing (18 refs need them)" in text and "missing: skip" in text
    assert [f"{n:012d}" in text for n in (9, 25, 72, 138, 309, 326, 575)] == [True] * 5 + [
        False
    ] * 2
    assert not (tmp_path / "out").exists()
    report = pack_quietly(recipe_of(refer_root, missing="skip"), tmp_path / "out")
    assert report.images == 5 and len(report.missing_images) == 7 and "7 of 12" in report.table()
    assert verify(tmp_path / "out").ok and verify(tmp_path / "out").counts == report.counts
    shutil.rmtree(refer_root / "images")
    with pytest.raises(InputError, match="nothing to pack"):
        pack_quietly(recipe_of(refer_root, missing="skip"), tmp_path / "empty")


def test_a_missing_annotation(refer_root: Path, tmp_path: Path) -> None:
    for file in refer_root.glob("*/instances.json"):
        tree = json.loads(file.read_text())
        tree["annotations"] = [a for a in tree["annotations"] if a["id"] != 41510]
        file.write_text(json.dumps(tree))
    with pytest.raises(InputError, match="ref_id 5 .*ann_id 41510"):
        pack_quietly(recipe_of(refer_root, sets=SETS[:1]), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    report = pack_quietly(recipe_of(refer_root, sets=SETS[:1], missing="skip"), tmp_path / "out")
    assert len(report.missing_annotations) == 1 and "1 refs are left out" in report.table()
    assert report.counts["refcoco/unc"]["train"]["refs"] == 15


@pytest.mark.parametrize("workers", [1, 2])
def test_a_jpeg_cut_short_is_named(
    refer_root: Path, packed: Path, tmp_path: Path, workers: int
) -> None:
    file = image(refer_root, 575)
    data = file.read_bytes()
    file.write_bytes(data[:-200])
    with pytest.raises(
        InputError,
        match="COCO_train2014_000000000575.jpg: the JPEG does not decode.*fetch the image again",
    ):
        pack_quietly(recipe_of(refer_root), tmp_path / "out", workers=workers)
    assert not (tmp_path / "out/index.json").exists() and not list(
        (tmp_path / "out").glob(".*.partial")
    )
    file.write_bytes(data)  # mended: it goes on from there
    pack_quietly(recipe_of(refer_root), tmp_path / "out")
    assert contents(tmp_path / "out") == contents(packed)


def test_sizes_that_do_not_agree(refer_root: Path, tmp_path: Path) -> None:
    file = refer_root / "refcocog/instances.json"
    tree = json.loads(file.read_text())
    tree["images"][0]["width"] += 1
    file.write_text(json.dumps(tree))
    with pytest.raises(InputError, match="image_id 9 different sizes"):
        pack_quietly(recipe_of(refer_root), tmp_path / "out")
    with pytest.raises(InputError, match="the picture is 64 x 48, its annotations are for 65 x 48"):
        pack_quietly(recipe_of(refer_root, sets=SETS[1:]), tmp_path / "out")


def test_counts_are_warned_about(refer_root: Path, tmp_path: Path) -> None:
    report = pack_quietly(recipe_of(refer_root), tmp_path / "out")
    assert (
        "warning: refcoco/unc train: 8 images, 16 refs, 41 sentences; published: 16,994 / 42,404 / 120,624"
        in report.table()
    )
    value = json.loads(json.dumps(report.to_json()))
    assert (
        value["counts"]["refcoco/unc"]["testA"] == {"images": 1, "refs": 2, "sentences": 6}
        and value["state"] == "packed"
    )
    assert value["bytes"] == sum(file.stat().st_size for file in (tmp_path / "out").glob("*.tar"))


# -------------------------------------------------------------------------------------------------- recipes, real data


def test_recipe_errors_name_file_key_and_nearest(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("name: x\nroot: /x\nsets: [{dataset: refcoco, splitby: unc}]\nshard_md: 3\n")
    with pytest.raises(InputError) as caught:
        read_recipe(file)
    assert (
        "r.yaml" in str(caught.value)
        and "'shard_mb'" in str(caught.value)
        and "'split_by'" in str(caught.value)
    )
    file.write_text("name: x\nroot: /x\nsets: []\n")
    with pytest.raises(InputError, match="sets"):
        read_recipe(file)
    file.write_text(
        "name: x\nroot: /x\nsets: [{dataset: a, split_by: b}, {dataset: a, split_by: b, folder: c}]\n"
    )
    with pytest.raises(InputError, match="a/b more than once"):
        read_recipe(file)


@pytest.mark.parametrize(
    "file", sorted((ROOT / "shards/recipes").glob("*.yaml")), ids=lambda file: file.stem
)
def test_shipped_recipes(file: Path, monkeypatch) -> None:
    monkeypatch.setenv("REFER_ROOT", "~/refer")
    recipe = read_recipe(file)
    assert recipe.name == file.stem and recipe.out == Path("data/shards") / recipe.name
    assert recipe.root in (Path.home() / "refer", Path("data/refshapes"))
