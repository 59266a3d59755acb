"""The page of a run, one HTML file that needs nothing else.

Read from the run directory:

    score.json, scores/*.json     what was scored
    scores/*.csv                  the rows of each score, for the scores by group
    metrics.jsonl                 the curves
    pictures/<split>/             best, median, worst and random samples
    config.yaml                   the configuration

No network, no file beside it: pictures are embedded, curves are drawn as SVG. Everything that is quoted is escaped, and
the page's policy lets no other script run than page.js, which filters and sorts the pictures.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping
from html import escape
from importlib.resources import files
from pathlib import Path

from coupalign.evaluation.metrics import Score
from coupalign.evaluation.protocols import find_protocol
from coupalign.evaluation.rows import Rows, read_rows, rows_path
from coupalign.files import whole_file
from coupalign.report.charts import Points, curve_section, read_curves
from coupalign.report.gallery import picture_section
from coupalign.report.groups import group_section
from coupalign.report.scores import header, name_scores, read_scores, score_section
from coupalign.tracking.journal import JOURNAL


def report_run(run: Path) -> Path:
    """Write <run>/report.html from what lies in a run directory; returns its path.

    Raises:
        InputError: there is no score in the directory, or a file of it is damaged.
    """
    found = read_scores(run)
    names = name_scores(found)
    rows = {
        names[key]: read_rows(rows_path(run, *key))
        for key in found
        if rows_path(run, *key).is_file()
    }
    pictures = {folder.name: folder for folder in sorted((run / "pictures").glob("*/"))}
    config = run / "config.yaml"
    text = config.read_text(encoding="utf-8") if config.is_file() else None
    return write_report(
        run / "report.html",
        run.resolve().name,
        {names[key]: score for key, score in found.items()},
        read_curves(run / JOURNAL),
        pictures,
        text,
        rows,
    )


def write_report(
    path: Path,
    title: str,
    scores: Mapping[str, Score],
    curves: Mapping[str, Points],
    pictures: Mapping[str, Path],
    config: str | None = None,
    rows: Mapping[str, Rows] | None = None,
) -> Path:
    """Write the page.

    Args:
        scores: by split.
        curves: (step, value) points by metric name, see `read_curves`.
        pictures: folders of `keep_pictures` by split.
        config: YAML text, shown as it stands.
        rows: of each score, where they are there.
    """
    body = [
        header(title, scores),
        *(score_section(name, score) for name, score in scores.items()),
        curve_section(curves),
        *(
            group_section(name, each, find_protocol(scores[name].protocol).empty)
            for name, each in (rows or {}).items()
        ),
        *(picture_section(split, folder) for split, folder in pictures.items()),
        _config_section(config),
    ]
    return write_page(path, title, filter(None, body))


def write_page(path: Path, title: str, body: Iterable[str]) -> Path:
    """Write a page that needs nothing else: sections of HTML, in our style, with our script and no other."""
    script = _data("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    with whole_file(path, "w") as file:
        file.write(
            _PAGE.format(
                title=escape(title),
                style=_data("page.css"),
                body="\n".join(body),
                script=script,
                digest=digest,
            )
        )
    return path


def _config_section(text: str | None) -> str:
    if text is None:
        return ""
    return f"<section><h2>Configuration</h2><details><summary>config.yaml</summary><pre>{escape(text)}</pre></details></section>"


def _data(name: str) -> str:
    return files("coupalign.report").joinpath(name).read_text(encoding="utf-8")


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}: coupalign report</title>
<style>
{style}</style>
</head>
<body>
{body}
<script>{script}</script>
</body>
</html>
"""
