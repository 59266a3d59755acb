"""Asked to stop: the request is noted at once and honored at the end of a step, by all ranks together."""
from __future__ import annotations

import signal
from types import FrameType, TracebackType

from coupalign import dist
from coupalign.dist import World

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Context in which SIGTERM, SIGUSR1 (Slurm's warning) and Ctrl-C set a flag; the second of them acts as usual."""

    def __init__(self, world: World):
        self.world = world
        self.name: str | None = None

    def __enter__(self) -> StopRequest:
        self.before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def agreed(self) -> bool:
        """Whether any rank was asked to stop; collective, and the same answer everywhere."""
        return dist.any_rank(self.name is not None, self.world)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        signal.signal(number, self.before[signal.Signals(number)])
