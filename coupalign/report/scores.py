"""The scores of a run, with their protocol and intervals."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from coupalign.errors import InputError
from coupalign.evaluation.metrics import Score
from coupalign.evaluation.protocols import PROTOCOLS
from coupalign.evaluation.rows import rows_path

Key = tuple[str, str, str]  # split, protocol, sentence rule


def read_scores(run: Path) -> dict[Key, Score]:
    """The scores of a run, ris-v1 and the rule "each" first.

    A score of `coupalign eval` (scores/<split>-<protocol>.json) stands for the one taken in training (scores/<split>.json).

    Raises:
        InputError: there is none, or a file is damaged.
    """
    files = sorted((run / "scores").glob("*.json"), key=lambda file: (-len(file.stem), file.stem))
    found: dict[Key, Score] = {}
    for file in files or [file for file in [run / "score.json"] if file.is_file()]:
        value = _read_json(file)
        try:
            score = Score.from_json(value)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if any(key[0] == file.stem for key in found):
                continue  # what training took before an upgrade: a later scoring stands for it
            raise InputError(
                f"{file}: not a score of this version ({error!r}); run `coupalign eval` again"
            ) from None
        rules = score.protocol, score.sentences
        split = str(value.get("split") or file.stem.removesuffix(rows_path(run, "", *rules).stem))
        found.setdefault((split, *rules), score)
    if not found:
        raise InputError(f"{run}: no scores here; run `coupalign eval {run}` first")
    order = list(PROTOCOLS)
    return dict(
        sorted(
            found.items(),
            key=lambda item: (
                order.index(item[0][1]) if item[0][1] in order else len(order),
                item[0][2] != "each",
                item[0],
            ),
        )
    )


def name_scores(keys: Iterable[Key]) -> dict[Key, str]:
    """ "val", and where protocol or sentence rule is not that of the first, "val (lavt, first)"."""
    keys = list(keys)
    names = {}
    for key in keys:
        other = ", ".join(word for word, usual in zip(key[1:], keys[0][1:]) if word != usual)
        names[key] = f"{key[0]} ({other})" if other else key[0]
    return names


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{file}: an object is expected, found {type(value).__name__}")
    return value


def header(title: str, scores: Mapping[str, Score]) -> str:
    split, score = next(iter(scores.items()))
    numbers = [
        ("oIoU", score.metrics["oIoU"]),
        ("mIoU", score.metrics["mIoU"]),
        ("P@0.5", score.metrics["P@0.5"]),
    ]
    if score.language_blind is not None:
        numbers.append(("oIoU with shuffled sentences", score.language_blind.metrics["oIoU"]))
    tiles = "".join(
        f'<div class="tile"><b>{percent(value)}</b><span>{escape(name)}</span></div>'
        for name, value in numbers
    )
    words = f"{split}, protocol {score.protocol}, {score.samples:,} samples, in percent"
    return f'<header><h1>{escape(title)}</h1><div class="tiles">{tiles}</div><p class="quiet">{escape(words)}</p></header>'


def score_section(name: str, score: Score) -> str:
    blind = score.language_blind
    head = "<th></th><th>score</th><th>95 % interval</th>" + (
        "" if blind is None else "<th>language-blind</th>"
    )
    lines = []
    for metric, value in score.metrics.items():
        pair = score.intervals.get(metric)
        interval = "" if pair is None else f"{percent(pair[0])} … {percent(pair[1])}"
        other = "" if blind is None else f"<td>{percent(blind.metrics[metric])}</td>"
        lines.append(
            f"<tr><th>{escape(metric)}</th><td><b>{percent(value)}</b></td><td>{interval}</td>{other}</tr>"
        )
    note = (
        ""
        if blind is None
        else (
            '<p class="quiet">Language-blind: the same model on the same samples with the sentences '
            "shuffled among them. The difference is what the model gets from reading.</p>"
        )
    )
    facts = "".join(
        f"<dt>{escape(head)}</dt><dd>{escape(words)}</dd>" for head, words in score.facts().items()
    )
    table = f"<table><tr>{head}</tr>{''.join(lines)}</table>"
    columns = f'<div class="columns"><div>{table}{note}</div><dl>{facts}</dl></div>'
    return f"<section><h2>Score: {escape(name)}</h2>{columns}</section>"


def percent(share: float) -> str:
    return f"{100 * share:.2f}"
