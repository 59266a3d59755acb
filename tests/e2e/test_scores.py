"""A score is of all ranks, of each sample once, and of the data that the run names."""

from __future__ import annotations

import json
import re
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch

from coupalign.cli.parser import main
from coupalign.data.batch import Batch
from coupalign.data.index import read_index
from coupalign.distributed.world import World
from coupalign.engine.open_checkpoint import open_checkpoint
from coupalign.evaluation.evaluator import Evaluation, evaluate
from coupalign.evaluation.protocols import find_protocol
from tests.e2e.scored_run import CPU, config_of, eval_loader_of


class Gathered(Exception):
    """A rank has counted its share."""


def score_on_ranks(run: Path, ranks: int, batch: int = 8) -> tuple[Evaluation, list[np.ndarray]]:
    """Score the run, one rank after the other; return rank 0's result and the rows of each rank."""
    config, model, _ = open_checkpoint(run)
    shares: list[np.ndarray] = []

    def infer(part: Batch) -> torch.Tensor:
        with torch.no_grad():
            return model.eval()(part.image, part.words, part.word_mask).float()

    def gather(rows: np.ndarray, world: World) -> np.ndarray:
        shares.insert(0, rows)
        if len(shares) < ranks:
            raise Gathered
        return np.concatenate(shares)

    def score(rank: int) -> Evaluation:
        world = World(rank, ranks, rank, ranks, CPU)
        loader = eval_loader_of(config, world=world, batch=batch)
        results = evaluate(infer, loader, [find_protocol("cris")], world=world, bootstrap=0)
        return results["cris", "each"]

    with patch("coupalign.evaluation.evaluator.gather_rows", gather):
        for rank in range(ranks - 1, 0, -1):
            with pytest.raises(Gathered):
                score(rank)
        return score(0), shares


def test_ranks_share_the_samples_and_always_read_the_same_sentences(scored_run: Path) -> None:
    """In LAVT every rank scores all samples, with its own random sentences; nothing is reduced."""
    config = config_of(scored_run)
    loaders = [eval_loader_of(config, world=World(rank, 2, rank, 2, CPU)) for rank in (0, 1)]

    def read_all() -> list[dict[int, str]]:
        return [
            {info.number: info.sentence for batch in loader for info in batch.info}
            for loader in loaders
        ]

    first, second = read_all(), read_all()

    assert first == second
    numbers = [number for share in first for number in share]
    assert sorted(numbers) == list(range(loaders[0].samples)), "each on one rank"


def test_overall_iou_is_of_all_ranks(scored_run: Path) -> None:
    """OneRef reduces mIoU over the ranks and prints the sums of one rank for oIoU."""
    (alone, _), (both, shares) = score_on_ranks(scored_run, 1), score_on_ranks(scored_run, 2)

    assert both.score == alone.score
    assert both.rows.tolist() == alone.rows.tolist()
    # Columns -4 and -3 are the intersections and unions of a rank.
    of_ranks = [rows[:, -4].sum() / rows[:, -3].sum() for rows in shares]
    assert of_ranks[0] != of_ranks[1]
    assert both.score.metrics["oIoU"] not in of_ranks


def test_spare_batches_that_keep_ranks_in_step_are_not_scored(scored_run: Path) -> None:
    """CARIS sums over the padded samples and divides by the number of real ones."""
    alone, _ = score_on_ranks(scored_run, 1)

    three, shares = score_on_ranks(scored_run, 3, batch=1)

    samples = eval_loader_of(config_of(scored_run)).samples
    assert samples % 3 and sum(map(len, shares)) == samples
    assert len(three.rows) == three.score.samples == samples
    assert three.score == alone.score


def test_concatenated_sentences_are_joined_with_a_space(scored_run: Path) -> None:
    """mmdet joins them without one."""
    config = config_of(scored_run)
    sentences_of_ref: dict[str, list[str]] = {}
    for name, sentence in eval_loader_of(config).names_and_sentences:
        sentences_of_ref.setdefault(name.rpartition("/")[0], []).append(sentence)

    joined = eval_loader_of(config, rule="concatenated").names_and_sentences

    assert [text for _, text in joined] == [" ".join(texts) for texts in sentences_of_ref.values()]


def test_score_is_of_the_data_that_the_run_names(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """CRIS' README gives a command with one data set's configuration and another one's images."""
    capsys.readouterr()

    assert main(["eval", str(run), "data.evaluate.0.dataset=refshapes", "--json"]) == 0

    [(name, score)] = json.loads(capsys.readouterr().out.splitlines()[-1]).items()
    assert score["conditions"]["sets"].startswith("refshapes/all val; shards ")
    # Another selection than that of the run, so it has a name of its own.
    assert re.fullmatch(r"\w+-[0-9a-f]{8}-refshapes-val", name)
    config = config_of(run, "data.evaluate.0.dataset=refshapes")
    assert score["data_fingerprint"] == eval_loader_of(config).fingerprint
    assert score["data_fingerprint"] != eval_loader_of(config, split="testA").fingerprint


def test_eval_refuses_a_data_set_that_the_shards_do_not_hold(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(run), "data.evaluate.0.dataset=refcocog"]) == 2

    message = "no sample of refcocog/*, split 'val'; it holds: refshapes/unc"
    assert message in capsys.readouterr().err


def test_number_of_scored_samples_is_that_of_the_shards(scored_run: Path, shards: Path) -> None:
    """CRIS and its children carry tables of the sizes of the data sets in their code."""
    counts, config = read_index(shards).counts["refshapes/unc"], config_of(scored_run)
    splits = ("val", "testA", "testB")

    samples = {split: eval_loader_of(config, split=split).samples for split in splits}

    assert samples == {split: counts[split]["sentences"] for split in splits}
    assert len(set(samples.values())) > 1
    assert sum(len(batch) for batch in eval_loader_of(config)) == samples["val"]
