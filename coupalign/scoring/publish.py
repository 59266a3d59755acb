"""Show what `coupalign eval` and `coupalign report` wrote in the run's MLflow page."""

from __future__ import annotations

from coupalign.config.schema import Config
from coupalign.tracking.open import open_tracker

_FILES = ("score.json", "report.html")
_FOLDERS = ("scores", "pictures")


def publish_scores(config: Config) -> None:
    """Send the scores, rows, pictures and report of a run to its tracker.

    Call it on rank 0. It does nothing if the run is not tracked.
    """
    directory = config.directory
    if not (directory / "tracking.json").is_file():
        return
    with open_tracker(config.tracking, directory, config.name, rank=0) as tracker:
        for name in _FILES:
            if (directory / name).is_file():
                tracker.artifact(directory / name)
        for name in _FOLDERS:
            if (directory / name).is_dir():
                tracker.artifact(directory / name, name)
