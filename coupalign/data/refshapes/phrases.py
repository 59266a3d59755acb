"""What RefShapes says about an object, and the proof that it can mean no other.

A `Phrase` is a logical description. Each of its parts is true, false or *unclear* of an object: "on the left" is true
below 0.42 of the width, false above 0.54 and unclear between; a part counts as unclear wherever two people could
disagree. `Scene.refers` accepts a phrase only if it is true of one object and false (not: unclear) of every other one.
Left and right occur only as words of their own, so that exchanging them describes the mirrored picture; every
threshold is symmetric.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import NamedTuple

import numpy as np

from coupalign.data.refshapes.drawing import Thing

SIDES = {"left": ("x", 1), "right": ("x", -1), "top": ("y", 1), "bottom": ("y", -1)}
RELATIONS = {"left of": ("x", 1), "right of": ("x", -1), "above": ("y", 1), "below": ("y", -1)}
ORDINALS = ("first", "second", "third")
SURE, NEITHER = 0.42, 0.54  # "on the left": true up to, false from; shares of the side
STEP = 0.09  # smallest gap between neighbors that are counted
APART, ALIGNED = 0.11, 0.02  # "left of": true from, false up to
CONE = 0.8  # "left of": largest sideways offset, relative to the distance
SYNONYMS = {"small": ("small", "little"), "big": ("big", "large")}
NOUNS = ("one", "shape", "thing")

Verdict = bool | None


class Phrase(NamedTuple):
    """Parts that are None or empty are not said. An order counts the objects that shape, color and size allow."""

    shape: str | None = None
    color: str | None = None
    size: str | None = None
    places: tuple[str, ...] = ()
    order: tuple[int, str] | None = None  # (0 for the first, side it is counted from)
    relation: tuple[str, Phrase] | None = None  # ("left of", landmark)


class Scene:
    """Objects in a picture of `side` pixels, with remembered verdicts: bit i of (yes, no) says true, false of object i."""

    def __init__(self, things: list[Thing], side: float) -> None:
        self.things, self.side = things, side
        self.everything = (1 << len(things)) - 1
        self._parts: dict[tuple, tuple[int, int]] = {}

    def refers(self, phrase: Phrase) -> int | None:
        """The index of the one object that a phrase means; None where it is ambiguous or empty."""
        yes, no = self.judge(phrase)
        return (
            yes.bit_length() - 1 if yes.bit_count() == 1 and yes | no == self.everything else None
        )

    def judge(self, phrase: Phrase) -> tuple[int, int]:
        """Of which objects the phrase is true, of which it is false (in bits); a false part outweighs an unclear one."""
        yes, no = self.everything, 0
        parts = [("shape", phrase.shape), ("color", phrase.color), ("size", phrase.size)]
        parts += [("place", place) for place in phrase.places]
        if phrase.order:
            parts.append(("order", (phrase[:3], phrase.order)))
        if phrase.relation:
            parts.append(("relation", phrase.relation))
        for part in parts:
            if part[1] is not None:
                if part not in self._parts:
                    self._parts[part] = _as_bits(self._verdicts(*part))
                yes, no = yes & self._parts[part][0], no | self._parts[part][1]
        return yes, no

    def _verdicts(self, kind: str, value: tuple | str) -> list[Verdict]:
        match kind:
            case "place":
                return [_placed(thing, value, self.side) for thing in self.things]
            case "order":
                named, order = self.judge(Phrase(*value[0]))[0], value[1]
                return _ordered(
                    self.things,
                    [bool(named >> number & 1) for number in range(len(self.things))],
                    order,
                    self.side,
                )
            case "relation":
                mark = self.refers(value[1])
                if mark is None:
                    return [None] * len(self.things)
                return [
                    _related(thing, self.things[mark], value[0], self.side) for thing in self.things
                ]
            case _:
                return [getattr(thing, kind) == value for thing in self.things]


def _as_bits(verdicts: Iterable[Verdict]) -> tuple[int, int]:
    yes = no = 0
    for number, verdict in enumerate(verdicts):
        yes |= (verdict is True) << number
        no |= (verdict is False) << number
    return yes, no


def _placed(thing: Thing, place: str, side: float) -> Verdict:
    axis, sign = SIDES[place]
    share = getattr(thing, axis) / side
    share = share if sign > 0 else 1 - share
    return True if share <= SURE else False if share >= NEITHER else None


def _ordered(
    things: list[Thing], named: list[bool], order: tuple[int, str], side: float
) -> list[Verdict]:
    rank, from_side = order
    axis, sign = SIDES[from_side]
    row = sorted(
        (sign * getattr(thing, axis), number)
        for number, thing in enumerate(things)
        if named[number]
    )
    clear = all(b - a >= STEP * side for (a, _), (b, _) in zip(row, row[1:]))
    verdicts: list[Verdict] = [False] * len(things)
    for position, (_, number) in enumerate(row):
        verdicts[number] = position == rank if clear else None
    return verdicts


def _related(thing: Thing, landmark: Thing, word: str, side: float) -> Verdict:
    axis, sign = RELATIONS[word]
    across = "y" if axis == "x" else "x"
    ahead = sign * (getattr(landmark, axis) - getattr(thing, axis))
    sideways = abs(getattr(landmark, across) - getattr(thing, across))
    if ahead <= ALIGNED * side:
        return False
    return True if ahead >= APART * side and sideways <= CONE * ahead else None


def plain_phrases(thing: Thing) -> list[Phrase]:
    """Every true combination of noun, color and size, shortest first."""
    colors = (None, thing.color) if thing.color else (None,)
    found = [
        Phrase(shape, color, size)
        for shape, color, size in product((thing.shape, None), colors, (None, thing.size))
    ]
    return sorted(found, key=lambda phrase: (phrase.color is not None) + (phrase.size is not None))


def clear_phrases(target: int, scene: Scene, hard: bool) -> dict[str, list[Phrase]]:
    """Phrases that mean the target and no other object, by kind: "plain", "generic" (no noun), "wordy", "order", "relation".

    Each is minimal (without any one of its parts it would be ambiguous), except the wordy ones, which say one thing more.
    """
    thing = scene.things[target]
    places = [place for place in SIDES if _placed(thing, place, scene.side)]
    choices = [
        (),
        *((place,) for place in places),
        *([tuple(places[::-1])] if len(places) == 2 else []),
    ]
    kinds: dict[str, list[Phrase]] = {
        "plain": [],
        "generic": [],
        "wordy": [],
        "order": [],
        "relation": [],
    }
    nouns = plain_phrases(thing)
    for noun, choice in product(nouns, choices):
        phrase = noun._replace(places=choice)
        if scene.refers(phrase) != target or phrase == Phrase():
            continue
        needless = sum(scene.refers(shorter) == target for shorter in _shortened(phrase))
        if phrase.shape is None and not needless:
            kinds["generic"].append(phrase)
        elif phrase.shape and needless <= 1:
            kinds["wordy" if needless else "plain"].append(phrase)
    if hard:
        vague = [noun for noun in nouns if noun.shape and scene.refers(noun) != target]
        kinds["order"] = _order_phrases(target, scene, vague)
        kinds["relation"] = _relation_phrases(target, scene, vague)
    return kinds


def _shortened(phrase: Phrase) -> list[Phrase]:
    """The phrase without one of its color, size or places."""
    shorter = [phrase._replace(color=None)] if phrase.color else []
    shorter += [phrase._replace(size=None)] if phrase.size else []
    return shorter + [
        phrase._replace(places=tuple(p for p in phrase.places if p != place))
        for place in phrase.places
    ]


def _order_phrases(target: int, scene: Scene, nouns: list[Phrase]) -> list[Phrase]:
    """Counting among three or more, from the nearer end."""
    found = []
    for noun in nouns:
        group = scene.judge(noun)[0].bit_count()
        for rank, place in product(range(min(len(ORDINALS), (group + 1) // 2)), SIDES):
            phrase = noun._replace(order=(rank, place))
            if group >= 3 and scene.refers(phrase) == target:
                found.append(phrase)
    return found


def _relation_phrases(target: int, scene: Scene, nouns: list[Phrase]) -> list[Phrase]:
    """Relations that are needed, each with the shortest noun phrases that do: the target's alone is ambiguous."""
    found: list[Phrase] = []
    for number, landmark in enumerate(scene.things):
        words = [
            word
            for word in RELATIONS
            if number != target and _related(scene.things[target], landmark, word, scene.side)
        ]
        mark = (
            next(
                (p for p in plain_phrases(landmark) if p.shape and scene.refers(p) == number), None
            )
            if words
            else None
        )
        for word, noun in product(words if mark else (), nouns):
            phrase = noun._replace(relation=(word, mark))
            needless = any(scene.refers(shorter) == target for shorter in _shortened(phrase))
            if scene.refers(phrase) == target and not needless:
                found.append(phrase)
    return found


