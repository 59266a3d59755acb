"""`coupalign eval` under all protocols and sentence rules, and `coupalign compare` on its files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coupalign.cli.parser import main
from coupalign.evaluation.metrics import METRICS
from coupalign.evaluation.rows import Rows, read_rows

PROTOCOLS = ("ris-v1", "lavt", "cris", "coupalign-author")
RULES = ("each", "first", "concatenated")


@pytest.fixture(scope="module")
def run(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps with a learning rate that makes the model predict something."""
    run = tmp_path_factory.mktemp("eval") / "run"
    changes = [
        "data.workers=0",
        "data.image_size=32",
        "train.steps=2",
        "optim.lr=0.3",
        "schedule.warmup_steps=0",
        "train.ema=null",
        "model.losses.foreground=40",
        "train.evaluate_every=2",
        "evaluate.bootstrap=10",
    ]
    assert main(["train", str(config), f"run_dir={run}", *changes]) == 0
    return run


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> pytest.CaptureFixture[str]:
    """What is printed from now on, without what other fixtures have printed."""
    capsys.readouterr()
    return capsys


def test_eval_scores_all_protocols_and_sentence_rules_at_once(
    run: Path, printed: pytest.CaptureFixture[str]
) -> None:
    of_training = (run / "scores" / "val-ris-v1.csv").read_bytes()

    everything = ["--protocol", "all", "--sentences", "all", "--language-blind", "--json"]
    assert main(["eval", str(run), *everything]) == 0

    *shown, line = printed.readouterr().out.splitlines()
    scores = json.loads(line)
    assert set(scores) == {f"val {protocol} {rule}" for protocol in PROTOCOLS for rule in RULES}

    # The printed table has a column per protocol and rule.
    table = {row.split()[0]: row.split()[1:] for row in reversed(shown) if row}
    assert table["protocol"] == [protocol for protocol in PROTOCOLS for _ in RULES]
    assert table["sentences"] == len(PROTOCOLS) * list(RULES)
    for name in METRICS:
        cells = [float(cell) for cell in table[name]]
        exact = [100 * score[name] for score in scores.values()]
        assert cells == pytest.approx(exact, abs=0.006)

    # Each score has its files.
    for name, score in scores.items():
        _, protocol, rule = name.split()
        assert (score["protocol"], score["sentences"]) == (protocol, rule)
        assert score["language_blind"]["sentences"] == rule
        stem = f"val-{protocol}" if rule == "each" else f"val-{protocol}-{rule}"
        file = run / "scores" / f"{stem}.json"
        assert json.loads(file.read_text())["oIoU"] == score["oIoU"]
        assert len(read_rows(file.with_suffix(".csv"))) == score["samples"]

    # The training had scored its last checkpoint, the one that was scored again.
    assert (run / "scores" / "val-ris-v1.csv").read_bytes() == of_training


def test_rows_of_the_sentence_rules_belong_together(run: Path) -> None:
    def rows(rule: str) -> Rows:
        return read_rows(run / "scores" / f"val-cris{rule}.csv")

    each, first, joined = rows(""), rows("-first"), rows("-concatenated")

    rows_of_ref: dict[str, list[int]] = {}
    for row, name in enumerate(each.names):
        rows_of_ref.setdefault(name.rpartition("/")[0], []).append(row)
    first_rows = [rows[0] for rows in rows_of_ref.values()]
    sentences = [" ".join(each.sentences[row] for row in rows) for rows in rows_of_ref.values()]

    same = each.take(first_rows)
    assert first.names == tuple(each.names[row] for row in first_rows)
    assert first.counts[:, 1:].tolist() == same.counts[:, 1:].tolist()
    assert first.sentences == same.sentences
    assert joined.names == tuple(f"{ref}/all" for ref in rows_of_ref)
    assert joined.sentences == tuple(sentences)
    assert joined.area.tolist() == first.area.tolist()
    # No target of RefShapes is alone in its class.
    assert (each.same_class >= 1).all()
    assert (each.counts[:, 1] <= each.area).all()
    assert (each.area < each.pixels).all()
    assert set(each.pixels) == {64 * 64}


def test_eval_of_one_protocol_prints_its_metrics(
    run: Path, printed: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(run), "--sentences", "first", "--split", "testA", "--json"]) == 0

    *shown, line = printed.readouterr().out.splitlines()
    assert list(json.loads(line)) == ["testA"]
    assert any(row.startswith("bIoU") for row in shown)
    files = {file.name for file in (run / "scores").glob("testA*")}
    assert files == {"testA-ris-v1-first.csv", "testA-ris-v1-first.json"}


def test_compare_of_a_run_with_itself_is_a_tie(
    run: Path, printed: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", str(run), str(run), "--protocol", "lavt", "--json"]) == 0

    result = json.loads(printed.readouterr().out.splitlines()[-1])
    assert (result["won"], result["lost"], result["p_value"]) == (0, 0, 1.0)
    assert result["tied"] == result["samples"]
