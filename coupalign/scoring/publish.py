"""Show what `coupalign eval` and `coupalign report` wrote in the run's MLflow page.

A run directory may be somebody else's. So its files never decide where results are sent: only the
user's own configuration, command line and environment do.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from coupalign.config.load import override
from coupalign.config.schema import Config, MlflowTracking
from coupalign.tracking.forwarder import is_own_address, not_sent
from coupalign.tracking.open import open_tracker
from coupalign.tracking.outbox import Outbox, tracking_address

_FILES = ("score.json", "report.html")
_FOLDERS = ("scores", "pictures")

logger = logging.getLogger(__name__)


def publish_scores(config: Config) -> None:
    """Send the scores, rows, pictures and report of a run to its tracker.

    Call it on rank 0, with a configuration that the user gave. It does nothing if the run is not
    tracked.
    """
    directory = config.directory
    if not (directory / "tracking.json").is_file():
        return
    with open_tracker(config.tracking, directory, config.name, rank=0) as tracker:
        for path, folder in _results(directory):
            tracker.artifact(path, folder)


def publish_scores_of(run: Path, overrides: Sequence[str] = ()) -> None:
    """Send the results of a run that this process did not train, if the user confirms the address.

    The address is `tracking.uri` of the overrides, else MLFLOW_TRACKING_URI, else mlflow.db next to
    the run. If the run was sent to another one before, nothing is sent; a line says how to.
    """
    outbox = Outbox.read(run)
    if outbox is None:
        return

    # The experiment is a name only; the address in the run's own configuration is left out.
    tracking = MlflowTracking(experiment=outbox.experiment)
    own = [text for text in overrides if text.startswith(("tracking.", "tracking="))]
    config = override(Config(tracking=tracking), own)
    if not isinstance(config.tracking, MlflowTracking):
        return

    address = tracking_address(config.tracking, run)
    if config.tracking.uri is None and not is_own_address(outbox, address):
        note_results(run)
        logger.warning("MLflow: %s", not_sent(outbox))
        return
    with open_tracker(config.tracking, run, outbox.run_name, rank=0) as tracker:
        for path, folder in _results(run):
            tracker.artifact(path, folder)


def note_results(run: Path) -> None:
    """Note that the results of a tracked run changed. `coupalign track` sends them."""
    outbox = Outbox.read(run)
    if outbox is not None:
        for path, folder in _results(run):
            outbox.add_artifact(path, folder)


def _results(run: Path) -> Iterator[tuple[Path, str]]:
    """The files and folders of results that exist, each with its folder among the artifacts."""
    for name in _FILES:
        if (run / name).is_file():
            yield run / name, ""
    for name in _FOLDERS:
        if (run / name).is_dir():
            yield run / name, name
