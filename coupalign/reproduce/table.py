"""Set our scores next to published numbers: text, Markdown, a page with failures, MLflow."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image
from tabulate import tabulate

from coupalign.config.schema import Config
from coupalign.evaluation.metrics import Score
from coupalign.evaluation.protocols import find_protocol
from coupalign.files import whole_file, write_json
from coupalign.report import read_scores, write_page
from coupalign.report.drawing import contact_sheet, save_png
from coupalign.report.gallery import embedded
from coupalign.report.pictures import read_pictures, read_strip
from coupalign.reproduce.runs import PlannedRun, config_of, is_done, refuse_other_configuration
from coupalign.reproduce.spec import Table, TableRow
from coupalign.tracking import open_tracker

MAX_FAILURES = 8


@dataclass(frozen=True)
class Numbers:
    """A score in percent over seeds: mean, and sample standard deviation for two seeds or more."""

    mean: float
    std: float | None
    seeds: int

    @classmethod
    def of(cls, percentages: Sequence[float]) -> Numbers:
        """Summarize one percentage per seed."""
        std = statistics.stdev(percentages) if len(percentages) > 1 else None
        return cls(statistics.fmean(percentages), std, len(percentages))

    def __str__(self) -> str:
        return f"{self.mean:.2f}" if self.std is None else f"{self.mean:.2f} ± {self.std:.2f}"


@dataclass(frozen=True, kw_only=True)
class Result:
    """One row of a table with our scores.

    Attributes:
        ours: our numbers by column; empty if there are no runs.
        blind: those of the same models with the sentences shuffled among the samples.
        waiting: names of the runs that have no scores yet.
    """

    row: TableRow
    runs: tuple[PlannedRun, ...]
    ours: Mapping[str, Numbers]
    blind: Mapping[str, Numbers]
    scores: tuple[Score, ...]
    waiting: tuple[str, ...]

    def lines(self, columns: Sequence[str], comparable: bool) -> Iterator[list[str]]:
        """Yield the lines paper, ours, difference and blind, each a label and one cell per column.

        Args:
            comparable: whether a difference to the published numbers means anything.
        """
        paper = self.row.paper
        if paper or not self.ours:
            cells = [f"{paper[column]:.2f}" if column in paper else "–" for column in columns]
            yield ["paper", *cells]

        if self.ours:
            yield ["ours", *(str(self.ours.get(column, "–")) for column in columns)]

        if comparable and set(columns) & set(paper) & set(self.ours):
            yield ["difference", *(self._difference(column) for column in columns)]

        if self.blind:
            yield ["blind", *(str(self.blind.get(column, "–")) for column in columns)]

    def _difference(self, column: str) -> str:
        if column in self.ours and column in self.row.paper:
            return f"{self.ours[column].mean - self.row.paper[column]:+.2f}"
        return "–"

    def to_json(self) -> dict[str, Any]:
        """Convert to values that JSON can hold."""
        return {
            "method": self.row.method,
            "paper": self.row.paper,
            "runs": [str(run.directory) for run in self.runs],
            "ours": {column: vars(numbers) for column, numbers in self.ours.items()},
            "blind": {column: vars(numbers) for column, numbers in self.blind.items()},
            "leak": sorted({score.leak for score in self.scores}),
        }


def collect(
    planned: Iterable[tuple[TableRow, Sequence[PlannedRun]]],
    table: Table,
    changes: Sequence[str] = (),
) -> list[Result]:
    """Read the scores of all runs that are complete.

    Scores that training alone has left are not used: they are of another checkpoint.

    Raises:
        InputError: a run directory holds the run of another configuration.
    """
    results = []
    for row, runs in planned:
        by_split: dict[str, list[Score]] = {}
        waiting = []
        for run in runs:
            config = config_of(run, changes)
            if not is_done(run, config):
                waiting.append(run.directory.name)
                continue

            refuse_other_configuration(run, changes)
            for (split, protocol, sentences), score in read_scores(run.directory).items():
                own = find_protocol(config.evaluate.protocol)
                if (protocol, sentences) == (own.name, own.sentences):
                    by_split.setdefault(split, []).append(score)

        blind = {
            split: [score.language_blind for score in scores if score.language_blind]
            for split, scores in by_split.items()
        }
        result = Result(
            row=row,
            runs=tuple(runs),
            ours=_numbers_by_column(table.columns, by_split),
            blind=_numbers_by_column(table.columns, blind),
            scores=tuple(score for scores in by_split.values() for score in scores),
            waiting=tuple(waiting),
        )
        results.append(result)
    return results


def text_table(table: Table, results: Sequence[Result], comparable: bool) -> str:
    """Format for a terminal: up to four lines per method (paper, ours, difference, blind)."""
    rows = []
    for method, cells in _labeled_lines(table, results, comparable):
        rows.append([method, *cells])

    align = ("left", "left", *("right" for _ in table.columns))
    text = tabulate(
        rows,
        ["method", "", *table.columns],
        tablefmt="plain",
        disable_numparse=True,
        colalign=align,
    )
    header, *lines = text.split("\n")
    rule = "-" * max(map(len, [header, *lines]))
    return "\n".join(
        [table.title, "", header, rule, *lines, "", *notes(table, results, comparable)]
    )


def markdown_table(table: Table, results: Sequence[Result], comparable: bool) -> str:
    """Format as Markdown."""
    lines = [
        f"### {table.title}",
        "",
        f"| method | | {' | '.join(table.columns)} |",
        f"|---|---|{'---:|' * len(table.columns)}",
    ]
    for method, cells in _labeled_lines(table, results, comparable):
        lines.append(f"| {method} | {' | '.join(cells)} |")

    bullets = [f"- {note}" for note in notes(table, results, comparable)]
    return "\n".join([*lines, "", *bullets])


def notes(table: Table, results: Sequence[Result], comparable: bool) -> list[str]:
    """List what a reader must know: source, seeds, protocol, leaks, and what is missing."""
    published = any(result.row.paper for result in results)
    source = f"published: {table.source}; " if published else ""
    lines = [
        f"{source}ours: mean ± standard deviation over seeds, in percent; "
        "blind: the same models with the sentences shuffled among the samples"
    ]

    if not comparable:
        line = "ours are of RefShapes, a small generated data set"
        if published:
            line += (
                ": they are next to the published numbers only to show that the whole path works, "
                "and a difference would mean nothing"
            )
        lines.append(line)

    scores = [score for result in results for score in result.scores]
    if scores:
        protocols = ", ".join(sorted({score.protocol for score in scores}))
        conditions = scores[0].conditions
        truth, threshold = conditions.get("truth", ""), conditions.get("threshold", "")
        lines.append(f"protocol {protocols}: {truth}; {threshold}")

    seeds = sorted({numbers.seeds for result in results for numbers in result.ours.values()})
    if seeds:
        lines.append(f"seeds: {', '.join(map(str, seeds))}")
    for leak in sorted({score.leak for score in scores}):
        lines.append(f"leak: {leak}")
    for result in results:
        if not result.runs:
            lines.append(f"{result.row.method}: published only, not in this harness")

    waiting = [name for result in results for name in result.waiting]
    if waiting:
        lines.append(f"not there yet: {', '.join(waiting)}")
    return lines


def publish(
    name: str,
    table: Table,
    results: Sequence[Result],
    folder: Path,
    config: Config,
    comparable: bool,
) -> list[Path]:
    """Write table.txt, table.md, table.json, failure pictures and index.html, and track them.

    Returns:
        the files. They are artifacts of the run `name` on the tracking server of `config`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "table.txt", folder / "table.md", folder / "table.json"]
    texts = (text_table(table, results, comparable), markdown_table(table, results, comparable))
    for file, text in zip(files, texts):
        with whole_file(file, "w") as stream:
            stream.write(text + "\n")
    write_json(folder / "table.json", [result.to_json() for result in results])

    for method, sheet in _failure_sheets(results):
        files.append(_failure_file(folder, method))
        save_png(files[-1], sheet)
    files.append(_write_table_page(folder / "index.html", table, results, comparable))

    tags = {"table": table.title}
    with open_tracker(config.tracking, folder, name, rank=0, tags=tags) as tracker:
        for file in files:
            tracker.artifact(file)
    return files


