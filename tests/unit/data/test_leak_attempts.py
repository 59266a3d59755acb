"""Attempts to score photographs that were trained on, and sets that only seem to do so.

Each attempt must be refused, marked LEAKY, excluded and counted; each honest set must be "none".
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image, ImageOps

from coupalign.config.schema import DataConfig
from coupalign.data.index import ShardIndex, read_index
from coupalign.data.leak import (
    TrainedOn,
    apply_leak_policy,
    count_overlaps,
    photos_of,
    read_trained_on,
)
from coupalign.data.refshapes.generate import synth
from coupalign.data.table import build_table
from coupalign.errors import InputError
from tests.unit.data.packing.small_set import pack_quietly, recipe_of
from tests.unit.data.photographs import (
    Stored,
    coco_name,
    encode,
    forget_hashes,
    pack_photographs,
    photograph,
)

# The scored photographs are those of the seeds 1 to 3, as 1 to 3 of COCO in refcoco's testA. An
# attempt stores the same three, and one more that is not scored.
SEEDS = (1, 2, 3, 4)
NUMBERS = (1, 2, 3)


def as_scored() -> list[Stored]:
    return [
        Stored(number, coco_name(number), encode(photograph(number)), "testA") for number in NUMBERS
    ]


def stored(
    change: Callable[[Image.Image], Image.Image] = lambda image: image,
    *,
    renumber: int = 0,
    name: str = "",
    **options: object,
) -> list[Stored]:
    """The photographs of SEEDS, changed, under the numbers seed + renumber."""
    photos = []
    for seed in SEEDS:
        number = seed + renumber
        file_name = name.format(number) if name else coco_name(number)
        photos.append(Stored(number, file_name, encode(change(photograph(seed)), **options)))
    return photos


def resized(factor: float) -> Callable[[Image.Image], Image.Image]:
    return lambda image: image.resize(
        (round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC
    )


def brighter(image: Image.Image) -> Image.Image:
    return image.point(lambda value: min(255, int(value * 1.15)))


def cropped(image: Image.Image) -> Image.Image:
    """Cut off 1 % at each side."""
    return image.crop((2, 1, image.width - 2, image.height - 1))


EXIF_TURNED = Image.Exif()
EXIF_TURNED[0x0112] = 6  # stored turned by 90 degrees; a viewer turns it back

ATTEMPTS: dict[str, tuple[str, list[Stored]]] = {
    # The same bytes.
    "another set of COCO": ("refcoco+", stored()),
    "G-Ref": ("refcocog", stored()),
    "a set of COCO that the guard has no name for": ("grefcoco", stored()),
    "the name in capital letters": ("RefCOCO", stored()),
    "a name of one's own": ("mine", stored()),
    "the same name, another partition": ("refcoco", stored()),
    "other numbers of COCO": ("refcocog", stored(renumber=500)),
    "other numbers, another name": ("mine", stored(renumber=500)),
    "file names of one's own": ("mine", stored(name="photo-{}.jpg")),
    "file names and numbers of one's own": ("mine", stored(name="photo-{}.jpg", renumber=70)),
    "COCO's names of 2017": ("refcoco+", stored(name="{:012d}.jpg")),
    # Other bytes, the same number.
    "compressed again": ("grefcoco", stored(quality=50)),
    "a border cut off": ("grefcoco", stored(cropped)),
    "half the size": ("grefcoco", stored(resized(0.5))),
    # Other bytes, other numbers.
    "compressed again, renumbered": ("grefcoco", stored(quality=50, renumber=500)),
    "quality 95, renumbered": ("mine", stored(quality=95, renumber=500)),
    "progressive": ("mine", stored(progressive=True, renumber=500)),
    "with a comment": ("mine", stored(comment=b"x", renumber=500)),
    "half the size, renumbered": ("mine", stored(resized(0.5), renumber=500)),
    "twice the size, renumbered": ("mine", stored(resized(2), renumber=500)),
    "a square": ("mine", stored(lambda image: image.resize((120, 120)), renumber=500)),
    "gray": ("mine", stored(lambda image: image.convert("L"), renumber=500)),
    "brighter": ("mine", stored(brighter, renumber=500)),
    "mirrored": ("mine", stored(ImageOps.mirror, renumber=500)),
    "turned by its EXIF data": (
        "mine",
        stored(
            lambda image: image.transpose(Image.Transpose.ROTATE_90),
            renumber=500,
            exif=EXIF_TURNED,
            quality=95,
        ),
    ),
}


def config_of(leaks: str = "refuse") -> DataConfig:
    """Train on the first index, score the testA of the second."""
    return DataConfig.model_validate(
        {
            "train": [{"index": "trained", "split": "train"}],
            "evaluate": [{"index": "scored", "split": "testA"}],
            "leaks": leaks,
        }
    )


def message_of(trained: ShardIndex, scored: ShardIndex, split: str = "testA") -> str:
    """What a score says."""
    config = config_of()
    seen = TrainedOn.from_table(build_table(config.train, [trained], "ref"), "refuse")
    source = config.evaluate[0].model_copy(update={"split": split})
    return seen.leak_message(photos_of(build_table([source], [scored], "sentence")))


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_attempt_is_caught(attempt: str, tmp_path: Path) -> None:
    dataset, photos = ATTEMPTS[attempt]
    trained = pack_photographs(tmp_path / "trained", dataset, photos, split_by="other")
    scored = pack_photographs(tmp_path / "scored", "refcoco", as_scored())
    table = build_table(config_of().train, [trained], "ref")

    assert message_of(trained, scored).startswith("LEAKY: 3 of 3 scored photographs")

    with pytest.raises(InputError, match="3 of 3 photographs of refcoco/unc testA"):
        apply_leak_policy(config_of(), table, [trained], [scored])

    kept, lines = apply_leak_policy(config_of("exclude"), table, [trained], [scored])
    assert [table.label(number) for number in range(len(table))][3] == kept.label(0)
    assert len(kept) == 1 and "3 of 4 training samples" in lines[0]

    kept, lines = apply_leak_policy(config_of("allow"), table, [trained], [scored])
    assert len(kept) == 4 and lines[0].startswith("LEAKY")

    overlaps = count_overlaps([trained, scored])
    assert overlaps.shared[f"{dataset}/other train", "refcoco/unc testA"] == 3
    assert overlaps.unhashed == {}


@pytest.mark.parametrize("quality", [90, 60])
def test_one_photograph_under_two_ids_of_a_set_is_caught(tmp_path: Path, quality: int) -> None:
    """Train and val of one partition have the same file under two names."""
    copy = Stored(900, "copy.jpg", encode(photograph(1), quality), "val")
    index = pack_photographs(tmp_path, "mine", [*stored(name="photo-{}.jpg"), copy])

    assert message_of(index, index, "val").startswith("LEAKY: 1 of 1")

    config = config_of().model_copy(update={"evaluate": ()})
    table = build_table(config.train, [index], "ref")
    with pytest.raises(InputError, match="1 of 1 photographs of mine/unc val"):
        apply_leak_policy(config, table, [index], [])
    assert count_overlaps([index]).examples["mine/unc train", "mine/unc val"] == (1, 900)


def test_photographs_of_initial_weights_are_caught(tmp_path: Path) -> None:
    trained = pack_photographs(tmp_path / "trained", "mine", stored(quality=60, renumber=500))
    scored = pack_photographs(tmp_path / "scored", "refcoco", as_scored())
    earlier = TrainedOn.from_table(build_table(config_of().train, [trained], "ref"), "refuse")
    earlier.write(tmp_path)
    other = Stored(50, coco_name(50), encode(photograph(50)))
    own = pack_photographs(tmp_path / "own", "refcoco", [other])
    now = TrainedOn.from_table(build_table(config_of().train, [own], "ref"), "refuse")

    started = now.including([tmp_path / "weights.safetensors"])

    photos = photos_of(build_table(config_of().evaluate, [scored], "sentence"))
    assert now.leak_message(photos) == "none: no scored photograph was trained on"
    assert started.leak_message(photos).startswith("LEAKY: 3 of 3")
    assert len(started.photos) == 5


# -------------------------------------------------------------------------------- honest sets


HONEST: dict[str, tuple[str, list[Stored]]] = {
    "other photographs, other numbers": (
        "refcoco+",
        [Stored(n, coco_name(n), encode(photograph(n))) for n in (11, 12, 13)],
    ),
    "other photographs under the same numbers": (
        "mine",
        [Stored(n, f"photo-{n}.jpg", encode(photograph(n + 10))) for n in NUMBERS],
    ),
    "other photographs under COCO's names": (
        "refcoco",
        [Stored(n, coco_name(n), encode(photograph(n + 10))) for n in NUMBERS],
    ),
    "other photographs under COCO's names, in a set of one's own": (
        "mine",
        [Stored(n, coco_name(n), encode(photograph(n + 10))) for n in NUMBERS],
    ),
}


@pytest.mark.parametrize("honest", HONEST)
def test_honest_set_does_not_leak(honest: str, tmp_path: Path) -> None:
    dataset, photos = HONEST[honest]
    trained = pack_photographs(tmp_path / "trained", dataset, photos, split_by="other")
    scored = pack_photographs(tmp_path / "scored", "refcoco", as_scored())

    message = message_of(trained, scored)

    assert message.startswith("none: no scored photograph was trained on")
    named_alike = photos[0].file_name == coco_name(1)
    assert ("3 have the COCO number of one that was" in message) == named_alike
    table = build_table(config_of().train, [trained], "ref")
    assert apply_leak_policy(config_of(), table, [trained], [scored]) == (table, [])
    assert count_overlaps([trained, scored]).shared == {}


def test_refshapes_do_not_leak(tmp_path: Path) -> None:
    """Drawn scenes look alike, have COCO's file names and are called refcoco."""
    indexes = []
    for seed in (0, 1):
        synth(tmp_path / f"shapes{seed}", 300, seed, level="easy", size=96, workers=1)
        recipe = recipe_of(
            tmp_path / f"shapes{seed}",
            sets=({"dataset": "refcoco", "split_by": "unc"},),
            max_images=None,
            vocabulary_size=None,
        )
        pack_quietly(recipe, tmp_path / f"packed{seed}")
        indexes.append(tmp_path / f"packed{seed}")

    config = DataConfig.model_validate(
        {"train": [{"index": str(indexes[0]), "split": "train"}], "evaluate": []}
    )
    first, second = (read_index(path) for path in indexes)
    table = build_table(config.train, [first], "ref")

    assert apply_leak_policy(config, table, [first], []) == (table, [])
    assert message_of(first, second, "val").startswith("none:")
    found = count_overlaps([first])
    assert found.shared == {} and sum(found.sizes.values()) == 300


