"""A first signal is recorded; a second one of its kind has its usual effect."""

from __future__ import annotations

import os
import signal

import pytest

from coupalign.distributed.stop import SIGNALS, StopRequest


@pytest.mark.parametrize("number", SIGNALS)
def test_first_signal_is_recorded_and_second_acts_as_usual(number: signal.Signals) -> None:
    class UsualEffect(Exception):
        pass

    def usual_handler(*_: object) -> None:
        raise UsualEffect

    before = signal.signal(number, usual_handler)
    try:
        with StopRequest() as stop:
            assert stop.name is None

            os.kill(os.getpid(), number)
            assert stop.name == number.name

            with pytest.raises(UsualEffect):
                os.kill(os.getpid(), number)

        assert signal.getsignal(number) is usual_handler
    finally:
        signal.signal(number, before)
