"""Drawing for RefShapes: anti-aliased shapes over textured ground, and the exact contours of what stays visible.

Lengths are pixels of the finished picture. Everything is drawn once, as a map of labels at four times the resolution;
colors and masks both follow from that map, so a mask never disagrees with the picture by more than half a pixel.
Legend: S side of the picture, V vertices, y grows downward.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
COLORS = {
    "red": (221, 38, 42),
    "orange": (246, 124, 16),
    "yellow": (246, 230, 50),
    "green": (36, 168, 62),
    "blue": (42, 88, 228),
    "purple": (156, 56, 196),
}
OVERSAMPLE = 4
GROUND, CLUTTER = (
    0,
    200,
)  # labels; object i has 2i + 1 (rim) and 2i + 2 (inside); clutter has CLUTTER and above


@dataclass(frozen=True)
class Thing:
    """One object of a scene; `color` is None in a gray picture."""

    shape: str
    color: str | None
    size: str  # "small" or "big"
    x: float  # of the center; after `render` of what is visible
    y: float
    radius: float  # of the circle with this area (other shapes have 0.85 of it)
    angle: float  # radians
    paint: tuple[int, int, int]


@dataclass(frozen=True)
class Bar:
    """A straight piece of clutter."""

    ends: tuple[float, float, float, float]
    width: float
    paint: tuple[int, int, int]


def outline(thing: Thing, shrink: float = 0.0) -> np.ndarray:
    """Vertices float [V, 2] (x, y) of an object's border, drawn in by `shrink` pixels of its radius."""
    turn = np.array(
        [[np.cos(thing.angle), np.sin(thing.angle)], [-np.sin(thing.angle), np.cos(thing.angle)]]
    )
    return _UNIT[thing.shape] @ turn * (thing.radius - shrink) + (thing.x, thing.y)


def reach(thing: Thing) -> float:
    """The farthest an object's border is from its center, pixels."""
    return thing.radius * _REACH[thing.shape]


def full_area(thing: Thing) -> float:
    """Area of the whole object, hidden parts included, square pixels."""
    return (1.0 if thing.shape == "circle" else 0.85) * np.pi * thing.radius**2


def polygon_area(vertices: list[tuple[float, float]]) -> float:
    """Shoelace area; positive where the vertices (x, y) run clockwise on the screen."""
    return (
        sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in zip(vertices, [*vertices[1:], vertices[0]]))
        / 2
    )


def label_map(things: list[Thing], behind: list[Bar], before: list[Bar], size: int) -> np.ndarray:
    """Draw clutter, objects in order, clutter; return uint8 [4S, 4S] labels."""
    canvas = Image.new("L", (size * OVERSAMPLE,) * 2, GROUND)
    draw = ImageDraw.Draw(canvas)
    rim = 1.1 * size / 96
    for number, bar in enumerate(behind):
        _draw_bar(draw, bar, CLUTTER + number)
    for number, thing in enumerate(things):
        for label, shrink in ((2 * number + 1, 0.0), (2 * number + 2, rim)):
            draw.polygon([tuple(p) for p in outline(thing, shrink) * OVERSAMPLE], fill=label)
    for number, bar in enumerate(before):
        _draw_bar(draw, bar, CLUTTER + len(behind) + number)
    return np.asarray(canvas)


