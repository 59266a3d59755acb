"""Golden files: polygons and logits small enough to count by eye, from pack to scores.

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
ALONE = World(0, 1, 0, 1, torch.device("cpu"))


def write_refer(golden: dict[str, Any], root: Path) -> None:
    """Write the refs of a golden file in the `refer` layout, one per image."""
    (root / "train2014").mkdir(parents=True)
    (root / "golden").mkdir()

    images, annotations, refs = [], [], []
    for number, ref in enumerate(golden["refs"], 1):
        height, width = ref["height"], ref["width"]
        name = f"COCO_train2014_{number:012d}.jpg"
        Image.new("RGB", (width, height), (90, 120, 150)).save(root / "train2014" / name)
        images.append({"id": number, "file_name": name, "height": height, "width": width})
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
            {"sent_id": 10 * number + index, "raw": sentence["text"], "sent": sentence["text"]}
            for index, sentence in enumerate(ref["sentences"])
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

    instances = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "thing"}],
    }
    (root / "golden" / "instances.json").write_text(json.dumps(instances))
    (root / "golden" / "refs(unc).json").write_text(json.dumps(refs))


def pack_golden(golden: dict[str, Any], folder: Path) -> Path:
    """Pack the refs of a golden file; returns the folder of the shards."""
    root, out = folder / "root", folder / "shards"
    write_refer(golden, root)
    recipe = {
        "name": "golden",
        "root": root,
        "sets": [{"dataset": "golden", "split_by": "unc"}],
        "vocabulary_size": 120,
    }
    pack(Recipe.model_validate(recipe), out, progress=False)
    return out


def texts_of(golden: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What the file says of every text that can be read, by the name of its sample."""
    texts = {}
    for number, ref in enumerate(golden["refs"], 1):
        for index, sentence in enumerate(ref["sentences"]):
            texts[f"golden/unc/{number}/{10 * number + index}"] = sentence
        texts[f"golden/unc/{number}/all"] = ref["concatenated"] or ref["sentences"][0]
    return texts


def is_sample_of(rule: str, name: str) -> bool:
    sentence = name.rpartition("/")[2]
    match rule:
        case "each":
            return sentence != "all"
        case "first":
            return sentence.endswith("0")
    return sentence == "all"


Scored = tuple[dict[str, Any], EvalLoader, dict[tuple[str, str], Evaluation]]


@pytest.fixture(scope="module", params=GOLDEN, ids=lambda file: file.stem)
def scored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Scored:
    golden = json.loads(request.param.read_text())
    texts = texts_of(golden)
    shards = pack_golden(golden, tmp_path_factory.mktemp("golden"))
    source = Source(index=str(shards), split="val")

    # A config refuses images of so few pixels, because a model could not work on them.
    config = DataConfig(train=(source,), resize=golden["resize"], workers=0)
    config = config.model_copy(update={"image_size": golden["image_size"]})
    loader = build_eval_loader(
        config,
        (source,),
        batch=2,
        world=ALONE,
        tokenizer=open_tokenizer(config),
        rules=RULES,
    )

    def infer(batch: Batch) -> torch.Tensor:
        logits = []
        for info in batch.info:
            rows = texts[info.name]["logits"]
            logits.append([[LOGITS[letter] for letter in row] for row in rows])
        return torch.tensor(logits)

    return golden, loader, evaluate(infer, loader, list(PROTOCOLS.values()), bootstrap=0)


def test_truth_is_union_of_polygons(scored: Scored) -> None:
    golden, loader, _ = scored
    truths = {info.image_id: info.truth for batch in loader for info in batch.info}

    for number, ref in enumerate(golden["refs"], 1):
        expected = np.array([list(row) for row in ref["truth"]]) == "#"
        assert np.array_equal(truths[number], expected), ref["about"]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_counts_equal_those_counted_by_hand(scored: Scored, protocol: str, rule: str) -> None:
    golden, loader, results = scored

    counts = {}
    for number, intersection, union, *_ in results[protocol, rule].rows.tolist():
        name, _ = loader.names_and_sentences[number]
        counts[name] = [intersection, union]

    expected = {
        name: text["expected"][protocol]
        for name, text in texts_of(golden).items()
        if is_sample_of(rule, name)
    }
    assert counts == expected


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_scores_equal_fractions_computed_by_hand(scored: Scored, protocol: str, rule: str) -> None:
    golden, _, results = scored

    score = results[protocol, rule].score

    assert score is not None
    by_hand = golden["scores"][protocol][rule]
    expected = {name: float(Fraction(value)) for name, value in by_hand.items()}
    actual = {name: score.metrics[name] for name in expected}
    assert actual == pytest.approx(expected, abs=1e-15)


def test_concatenated_sentences_are_read(scored: Scored) -> None:
    golden, loader, _ = scored

    joined = [text for name, text in loader.names_and_sentences if name.endswith("/all")]

    expected = []
    for ref in golden["refs"]:
        expected.append(" ".join(sentence["text"] for sentence in ref["sentences"]))
    assert joined == expected
