"""A tracking server that goes away takes nothing with it."""

from __future__ import annotations

from collections.abc import Callable

from tests.cluster.faults import OUTPUT, remains, tracked
from tests.cluster.outage import AWAY_S, Outage


def test_tracking_server_that_is_away_for_five_minutes_gets_everything(
    outage: Outage, survived: Callable[[str], None]
) -> None:
    """The outage began with another file. This test only waits for its end."""
    outage.training.wait(AWAY_S + 200)
    outage.thread.join(60)

    assert not outage.thread.is_alive()
    output = (outage.folder / OUTPUT).read_text(errors="replace")
    assert "cannot be reached" in output, output[-4000:]
    assert "is back and has everything" in output, output[-4000:]

    sent = tracked(outage.server.folder / "server.db", "coupalign")
    measured = remains(outage.folder / "run")["metrics"]
    losses_sent = {key for key in sent if key[1] == "train/loss"}
    assert losses_sent == {key for key in measured if key[1] == "train/loss"}
    both = sent.keys() & measured.keys()
    assert {key: sent[key] for key in both} == {key: [measured[key]] for key in both}
    survived(f"tracking server away for {AWAY_S} s")