def _numbers_by_column(
    columns: Iterable[str], scores: Mapping[str, Sequence[Score]]
) -> dict[str, Numbers]:
    numbers = {}
    for column in columns:
        split, _, metric = column.partition(" ")
        percentages = [100 * score.metrics[metric] for score in scores.get(split, ())]
        if percentages:
            numbers[column] = Numbers.of(percentages)
    return numbers


def _labeled_lines(
    table: Table, results: Sequence[Result], comparable: bool
) -> Iterator[tuple[str, list[str]]]:
    """Yield the lines of all rows. Only the first line of a row names the method."""
    for result in results:
        method = result.row.method
        for cells in result.lines(table.columns, comparable):
            yield method, cells
            method = ""


def _failure_sheets(results: Sequence[Result]) -> Iterator[tuple[str, Image.Image]]:
    """Yield for each method the worst kept predictions of its first run."""
    for result in results:
        if not result.runs:
            continue
        # Pictures of other sets may be there too, if the run was scored on them.
        run = result.runs[0]
        folders = [run.directory / "pictures" / split for split in run.splits]
        folders = [folder for folder in folders if folder.is_dir()]
        if not folders:
            continue

        worst = read_pictures(folders[0]).get("worst", [])[:MAX_FAILURES]
        images = [read_strip(folders[0] / saved.file) for saved in worst]
        if images:
            yield result.row.method, contact_sheet(images, 1)