def say(phrase: Phrase, rng: np.random.Generator) -> str:
    """One of the wordings of a phrase, in lower case."""
    noun = _noun(phrase, rng)
    article = "the " if rng.random() < 0.35 else ""
    if phrase.relation:
        word, landmark = phrase.relation
        if word in ("left of", "right of") and rng.random() < 0.4:
            word = f"to the {word}"
        return f"{article}{noun} {word} the {_noun(landmark, rng)}"
    if phrase.order:
        return f"{article}{ORDINALS[phrase.order[0]]} {noun} from the {phrase.order[1]}"
    if not phrase.places:
        if phrase.color and phrase.shape and not phrase.size and rng.random() < 0.15:
            return f"{article}{phrase.shape} that is {phrase.color}"
        return article + noun
    where = " ".join(phrase.places)
    if rng.random() < 0.4:
        return f"{article}{where} {noun}"
    if phrase.places[0] in ("left", "right"):
        return f"{article}{noun} on the {where}" + (" side" if rng.random() < 0.3 else "")
    return f"{article}{noun} at the {where}"


def _noun(phrase: Phrase, rng: np.random.Generator) -> str:
    size = SYNONYMS[phrase.size][rng.integers(2)] if phrase.size else ""
    head = phrase.shape or NOUNS[rng.integers(len(NOUNS))]
    return " ".join(filter(None, (size, phrase.color, head)))
