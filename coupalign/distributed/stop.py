"""Notice a request to stop at once; the ranks act on it where they can agree.

This module imports nothing heavy, so signals are noticed even before torch is imported.
"""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Record the first SIGTERM, SIGUSR1 (Slurm's warning) or Ctrl-C instead of acting on it.

        with StopRequest() as stop:
            ...
            if stop.name is not None: ...

    A second signal of the same kind has its usual effect.

    Attributes:
        name: of the signal that arrived, such as "SIGTERM". None: no request yet.
    """

    def __init__(self) -> None:
        self.name: str | None = None

    def __enter__(self) -> StopRequest:
        self._usual_handlers = {number: signal.signal(number, self._record) for number in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._usual_handlers.items():
            signal.signal(number, handler)

    def _record(self, number: int, frame: FrameType | None) -> None:
        received = signal.Signals(number)
        self.name = received.name
        signal.signal(number, self._usual_handlers[received])
