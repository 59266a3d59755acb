"""A request to stop is noted, and a second one of its kind is not held back."""

from __future__ import annotations

import os
import signal

import pytest

from coupalign.distributed.stop import SIGNALS, StopRequest


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_noted_and_the_second_acts_as_usual(number: signal.Signals) -> None:
    class Usual(Exception):
        pass

    def usual(*_: object) -> None:
        raise Usual

    before = signal.signal(number, usual)
    try:
        with StopRequest() as stop:
            assert stop.name is None
            os.kill(os.getpid(), number)
            assert stop.name == number.name
            with pytest.raises(Usual):
                os.kill(os.getpid(), number)
        assert signal.getsignal(number) is usual
    finally:
        signal.signal(number, before)