def visible_masks(labels: np.ndarray, count: int) -> np.ndarray:
    """bool [count, S, S]: pixels of which an object covers at least half."""
    owner = np.where(labels < CLUTTER, (labels + 1) // 2, 0)
    return np.stack(
        [_covered(owner == number) * 2 >= OVERSAMPLE**2 for number in range(1, count + 1)]
    )


def colorize(
    labels: np.ndarray,
    things: list[Thing],
    bars: list[Bar],
    ground: np.ndarray,
    rng: np.random.Generator,
) -> Image.Image:
    """The picture of a label map over `ground` float [S, S, 3]: flat paints, darker rims, uneven light, sensor noise."""
    table = np.zeros((256, 3), np.uint8)
    for number, thing in enumerate(things):
        table[2 * number + 1] = np.multiply(thing.paint, 0.45)
        table[2 * number + 2] = thing.paint
    for number, bar in enumerate(bars):
        table[CLUTTER + number] = bar.paint
    flat = Image.fromarray(labels, "L")
    flat.putpalette(table.tobytes())
    picture = np.asarray(flat.convert("RGB").reduce(OVERSAMPLE), np.float32)
    picture = (
        picture
        + (_covered(labels == GROUND).astype(np.float32) / OVERSAMPLE**2)[..., None] * ground
    )
    size = ground.shape[0]
    light = _ramp(size, rng.uniform(0, 2 * np.pi)) - np.float32(0.5)
    picture *= (1 + np.float32(rng.uniform(0, 0.12)) * light)[..., None]
    picture += rng.standard_normal((size, size, 1), np.float32) * np.float32(rng.uniform(1, 4))
    return Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))


def _covered(fine: np.ndarray) -> np.ndarray:
    """How many of a pixel's 16 parts are set: bool [4S, 4S] to uint8 [S, S]."""
    return np.asarray(Image.fromarray(fine.view(np.uint8) * OVERSAMPLE**2).reduce(OVERSAMPLE))


def textured_ground(rng: np.random.Generator, size: int, level: float) -> np.ndarray:
    """A muted background float [S, S, 3] around the brightness `level`: noise, stripes, a gradient or a checkerboard."""
    tint = rng.uniform(-12, 12, 3)
    contrast = rng.uniform(14, 34) * rng.choice((-1, 1))
    unit = size / 96
    match int(rng.integers(4)):
        case 0:
            cells = int(rng.integers(5, 14))
            coarse = Image.fromarray(rng.integers(0, 256, (cells, cells), np.uint8))
            pattern = (
                np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), np.float32) / 255
            )
        case 1:
            angle, period = rng.uniform(0, 2 * np.pi), rng.uniform(6, 18) * unit
            wave = np.sin(2 * np.pi * _ramp(size, angle) * size * 1.4 / period)
            pattern = np.clip(0.5 + wave, 0, 1)
        case 2:
            pattern = _ramp(size, rng.uniform(0, 2 * np.pi))
        case _:
            cell = rng.uniform(6, 16) * unit
            index = (np.arange(size) / cell + rng.uniform(0, 1)).astype(int)
            pattern = (index[:, None] + index[None, :]) % 2
    return (level + (np.asarray(pattern, np.float32)[..., None] - 0.5) * contrast + tint).astype(
        np.float32
    )


def trace(mask: np.ndarray) -> list[list[int]]:
    """COCO polygons of a mask: flat [x0, y0, x1, y1, …] along pixel borders, one a 4-connected part.

    COCO polygons cannot say "hole": a mask with one is cut in two there, until no part has any. Rasterizing the union
    of the polygons (pycocotools, or even-odd at pixel centers) gives the mask back exactly.
    """
    loops = _loops(mask)
    for loop in loops:
        if polygon_area(loop) < 0:
            xs = [x for x, _ in loop]
            column = (min(xs) + max(xs) + 1) // 2
            columns = np.arange(mask.shape[1])
            return trace(mask & (columns < column)) + trace(mask & (columns >= column))
    return [[value for point in loop for value in point] for loop in loops]


