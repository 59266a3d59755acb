"""A table with the published numbers beside ours: as text, as Markdown, as a page with the failures, and in MLflow."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from coupalign.config.schema import Config
from coupalign.evaluation.metrics import Score
from coupalign.files import whole_file, write_json
from coupalign.report import read_scores, write_page
from coupalign.report.drawing import contact_sheet, save_png
from coupalign.report.gallery import embedded
from coupalign.report.pictures import read_pictures
from coupalign.reproduce.runs import PlannedRun, check_same, config_of, is_done
from coupalign.reproduce.spec import Table, TableRow
from coupalign.tracking import open_tracker

_FAILURES = 8


@dataclass(frozen=True)
class Numbers:
    """A score in percent over the seeds that there are: mean, and the sample standard deviation where there are two or more."""

    mean: float
    std: float | None
    seeds: int

    def __str__(self) -> str:
        return f"{self.mean:.2f}" if self.std is None else f"{self.mean:.2f} ± {self.std:.2f}"


@dataclass(frozen=True)
class Result:
    """One row: ours and, with the sentences shuffled among the samples, the same models; by column. Empty: there are no runs."""

    row: TableRow
    runs: tuple[PlannedRun, ...]
    ours: Mapping[str, Numbers]
    blind: Mapping[str, Numbers]
    scores: tuple[Score, ...]
    waiting: tuple[str, ...]  # names of the runs whose scores are not there


def collect(
    planned: Iterable[tuple[TableRow, Sequence[PlannedRun]]],
    table: Table,
    changes: Sequence[str] = (),
) -> list[Result]:
    """Read the scores of the runs that have all of theirs; what training alone has left behind is of another checkpoint.

    Raises:
        InputError: a run is that of another configuration.
    """
    results = []
    for row, runs in planned:
        found: dict[str, list[Score]] = {}
        waiting = []
        for run in runs:
            config = config_of(run, changes)
            if not is_done(run, config):
                waiting.append(run.directory.name)
                continue
            check_same(run, changes)
            for (split, rules, sentences), score in read_scores(run.directory).items():
                if (rules, sentences) == (config.evaluate.protocol, "each"):
                    found.setdefault(split, []).append(score)
        blind = {
            split: [score.language_blind for score in scores if score.language_blind]
            for split, scores in found.items()
        }
        results.append(
            Result(
                row,
                tuple(runs),
                dict(_numbers(table.columns, found)),
                dict(_numbers(table.columns, blind)),
                tuple(score for scores in found.values() for score in scores),
                tuple(waiting),
            )
        )
    return results


def text_table(table: Table, results: Sequence[Result], comparable: bool) -> str:
    """For a terminal: up to four lines a method, published, ours, the difference, and with shuffled sentences."""
    cells = [["method", "", *table.columns]]
    for result in results:
        cells += [
            [result.row.method if place == 0 else "", *line]
            for place, line in enumerate(_lines(result, table.columns, comparable))
        ]
    widths = [max(len(row[place]) for row in cells) for place in range(len(cells[0]))]
    body = [
        "  ".join(
            cell.ljust(width) if place < 2 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths))
        )
        for row in cells
    ]
    lines = [body[0], "-" * len(body[0]), *(line.rstrip() for line in body[1:])]
    return "\n".join([table.title, "", *lines, "", *notes(table, results, comparable)])


def markdown_table(table: Table, results: Sequence[Result], comparable: bool) -> str:
    """The same as Markdown."""
    lines = [
        f"### {table.title}",
        "",
        f"| method | | {' | '.join(table.columns)} |",
        f"|---|---|{'---:|' * len(table.columns)}",
    ]
    for result in results:
        for place, line in enumerate(_lines(result, table.columns, comparable)):
            lines.append(f"| {result.row.method if place == 0 else ''} | {' | '.join(line)} |")
    return "\n".join([*lines, "", *(f"- {note}" for note in notes(table, results, comparable))])


def notes(table: Table, results: Sequence[Result], comparable: bool) -> list[str]:
    """Everything that a reader must know: source, seeds, protocol, leaks, what is missing."""
    scores = [score for result in results for score in result.scores]
    published = any(result.row.paper for result in results)
    source = f"published: {table.source}; " if published else ""
    said = [
        f"{source}ours: mean ± standard deviation over seeds, in percent; blind: the same models with the sentences shuffled among the "
        "samples"
    ]
    if not comparable:
        said.append(
            "ours are of RefShapes, a small generated data set"
            + (
                ": they stand beside the published numbers only to show that the whole path works, and a difference would mean nothing"
                if published
                else ""
            )
        )
    if scores:
        said.append(
            f"protocol {', '.join(sorted({score.protocol for score in scores}))}: {scores[0].conditions.get('truth', '')}; "
            f"{scores[0].conditions.get('threshold', '')}"
        )
    counts = sorted({number.seeds for result in results for number in result.ours.values()})
    said += [f"seeds: {', '.join(map(str, counts))}"] if counts else []
    said += [f"leak: {leak}" for leak in sorted({score.leak for score in scores})]
    said += [
        f"{result.row.method}: published only, not in this harness"
        for result in results
        if not result.runs
    ]
    waiting = [name for result in results for name in result.waiting]
    return said + ([f"not there yet: {', '.join(waiting)}"] if waiting else [])


def publish(
    name: str,
    table: Table,
    results: Sequence[Result],
    folder: Path,
    config: Config,
    comparable: bool,
) -> list[Path]:
    """Write table.txt, table.md, table.json, failures.png and index.html, and log them to the tracking server of `config`."""
    folder.mkdir(parents=True, exist_ok=True)
    plain, marked = (
        text_table(table, results, comparable),
        markdown_table(table, results, comparable),
    )
    for file, words in (("table.txt", plain), ("table.md", marked)):
        with whole_file(folder / file, "w") as stream:
            stream.write(words + "\n")
    write_json(folder / "table.json", [_as_json(result) for result in results])
    written = [folder / "table.txt", folder / "table.md", folder / "table.json"]
    sheets = dict(_failures(results))
    for method, sheet in sheets.items():
        written.append(folder / f"failures-{_slug(method)}.png")
        save_png(written[-1], sheet)
    written.append(_page(folder / "index.html", table, results, comparable))
    with open_tracker(
        config.tracking, folder, name, rank=0, tags={"table": table.title}
    ) as tracker:
        for file in written:
            tracker.artifact(file)
    return written


def _numbers(
    columns: Iterable[str], scores: Mapping[str, Sequence[Score]]
) -> Iterator[tuple[str, Numbers]]:
    for column in columns:
        split, _, metric = column.partition(" ")
        values = [100 * score.metrics[metric] for score in scores.get(split, ())]
        if values:
            yield (
                column,
                Numbers(
                    statistics.fmean(values),
                    statistics.stdev(values) if len(values) > 1 else None,
                    len(values),
                ),
            )


def _lines(result: Result, columns: Sequence[str], comparable: bool) -> Iterator[list[str]]:
    paper = result.row.paper
    if paper or not result.ours:
        yield ["paper", *(f"{paper[column]:.2f}" if column in paper else "–" for column in columns)]
    if result.ours:
        yield ["ours", *(str(result.ours.get(column, "–")) for column in columns)]
    both = [column for column in columns if column in paper and column in result.ours]
    if both and comparable:
        yield [
            "difference",
            *(
                f"{result.ours[column].mean - paper[column]:+.2f}" if column in both else "–"
                for column in columns
            ),
        ]
    if result.blind:
        yield ["blind", *(str(result.blind.get(column, "–")) for column in columns)]


def _failures(results: Sequence[Result]) -> Iterator[tuple[str, Image.Image]]:
    """For each method the worst predictions of its first run, of those that were kept."""
    for result in results:
        for run in result.runs[:1]:
            for folder in sorted((run.directory / "pictures").glob("*/"))[:1]:
                kept = read_pictures(folder).get("worst", [])[:_FAILURES]
                if kept:
                    yield (
                        result.row.method,
                        contact_sheet(
                            [Image.open(folder / one.file).convert("RGB") for one in kept], 1
                        ),
                    )


def _page(path: Path, table: Table, results: Sequence[Result], comparable: bool) -> Path:
    head = "".join(f"<th>{escape(column)}</th>" for column in table.columns)
    lines = []
    for result in results:
        for place, (kind, *cells) in enumerate(_lines(result, table.columns, comparable)):
            name = escape(result.row.method) if place == 0 else ""
            numbers = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
            lines.append(f'<tr class="{kind}"><th>{name}</th><td>{kind}</td>{numbers}</tr>')
    said = "".join(
        f'<p class="quiet">{escape(note)}</p>' for note in notes(table, results, comparable)
    )
    links = "".join(
        f'<li><a href="../{escape(run.directory.name)}/report.html">{escape(run.directory.name)}</a></li>'
        for result in results
        for run in result.runs
        if (run.directory / "report.html").is_file()
    )
    return write_page(
        path,
        table.title,
        [
            f"<header><h1>{escape(table.title)}</h1></header>",
            f'<section class="wide"><table><tr><th>method</th><th></th>{head}</tr>{"".join(lines)}</table>{said}</section>',
            *(
                _failure_section(method, path.with_name(f"failures-{_slug(method)}.png"))
                for method, _ in _failures(results)
            ),
            f"<section><h2>The runs</h2><ul>{links}</ul></section>" if links else "",
        ],
    )


def _failure_section(method: str, file: Path) -> str:
    return (
        f'<section><h2>Failures: {escape(method)}</h2><p class="quiet">The worst predictions of its first run, of the samples that '
        f'the first rank scored.</p><img class="sheet" alt="failures of {escape(method)}" src="{embedded(file)}"></section>'
    )


def _as_json(result: Result) -> dict[str, Any]:
    return {
        "method": result.row.method,
        "paper": result.row.paper,
        "runs": [str(run.directory) for run in result.runs],
        "ours": {column: vars(numbers) for column, numbers in result.ours.items()},
        "blind": {column: vars(numbers) for column, numbers in result.blind.items()},
        "leak": sorted({score.leak for score in result.scores}),
    }


def _slug(words: str) -> str:
    return "".join(
        letter if letter.isalnum() or letter in "./_-" else "-"
        for letter in words.replace("@", "_at_")
    ).strip("-")
