"""Breaks a rank at a chosen moment.

Python imports this file when it starts, wherever this folder is on PYTHONPATH. The variable FAULTS
names a JSON file with a list of faults. Each start of the job takes the first that has not
happened yet:

    {"rank": 1, "event": "os.rename", "match": "checkpoints", "count": 2, "do": "kill"}

The fault happens when the rank raises the audit event (PEP 578: "open", "os.rename",
"coupalign.doing", ...) for the count-th time with a first argument that matches, and `after_s`
seconds later if that is given. What it does:

    kill   SIGKILL
    usr1   SIGUSR1
    hang   sleep forever
    clock  set the clock of the process a day back
    slow   sleep `after_s` seconds at each such event

Before a fault happens it is added to the file `FAULTS`.log.
"""

import json
import os
import re
import signal
import sys
import threading
import time


def _arm(fault: dict, log: str) -> None:
    """Install the audit hook that makes the fault happen."""
    rank, pattern = os.getpid(), re.compile(fault["match"])
    events_left = [fault.get("count", 1)]
    busy = threading.local()

    def act() -> None:
        # A data worker is forked from the rank and must not act.
        if os.getpid() != rank:
            return
        with open(log, "a", encoding="utf-8") as file:
            file.write(json.dumps(fault) + "\n")

        if fault["do"] == "kill":
            os.kill(rank, signal.SIGKILL)
        elif fault["do"] == "usr1":
            os.kill(rank, signal.SIGUSR1)
        elif fault["do"] == "hang":
            time.sleep(1e6)
        else:
            real = time.time
            time.time = lambda: real() - 86_400

    def hook(event: str, arguments: tuple) -> None:
        if event != fault["event"] or getattr(busy, "now", False):
            return
        if events_left[0] < 1 or os.getpid() != rank:
            return
        if not pattern.search(str(arguments[0]) if arguments else ""):
            return

        # What the fault itself does raises events, too.
        busy.now = True
        try:
            if fault["do"] == "slow":
                time.sleep(fault["after_s"])
                return
            events_left[0] -= 1
            if events_left[0] > 0:
                return
            if fault.get("after_s"):
                threading.Timer(fault["after_s"], act).start()
            else:
                act()
        finally:
            busy.now = False

    sys.addaudithook(hook)


def _next_fault() -> dict | None:
    """Return the first fault that has not happened yet."""
    with open(os.environ["FAULTS"], encoding="utf-8") as file:
        faults = json.load(file)
    try:
        with open(os.environ["FAULTS"] + ".log", encoding="utf-8") as file:
            happened = len(file.readlines())
    except FileNotFoundError:
        happened = 0
    return faults[happened] if happened < len(faults) else None


if "FAULTS" in os.environ and "RANK" in os.environ:
    _fault = _next_fault()
    if _fault and _fault["rank"] == int(os.environ["RANK"]):
        _arm(_fault, os.environ["FAULTS"] + ".log")
