"""Phrases: each sentence can mean one object only."""

from __future__ import annotations

from dataclasses import replace

from coupalign.data.refshapes.drawing import SceneObject
from coupalign.data.refshapes.phrases import Phrase, Scene
from coupalign.data.sides import mirror_sentence
from tests.unit.data.refshapes.reader import (
    SIDES,
    GeneratedSet,
    distance_from,
    fitting_objects,
    read_sentence,
)


def test_each_sentence_means_its_object_alone(generated: GeneratedSet) -> None:
    """For a strict and a generous reader, in the picture and in its mirror image."""
    objects_of_image = {
        image_id: generated.objects(image_id)
        for image_id in {ref["image_id"] for ref in generated.refs}
    }
    for ref in generated.refs:
        objects = objects_of_image[ref["image_id"]]
        mirrored = [replace(item, x=1 - item.x) for item in objects]
        for sentence in ref["sentences"]:
            text = sentence["sent"]
            mirrored_text = mirror_sentence(text)
            for generous in (False, True):
                case = (ref["image_id"], text, generous)

                meant = read_sentence(text, objects, generous)
                meant_in_mirror = read_sentence(mirrored_text, mirrored, generous)

                assert meant == [ref["ann_id"]], case
                assert meant_in_mirror == [ref["ann_id"]], (*case, "mirrored")


def test_side_also_holds_relative_to_the_group(generated: GeneratedSet) -> None:
    """`circle on the left` is in the left half, and it is the leftmost circle as well."""
    checked = 0
    for ref in generated.refs:
        objects = generated.objects(ref["image_id"])
        for sentence in ref["sentences"]:
            words = [word for word in sentence["tokens"] if word not in ("the", "on", "at", "side")]
            sides = [word for word in words if word in SIDES]
            if len(sides) != 1 or {"of", "from"} & set(words):
                continue

            side = sides[0]
            group = fitting_objects([word for word in words if word != side], objects)
            nearest = min(group, key=lambda item: distance_from(side, item))

            assert nearest.ann_id == ref["ann_id"], sentence["sent"]
            checked += 1
    assert checked > 30


def scene_of(*objects: tuple[str, float]) -> Scene:
    """A scene of 100 pixels with big red objects (shape, x) in one row."""
    row = [
        SceneObject(
            shape=shape,
            color="red",
            size="big",
            x=x,
            y=50,
            radius=10,
            angle=0,
            paint=(0, 0, 0),
        )
        for shape, x in objects
    ]
    return Scene(row, 100)


def test_side_is_ambiguous_if_another_object_nearly_fits() -> None:
    left = Phrase("circle", sides=("left",))

    assert scene_of(("circle", 20), ("circle", 80)).find_referent(left) == 0
    assert scene_of(("circle", 20), ("circle", 48)).find_referent(left) is None
    assert scene_of(("circle", 20), ("square", 48)).find_referent(left) == 0
    assert scene_of(("circle", 20), ("circle", 30)).find_referent(left) is None
    assert scene_of(("circle", 70)).find_referent(left) is None


def test_order_needs_gaps_between_neighbors() -> None:
    second = Phrase("circle", order=(1, "right"))
    row = [("circle", 10), ("circle", 30), ("circle", 60)]

    assert scene_of(*row, ("circle", 90)).find_referent(second) == 2
    assert scene_of(*row, ("circle", 65)).find_referent(second) is None


def test_relation_needs_a_clear_landmark() -> None:
    left_of_square = Phrase("star", relation=("left of", Phrase("square")))
    objects = [("star", 20), ("star", 80), ("square", 50)]
    close = [("star", 20), ("star", 45), ("square", 50)]

    assert scene_of(*objects).find_referent(left_of_square) == 0
    assert scene_of(*objects, ("square", 90)).find_referent(left_of_square) is None
    assert scene_of(*close).find_referent(left_of_square) is None
