"""state.json is read strictly: what we did not write is damage, and never a traceback."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from coupalign.engine.base import TrainState
from coupalign.engine.state_file import BadState, EngineRecord, StateFile, read_state
from coupalign.errors import InputError

STATE = TrainState(
    step=8, bad_steps=1, best=0.25, best_step=4, evaluated=8, best_of="val, lavt, 20 samples"
)


def content() -> dict[str, Any]:
    return StateFile.describe(
        STATE,
        tool="coupalign 0",
        engine=EngineRecord(kind="deepspeed", stage=3, ranks=2),
        counters={"applied": 7, "scale": 1.0, "good_steps": 0},
        data="fingerprint",
        session="abc",
    ).to_json()


def write(folder: Path, tree: Any) -> Path:
    (folder / "state.json").write_text(json.dumps(tree))
    return folder / "state.json"


def test_state_survives_a_round_trip(tmp_path: Path) -> None:
    read = read_state(write(tmp_path, content()))

    assert read.train_state == STATE
    assert read.engine == EngineRecord(kind="deepspeed", stage=3, ranks=2)
    assert read.counters.model_dump() == {"applied": 7, "scale": 1.0, "good_steps": 0}


def test_state_of_the_format_before_is_read(tmp_path: Path) -> None:
    tree = content() | {"format": 2}
    del tree["session"], tree["state"]["best_of"]

    assert read_state(write(tmp_path, tree)).train_state.best_of is None


def test_newer_format_is_refused_and_not_called_damage(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="format 4 was written by a newer version of coupalign"):
        read_state(write(tmp_path, content() | {"format": 4}))


PLACES = [
    (key,) if not isinstance(value, dict) else (key, name)
    for key, value in content().items()
    for name in (value if isinstance(value, dict) else [None])
]
WRONG = [None, True, -1, 1.5, math.nan, math.inf, "8", "", [], {}, 10**30]
# None is the value of a run without evaluation, and any text will do for a text.
RIGHT = {
    ("session",): [None, "8", ""],
    ("tool",): ["8", ""],
    ("data",): ["8", ""],
    ("state", "best_of"): [None, "8", ""],
    ("state", "best"): [None],
    ("state", "best_step"): [None],
    ("state", "evaluated"): [None],
    ("counters", "scale"): [1.5, 10**30],
    ("counters", "applied"): [10**30],
    ("counters", "good_steps"): [10**30],
    ("engine", "ranks"): [10**30],
    ("state", "step"): [10**30],
}


@pytest.mark.parametrize("place", PLACES, ids=".".join)
def test_value_of_another_kind_is_damage(tmp_path: Path, place: tuple[str, ...]) -> None:
    for value in WRONG:
        if any(
            value is right or (value == right and value is not True)
            for right in RIGHT.get(place, [])
        ):
            continue
        tree = content()
        node = tree
        for key in place[:-1]:
            node = node[key]
        node[place[-1]] = value

        if place == ("format",) and type(value) is int and value > 3:
            continue
        with pytest.raises(BadState, match=r"state\.json"):
            read_state(write(tmp_path, tree))


@pytest.mark.parametrize("place", PLACES, ids=".".join)
def test_key_that_is_gone_or_renamed_is_damage(tmp_path: Path, place: tuple[str, ...]) -> None:
    tree = content()
    node = tree
    for key in place[:-1]:
        node = node[key]
    node[place[-1] + "x"] = node.pop(place[-1])

    with pytest.raises(BadState):
        read_state(write(tmp_path, tree))


@pytest.mark.parametrize(
    "change",
    [{"step": 3}, {"best_step": 9}, {"evaluated": 9}, {"bad_steps": 9}, {"best": 1.5}],
)
def test_numbers_that_contradict_each_other_are_damage(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    tree = content()
    tree["state"] |= change

    with pytest.raises(BadState):
        read_state(write(tmp_path, tree))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "7", "[" * 100_000, "\x00"])
def test_other_json_is_damage(tmp_path: Path, text: str) -> None:
    (tmp_path / "state.json").write_text(text)

    with pytest.raises(BadState, match="state.json is unreadable"):
        read_state(tmp_path / "state.json")