def _failure_file(folder: Path, method: str) -> Path:
    return folder / f"failures-{_slug(method)}.png"


def _write_table_page(
    path: Path, table: Table, results: Sequence[Result], comparable: bool
) -> Path:
    sections = [
        f"<header><h1>{escape(table.title)}</h1></header>",
        _table_section(table, results, comparable),
    ]
    for method, _ in _failure_sheets(results):
        sections.append(_failure_section(method, _failure_file(path.parent, method)))
    sections.append(_links_section(results))
    return write_page(path, table.title, sections)


def _table_section(table: Table, results: Sequence[Result], comparable: bool) -> str:
    columns = "".join(f"<th>{escape(column)}</th>" for column in table.columns)
    rows = [f"<tr><th>method</th><th></th>{columns}</tr>"]
    for method, (label, *cells) in _labeled_lines(table, results, comparable):
        numbers = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        rows.append(f'<tr class="{label}"><th>{escape(method)}</th><td>{label}</td>{numbers}</tr>')

    paragraphs = [
        f'<p class="quiet">{escape(note)}</p>' for note in notes(table, results, comparable)
    ]
    return f'<section class="wide"><table>{"".join(rows)}</table>{"".join(paragraphs)}</section>'


def _failure_section(method: str, file: Path) -> str:
    name = escape(method)
    return (
        f'<section><h2>Failures: {name}</h2><p class="quiet">The worst predictions of its first '
        "run, of the samples that the first rank scored.</p>"
        f'<img class="sheet" alt="failures of {name}" src="{embedded(file)}"></section>'
    )


def _links_section(results: Sequence[Result]) -> str:
    links = []
    for result in results:
        for run in result.runs:
            if (run.directory / "report.html").is_file():
                name = escape(run.directory.name)
                links.append(f'<li><a href="../{name}/report.html">{name}</a></li>')

    if not links:
        return ""
    return f"<section><h2>The runs</h2><ul>{''.join(links)}</ul></section>"


def _slug(text: str) -> str:
    """Turn a method's name into a file name."""
    letters = [
        letter if letter.isalnum() or letter in "./_-" else "-"
        for letter in text.replace("@", "_at_")
    ]
    return "".join(letters).strip("-")
