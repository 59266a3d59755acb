"""Describe an object of a RefShapes scene, and prove that the description fits no other object.

A `Phrase` is a logical description. Each of its parts is true, false or *unclear* for an object.
For example, "on the left" is true below 0.42 of the width, false above 0.54, and unclear between.
A part counts as unclear wherever two people could disagree. `Scene.find_referent` accepts a phrase
only if it is true for one object and false (not: unclear) for every other one.

Left and right occur only as separate words, so exchanging them describes the mirrored picture. All
thresholds are symmetric.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import NamedTuple

import numpy as np

from coupalign.data.refshapes.drawing import SceneObject

# Axis of each word, and the sign of the direction that goes away from it.
SIDES = {"left": ("x", 1), "right": ("x", -1), "top": ("y", 1), "bottom": ("y", -1)}
RELATIONS = {"left of": ("x", 1), "right of": ("x", -1), "above": ("y", 1), "below": ("y", -1)}
ORDINALS = ("first", "second", "third")
SYNONYMS = {"small": ("small", "little"), "big": ("big", "large")}
NOUNS = ("one", "shape", "thing")
KINDS = ("plain", "generic", "wordy", "order", "relation")  # see clear_phrases

# Thresholds, as shares of the side of the picture.
SIDE_TRUE, SIDE_FALSE = 0.42, 0.54  # "on the left": true up to, false from
ORDER_GAP = 0.09  # smallest gap between neighbors that can be counted
RELATION_TRUE, RELATION_FALSE = 0.11, 0.02  # "left of": true from, false up to
CONE = 0.8  # "left of": largest sideways offset, relative to the distance

Verdict = bool | None  # None: unclear


class Phrase(NamedTuple):
    """A description; a part that is None or empty is not mentioned."""

    shape: str | None = None
    color: str | None = None
    size: str | None = None
    sides: tuple[str, ...] = ()
    # (0 for the first, side it is counted from), among the objects of this shape, color and size.
    order: tuple[int, str] | None = None
    relation: tuple[str, Phrase] | None = None  # ("left of", landmark)


class Scene:
    """Judge phrases about the objects of a picture, and remember the verdicts.

    Sets of objects are bit masks: bit i stands for object i.

    Args:
        side: of the picture, in pixels.
    """

    def __init__(self, objects: list[SceneObject], side: float) -> None:
        self.objects = objects
        self.side = side
        self.all_objects = (1 << len(objects)) - 1
        self._part_verdicts: dict[tuple, tuple[int, int]] = {}

    def find_referent(self, phrase: Phrase) -> int | None:
        """Return the index of the only object that a phrase can mean; None if it is ambiguous."""
        true_for, false_for = self.judge(phrase)
        is_unique = true_for.bit_count() == 1
        is_clear = true_for | false_for == self.all_objects
        return true_for.bit_length() - 1 if is_unique and is_clear else None

    def judge(self, phrase: Phrase) -> tuple[int, int]:
        """Return the objects for which a phrase is true and those for which it is false.

        It is false as soon as one part is false, even if another one is unclear.
        """
        true_for, false_for = self.all_objects, 0
        for part in _parts(phrase):
            if part not in self._part_verdicts:
                self._part_verdicts[part] = _as_bits(self._judge_part(*part))
            part_true, part_false = self._part_verdicts[part]
            true_for &= part_true
            false_for |= part_false
        return true_for, false_for

    def _judge_part(self, kind: str, value: tuple | str) -> list[Verdict]:
        match kind:
            case "side":
                return [_on_side(item, value, self.side) for item in self.objects]
            case "order":
                noun, order = value
                counted, _ = self.judge(Phrase(*noun))
                is_counted = [bool(counted >> i & 1) for i in range(len(self.objects))]
                return _ordered(self.objects, is_counted, order, self.side)
            case "relation":
                relation, landmark_phrase = value
                landmark = self.find_referent(landmark_phrase)
                if landmark is None:
                    return [None] * len(self.objects)
                mark = self.objects[landmark]
                return [_related(item, mark, relation, self.side) for item in self.objects]
            case _:
                return [getattr(item, kind) == value for item in self.objects]


def _parts(phrase: Phrase) -> list[tuple]:
    """Return the (kind, value) pairs of everything that a phrase mentions."""
    attributes = (("shape", phrase.shape), ("color", phrase.color), ("size", phrase.size))
    parts: list[tuple] = [(kind, value) for kind, value in attributes if value is not None]
    parts += [("side", side) for side in phrase.sides]
    if phrase.order:
        noun = (phrase.shape, phrase.color, phrase.size)
        parts.append(("order", (noun, phrase.order)))
    if phrase.relation:
        parts.append(("relation", phrase.relation))
    return parts


def _as_bits(verdicts: Iterable[Verdict]) -> tuple[int, int]:
    true_for = false_for = 0
    for number, verdict in enumerate(verdicts):
        true_for |= (verdict is True) << number
        false_for |= (verdict is False) << number
    return true_for, false_for


# ----------------------------------------------------------------------------------- Judgments


def _on_side(item: SceneObject, side_name: str, side: float) -> Verdict:
    """Judge "on the left", "at the top" and so on."""
    axis, sign = SIDES[side_name]
    position = getattr(item, axis) / side
    distance = position if sign > 0 else 1 - position
    if distance <= SIDE_TRUE:
        return True
    if distance >= SIDE_FALSE:
        return False
    return None


def _ordered(
    objects: list[SceneObject], is_counted: list[bool], order: tuple[int, str], side: float
) -> list[Verdict]:
    """Judge "second from the left" and so on; unclear if two counted neighbors are too close."""
    rank, from_side = order
    axis, sign = SIDES[from_side]
    row = sorted(
        (sign * getattr(item, axis), number)
        for number, item in enumerate(objects)
        if is_counted[number]
    )
    is_clear = all(b - a >= ORDER_GAP * side for (a, _), (b, _) in zip(row, row[1:]))

    verdicts: list[Verdict] = [False] * len(objects)
    for position, (_, number) in enumerate(row):
        verdicts[number] = position == rank if is_clear else None
    return verdicts


def _related(item: SceneObject, landmark: SceneObject, relation: str, side: float) -> Verdict:
    """Judge "left of the landmark" and so on."""
    axis, sign = RELATIONS[relation]
    other_axis = "y" if axis == "x" else "x"
    ahead = sign * (getattr(landmark, axis) - getattr(item, axis))
    sideways = abs(getattr(landmark, other_axis) - getattr(item, other_axis))
    if ahead <= RELATION_FALSE * side:
        return False
    if ahead >= RELATION_TRUE * side and sideways <= CONE * ahead:
        return True
    return None


# ------------------------------------------------------------------------------------ Candidates


def noun_phrases(item: SceneObject) -> list[Phrase]:
    """Return every true combination of noun, color and size, shortest first."""
    colors = (None, item.color) if item.color else (None,)
    combinations = product((item.shape, None), colors, (None, item.size))
    phrases = [Phrase(*attributes) for attributes in combinations]
    return sorted(phrases, key=_count_adjectives)


def _count_adjectives(phrase: Phrase) -> int:
    return (phrase.color is not None) + (phrase.size is not None)


def clear_phrases(target: int, scene: Scene, hard: bool) -> dict[str, list[Phrase]]:
    """Find the phrases that mean the target and no other object, by kind.

    The kinds are "plain", "generic" (without a noun), "wordy", "order" and "relation". Each phrase
    is minimal: without any one of its parts it would be ambiguous. Only the wordy ones mention one
    thing more.

    Args:
        hard: also look for order and relation.
    """
    item = scene.objects[target]
    nouns = noun_phrases(item)
    kinds: dict[str, list[Phrase]] = {kind: [] for kind in KINDS}

    # Attributes and sides. A part is needless if the phrase is clear without it.
    for noun, sides in product(nouns, _side_choices(item, scene.side)):
        phrase = noun._replace(sides=sides)
        if scene.find_referent(phrase) != target or phrase == Phrase():
            continue
        needless = sum(scene.find_referent(shorter) == target for shorter in _shortened(phrase))
        if phrase.shape is None and not needless:
            kinds["generic"].append(phrase)
        elif phrase.shape and needless <= 1:
            kinds["wordy" if needless else "plain"].append(phrase)

    # Order and relations, for nouns that are ambiguous without them.
    if hard:
        vague = [noun for noun in nouns if noun.shape and scene.find_referent(noun) != target]
        kinds["order"] = _order_phrases(target, scene, vague)
        kinds["relation"] = _relation_phrases(target, scene, vague)
    return kinds


def _side_choices(item: SceneObject, side: float) -> list[tuple[str, ...]]:
    """Return no side, each true side alone, and both together ("top left")."""
    sides = [name for name in SIDES if _on_side(item, name, side)]
    choices: list[tuple[str, ...]] = [(), *((name,) for name in sides)]
    if len(sides) == 2:
        choices.append(tuple(sides[::-1]))
    return choices


def _shortened(phrase: Phrase) -> list[Phrase]:
    """Return the phrase without its color, without its size, and without each of its sides."""
    shorter = []
    if phrase.color:
        shorter.append(phrase._replace(color=None))
    if phrase.size:
        shorter.append(phrase._replace(size=None))
    for removed in phrase.sides:
        sides = tuple(side for side in phrase.sides if side != removed)
        shorter.append(phrase._replace(sides=sides))
    return shorter


def _order_phrases(target: int, scene: Scene, nouns: list[Phrase]) -> list[Phrase]:
    """Count among three or more objects, from the nearer end."""
    phrases = []
    for noun in nouns:
        true_for, _ = scene.judge(noun)
        group_size = true_for.bit_count()
        if group_size < 3:
            continue
        ranks = min(len(ORDINALS), (group_size + 1) // 2)
        for rank, side in product(range(ranks), SIDES):
            phrase = noun._replace(order=(rank, side))
            if scene.find_referent(phrase) == target:
                phrases.append(phrase)
    return phrases


def _relation_phrases(target: int, scene: Scene, nouns: list[Phrase]) -> list[Phrase]:
    """Find the relations that are needed, each with the shortest noun phrase of its landmark."""
    phrases: list[Phrase] = []
    for number, landmark in enumerate(scene.objects):
        if number == target:
            continue
        relations = [
            relation
            for relation in RELATIONS
            if _related(scene.objects[target], landmark, relation, scene.side)
        ]

        # The landmark needs a clear noun phrase of its own.
        mark = _shortest_noun_phrase(number, scene) if relations else None
        if mark is None:
            continue

        for relation, noun in product(relations, nouns):
            phrase = noun._replace(relation=(relation, mark))
            shorter_phrases = _shortened(phrase)
            needless = any(scene.find_referent(shorter) == target for shorter in shorter_phrases)
            if scene.find_referent(phrase) == target and not needless:
                phrases.append(phrase)
    return phrases


def _shortest_noun_phrase(number: int, scene: Scene) -> Phrase | None:
    for phrase in noun_phrases(scene.objects[number]):
        if phrase.shape and scene.find_referent(phrase) == number:
            return phrase
    return None


# --------------------------------------------------------------------------------------- Wording


def write_sentence(phrase: Phrase, rng: np.random.Generator) -> str:
    """Draw one of the wordings of a phrase, in lower case."""
    noun = _draw_noun(phrase, rng)
    article = "the " if rng.random() < 0.35 else ""

    # "star (to the) left of the small circle"
    if phrase.relation:
        relation, landmark = phrase.relation
        if relation in ("left of", "right of") and rng.random() < 0.4:
            relation = f"to the {relation}"
        return f"{article}{noun} {relation} the {_draw_noun(landmark, rng)}"

    # "second star from the left"
    if phrase.order:
        rank, side = phrase.order
        return f"{article}{ORDINALS[rank]} {noun} from the {side}"

    # "red star" or "star that is red"
    if not phrase.sides:
        if phrase.color and phrase.shape and not phrase.size and rng.random() < 0.15:
            return f"{article}{phrase.shape} that is {phrase.color}"
        return article + noun

    # "left star", "star on the left (side)" or "star at the top left"
    where = " ".join(phrase.sides)
    if rng.random() < 0.4:
        return f"{article}{where} {noun}"
    if phrase.sides[0] in ("left", "right"):
        suffix = " side" if rng.random() < 0.3 else ""
        return f"{article}{noun} on the {where}{suffix}"
    return f"{article}{noun} at the {where}"


def _draw_noun(phrase: Phrase, rng: np.random.Generator) -> str:
    size = SYNONYMS[phrase.size][rng.integers(2)] if phrase.size else ""
    head = phrase.shape or NOUNS[rng.integers(len(NOUNS))]
    return " ".join(word for word in (size, phrase.color, head) if word)
