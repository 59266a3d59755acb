"""Asked to stop: the request is noted at once and honored where all ranks can agree on it.

Imports nothing heavy, so that a signal is noted from the first second on, before torch is there.
"""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Context in which SIGTERM, SIGUSR1 (Slurm's warning) and Ctrl-C set a flag; the second of them acts as usual."""

    def __init__(self) -> None:
        self.name: str | None = None  # of the signal that came

    def __enter__(self) -> StopRequest:
        self.before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        signal.signal(number, self.before[signal.Signals(number)])