# -------------------------------------------------------------------- shards of early versions


@pytest.mark.parametrize("old", ["trained", "scored", "both"])
def test_missing_hashes_are_unknown(old: str, tmp_path: Path) -> None:
    trained = pack_photographs(tmp_path / "trained", "mine", stored(renumber=500))
    scored = pack_photographs(tmp_path / "scored", "refcoco", as_scored())
    if old != "scored":
        trained = forget_hashes(tmp_path / "trained")
    if old != "trained":
        scored = forget_hashes(tmp_path / "scored")

    message = message_of(trained, scored)

    assert message.startswith("unknown: 3 of 3 scored photographs may have been trained on")
    assert ("the scored shards" in message) == (old != "trained")
    assert ("the shards of the training" in message) == (old != "scored")
    assert "Pack the shards again with --overwrite" in message

    table = build_table(config_of().train, [trained], "ref")
    kept, (line,) = apply_leak_policy(config_of(), table, [trained], [scored])
    assert len(kept) == 4
    assert line.startswith("leaks unknown:") and "3 of 3 of refcoco/unc testA" in line

    overlaps = count_overlaps([trained, scored])
    assert "unknown: an early version packed" in overlaps.table()
    assert "is known to be in another split" in overlaps.table()
    assert (
        sum(overlaps.to_json()["unknown"].values()) == {"trained": 4, "scored": 3, "both": 7}[old]
    )


