"""Where the numbers of a run go: the journal in the run directory always, an MLflow server besides where one is asked for."""

from __future__ import annotations

from coupalign.tracking.base import JOURNAL, Row, Tracker, git_revision, open_tracker, read_rows
from coupalign.tracking.forward import Synced, sync

__all__ = [
    "JOURNAL",
    "Row",
    "Synced",
    "Tracker",
    "git_revision",
    "open_tracker",
    "read_rows",
    "sync",
]
