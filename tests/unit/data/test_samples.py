"""Reading samples: what they hold, what they share, and what augmentation does to them."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from coupalign.config.schema import Augmentation, DataConfig, Source
from coupalign.data import masks, transforms
from coupalign.data.batch import SampleInfo
from coupalign.data.build import open_tokenizer
from coupalign.data.index import read_index
from coupalign.data.samples import BadSample, SampleReader
from coupalign.data.shards import open_index
from coupalign.data.sides import mirror_sentence
from coupalign.data.table import build_table
from tests.unit.data.batches import config_of, evaluate, steps_of, train
from tests.unit.data.conftest import change_index


@pytest.mark.parametrize("resize", ["squash", "letterbox"])
def test_sample_is_what_the_annotation_says(packed: Path, refer_root: Path, resize: str):
    """Compared with the `refer` files themselves, which the loader never saw."""
    refs_text = (refer_root / "refcocog" / "refs(umd).json").read_text(encoding="utf-8")
    refs = {ref["ref_id"]: ref for ref in json.loads(refs_text)}
    instances = json.loads((refer_root / "refcoco" / "instances.json").read_text())
    annotations = {annotation["id"]: annotation for annotation in instances["annotations"]}
    files = {image["id"]: image["file_name"] for image in instances["images"]}
    source = Source(index=str(packed), dataset="refcocog", split="train")
    config = config_of(packed, resize=resize, train=(source,), augment=Augmentation())

    _, [batch] = next(train(config).steps_from(0))

    for row, info in enumerate(batch.info):
        ref = refs[int(info.name.split("/")[2])]
        assert info.image_id == ref["image_id"]
        assert info.sentence in [sentence["sent"] for sentence in ref["sentences"]]

        image = Image.open(refer_root / "images" / "train2014" / files[ref["image_id"]])
        square = transforms.image_to_square(np.asarray(image.convert("RGB")), info.frame)
        assert np.array_equal(batch.image[row].permute(1, 2, 0), square)

        segmentation = annotations[ref["ann_id"]]["segmentation"]
        rle = masks.rle_from_segmentation(segmentation, image.height, image.width)
        target = transforms.mask_to_square(masks.decode(rle), info.frame)
        assert np.array_equal(batch.target[row], target)


def test_sentence_may_be_the_raw_text(packed: Path):
    config = config_of(packed, unit="sentence", sentence="raw", augment=Augmentation())

    rows = steps_of(train(config, 41), 0, 1)[0]

    sentences = {row.sentence for row in rows}
    assert any(sentence.startswith("The ") for sentence in sentences)
    assert any(sentence.endswith(".") for sentence in sentences)


def test_flip_mirrors_image_mask_and_sentence(packed: Path):
    plain, mirrored = (
        steps_of(
            train(config_of(packed, unit="sentence", augment=Augmentation(flip=flip)), 41), 0, 1
        )[0]
        for flip in (0, 1)
    )

    kept = 0
    for a, b in zip(plain, mirrored):
        mirrored_sentence = mirror_sentence(a.sentence)
        if mirrored_sentence is None:
            assert (a.sentence, a.image, a.target) == (b.sentence, b.image, b.target)
            kept += 1
            continue

        assert b.sentence == mirrored_sentence
        for before, after in ((a.image, b.image), (a.target, b.target)):
            before = np.frombuffer(before, np.uint8).reshape(-1, 32, 32)
            after = np.frombuffer(after, np.uint8).reshape(-1, 32, 32)
            assert np.array_equal(before[..., ::-1], after)
    assert 0 < kept < len(plain)
    assert any(a.sentence != b.sentence for a, b in zip(plain, mirrored))


def test_requested_image_has_its_original_size_and_changes_nothing(packed: Path):
    """The images of 64 x 48 pixels are decoded at half of their size on their way to 8 x 8."""
    config = config_of(packed).model_copy(update={"image_size": 8})

    plain = next(iter(evaluate(config, images=False)))
    with_images = next(iter(evaluate(config, images=True)))

    assert torch.equal(plain.image, with_images.image)
    for info in with_images.info:
        size = (info.frame.height, info.frame.width)
        assert transforms.reduction(*size, info.frame) > 1
        assert info.image.shape == (*size, 3)
        assert info.truth.shape == size


@pytest.mark.parametrize("resize", ["squash", "letterbox"])
def test_sentences_about_an_image_share_its_decoding_and_nothing_else(
    packed: Path, resize: str, monkeypatch: pytest.MonkeyPatch
):
    source = Source(index=str(packed), split="train")
    config = DataConfig(train=[source], image_size=64, resize=resize)
    table = build_table(config.train, [open_index(str(packed))], "sentence")
    tokenizer, decoded = open_tokenizer(config), []
    decode = transforms.decode_image
    monkeypatch.setattr(
        transforms,
        "decode_image",
        lambda data, frame=None: decoded.append(len(data)) or decode(data, frame),
    )

    def read(reader: SampleReader, number: int) -> tuple[np.ndarray, SampleInfo]:
        square = np.empty((64, 64, 3), np.uint8)
        info = reader.read_eval_sample(number, None, with_image=True, square=square)
        return square, info

    # All samples in order, then some at random.
    random_numbers = np.random.default_rng(0).integers(len(table), size=40).tolist()
    numbers = [*range(len(table)), *random_numbers]
    one_reader = SampleReader(config, table, tokenizer)
    found = [read(one_reader, number) for number in numbers]

    # An image is decoded once for neighbors.
    runs = 1 + np.count_nonzero(np.diff(table.image[numbers]))
    assert len(decoded) == runs < len(numbers)

    # A reader that has read nothing else gives the same.
    for number, (square, info) in zip(numbers, found):
        expected, alone = read(SampleReader(config, table, tokenizer), number)
        assert np.array_equal(square, expected)
        assert np.array_equal(info.image, alone.image)
        assert np.array_equal(info.truth, alone.truth)
        assert replace(info, image=None, truth=None) == replace(alone, image=None, truth=None)


# ------------------------------------------------------------------------------- Damaged shards


def read_all(packed: Path, split: str = "train") -> list[str]:
    """Read every training and evaluation sample; returns the messages about bad ones."""
    source = Source(index=str(packed), dataset="refcoco", split=split)
    config = DataConfig(train=[source], image_size=32)
    table = build_table(config.train, [open_index(str(packed))], "sentence")
    reader = SampleReader(config, table, open_tokenizer(config))
    image, target = np.empty((1, 32, 32, 3), np.uint8), np.empty((1, 32, 32), bool)

    messages = []
    for number in range(len(table)):
        try:
            reader.read_train_samples(0, [(0, number)], image, target)
        except BadSample as error:
            messages.append(str(error))
        try:
            reader.read_eval_sample(number, None, with_image=False, square=image[0])
        except BadSample as error:
            messages.append(str(error))
    return messages


@pytest.mark.parametrize("unit", ["sentence", "ref"])
def test_sentences_that_are_never_mirrored_are_counted_once_per_ref(packed: Path, unit: str):
    config = config_of(packed, unit=unit)
    loader = train(config, 4)
    table = loader.reader.table
    _, [batch] = next(loader.steps_from(0))
    shard = table.shard[batch.info[0].number]
    refs = {}
    for number in np.flatnonzero(table.shard == shard).tolist():
        _, record = loader.reader.read_stored(number)
        refs[record["ref_id"]] = [sentence["sent"] for sentence in record["sentences"]]
    texts = [text for sentences in refs.values() for text in sentences]

    left_alone, total = loader.count_not_mirrored()

    assert total == len(texts)
    assert left_alone == sum(mirror_sentence(text) is None for text in texts)


def flip(packed: Path, at: int, bit: int) -> None:
    tar = packed / "shard-000000.tar"
    with open(tar, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0] ^ 1 << bit
        file.seek(at)
        file.write(bytes([byte]))


@pytest.mark.parametrize("with_checksums", [True, False])
def test_wrong_bit_in_a_record_is_refused_and_named(packed: Path, with_checksums: bool):
    """Shards of early versions have no checksums: there, a letter of a text may be wrong."""
    if not with_checksums:
        change_index(packed, lambda tree: [image.pop("crc") for image in tree["images"]])
    image = read_index(packed).images[0]
    text = (packed / "shard-000000.tar").read_bytes()[image.json[0] : sum(image.json)]
    assert read_all(packed) == []

    counts = text.index(b'"counts":"') + len(b'"counts":"')
    places = {"run lengths": counts + 1, "area": text.index(b'"area":') + 7, "sent": -12}
    for field, place in places.items():
        flip(packed, image.json[0] + place % len(text), 0)
        messages = read_all(packed)
        flip(packed, image.json[0] + place % len(text), 0)

        if field == "sent" and not with_checksums:
            continue
        assert messages, field
        for message in messages:
            assert re.match(
                r"refcoco/unc/[01]: 000000000009.json \(image 9\) in .*shard-000000.tar: ", message
            )


def test_every_wrong_bit_in_run_lengths_is_refused_without_checksums(packed: Path):
    change_index(packed, lambda tree: [image.pop("crc") for image in tree["images"]])
    source = Source(index=str(packed), dataset="refcoco", split="train")
    config = DataConfig(train=[source], image_size=32)
    table = build_table(config.train, [open_index(str(packed))], "ref")
    reader = SampleReader(config, table, open_tokenizer(config))
    square = np.empty((32, 32, 3), np.uint8)

    _, record = reader.read_stored(0)
    image = read_index(packed).images[0]
    text = (packed / "shard-000000.tar").read_bytes()[image.json[0] : sum(image.json)]
    first = image.json[0] + text.index(record["rle"]["counts"].encode())
    for at in range(first, first + len(record["rle"]["counts"])):
        for bit in range(8):
            flip(packed, at, bit)
            with pytest.raises(BadSample, match="refcoco/unc/0: 000000000009.json"):
                reader.read_eval_sample(0, None, with_image=False, square=square)
            flip(packed, at, bit)


def test_wrong_bit_in_a_photograph_is_refused(packed: Path):
    image = read_index(packed).images[0]

    flip(packed, image.jpg[0] + image.jpg[1] // 2, 3)

    messages = read_all(packed)
    assert messages and all("000000000009.jpg" in message for message in messages)
