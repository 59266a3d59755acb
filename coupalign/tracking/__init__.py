"""Record the numbers of a run: always in its journal, and in MLflow if asked for."""

from __future__ import annotations

from coupalign.tracking.forwarder import Synced, sync
from coupalign.tracking.journal import JOURNAL, Measurement, Tracker, read_journal
from coupalign.tracking.open import open_tracker
from coupalign.version import git_revision

__all__ = [
    "JOURNAL",
    "Measurement",
    "Synced",
    "Tracker",
    "git_revision",
    "open_tracker",
    "read_journal",
    "sync",
]
