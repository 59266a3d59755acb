"""A tracking server that goes away takes nothing with it."""

from __future__ import annotations

from collections.abc import Callable

from tests.cluster.faults import OUTPUT, remains, tracked
from tests.cluster.outage import AWAY_S, Outage


def test_a_tracking_server_that_is_away_for_five_minutes(
    outage: Outage, survived: Callable[[str], None]
) -> None:
    """It is away while the tests of other files run; this one only waits for the end."""
    outage.training.wait(AWAY_S + 200)
    outage.thread.join(60)
    output = (outage.folder / OUTPUT).read_text(errors="replace")
    assert not outage.thread.is_alive()
    assert "cannot be reached" in output and "is back and has everything" in output, output[-4000:]
    sent = tracked(outage.server.folder / "server.db", "coupalign")
    mine = remains(outage.folder / "run")["metrics"]
    assert {key for key in sent if key[1] == "train/loss"} == {
        key for key in mine if key[1] == "train/loss"
    }
    assert all(values == [mine[key]] for key, values in sent.items() if key in mine)
    survived(f"tracking server away for {AWAY_S} s")
