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
        _listening.append(self)
        self._usual_handlers = {number: signal.signal(number, self._record) for number in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _listening.remove(self)
        for number, handler in self._usual_handlers.items():
            signal.signal(number, handler)

    def _record(self, number: int, frame: FrameType | None) -> None:
        received = signal.Signals(number)
        self.name = received.name
        signal.signal(number, self._usual_handlers[received])


_listening: list[StopRequest] = []


def request_stop(name: str) -> bool:
    """Request a stop as a signal does; `name` says by what. Works from any thread.

    Returns:
        whether anything in this process listens to such requests.
    """
    for stop in tuple(_listening):
        stop.name = stop.name or name
    return bool(_listening)