@pytest.mark.parametrize("old", ["trained", "scored", "both"])
def test_missing_hashes_leave_the_numbers(old: str, tmp_path: Path) -> None:
    trained = pack_photographs(tmp_path / "trained", "refcoco+", stored()[:1])
    scored = pack_photographs(tmp_path / "scored", "refcoco", as_scored())
    if old != "scored":
        trained = forget_hashes(tmp_path / "trained")
    if old != "trained":
        scored = forget_hashes(tmp_path / "scored")

    message = message_of(trained, scored)

    assert message.startswith("LEAKY: at least 1 of 3 scored photographs were trained on")
    table = build_table(config_of().train, [trained], "ref")
    with pytest.raises(InputError, match="1 of 3 photographs of refcoco/unc testA"):
        apply_leak_policy(config_of(), table, [trained], [scored])


def test_missing_hashes_leave_name_number_and_length(tmp_path: Path) -> None:
    """What identified a photograph of another collection before there were hashes."""
    pack_photographs(tmp_path / "one", "mine", stored(name="photo-{}.jpg"))
    one = forget_hashes(tmp_path / "one")
    two = pack_photographs(tmp_path / "two", "mine", stored(name="photo-{}.jpg", quality=91))

    assert message_of(one, one, "train").startswith("LEAKY: 4 of 4")
    assert message_of(one, two, "train").startswith("unknown: 4 of 4")


def test_old_list_of_photographs_is_read(tmp_path: Path) -> None:
    (tmp_path / "trained_on.json").write_text(
        '{"mix": null, "weights": [], "photos": {"coco": [[1, 0], [77, 0]], "mine": [[5, 100]]}}'
    )
    scored = pack_photographs(tmp_path / "scored", "refcoco", as_scored())
    photos = photos_of(build_table(config_of().evaluate, [scored], "sentence"))

    seen = read_trained_on(tmp_path)

    assert len(seen.photos) == 3
    assert seen.leak_message(photos).startswith("LEAKY: at least 1 of 3")
    other = [Stored(9, coco_name(9), encode(photograph(9)), "testA")]
    unseen = pack_photographs(tmp_path / "other", "refcoco", other)
    photos = photos_of(build_table(config_of().evaluate, [unseen], "sentence"))
    assert seen.leak_message(photos).startswith("unknown: 1 of 1")
