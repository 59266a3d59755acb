"""The scenes of RefShapes: which objects lie where, and which of them are spoken of in which words."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from coupalign.data.refshapes import drawing as shapes
from coupalign.data.refshapes import phrases
from coupalign.data.refshapes.drawing import COLORS, SHAPES, Bar, Thing

GRAY_SHARE = 0.05
VISIBLE = 0.6  # smallest visible share of an object


@dataclass(frozen=True)
class Level:
    """Lengths are for a picture of 96 pixels and grow with it."""

    shapes: tuple[str, ...]
    counts: tuple[
        tuple[int, ...], ...
    ]  # objects per class of a scene; referred to are classes with two or more
    small: tuple[float, float]  # radii
    big: tuple[float, float]
    overlap: float  # share of scenes whose objects may overlap
    bar_before: float  # share of scenes with a bar across the objects
    kinds: dict[str, float]  # weights of the sentences


LEVELS = {
    "easy": Level(
        SHAPES[:5],
        ((2, 1), (3,), (2, 1), (3, 1), (2, 2)),
        (11.0, 12.5),
        (18.5, 20.5),
        0.3,
        0.15,
        {"plain": 0.75, "wordy": 0.2, "generic": 0.05},
    ),
    "hard": Level(
        SHAPES,
        ((3, 2), (3, 3), (4, 2), (4, 3), (4, 2, 2), (5, 2), (5, 3), (5, 2, 2)),
        (6.5, 7.5),
        (11.0, 12.5),
        0.6,
        0.4,
        {"plain": 0.2, "wordy": 0.05, "generic": 0.03, "order": 0.25, "relation": 0.47},
    ),
}


def compose(
    rng: np.random.Generator, level: Level, size: int, split: str
) -> tuple[Image.Image, np.ndarray, list[Thing], list[dict[str, Any]]]:
    """Draw scenes until one has two or three clearly describable targets.

    Returns:
        picture (RGB or L), visible masks bool [objects, S, S], objects, refs `{"object": index, "sentences": [[raw, sent], …]}`.
    """
    gray = rng.random() < GRAY_SHARE
    for _ in range(2000):
        ground_level = float(rng.uniform(60, 200))
        things = _place(rng, level, size, split, gray, ground_level)
        if things is None:
            continue
        behind = [_bar(rng, size) for _ in range(rng.integers(0, 7))]
        before = [_bar(rng, size, long=True)] if rng.random() < level.bar_before else []
        labels = shapes.label_map(things, behind, before, size)
        masks = shapes.visible_masks(labels, len(things))
        if any(
            mask.sum() < VISIBLE * shapes.full_area(thing) for mask, thing in zip(masks, things)
        ):
            continue
        things = [_seen(thing, mask) for thing, mask in zip(things, masks)]
        refs = _refer(rng, level, things, split, size)
        if len(refs) < 2:
            continue
        picture = shapes.colorize(
            labels, things, behind + before, shapes.textured_ground(rng, size, ground_level), rng
        )
        return (picture.convert("L") if gray else picture), masks, things, refs
    raise AssertionError("no describable scene in 2000 attempts")


def _place(
    rng: np.random.Generator, level: Level, size: int, split: str, gray: bool, ground: float
) -> list[Thing] | None:
    """Objects with room between them, in random drawing order; None where the dice leave no room."""
    unit = size / 96
    counts = level.counts[rng.integers(len(level.counts))]
    room = 0.85 if rng.random() < level.overlap else 1.2
    palette = [str(name) for name in rng.permutation(list(COLORS))[:3]]
    things: list[Thing] = []
    for shape in np.repeat(_classes(rng, level, len(counts), split), counts).tolist():
        extent, color = ("small", "big")[rng.integers(2)], palette[rng.integers(3)]
        paint = _gray_paint(rng, ground) if gray else _paint(rng, color)
        thing = Thing(
            shape,
            None if gray else color,
            extent,
            0,
            0,
            float(rng.uniform(*getattr(level, extent))) * unit,
            float(rng.uniform(-0.2, 0.2)),
            paint,
        )
        margin = shapes.reach(thing) + unit
        spots = rng.uniform(margin, size - margin, (30, 2))
        free = np.ones(30, bool)
        for other in things:
            free &= np.hypot(*(spots - (other.x, other.y)).T) >= room * (
                thing.radius + other.radius
            )
        if not free.any():
            return None
        x, y = spots[free.argmax()].tolist()
        things.append(replace(thing, x=x, y=y))
    return [things[number] for number in rng.permutation(len(things))]


def _classes(rng: np.random.Generator, level: Level, count: int, split: str) -> list[str]:
    """Different classes for a scene, the most frequent first: circles in testA, in testB no circle at all."""
    names = [str(name) for name in rng.permutation(level.shapes)]
    if split in ("testA", "testB"):
        names.remove("circle")
    return (["circle"] * (split == "testA") + names)[:count]


def _paint(rng: np.random.Generator, color: str) -> tuple[int, int, int]:
    return tuple(
        min(max(value + change, 0), 255)
        for value, change in zip(COLORS[color], rng.integers(-9, 10, 3).tolist())
    )


def _gray_paint(rng: np.random.Generator, ground: float) -> tuple[int, int, int]:
    """A gray that stands out from the ground."""
    levels = [value for value in range(20, 250) if abs(value - ground) >= 65]
    return (int(rng.choice(levels)),) * 3


def _bar(rng: np.random.Generator, size: int, long: bool = False) -> Bar:
    """A muted line or speck; a long one crosses the picture."""
    unit = size / 96
    x, y = rng.uniform(0, size, 2)
    turn = rng.uniform(0, 2 * np.pi)
    length = 3 * size if long else rng.uniform(2, 26) * unit
    dx, dy = length * np.cos(turn) / 2, length * np.sin(turn) / 2
    base = rng.uniform(30, 225)
    paint = tuple(int(v) for v in np.clip(base + rng.uniform(-14, 14, 3), 0, 255))
    return Bar(
        (float(x - dx), float(y - dy), float(x + dx), float(y + dy)),
        float(rng.uniform(1.6, 3.0)) * unit,
        paint,
    )


def _seen(thing: Thing, mask: np.ndarray) -> Thing:
    """The object at the center of its visible pixels: the place that its sentences speak of."""
    ys, xs = np.nonzero(mask)
    return replace(thing, x=float(xs.mean()) + 0.5, y=float(ys.mean()) + 0.5)


def _refer(
    rng: np.random.Generator, level: Level, things: list[Thing], split: str, size: int
) -> list[dict[str, Any]]:
    """Two or three targets that are not alone in their class, each with two or three different sentences."""
    scene = phrases.Scene(things, size)
    names = [thing.shape for thing in things]
    refs: list[dict[str, Any]] = []
    wanted = int(rng.integers(2, 4))
    for target in rng.permutation(len(things)).tolist():
        if (
            len(refs) == wanted
            or names.count(names[target]) < 2
            or (split == "testA" and names[target] != "circle")
        ):
            continue
        found = phrases.clear_phrases(target, scene, "order" in level.kinds)
        sentences = _sentences(rng, level, found, int(rng.integers(2, 4)))
        if len(sentences) >= 2:
            refs.append(
                {
                    "object": target,
                    "sentences": [[_as_typed(sent, rng), sent] for sent in sentences],
                }
            )
    return refs


def _sentences(
    rng: np.random.Generator, level: Level, found: dict[str, list[phrases.Phrase]], wanted: int
) -> list[str]:
    """Up to `wanted` sentences that differ in more than an article.

    Color words are favored over places, of which there is more choice, and phrases not yet used over other wordings.
    """
    kinds = [kind for kind in level.kinds if found[kind]]
    if not kinds:
        return []
    weights = np.array([level.kinds[kind] for kind in kinds])
    sentences: dict[str, str] = {}
    used: set[phrases.Phrase] = set()
    for kind in rng.choice(len(kinds), 12, p=weights / weights.sum()).tolist():
        choice = found[kinds[kind]]
        favor = np.cumsum(
            [
                (6.0 if p.color else 1.0) / (1 + len(p.places)) * (0.2 if p in used else 1.0)
                for p in choice
            ]
        )
        phrase = choice[int(np.searchsorted(favor, rng.random() * favor[-1], "right"))]
        used.add(phrase)
        sentence = phrases.say(phrase, rng)
        sentences.setdefault(sentence.replace("the ", ""), sentence)
        if len(sentences) == wanted:
            break
    return list(sentences.values())


def _as_typed(sentence: str, rng: np.random.Generator) -> str:
    """`raw`: what somebody might have typed, with capitals and full stops."""
    typed = sentence.capitalize() if rng.random() < 0.3 else sentence
    return typed + str(rng.choice((".", " "))) if rng.random() < 0.2 else typed
