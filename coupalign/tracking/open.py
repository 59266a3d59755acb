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
    """Open the tracker of a session: the journal and MLflow on rank 0, a null object elsewhere.

    Args:
        params: the configuration with dotted keys (see `config.load.flatten`).
        tags: data fingerprint, git revision and others that describe the run.

    Raises:
        InputError: on every rank, for a tracking address that cannot work. An address that does not
            answer is no error.
    """
    tracker: Tracker = NullTracker()
    match config:
        case MlflowTracking():
            from coupalign.tracking.outbox import tracking_address

            # Every rank checks the address, so that all of them fail together.
            uri = tracking_address(config, run_dir)
            if rank == 0:
                from coupalign.tracking.forwarder import MlflowTracker

                tracker = MlflowTracker(
                    journal=Journal(run_dir),
                    uri=uri,
                    config=config,
                    run_name=run_name,
                    params=params or {},
                    tags=tags or {},
                )
        case NoTracking():
            if rank == 0:
                tracker = Journal(run_dir)

    status: Status = "FAILED"
    try:
        yield tracker
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit):
        status = "KILLED"
        raise
    finally:
        tracker.close(status)
