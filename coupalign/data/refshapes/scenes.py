"""Compose the scenes of RefShapes: where the objects are, which are referred to, and how."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from coupalign.data.refshapes import drawing, phrases
from coupalign.data.refshapes.drawing import COLORS, REFERENCE_SIDE, SHAPES, Bar, SceneObject

GRAY_SHARE = 0.05
MIN_VISIBLE = 0.6  # smallest visible share of an object
MAX_ATTEMPTS = 2000  # scenes to draw before giving up
POSITIONS = 30  # candidates for the position of an object
PHRASE_DRAWS = 12  # attempts to find different sentences for a ref


@dataclass(frozen=True, kw_only=True)
class Level:
    """How hard a scene is. Lengths are for a picture of 96 pixels and grow with it."""

    shapes: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]  # choices of the number of objects per class
    small: tuple[float, float]  # range of radii
    big: tuple[float, float]
    overlap: float  # share of scenes whose objects may overlap
    bar_before: float  # share of scenes with a bar across the objects
    kinds: dict[str, float]  # weights of the kinds of phrases


LEVELS = {
    "easy": Level(
        shapes=SHAPES[:5],
        counts=((2, 1), (3,), (2, 1), (3, 1), (2, 2)),
        small=(11.0, 12.5),
        big=(18.5, 20.5),
        overlap=0.3,
        bar_before=0.15,
        kinds={"plain": 0.75, "wordy": 0.2, "generic": 0.05},
    ),
    "hard": Level(
        shapes=SHAPES,
        counts=((3, 2), (3, 3), (4, 2), (4, 3), (4, 2, 2), (5, 2), (5, 3), (5, 2, 2)),
        small=(6.5, 7.5),
        big=(11.0, 12.5),
        overlap=0.6,
        bar_before=0.4,
        kinds={"plain": 0.2, "wordy": 0.05, "generic": 0.03, "order": 0.25, "relation": 0.47},
    ),
}


@dataclass(frozen=True)
class ComposedScene:
    picture: Image.Image  # RGB or L
    masks: np.ndarray  # of the visible pixels, bool [objects, S, S]
    objects: list[SceneObject]
    refs: list[dict[str, Any]]  # {"object": index, "sentences": [[raw, sent], …]}


def compose(rng: np.random.Generator, level: Level, size: int, split: str) -> ComposedScene:
    """Draw scenes until one has two or three targets that can be described clearly.

    The order of the random draws decides the bytes of the data set: do not change it.
    """
    gray = rng.random() < GRAY_SHARE
    for _ in range(MAX_ATTEMPTS):
        brightness = float(rng.uniform(60, 200))
        objects = _place_objects(
            rng, level, size=size, split=split, gray=gray, brightness=brightness
        )
        if objects is None:
            continue

        # Draw the labels, and start again if too little of an object is visible.
        behind = [_draw_speck(rng, size) for _ in range(rng.integers(0, 7))]
        has_bar = rng.random() < level.bar_before
        before = [_draw_crossing_bar(rng, size)] if has_bar else []
        labels = drawing.draw_labels(objects, behind, before, size)
        masks = drawing.visible_masks(labels, len(objects))
        if _any_hidden(objects, masks):
            continue

        # Describe the objects by what is visible of them.
        objects = [_move_to_visible_center(item, mask) for item, mask in zip(objects, masks)]
        refs = _draw_refs(rng, level, objects, split, size=size)
        if len(refs) < 2:
            continue

        background = drawing.textured_background(rng, size, brightness)
        picture = drawing.colorize(labels, objects, behind + before, background, rng=rng)
        return ComposedScene(picture.convert("L") if gray else picture, masks, objects, refs)
    raise AssertionError(f"no scene with clear targets in {MAX_ATTEMPTS} attempts")


# --------------------------------------------------------------------------------------- Objects


def _place_objects(
    rng: np.random.Generator, level: Level, *, size: int, split: str, gray: bool, brightness: float
) -> list[SceneObject] | None:
    """Place objects with space between them, in random drawing order.

    Args:
        brightness: of the background.

    Returns:
        None if there was no free position for one of the objects.
    """
    unit = size / REFERENCE_SIDE
    counts = level.counts[rng.integers(len(level.counts))]
    spacing = 0.85 if rng.random() < level.overlap else 1.2  # relative to the sum of two radii
    palette = [str(name) for name in rng.permutation(list(COLORS))[:3]]
    classes = _draw_classes(rng, level, len(counts), split)

    objects: list[SceneObject] = []
    for shape in np.repeat(classes, counts).tolist():
        size_name = ("small", "big")[rng.integers(2)]
        color = palette[rng.integers(3)]
        paint = _draw_gray_paint(rng, brightness) if gray else _draw_paint(rng, color)
        item = SceneObject(
            shape=shape,
            color=None if gray else color,
            size=size_name,
            x=0,
            y=0,
            radius=float(rng.uniform(*getattr(level, size_name))) * unit,
            angle=float(rng.uniform(-0.2, 0.2)),
            paint=paint,
        )

        # Take the first of some random positions that is free.
        margin = drawing.outer_radius(item) + unit
        positions = rng.uniform(margin, size - margin, (POSITIONS, 2))
        free = np.ones(POSITIONS, bool)
        for other in objects:
            distances = np.hypot(*(positions - (other.x, other.y)).T)
            free &= distances >= spacing * (item.radius + other.radius)
        if not free.any():
            return None
        x, y = positions[free.argmax()].tolist()
        objects.append(replace(item, x=x, y=y))
    return [objects[number] for number in rng.permutation(len(objects))]


def _draw_classes(rng: np.random.Generator, level: Level, count: int, split: str) -> list[str]:
    """Draw different classes for a scene, the most frequent first.

    In testA, circles are the most frequent; in testB, there are none.
    """
    names = [str(name) for name in rng.permutation(level.shapes)]
    if split in ("testA", "testB"):
        names.remove("circle")
    if split == "testA":
        names.insert(0, "circle")
    return names[:count]


def _draw_paint(rng: np.random.Generator, color: str) -> tuple[int, int, int]:
    changes = rng.integers(-9, 10, 3).tolist()
    return tuple(min(max(v + change, 0), 255) for v, change in zip(COLORS[color], changes))


def _draw_gray_paint(rng: np.random.Generator, brightness: float) -> tuple[int, int, int]:
    """Draw a gray that differs clearly from the brightness of the background."""
    levels = [value for value in range(20, 250) if abs(value - brightness) >= 65]
    return (int(rng.choice(levels)),) * 3


def _any_hidden(objects: list[SceneObject], masks: np.ndarray) -> bool:
    return any(
        mask.sum() < MIN_VISIBLE * drawing.full_area(item) for mask, item in zip(masks, objects)
    )


def _move_to_visible_center(item: SceneObject, mask: np.ndarray) -> SceneObject:
    """Return the object at the center of its visible pixels, which its sentences are about."""
    ys, xs = np.nonzero(mask)
    return replace(item, x=float(xs.mean()) + 0.5, y=float(ys.mean()) + 0.5)


# --------------------------------------------------------------------------------------- Clutter


def _draw_speck(rng: np.random.Generator, size: int) -> Bar:
    """Draw a muted line or speck."""
    x, y, angle = _draw_pose(rng, size)
    length = rng.uniform(2, 26) * (size / REFERENCE_SIDE)
    return _draw_bar(rng, size, (x, y), angle, length=length)


def _draw_crossing_bar(rng: np.random.Generator, size: int) -> Bar:
    """Draw a muted line across the whole picture."""
    x, y, angle = _draw_pose(rng, size)
    return _draw_bar(rng, size, (x, y), angle, length=3 * size)


def _draw_pose(rng: np.random.Generator, size: int) -> tuple[float, float, float]:
    x, y = rng.uniform(0, size, 2)
    return x, y, rng.uniform(0, 2 * np.pi)


def _draw_bar(
    rng: np.random.Generator, size: int, center: tuple[float, float], angle: float, *, length: float
) -> Bar:
    x, y = center
    dx, dy = length * np.cos(angle) / 2, length * np.sin(angle) / 2
    brightness = rng.uniform(30, 225)
    channels = np.clip(brightness + rng.uniform(-14, 14, 3), 0, 255)
    return Bar(
        ends=(float(x - dx), float(y - dy), float(x + dx), float(y + dy)),
        width=float(rng.uniform(1.6, 3.0)) * (size / REFERENCE_SIDE),
        paint=tuple(int(value) for value in channels),
    )


# ------------------------------------------------------------------------------------------ Refs


def _draw_refs(
    rng: np.random.Generator,
    level: Level,
    objects: list[SceneObject],
    split: str,
    *,
    size: int,
) -> list[dict[str, Any]]:
    """Choose two or three targets, each with two or three different sentences.

    A target is never the only object of its class. In testA, it is a circle.
    """
    scene = phrases.Scene(objects, size)
    classes = [item.shape for item in objects]
    wanted = int(rng.integers(2, 4))

    refs: list[dict[str, Any]] = []
    for target in rng.permutation(len(objects)).tolist():
        if len(refs) == wanted:
            break
        shape = classes[target]
        if classes.count(shape) < 2 or (split == "testA" and shape != "circle"):
            continue

        choices = phrases.clear_phrases(target, scene, hard="order" in level.kinds)
        sentences = _draw_sentences(rng, level, choices, wanted=int(rng.integers(2, 4)))
        if len(sentences) >= 2:
            typed = [[_as_typed(sentence, rng), sentence] for sentence in sentences]
            refs.append({"object": target, "sentences": typed})
    return refs


def _draw_sentences(
    rng: np.random.Generator,
    level: Level,
    choices: dict[str, list[phrases.Phrase]],
    *,
    wanted: int,
) -> list[str]:
    """Draw up to `wanted` sentences that differ in more than an article.

    Args:
        choices: the clear phrases by kind.
    """
    kinds = [kind for kind in level.kinds if choices[kind]]
    if not kinds:
        return []
    weights = np.array([level.kinds[kind] for kind in kinds])

    sentences: dict[str, str] = {}  # by their text without articles
    used: set[phrases.Phrase] = set()
    for kind in rng.choice(len(kinds), PHRASE_DRAWS, p=weights / weights.sum()).tolist():
        phrase = _draw_phrase(rng, choices[kinds[kind]], used)
        used.add(phrase)
        sentence = phrases.write_sentence(phrase, rng)
        sentences.setdefault(sentence.replace("the ", ""), sentence)
        if len(sentences) == wanted:
            break
    return list(sentences.values())


def _draw_phrase(
    rng: np.random.Generator, choices: list[phrases.Phrase], used: set[phrases.Phrase]
) -> phrases.Phrase:
    """Draw a phrase; color words are favored over sides, and new phrases over used ones."""
    weights = []
    for phrase in choices:
        color_weight = 6.0 if phrase.color else 1.0
        used_weight = 0.2 if phrase in used else 1.0
        weights.append(color_weight / (1 + len(phrase.sides)) * used_weight)
    cumulative = np.cumsum(weights)
    return choices[int(np.searchsorted(cumulative, rng.random() * cumulative[-1], "right"))]


def _as_typed(sentence: str, rng: np.random.Generator) -> str:
    """Return the `raw` form: what a person might have typed, with capitals and full stops."""
    typed = sentence.capitalize() if rng.random() < 0.3 else sentence
    if rng.random() < 0.2:
        typed += str(rng.choice((".", " ")))
    return typed
