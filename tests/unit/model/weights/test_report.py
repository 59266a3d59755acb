"""What a load report says."""

from __future__ import annotations

import json

from coupalign.model.weights.report import LoadReport, list_first, random_report


def test_list_first_says_how_many_more():
    assert list_first(["a", "b"], 2) == "a, b"
    assert list_first(["a", "b", "c", "d"], 2) == "a, b and 2 more"
    assert list_first([], 2) == ""


def test_random_report_says_so_in_capitals():
    report = random_report("text", "asked for")

    assert report.random and report.to_json()["random"]
    assert report.text() == "text: RANDOM START, no pretrained weights\n  asked for"


def test_report_groups_left_out_names_by_reason():
    report = LoadReport(
        part="image",
        source="swin.pth",
        loaded=("a",),
        interpolated=(("table", (9, 2), (25, 2)),),
        left_out=(("head.bias", "the classifier"), ("x", "derived"), ("fc", "the classifier")),
        missing=("norm",),
        notes=("translated",),
        leak="It saw them",
    )

    assert report.text().splitlines() == [
        "image: THESE WEIGHTS MAY HAVE SEEN THE TEST IMAGES. It saw them",
        "image: 1 tensors loaded, 1 interpolated, 3 left out, 1 not in the file; from swin.pth",
        "  translated",
        "  interpolated (bicubic): table (9, 2) -> (25, 2)",
        "  left out, the classifier: head.bias, fc",
        "  left out, derived: x",
        "  not in the file, initial values kept: norm",
    ]
    assert json.loads(json.dumps(report.to_json()))["random"] is False
