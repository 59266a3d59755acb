"""The pictures that a scoring keeps: exact extremes, a fair draw, a bounded number."""

from __future__ import annotations

import numpy as np

from coupalign.evaluation.metrics import ious
from coupalign.evaluation.shelf import choose_pictures
from tests.unit.evaluation.examples import ExampleLoader, evaluate_one


def test_pictures_hold_exact_extremes_and_stay_few():
    result = evaluate_one(ExampleLoader(samples=200, images=True), pictures=3)

    groups = choose_pictures(result.pictures, result.rows, 3)

    values = ious(result.rows)
    assert [picture.iou for picture in groups["best"]] == sorted(values)[::-1][:3]
    assert [picture.iou for picture in groups["worst"]] == sorted(values)[:3]
    assert all(abs(picture.iou - np.median(values)) < 0.1 for picture in groups["median"])
    assert len({picture.number for picture in groups["random"]}) == 3

    assert len(result.pictures) <= 3 + 3 + 12
    for picture in result.pictures:
        assert picture.image[0, 0, 0] == picture.number
        intersection = (picture.prediction & picture.truth).sum()
        union = (picture.prediction | picture.truth).sum()
        assert picture.iou == intersection / union == values[picture.number]


def test_random_pictures_are_an_unbiased_draw():
    """The shelf also holds extremes, which must not be likelier to be shown as random."""
    result = evaluate_one(ExampleLoader(samples=250, images=True), pictures=12)

    drawn = choose_pictures(result.pictures, result.rows, 12)["random"]

    ranks = [np.mean(ious(result.rows) < picture.iou) for picture in drawn]
    assert 0.3 < np.mean(ranks) < 0.7


def test_random_pictures_do_not_depend_on_batch_size():
    drawn = []
    for batch in (4, 17):
        loader = ExampleLoader(samples=250, images=True, batch=batch)
        result = evaluate_one(loader, pictures=12)
        pictures = choose_pictures(result.pictures, result.rows, 12)["random"]
        drawn.append([picture.number for picture in pictures])

    assert drawn[0] == drawn[1]


def test_all_samples_are_shown_if_fewer_than_asked_for():
    result = evaluate_one(ExampleLoader(samples=2, images=True), pictures=4)

    groups = choose_pictures(result.pictures, result.rows, 4)

    sizes = {name: len(group) for name, group in groups.items()}
    assert sizes == {"random": 2, "best": 2, "median": 2, "worst": 2}


def test_no_pictures_are_kept_unless_asked_for():
    assert evaluate_one(ExampleLoader()).pictures == ()
