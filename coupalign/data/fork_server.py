"""The server that worker processes are forked from.

It imports no torch here, so that it can start while this process imports torch.
"""

from __future__ import annotations

import multiprocessing
import signal
from multiprocessing import forkserver, resource_tracker

SIGNALS = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
)  # meant for the run, not for its workers
PRELOADED = ["coupalign.data.loader"]


def fork_server() -> multiprocessing.context.BaseContext:
    """Where worker processes come from: a server that does nothing else, and that begins to import what they need.

    A rank itself has threads (collectives, the watch, the progress bar), and a fork at the moment in which one of them holds a lock
    of the interpreter never comes up (CPython 3.11, seen in a worker that was forked right after a collective). Signals meant for the
    run pass the server by: it inherits that they are blocked. Only the first call starts it; none waits for it.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    resource_tracker.ensure_running()  # or it would be started below, and unblock signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context
