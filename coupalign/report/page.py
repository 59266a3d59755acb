"""The page of a run: one HTML file that needs nothing else.

It is made from these files of the run directory:

    score.json, scores/*.json     the scores
    scores/*.csv                  the rows of each score, for the scores by group
    metrics.jsonl                 the curves
    pictures/<set>/               best, median, worst and random samples
    config.yaml                   the configuration

The page loads nothing from the network and no other file: pictures are embedded, curves are drawn
as SVG. All quoted text is escaped, and the page's policy allows no script but page.js, which
filters and sorts the pictures.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Iterable, Mapping
from html import escape
from importlib.resources import files
from pathlib import Path

from coupalign.errors import InputError, RunError
from coupalign.evaluation.metrics import Score
from coupalign.evaluation.protocols import find_protocol
from coupalign.evaluation.rows import Rows, read_rows, rows_path
from coupalign.files import require_writable, whole_file
from coupalign.report.charts import Points, curve_section, read_curves
from coupalign.report.gallery import picture_section
from coupalign.report.groups import group_section
from coupalign.report.scores import name_scores, page_header, read_scores, score_section
from coupalign.tracking.journal import JOURNAL

_DOCTYPE = b"<!doctype html>"


def report_run(run: Path, out: Path | None = None) -> Path:
    """Write the page of a run from the files of its directory; returns its path.

    Args:
        out: the file to write. Default: <run>/report.html.

    Raises:
        InputError: the directory has no score, a file is damaged, or `out` cannot be written.
        RunError: writing failed, for example on a full disk.
    """
    page = out or run / "report.html"
    if not run.is_dir():
        raise InputError(f"{run}: no such run directory")
    if page.is_dir():
        raise InputError(f"{page}: is a folder; name the file of the page")
    if out is not None and not _may_replace(page):
        raise InputError(f"{page}: is there, and is no HTML page; name another file for the page")
    require_writable(page.parent, "the page", "Name another file with `coupalign report --out`")

    scores = read_scores(run)
    names = name_scores(scores)

    rows = {}
    for key, name in names.items():
        path = rows_path(run, *key)
        if path.is_file():
            rows[name] = read_rows(path)

    try:
        return write_report(
            page,
            run.resolve().name,
            scores={names[key]: score for key, score in scores.items()},
            curves=read_curves(run / JOURNAL),
            pictures=_picture_folders(run / "pictures"),
            config=_read_config(run / "config.yaml"),
            rows=rows,
        )
    except OSError as error:
        raise InputError(f"{run}: cannot be read ({error})") from error


def _picture_folders(pictures: Path) -> dict[str, Path]:
    """The folders of `save_pictures` by the name of their set, without half-written ones."""
    folders = sorted(folder for folder in pictures.glob("*/") if not folder.name.startswith("."))
    for folder in folders:
        # In a foreign run directory it may be a link to pictures of this machine.
        if folder.is_symlink():
            raise InputError(f"{folder}: is a link; replace it by a copy of the folder")
    return {folder.name: folder for folder in folders}


def _read_config(file: Path) -> str | None:
    """Return the text of a run's configuration; None if the directory has none."""
    if not file.is_file():
        return None
    # In a foreign run directory it may be a link to any file of this machine.
    if not file.resolve().is_relative_to(file.parent.resolve()):
        raise InputError(f"{file}: is a link to a file outside of the run; replace it by a copy")
    try:
        return file.read_text(encoding="utf-8")
    except ValueError as error:
        raise InputError(f"{file}: cannot be read ({error})") from None


def write_report(
    path: Path,
    title: str,
    *,
    scores: Mapping[str, Score],
    curves: Mapping[str, Points],
    pictures: Mapping[str, Path],
    config: str | None,
    rows: Mapping[str, Rows],
) -> Path:
    """Write the page of a run; returns its path.

    Args:
        scores: by name, at least one.
        curves: (step, value) points by metric name, see `read_curves`.
        pictures: folders of `save_pictures` by the name of their set.
        config: YAML text, shown unchanged.
        rows: of the scores that have any, by the name of the score.
    """
    sections = [page_header(title, scores)]
    for name, score in scores.items():
        sections.append(score_section(name, score))
    sections.append(curve_section(curves))
    for name, scored in rows.items():
        protocol = find_protocol(scores[name].protocol)
        sections.append(group_section(name, scored, protocol.iou_rule))
    for split, folder in pictures.items():
        sections.append(picture_section(split, folder))
    if config is not None:
        sections.append(_config_section(config))
    return write_page(path, title, filter(None, sections))


def _may_replace(page: Path) -> bool:
    """Whether a page may take this place: nothing is there, or an empty file, or another page.

    Whatever else somebody names by mistake stays: the data of a run, or a device, which root could
    replace by a file.
    """
    if not page.is_file():
        return not os.path.lexists(page)
    with open(page, "rb") as file:
        start = file.read(len(_DOCTYPE))
    return start.lower() == _DOCTYPE or (not start and not page.is_symlink())


def write_page(path: Path, title: str, sections: Iterable[str]) -> Path:
    """Write sections of HTML as a page in our style that runs no script but ours.

    Raises:
        RunError: the file cannot be written, for example on a full disk.
    """
    script = _read_asset("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = _PAGE.format(
        title=escape(title),
        style=_read_asset("page.css"),
        body="\n".join(sections),
        script=script,
        digest=digest,
    )
    # Half of a character, from a foreign file, has no place in UTF-8.
    page = page.encode("utf-8", "backslashreplace").decode()
    try:
        with whole_file(path, "w") as file:
            file.write(page)
    except OSError as error:
        raise RunError(
            f"{path}: the page could not be written ({error}). Free some space, then run the same "
            "command again"
        ) from error
    return path


def _config_section(text: str) -> str:
    return (
        "<section><h2>Configuration</h2><details><summary>config.yaml</summary>"
        f"<pre>{escape(text)}</pre></details></section>"
    )


def _read_asset(name: str) -> str:
    return files("coupalign.report").joinpath(name).read_text(encoding="utf-8")


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; \
script-src 'sha256-{digest}'">
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
