"""The moving average of the weights."""

from __future__ import annotations

import pytest
import torch

from coupalign.engine.ema import Ema

YES, NO = torch.tensor(True), torch.tensor(False)


def test_average_follows_applied_steps_with_a_decay_that_grows() -> None:
    live = torch.zeros(3)
    ema = Ema({"weight": live}, decay=0.5)

    # The first step's decay is (1 + 1) / (10 + 1).
    live.fill_(1.0)
    ema.update(torch.tensor(1), YES)
    assert ema.averages["weight"].tolist() == pytest.approx([9 / 11] * 3)

    live.fill_(0.0)
    ema.update(torch.tensor(1000), YES)
    assert ema.averages["weight"].tolist() == pytest.approx([9 / 22] * 3)


def test_refused_step_does_not_change_the_average() -> None:
    live = torch.zeros(3)
    ema = Ema({"weight": live}, decay=0.5)

    live.fill_(1.0)
    ema.update(torch.tensor(1), NO)

    assert ema.averages["weight"].tolist() == [0, 0, 0]


def test_weights_come_back_after_the_average_was_swapped_in() -> None:
    live = torch.zeros(2)
    ema = Ema({"weight": live}, decay=0.5)
    live.fill_(1.0)

    with pytest.raises(KeyError), ema.swapped_in():
        assert live.tolist() == [0, 0]
        raise KeyError

    assert live.tolist() == [1, 1] and ema.averages["weight"].tolist() == [0, 0]
