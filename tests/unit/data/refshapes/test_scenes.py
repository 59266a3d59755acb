"""Scenes: targets, levels and gray pictures."""

from __future__ import annotations

from collections import Counter

import numpy as np

from tests.unit.data.refshapes.reader import HUES, IMAGES, GeneratedSet


def test_gray_pictures_have_no_color_words(generated: GeneratedSet) -> None:
    image_ids = [image["id"] for image in generated.instances["images"]]
    gray = {image_id for image_id in image_ids if generated.picture(image_id).mode == "L"}

    assert 0 < len(gray) < 0.15 * IMAGES
    for ref in generated.refs:
        if ref["image_id"] in gray:
            assert not any(set(s["tokens"]) & set(HUES) for s in ref["sentences"])


def test_targets_are_not_alone_in_their_class_and_stay_visible(generated: GeneratedSet) -> None:
    annotations = generated.annotations.values()
    per_class = Counter((a["image_id"], a["category_id"]) for a in annotations)
    per_image = Counter(a["image_id"] for a in annotations)
    areas = [a["area"] for a in annotations]

    assert all(per_class[ref["image_id"], ref["category_id"]] >= 2 for ref in generated.refs)
    if generated.level == "easy":
        assert set(per_image.values()) <= {3, 4}
        assert min(areas) >= 140
    else:
        assert set(per_image.values()) <= {5, 6, 7, 8, 9}
        assert min(areas) >= 60


def test_levels_differ_in_language(generated: GeneratedSet) -> None:
    sentences = [s["tokens"] for ref in generated.refs for s in ref["sentences"]]
    with_relation = np.mean([bool({"above", "below", "of"} & set(s)) for s in sentences])
    with_order = np.mean(["from" in s for s in sentences])
    with_color = np.mean([bool(set(HUES) & set(s)) for s in sentences])
    longest = max(map(len, sentences))

    if generated.level == "easy":
        assert with_relation == with_order == 0
        assert longest <= 8
        assert with_color > 0.4
    else:
        assert with_relation > 0.25
        assert with_order > 0.15
        assert longest <= 14
