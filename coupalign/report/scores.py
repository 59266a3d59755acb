"""The scores of a run, with their protocol and intervals."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from coupalign.data.table import RULES
from coupalign.errors import InputError, quoted
from coupalign.evaluation.metrics import Score
from coupalign.evaluation.protocols import PROTOCOLS
from coupalign.evaluation.rows import rows_path
from coupalign.files import parse_strict_json

ScoreKey = tuple[str, str, str]  # name of the set, protocol, sentence rule

_PLAIN_NAME = re.compile(r"\w[\w+.-]*")


def read_scores(run: Path) -> dict[ScoreKey, Score]:
    """Read the scores of a run; those of ris-v1 and of the rule "each" come first.

    A score of `coupalign eval` (scores/<set>-<protocol>.json) replaces the one that training took
    (scores/<set>.json).

    Raises:
        InputError: there are no scores, or a file is damaged.
    """
    files = list((run / "scores").glob("*.json"))
    if not files and (run / "score.json").is_file():
        files = [run / "score.json"]
    # Longer names first: those of `coupalign eval` come before those of training.
    files.sort(key=lambda file: (-len(file.stem), file.stem))

    scores: dict[ScoreKey, Score] = {}
    for file in files:
        try:
            value = parse_strict_json(file.read_bytes())
            if not isinstance(value, dict):
                raise ValueError(f"expected a JSON object, found {type(value).__name__}")
            score = Score.from_json(value)
            protocol, rule = score.protocol, score.sentences
            if protocol not in PROTOCOLS or rule not in RULES:
                raise ValueError(f"protocol {quoted(protocol)}, sentences {quoted(rule)}: unknown")
        except (OSError, KeyError, ValueError) as error:
            # An old score of training does not matter once the set has been scored again.
            if any(name == file.stem for name, _, _ in scores):
                continue
            reason = f"{error} is missing" if isinstance(error, KeyError) else error
            raise InputError(
                f"{file}: not a score of this version ({reason}); run `coupalign eval` again, or "
                "remove the file"
            ) from None

        scores.setdefault((_set_name(file, value, score), protocol, rule), score)

    if not scores:
        raise InputError(f"{run}: no scores here; run `coupalign eval {run}` first")
    return {key: scores[key] for key in sorted(scores, key=_report_order)}


def _set_name(file: Path, value: Mapping[str, Any], score: Score) -> str:
    """Return the name of the evaluation set of a score, from the name of its file."""
    if file.parent.name == "scores":
        # Of val-ris-v1.json; that of training is val.json.
        suffix = rows_path(Path(), "", score.protocol, score.sentences).stem
        return file.stem.removesuffix(suffix)

    # In score.json alone, where the name is foreign text.
    name = value.get("name") or value.get("split")
    is_plain = isinstance(name, str) and _PLAIN_NAME.fullmatch(name)
    return name if is_plain else "score"


def name_scores(keys: Iterable[ScoreKey]) -> dict[ScoreKey, str]:
    """Name scores for a reader: "val", or "val (lavt, first)".

    Protocol and sentence rule are named where they differ from those of the first score.
    """
    names = {}
    usual: tuple[str, ...] = ()
    for split, *rules in keys:
        usual = usual or tuple(rules)
        unusual = [rule for rule, first in zip(rules, usual) if rule != first]
        name = f"{split} ({', '.join(unusual)})" if unusual else split
        names[split, *rules] = name
    return names


def page_header(title: str, scores: Mapping[str, Score]) -> str:
    """Show the title of the page and the most important numbers of its first score."""
    split, score = next(iter(scores.items()))
    numbers = {name: score.metrics[name] for name in ("oIoU", "mIoU", "P@0.5")}
    if score.language_blind is not None:
        numbers["oIoU with shuffled sentences"] = score.language_blind.metrics["oIoU"]

    tiles = [
        f'<div class="tile"><b>{percent(value)}</b><span>{escape(name)}</span></div>'
        for name, value in numbers.items()
    ]
    subtitle = f"{split}, protocol {score.protocol}, {score.samples:,} samples, in percent"
    return (
        f'<header><h1>{escape(title)}</h1><div class="tiles">{"".join(tiles)}</div>'
        f'<p class="quiet">{escape(subtitle)}</p></header>'
    )


def score_section(name: str, score: Score) -> str:
    """Show all metrics of a score, with its protocol next to them."""
    blind = score.language_blind
    header = "<th></th><th>score</th><th>95 % interval</th>"
    note = ""
    if blind is not None:
        header += "<th>language-blind</th>"
        note = (
            '<p class="quiet">Language-blind: the same model on the same samples with the '
            "sentences shuffled among them. The difference is what the model gets from reading."
            "</p>"
        )

    lines = []
    for metric, value in score.metrics.items():
        interval = ""
        if metric in score.intervals:
            interval = " … ".join(map(percent, score.intervals[metric]))
        cells = f"<th>{escape(metric)}</th><td><b>{percent(value)}</b></td><td>{interval}</td>"
        if blind is not None:
            cells += f"<td>{percent(blind.metrics[metric])}</td>"
        lines.append(f"<tr>{cells}</tr>")

    facts = [
        f"<dt>{escape(heading)}</dt><dd>{escape(text)}</dd>"
        for heading, text in score.facts().items()
    ]
    table = f"<table><tr>{header}</tr>{''.join(lines)}</table>"
    columns = f'<div class="columns"><div>{table}{note}</div><dl>{"".join(facts)}</dl></div>'
    return f"<section><h2>Score: {escape(name)}</h2>{columns}</section>"


def percent(share: float) -> str:
    """Format 0 … 1 as percent with two decimals."""
    return f"{100 * share:.2f}"


def _report_order(key: ScoreKey) -> tuple[int, bool, ScoreKey]:
    """Protocols in the order of `PROTOCOLS`, the rule "each" before others, then by name."""
    _, protocol, rule = key
    protocols = list(PROTOCOLS)
    rank = protocols.index(protocol) if protocol in protocols else len(protocols)
    return rank, rule != "each", key
