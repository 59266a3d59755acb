"""`coupalign eval` under every protocol and sentence rule at once, and `coupalign compare` on what it leaves behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coupalign.cli.parser import main
from coupalign.evaluation.metrics import METRICS
from coupalign.evaluation.rows import Rows, read_rows

PROTOCOLS, RULES = ("ris-v1", "lavt", "cris"), ("each", "first", "concatenated")


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


def test_all_protocols_and_sentence_rules_in_one_go(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (run / "scores" / "val-ris-v1.csv").read_bytes()
    capsys.readouterr()
    assert (
        main(
            [
                "eval",
                str(run),
                "--protocol",
                "all",
                "--sentences",
                "all",
                "--language-blind",
                "--json",
            ]
        )
        == 0
    )
    *shown, line = capsys.readouterr().out.splitlines()
    scores = json.loads(line)
    assert set(scores) == {f"val {protocol} {rule}" for protocol in PROTOCOLS for rule in RULES}
    table = {row.split()[0]: row.split()[1:] for row in reversed(shown) if row}
    assert table["protocol"] == [protocol for protocol in PROTOCOLS for _ in RULES] and table[
        "sentences"
    ] == 3 * list(RULES)
    for name in METRICS:
        assert [float(cell) for cell in table[name]] == pytest.approx(
            [100 * score[name] for score in scores.values()], abs=0.006
        )
    for name, score in scores.items():
        _, protocol, rule = name.split()
        assert (score["protocol"], score["sentences"]) == (protocol, rule) and score[
            "language_blind"
        ]["sentences"] == rule
        stem = f"val-{protocol}" + ("" if rule == "each" else f"-{rule}")
        assert json.loads((run / "scores" / f"{stem}.json").read_text())["oIoU"] == score["oIoU"]
        assert len(read_rows(run / "scores" / f"{stem}.csv")) == score["samples"]
    assert (run / "scores" / "val-ris-v1.csv").read_bytes() == before, (
        "as the training scored its last checkpoint"
    )


def test_the_rows_of_the_rules_belong_together(run: Path) -> None:
    def rows(rule: str) -> Rows:
        return read_rows(run / "scores" / f"val-cris{rule}.csv")

    each, first, joined = rows(""), rows("-first"), rows("-concatenated")
    by_ref: dict[str, list[int]] = {}
    for place, name in enumerate(each.names):
        by_ref.setdefault(name.rpartition("/")[0], []).append(place)
    assert first.names == tuple(each.names[places[0]] for places in by_ref.values())
    same = each.take([places[0] for places in by_ref.values()])
    assert (
        first.counts[:, 1:].tolist() == same.counts[:, 1:].tolist()
        and first.sentences == same.sentences
    )
    assert joined.names == tuple(f"{ref}/all" for ref in by_ref)
    assert joined.sentences == tuple(
        " ".join(each.sentences[place] for place in places) for places in by_ref.values()
    )
    assert joined.area.tolist() == first.area.tolist() and (each.same_class >= 1).all(), (
        "no target of RefShapes is alone in its class"
    )
    assert (
        (each.counts[:, 1] <= each.area).all()
        and (each.area < each.pixels).all()
        and set(each.pixels) == {64 * 64}
    )


def test_one_protocol_has_a_table_of_its_own(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["eval", str(run), "--sentences", "first", "--split", "testA", "--json"]) == 0
    *shown, line = capsys.readouterr().out.splitlines()
    assert list(json.loads(line)) == ["testA"] and any(row.startswith("bIoU") for row in shown)
    assert {file.name for file in (run / "scores").glob("testA*")} == {
        "testA-ris-v1-first.csv",
        "testA-ris-v1-first.json",
    }


def test_a_run_compared_with_itself(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["compare", str(run), str(run), "--protocol", "lavt", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["won"], found["lost"], found["p_value"]) == (0, 0, 1.0) and found[
        "tied"
    ] == found["samples"]