def _loops(mask: np.ndarray) -> list[list[tuple[int, int]]]:
    """Border walks with the mask on the right hand; corners only. Holes come out counterclockwise."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return []
    top, left = int(rows[0]), int(columns[0])
    inside = np.pad(mask[top : rows[-1] + 1, left : columns[-1] + 1], 1)
    here = inside[1:-1, 1:-1]
    steps: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for dx, dy, neighbor, ox, oy in (
        (1, 0, inside[:-2, 1:-1], 0, 0),
        (0, 1, inside[1:-1, 2:], 1, 0),
        (-1, 0, inside[2:, 1:-1], 1, 1),
        (0, -1, inside[1:-1, :-2], 0, 1),
    ):
        for y, x in np.argwhere(here & ~neighbor).tolist():
            steps.setdefault((x + ox + left, y + oy + top), []).append((dx, dy))
    loops = []
    while steps:
        start = next(iter(steps))
        point, (dx, dy) = start, steps[start][0]
        loop: list[tuple[int, int]] = []
        while point in steps:
            choices = steps[point]
            # Where two pixels touch at a corner only, turning right stays at the pixel we came along.
            step = (-dy, dx) if (-dy, dx) in choices else choices[0]
            choices.remove(step)
            if not choices:
                del steps[point]
            if step != (dx, dy) or not loop:
                loop.append(point)
            dx, dy = step
            point = (point[0] + dx, point[1] + dy)
            if point == start and (start not in steps or (-dy, dx) not in steps[start]):
                break
        if len(loop) > 1 and _straight(loop[-1], loop[0], loop[1]):
            loop.pop(0)
        loops.append(loop)
    return loops


def _straight(a: tuple[int, int], b: tuple[int, int], c: tuple[int, int]) -> bool:
    return (a[0] == b[0] == c[0]) or (a[1] == b[1] == c[1])


def _draw_bar(draw: ImageDraw.ImageDraw, bar: Bar, label: int) -> None:
    x0, y0, x1, y1 = bar.ends
    along = np.array([x1 - x0, y1 - y0]) / max(np.hypot(x1 - x0, y1 - y0), 1e-9) * bar.width / 2
    across = np.array([-along[1], along[0]])
    first, last = np.array([x0, y0]), np.array([x1, y1])
    corners = (first + across, last + across, last - across, first - across)
    draw.polygon([tuple(corner * OVERSAMPLE) for corner in corners], fill=label)


def _ramp(size: int, angle: float) -> np.ndarray:
    """float32 [S, S] that rises from 0 to 1 along a direction."""
    y, x = np.mgrid[:size, :size].astype(np.float32)
    ramp = x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle))
    return (ramp - ramp.min()) / (ramp.max() - ramp.min())


def _unit_outlines() -> dict[str, np.ndarray]:
    """Shapes around the origin, clockwise on the screen: the circle of area pi, the others of 0.85 pi."""
    turns = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    lobes = 13 * np.cos(turns) - 5 * np.cos(2 * turns) - 2 * np.cos(3 * turns) - np.cos(4 * turns)
    heart = np.stack([16 * np.sin(turns) ** 3, -lobes], 1)
    tips = np.arange(10) * np.pi / 5 - np.pi / 2
    star = (
        np.stack([np.cos(tips), np.sin(tips)], 1) * np.where(np.arange(10) % 2, 0.52, 1.0)[:, None]
    )
    arm = 0.4
    corner = np.array([[-arm, -1], [arm, -1], [arm, -arm]], float)
    quarter = np.array([[0, 1], [-1, 0]], float)
    shapes = {
        "circle": np.stack([np.cos(turns), np.sin(turns)], 1),
        "square": np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]], float),
        "triangle": np.array([[0, -1], [0.87, 0.5], [-0.87, 0.5]], float),
        "star": star,
        "cross": np.concatenate([corner @ np.linalg.matrix_power(quarter, k) for k in range(4)]),
        "heart": heart - (0, 2.5),
    }
    areas = {name: np.pi if name == "circle" else 0.85 * np.pi for name in shapes}
    return {
        name: points * np.sqrt(areas[name] / polygon_area(points.tolist()))
        for name, points in shapes.items()
    }


_UNIT = _unit_outlines()
_REACH = {name: float(np.hypot(*points.T).max()) for name, points in _UNIT.items()}
