"""Breaks a rank at a chosen place:

Python imports this file at its start wherever this folder is on PYTHONPATH.

FAULTS names a JSON file: a list of faults. Each start of the job takes the first that has not
    happened yet:

    {"rank": 1, "event": "os.rename", "match": "checkpoints", "count": 2, "do": "kill", "after_s":
    0.0}

The fault happens when the rank raises the audit event (PEP 578: "open", "os.rename",
"coupalign.doing" …) whose first argument matches, for the count-th time; "kill" is SIGKILL, "usr1"
SIGUSR1, "hang" sleeps for ever, "clock" sets its clock a day back, "slow" sleeps `after_s` at each
event. What happened is added to the file `FAULTS`.log before it happens."""

import json
import os
import re
import signal
import sys
import threading
import time


def _arm(fault: dict, log: str) -> None:
    process, left, pattern = os.getpid(), [fault.get("count", 1)], re.compile(fault["match"])
    busy = threading.local()

    def act() -> None:
        if os.getpid() != process:
            return  # a data worker, forked from the rank
        with open(log, "a", encoding="utf-8") as file:
            file.write(json.dumps(fault) + "\n")
        if fault["do"] == "kill":
            os.kill(process, signal.SIGKILL)
        elif fault["do"] == "usr1":
            os.kill(process, signal.SIGUSR1)
        elif fault["do"] == "hang":
            time.sleep(1e6)
        else:
            real = time.time
            time.time = lambda: real() - 86_400

    def hook(event: str, arguments: tuple) -> None:
        if (
            event != fault["event"]
            or getattr(busy, "now", False)
            or left[0] < 1
            or os.getpid() != process
        ):
            return
        if not pattern.search(str(arguments[0]) if arguments else ""):
            return
        busy.now = True
        try:
            if fault["do"] == "slow":
                time.sleep(fault["after_s"])
                return
            left[0] -= 1
            if left[0] == 0:
                threading.Timer(fault["after_s"], act).start() if fault.get("after_s") else act()
        finally:
            busy.now = False

    sys.addaudithook(hook)


def _next_fault() -> dict | None:
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
