"""Scores of different sets stand beside each other: none replaces another one without a word."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from coupalign.cli.parser import main
from coupalign.data.index import read_index
from coupalign.data.packing.pack import pack
from coupalign.data.packing.recipe import read_recipe
from coupalign.data.refshapes.generate import synth
from tests.e2e.conftest import ROOT, finish, launch


@pytest.fixture(scope="session")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another shard set, whose val split has the same name."""
    folder = tmp_path_factory.mktemp("others")
    synth(folder / "scenes", 30, seed=5, level="easy", size=64, workers=0)
    recipe = read_recipe(ROOT / "shards/recipes/refshapes.yaml", [f"root={folder / 'scenes'}"])
    pack(recipe, folder / "shards", workers=1)
    return folder / "shards"


def files_of(run: Path) -> dict[str, bytes]:
    """The scores of a run, by the names of their files."""
    files = [*run.glob("score.json"), *(run / "scores").iterdir()]
    return {file.name: file.read_bytes() for file in files}


def test_score_of_another_set_stands_beside_that_of_the_run(
    run: Path, others: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(run), "--pictures", "1"]) == 0
    own = files_of(run)

    theirs = ["--index", str(others), "--split", "val", "--pictures", "1", "--json"]
    assert main(["eval", str(run), *theirs]) == 0

    # Their score is filed under a name that says which shards it is of.
    [(name, printed)] = json.loads(capsys.readouterr().out.splitlines()[-1]).items()
    index = read_index(others)
    assert name == f"{index.name}-{index.fingerprint[:8]}-val"
    filed = json.loads((run / "scores" / f"{name}-cris.json").read_text())
    assert (filed["name"], filed["split"]) == (name, "val")
    assert filed["oIoU"] == printed["oIoU"]
    assert f"shards {index.name} {index.fingerprint[:8]}" in filed["conditions"]["sets"]

    # The run's own files are as they were, and the page shows both.
    assert own.items() <= files_of(run).items()
    assert {folder.name for folder in (run / "pictures").iterdir()} >= {"val", name}
    page = (run / "report.html").read_text()
    assert "Score: val" in page and f"Score: {name}" in page
    assert main(["compare", str(run), str(run), "--split", name, "--protocol", "cris"]) == 0


def test_limited_score_does_not_replace_the_whole_one(run: Path) -> None:
    assert main(["eval", str(run)]) == 0
    own = files_of(run)

    assert main(["eval", str(run), "evaluate.limit=3"]) == 0

    assert files_of(run).keys() - own.keys() == {"val-limit-3-cris.json", "val-limit-3-cris.csv"}
    assert own.items() <= files_of(run).items()


def test_two_sets_with_the_same_split_are_trained_and_scored(
    config: Path, shards: Path, others: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    both = f"[{{index: {shards}, split: val}}, {{index: {others}, split: val}}]"
    changes = ["train.steps=2", "train.evaluate_every=2", "data.image_size=32"]

    assert main(["train", str(config), f"run_dir={run}", f"data.evaluate={both}", *changes]) == 0
    assert main(["eval", str(run), "--json"]) == 0

    names = {file.stem for file in (run / "scores").glob("*.json")}
    of_training = {name for name in names if not name.endswith("-ris-v1")}
    assert len(of_training) == 2 and all(name.endswith("-val") for name in of_training)
    assert names == of_training | {f"{name}-ris-v1" for name in of_training}
    journal = (run / "metrics.jsonl").read_text().splitlines()
    logged = {metric for line in journal for metric in json.loads(line)["metrics"]}
    assert {f"eval/{name}/oIoU" for name in of_training} <= logged


def test_repeated_set_is_refused_before_the_first_step(
    config: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    twice = f"[{{index: {shards}, split: val}}, {{index: {shards}, split: val}}]"

    assert main(["train", str(config), f"run_dir={run}", f"data.evaluate={twice}"]) == 2

    assert "split 'val'" in capsys.readouterr().err
    assert not (run / "metrics.jsonl").exists()


def test_run_that_cannot_be_written_is_refused_before_scoring(
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(**_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as changed:
        changed.setattr("coupalign.files.TemporaryFile", refuse)
        assert main(["eval", str(run)]) == 2
        assert main(["report", str(run)]) == 2

    printed = capsys.readouterr()
    assert "oIoU" not in printed.out
    assert "Read-only file system" in printed.err and "--out" in printed.err

    # The remedy works, and leaves the run as it was.
    before = files_of(run)
    assert main(["eval", str(run), "--out", str(tmp_path / "mine")]) == 0
    assert (tmp_path / "mine" / "report.html").is_file()
    assert (tmp_path / "mine" / "scores" / "val-cris.csv").is_file()
    assert "trained on" in json.loads((tmp_path / "mine" / "score.json").read_text())["leak"]
    assert main(["report", str(run), "--out", str(tmp_path / "page.html")]) == 0
    assert files_of(run) == before


def test_full_disk_while_scores_are_written_prints_them_and_fails(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files_of(run)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("coupalign.scoring.splits.write_rows", refuse)
    assert main(["eval", str(run)]) == 3

    printed = capsys.readouterr()
    assert "oIoU" in printed.out
    assert "the scores could not be written" in printed.err and "No space left" in printed.err
    assert files_of(run) == before


@pytest.mark.slow
def test_eval_on_two_ranks_ends_and_gives_the_rows_of_one(scored_run: Path, tmp_path: Path) -> None:
    for ranks in (1, 2):
        finish(launch(ranks, "eval", scored_run, "--out", tmp_path / str(ranks)))

    rows = [(tmp_path / ranks / "scores" / "val-cris.csv").read_bytes() for ranks in "12"]
    assert rows[0] == rows[1]
