"""Stop a rank whose launcher has ended, so that it does not train on as an orphan.

torchrun, deepspeed and Slurm end their ranks when they are asked to stop. When they are killed (by
the out-of-memory killer, with a closed session), nobody tells the ranks. So each rank watches the
processes that started it. When one of them ends, the rank stops as it does on SIGTERM: it saves
together with the other ranks and exits. A rank that is still there after 30 s is ended.

This module imports nothing heavy, so that a rank can watch before torch is imported.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from coupalign.distributed.launcher import detect_launcher
from coupalign.distributed.stop import request_stop
from coupalign.errors import ExitStatus

# As long as torchrun and deepspeed wait for ranks that were asked to stop.
_GRACE_S = 30.0
_POLL_S = 0.5

_PROGRAMS = ("deepspeed", "torchrun")
_MODULES = (
    "deepspeed.launcher.launch",
    "deepspeed.launcher.runner",
    "torch.distributed.run",
    "torch.distributed.launch",
)
_PR_SET_PDEATHSIG = 1  # from <linux/prctl.h>

_watching = threading.Event()


def stop_with_launcher(environment: Mapping[str, str] = os.environ) -> None:
    """Watch the launcher of this rank from now on. Only the first call counts.

    Does nothing without a launcher. A shell or a wrapper above the rank may end before it.
    """
    launcher = detect_launcher(environment)
    if launcher not in ("torchrun", "deepspeed", "srun") or _watching.is_set():
        return
    _watching.set()

    parent = os.getppid()
    launchers = find_launchers(parent)
    # For the kernel, the parent is the thread that started this process. Only these two are known
    # to start their ranks from their main thread.
    if launcher in ("torchrun", "deepspeed") and parent in [one.pid for one in launchers]:
        _ask_kernel_for_signal(signal.SIGTERM)

    rank = environment.get("RANK", environment.get("SLURM_PROCID", "0"))
    threading.Thread(
        target=_watch, args=(rank, parent, launchers), name="launcher watch", daemon=True
    ).start()


def find_launchers(parent: int) -> list[psutil.Process]:
    """Find the launchers above a rank; deepspeed has two processes, one below the other."""
    try:
        ancestors = [psutil.Process(parent), *psutil.Process(parent).parents()]
    except psutil.Error:
        return []
    return [ancestor for ancestor in ancestors if _is_launcher(ancestor)]


def is_launcher_command(name: str, command: Sequence[str]) -> bool:
    """Whether a process of this name and command line is torchrun, deepspeed or Slurm's."""
    if name.startswith("slurmstepd"):
        return True
    if not command or not Path(command[0]).name.startswith("python"):
        return False

    # `python /env/bin/torchrun …` or `python -m torch.distributed.run …`
    modules = {module for flag, module in zip(command, command[1:]) if flag == "-m"}
    programs = {Path(word).name for word in command[1:3]}
    return bool(modules.intersection(_MODULES) or programs.intersection(_PROGRAMS))


def _is_launcher(process: psutil.Process) -> bool:
    try:
        return is_launcher_command(process.name(), process.cmdline())
    except psutil.Error:
        return False


def _has_ended(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _watch(rank: str, parent: int, launchers: Sequence[psutil.Process]) -> None:
    """Wait for the end of a launcher, then stop this rank."""
    # It may have ended while we looked for it.
    ended = [parent] if os.getppid() != parent else []
    while not ended:
        time.sleep(_POLL_S)
        ended = [launcher.pid for launcher in launchers if _has_ended(launcher)]

    who = f"rank {rank} on {socket.gethostname()}"
    _print(f"{who}: its launcher, process {ended[0]}, has ended; stopping")
    if request_stop("the end of its launcher"):
        time.sleep(_GRACE_S)
        _print(f"{who}: still running {_GRACE_S:.0f} s after the end of its launcher; ending it")
    os._exit(ExitStatus.RUN_FAILED)


def _print(line: str) -> None:
    # The launcher may have been the reader of a pipe.
    with suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


def _ask_kernel_for_signal(number: int) -> None:
    """Let Linux send a signal to this process when its parent ends."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
