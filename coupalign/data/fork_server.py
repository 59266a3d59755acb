"""The server that worker processes are forked from.

This module imports no torch, so that the server can start while this process still imports it.
"""

from __future__ import annotations

import multiprocessing
import signal
from multiprocessing import forkserver, resource_tracker

from coupalign.errors import InputError
from coupalign.limits import explain_shortage

# Signals for the run. The rank answers them; the server and the workers do not.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

# What the server imports, so that a worker that is forked from it need not.
PRELOADED = ["coupalign.data.loader"]


def fork_server() -> multiprocessing.context.BaseContext:
    """Start the fork server, and return the multiprocessing context that forks from it.

    Only the first call starts a server. No call waits for it.

    Why workers are not forked from the rank: a rank has threads (collectives, the watchdog, the
    progress bar). If one of them holds a lock of the interpreter at the moment of the fork, the
    child waits for this lock forever. (Seen on CPython 3.11, in a worker that was forked right
    after a collective.)

    Raises:
        InputError: the system allows no more open files, processes or memory.
    """
    try:
        return _ensure_running()
    except (OSError, MemoryError) as error:
        shortage = explain_shortage(error)
        if shortage is None:
            raise
        raise InputError(f"the worker processes cannot be started: {shortage}") from error


def _ensure_running() -> multiprocessing.context.BaseContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)

    # Otherwise `ensure_running` below would start the tracker, and that unblocks signals.
    resource_tracker.ensure_running()

    # The server inherits that these signals are blocked, so they do not end it.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context
