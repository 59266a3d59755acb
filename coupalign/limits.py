"""Say in words what a process ran out of (memory, shared memory, open files) and what to raise."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path

from coupalign.errors import describe_error

SHARED_MEMORY = Path("/dev/shm")

# What torch and Python say, in lower case. The first match counts: a failure to share memory also
# says why ("no space left", "too many open files").
_OPEN_FILES = ("too many open files", "items of ancdata")
_SHARED_MEMORY = ("shared memory", "bus error", "</torch_", "/dev/shm")
_GPU_MEMORY = ("cuda out of memory", "cuda error: out of memory", "hip out of memory")
_MEMORY = ("can't allocate memory", "cannot allocate memory", "bad_alloc", "out of memory")
_THREADS = ("can't start new thread", "resource temporarily unavailable")


def explain_shortage(error: BaseException) -> str | None:
    """Say what was short and what to raise, in one line without a period.

    Args:
        error: an exception of Python, torch or the operating system.

    Returns:
        None for an error of any other kind.
    """
    if not isinstance(error, (MemoryError, OSError, RuntimeError, EOFError)):
        return None
    text = str(error).lower()

    def says(*phrases: str) -> bool:
        return any(phrase in text for phrase in phrases)

    if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE) or says(*_OPEN_FILES):
        remedy = open_files_remedy()
    elif says(*_SHARED_MEMORY):
        remedy = shared_memory_remedy()
    elif says(*_GPU_MEMORY):
        remedy = "the GPU has too little memory; lower train.max_micro_batch"
    elif isinstance(error, MemoryError) or says(*_MEMORY):
        remedy = f"out of memory{_memory_limit()}; lower train.max_micro_batch or data.workers"
    elif getattr(error, "errno", None) == errno.EAGAIN or says(*_THREADS):
        remedy = f"too many processes or threads{_process_limit()}; lower data.workers"
    else:
        return None
    return f"{remedy} ({describe_error(error)})"


def shared_memory_remedy() -> str:
    """Say how full the shared memory is, and how to do with less or get more."""
    return (
        f"too little shared memory{_shared_memory_left()}. Raise it (docker run --shm-size=8g, or "
        f"mount -o remount,size=8g {SHARED_MEMORY}), lower data.workers, or set data.workers=0"
    )


def open_files_remedy() -> str:
    """Say how many files may be open, and how to do with fewer or get more."""
    limit, highest = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = "" if highest == resource.RLIM_INFINITY else f", at most {highest:,}"
    return (
        f"too many open files, the limit is {limit:,}. Raise it (ulimit -n 65536{most}), or lower "
        "data.workers"
    )


def free_shared_memory() -> int | None:
    """Return the free bytes of shared memory; None where the system does not say."""
    try:
        status = os.statvfs(SHARED_MEMORY)
    except OSError:
        return None
    return status.f_bavail * status.f_frsize


def _shared_memory_left() -> str:
    free = free_shared_memory()
    return "" if free is None else f": {SHARED_MEMORY} has {free / 1e6:,.1f} MB left"


def _memory_limit() -> str:
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return (
        ""
        if limit == resource.RLIM_INFINITY
        else f", the limit is {limit // 1024:,} kB (ulimit -v)"
    )


def _process_limit() -> str:
    limit = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    return "" if limit == resource.RLIM_INFINITY else f", the limit is {limit:,} (ulimit -u)"
