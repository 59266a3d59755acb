"""Pairing the tensors of a file with those of a model; test_load.py has the real encoders."""

from __future__ import annotations

import torch

from coupalign.model.weights.match import match_tensors
from coupalign.model.weights.names import EXACT_NAMES, IMAGE_NAMES


def zeros(**shapes):
    return {name.replace("__", "."): torch.zeros(shape) for name, shape in shapes.items()}


def test_exact_names_must_all_be_there_in_their_shapes():
    target = zeros(a=(2,), b=(3,), c=(4,))
    tensors = zeros(a=(2,), b=(5,), d=(6,))

    match = match_tensors(target, tensors, EXACT_NAMES)

    assert match.values.keys() == {"a"} and match.values["a"] is tensors["a"]
    assert match.reshaped == {"b": ((5,), (3,))}
    assert match.missing == {"c": (4,)} and match.unexpected == {"d": (6,)}
    assert match.has_differences
    assert match.differences().splitlines() == [
        "  in another shape:",
        "    b (5,) in the file, (3,) in the model",
        "  missing in the file:",
        "    c (4,)",
        "  only in the file:",
        "    d (6,)",
    ]


def test_differences_name_the_first_four_of_a_kind():
    target = {f"layer{i}": torch.zeros(i) for i in range(6)}

    match = match_tensors(target, {}, EXACT_NAMES)

    lines = match.differences().splitlines()
    assert lines[1] == "    layer0 (0,)" and lines[4:] == ["    layer3 (3,)", "    and 2 more"]


def test_prefix_with_the_most_names_of_the_model_is_taken_off():
    target = zeros(conv__weight=(2,), bn__weight=(3,))
    tensors = zeros(
        model__backbone__conv__weight=(2,),
        model__backbone__bn__weight=(3,),
        model__backbone__fc__weight=(4,),
        model__neck__weight=(5,),
    )

    match = match_tensors(target, tensors, IMAGE_NAMES)

    assert not match.has_differences and match.values.keys() == target.keys()
    assert match.notes == ["prefix 'model.backbone.' taken off the names"]
    assert match.left_out == [
        ("model.neck.weight", "not below 'model.backbone.'"),
        ("model.backbone.fc.weight", "the classifier"),
    ]
