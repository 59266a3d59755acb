"""Open the tracker that a configuration asks for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from coupalign.config.schema import MlflowTracking, NoTracking
from coupalign.tracking.journal import Journal, NullTracker, Status, Tracker


@contextmanager
def open_tracker(
    config: NoTracking | MlflowTracking,
    run_dir: Path,
    run_name: str,
    rank: int,
    params: Mapping[str, Any] | None = None,
    tags: Mapping[str, str] | None = None,
) -> Iterator[Tracker]:
    """The tracker of a session: the journal and what follows it on rank 0, a null object elsewhere.

    Args:
        params: the configuration with dotted keys (see `config.load.flatten`).
        tags: data fingerprint, git revision and other words that describe the run.
    Raises InputError on every rank for a tracking address that cannot work; an address that does not answer is no error.
    """
    tracker: Tracker
    match config:
        case MlflowTracking():
            from coupalign.tracking.forwarder import MlflowTracker
            from coupalign.tracking.outbox import tracking_address

            uri = tracking_address(config, run_dir)
            tracker = (
                NullTracker()
                if rank
                else MlflowTracker(
                    Journal(run_dir), uri, config, run_name, params or {}, tags or {}
                )
            )
        case NoTracking():
            tracker = NullTracker() if rank else Journal(run_dir)
    status: Status = "FAILED"
    try:
        yield tracker
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit):
        status = "KILLED"
        raise
    finally:
        tracker.close(status)
