"""Golden files: polygons and logits small enough to count by eye, through pack, loader, protocols and scores, to integers and fractions.

The numbers in `golden/` were counted and computed by hand, not copied from a run.
"""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from coupalign.config.schema import DataConfig, Source
from coupalign.data.batch import Batch
from coupalign.data.build import build_eval_loader, open_tokenizer
from coupalign.data.loader import EvalLoader
from coupalign.data.packing.pack import pack
from coupalign.data.packing.recipe import Recipe
from coupalign.data.table import RULES
from coupalign.distributed.world import World
from coupalign.evaluation.evaluator import Evaluation, evaluate
from coupalign.evaluation.protocols import PROTOCOLS

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.json"))
LOGITS = {"+": 4.0, ".": -4.0, "?": -0.5}


def pack_golden(golden: dict[str, Any], folder: Path) -> Path:
    """The refs of a golden file in the `refer` layout, one a photograph, packed."""
    root, out = folder / "root", folder / "shards"
    (root / "train2014").mkdir(parents=True)
    (root / "golden").mkdir()
    images, annotations, refs = [], [], []
    for number, ref in enumerate(golden["refs"], 1):
        name = f"COCO_train2014_{number:012d}.jpg"
        Image.new("RGB", (ref["width"], ref["height"]), (90, 120, 150)).save(
            root / "train2014" / name
        )
        images.append(
            {"id": number, "file_name": name, "height": ref["height"], "width": ref["width"]}
        )
        annotations.append(
            {
                "id": number,
                "image_id": number,
                "category_id": 1,
                "segmentation": ref["segmentation"],
                "iscrowd": int(isinstance(ref["segmentation"], dict)),
            }
        )
        sentences = [
            {"sent_id": 10 * number + place, "raw": one["text"], "sent": one["text"]}
            for place, one in enumerate(ref["sentences"])
        ]
        refs.append(
            {
                "ref_id": number,
                "ann_id": number,
                "image_id": number,
                "split": "val",
                "sentences": sentences,
            }
        )
    categories = [{"id": 1, "name": "thing"}]
    (root / "golden" / "instances.json").write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    (root / "golden" / "refs(unc).json").write_text(json.dumps(refs))
    recipe = {
        "name": "golden",
        "root": root,
        "sets": [{"dataset": "golden", "split_by": "unc"}],
        "vocabulary_size": 120,
    }
    pack(Recipe.model_validate(recipe), out, progress=False)
    return out


def texts_of(golden: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What the file says of every text that can be read, by its name."""
    texts = {}
    for number, ref in enumerate(golden["refs"], 1):
        for place, one in enumerate(ref["sentences"]):
            texts[f"golden/unc/{number}/{10 * number + place}"] = one
        texts[f"golden/unc/{number}/all"] = ref["concatenated"] or ref["sentences"][0]
    return texts


@pytest.fixture(scope="module", params=GOLDEN, ids=lambda file: file.stem)
def scored(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], EvalLoader, dict[tuple[str, str], Evaluation]]:
    golden = json.loads(request.param.read_text())
    source = Source(index=str(pack_golden(golden, tmp_path_factory.mktemp("golden"))), split="val")
    config = DataConfig(train=(source,), resize=golden["resize"], workers=0)
    config = config.model_copy(
        update={"image_size": golden["image_size"]}
    )  # a model could not work on so few pixels
    loader = build_eval_loader(
        config,
        (source,),
        batch=2,
        world=World(0, 1, 0, 1, torch.device("cpu")),
        tokenizer=open_tokenizer(config),
        rules=RULES,
    )
    texts = texts_of(golden)

    def infer(batch: Batch) -> torch.Tensor:
        return torch.tensor(
            [
                [[LOGITS[one] for one in row] for row in texts[info.name]["logits"]]
                for info in batch.info
            ]
        )

    return golden, loader, evaluate(infer, loader, list(PROTOCOLS.values()), bootstrap=0)


def test_the_truth_is_the_union_of_the_polygons(scored) -> None:
    golden, loader, _ = scored
    truths = {info.image_id: info.truth for batch in loader for info in batch.info}
    for number, ref in enumerate(golden["refs"], 1):
        assert np.array_equal(
            truths[number], np.array([list(row) for row in ref["truth"]]) == "#"
        ), ref["about"]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_integer_is_the_one_counted_by_hand(scored, protocol: str, rule: str) -> None:
    golden, loader, results = scored
    texts, rows = texts_of(golden), results[protocol, rule].rows
    counted = {
        loader.names_and_sentences[number][0]: [inside, union]
        for number, inside, union, *_ in rows.tolist()
    }
    places = {name: name.rpartition("/")[2] for name in texts}
    wanted = {
        "each": lambda place: place != "all",
        "first": lambda place: place[-1] == "0",
        "concatenated": lambda place: place == "all",
    }
    names = [name for name, place in places.items() if wanted[rule](place)]
    assert counted == {name: texts[name]["expected"][protocol] for name in names}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_score_is_the_fraction_computed_by_hand(scored, protocol: str, rule: str) -> None:
    golden, _, results = scored
    score = results[protocol, rule].score
    assert score is not None
    expected = {
        name: float(Fraction(value)) for name, value in golden["scores"][protocol][rule].items()
    }
    assert {name: score.metrics[name] for name in expected} == pytest.approx(expected, abs=1e-15)


def test_the_joined_text_is_read(scored) -> None:
    golden, loader, _ = scored
    joined = {
        name: sentence for name, sentence in loader.names_and_sentences if name.endswith("/all")
    }
    assert list(joined.values()) == [
        " ".join(one["text"] for one in ref["sentences"]) for ref in golden["refs"]
    ]
