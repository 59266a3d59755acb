"""Draw the scenes of RefShapes: anti-aliased shapes over a textured background, and exact contours.

Lengths are pixels of the finished picture. A scene is drawn once, as a map of labels at four times
the resolution. Colors and masks both follow from that map, so a mask never disagrees with the
picture by more than half a pixel.

Legend: S side of the picture, V vertices; y points downward.
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
REFERENCE_SIDE = 96  # fixed lengths are for a picture of this side and grow with it

# Labels: 0 is background, object i has 2i + 1 (rim) and 2i + 2 (inside), clutter has 200 and above.
BACKGROUND = 0
CLUTTER = 200

RIM_WIDTH = 1.1
RIM_SHADE = 0.45  # brightness of the rim, relative to the inside

Point = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class SceneObject:
    shape: str
    color: str | None  # None in a gray picture
    size: str  # "small" or "big"
    x: float  # of the center; in a finished scene, of the center of the visible pixels
    y: float
    radius: float  # of the circle with this area (other shapes have 0.85 of it)
    angle: float  # radians
    paint: tuple[int, int, int]


@dataclass(frozen=True)
class Bar:
    """A straight piece of clutter."""

    ends: tuple[float, float, float, float]  # x0, y0, x1, y1
    width: float
    paint: tuple[int, int, int]


# ---------------------------------------------------------------------------------------- Shapes


def outline(item: SceneObject, shrink: float = 0.0) -> np.ndarray:
    """Return the border of an object as vertices (x, y), float [V, 2].

    Args:
        shrink: pixels to subtract from the radius.
    """
    cos, sin = np.cos(item.angle), np.sin(item.angle)
    rotation = np.array([[cos, sin], [-sin, cos]])
    return _UNIT_OUTLINES[item.shape] @ rotation * (item.radius - shrink) + (item.x, item.y)


def outer_radius(item: SceneObject) -> float:
    """Return the largest distance of the border from the center, in pixels."""
    return item.radius * _UNIT_OUTER_RADII[item.shape]


def full_area(item: SceneObject) -> float:
    """Return the area of the whole object, including hidden parts, in square pixels."""
    return _unit_area(item.shape) * item.radius**2


def polygon_area(vertices: list[tuple[float, float]]) -> float:
    """Shoelace area; positive if the vertices (x, y) run clockwise on the screen."""
    doubled = 0
    for (x0, y0), (x1, y1) in zip(vertices, [*vertices[1:], vertices[0]]):
        doubled += x0 * y1 - x1 * y0
    return doubled / 2


def _unit_area(shape: str) -> float:
    return np.pi if shape == "circle" else 0.85 * np.pi


def _unit_outlines() -> dict[str, np.ndarray]:
    """Return the shapes around the origin with their unit areas, clockwise on the screen."""
    shapes = {
        "circle": _circle(),
        "square": np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]], float),
        "triangle": np.array([[0, -1], [0.87, 0.5], [-0.87, 0.5]], float),
        "star": _star(),
        "cross": _cross(),
        "heart": _heart(),
    }

    # Scale each to its unit area.
    outlines = {}
    for name, points in shapes.items():
        scale = np.sqrt(_unit_area(name) / polygon_area(points.tolist()))
        outlines[name] = points * scale
    return outlines


def _circle() -> np.ndarray:
    turns = _turns()
    return np.stack([np.cos(turns), np.sin(turns)], 1)


def _turns() -> np.ndarray:
    """Return 48 angles around a circle, in radians."""
    return np.linspace(0, 2 * np.pi, 48, endpoint=False)


def _star() -> np.ndarray:
    tips = np.arange(10) * np.pi / 5 - np.pi / 2
    radii = np.where(np.arange(10) % 2, 0.52, 1.0)
    return np.stack([np.cos(tips), np.sin(tips)], 1) * radii[:, None]


def _cross() -> np.ndarray:
    arm = 0.4
    corner = np.array([[-arm, -1], [arm, -1], [arm, -arm]], float)
    quarter_turn = np.array([[0, 1], [-1, 0]], float)
    return np.concatenate([corner @ np.linalg.matrix_power(quarter_turn, k) for k in range(4)])


def _heart() -> np.ndarray:
    turns = _turns()
    x = 16 * np.sin(turns) ** 3
    y = 13 * np.cos(turns) - 5 * np.cos(2 * turns) - 2 * np.cos(3 * turns) - np.cos(4 * turns)
    return np.stack([x, -y], 1) - (0, 2.5)


_UNIT_OUTLINES = _unit_outlines()
_UNIT_OUTER_RADII = {
    name: float(np.hypot(*points.T).max()) for name, points in _UNIT_OUTLINES.items()
}


# ------------------------------------------------------------------------------ Labels and masks


def draw_labels(
    objects: list[SceneObject], behind: list[Bar], before: list[Bar], size: int
) -> np.ndarray:
    """Draw the bars behind, the objects in order, the bars before; return labels uint8 [4S, 4S]."""
    canvas = Image.new("L", (size * OVERSAMPLE,) * 2, BACKGROUND)
    draw = ImageDraw.Draw(canvas)

    for number, bar in enumerate(behind):
        _draw_bar(draw, bar, CLUTTER + number)
    rim = RIM_WIDTH * size / REFERENCE_SIDE
    for number, item in enumerate(objects):
        _draw_polygon(draw, outline(item), 2 * number + 1)
        _draw_polygon(draw, outline(item, rim), 2 * number + 2)
    for number, bar in enumerate(before, start=len(behind)):
        _draw_bar(draw, bar, CLUTTER + number)
    return np.asarray(canvas)


def visible_masks(labels: np.ndarray, count: int) -> np.ndarray:
    """Return the pixels that are at least half covered by each of `count` objects.

    Returns:
        bool [count, S, S].
    """
    owner = np.where(labels < CLUTTER, (labels + 1) // 2, 0)
    masks = [
        _covered(owner == number) * 2 >= OVERSAMPLE**2  # at least half of the subpixels
        for number in range(1, count + 1)
    ]
    return np.stack(masks)


def _draw_polygon(draw: ImageDraw.ImageDraw, vertices: np.ndarray, label: int) -> None:
    draw.polygon([tuple(point) for point in vertices * OVERSAMPLE], fill=label)


def _draw_bar(draw: ImageDraw.ImageDraw, bar: Bar, label: int) -> None:
    x0, y0, x1, y1 = bar.ends
    length = max(np.hypot(x1 - x0, y1 - y0), 1e-9)
    along = np.array([x1 - x0, y1 - y0]) / length * bar.width / 2
    across = np.array([-along[1], along[0]])

    first, last = np.array([x0, y0]), np.array([x1, y1])
    corners = np.stack([first + across, last + across, last - across, first - across])
    _draw_polygon(draw, corners, label)


def _covered(fine: np.ndarray) -> np.ndarray:
    """Count the set subpixels (0 to 16) of each pixel: bool [4S, 4S] to uint8 [S, S]."""
    return np.asarray(Image.fromarray(fine.view(np.uint8) * OVERSAMPLE**2).reduce(OVERSAMPLE))


# ---------------------------------------------------------------------------------------- Colors


def colorize(
    labels: np.ndarray,
    objects: list[SceneObject],
    bars: list[Bar],
    background: np.ndarray,
    rng: np.random.Generator,
) -> Image.Image:
    """Paint a label map: flat colors, darker rims, uneven light and sensor noise.

    Args:
        background: float [S, S, 3].
    """
    size = background.shape[0]
    flat = Image.fromarray(labels, "L")
    flat.putpalette(_palette(objects, bars).tobytes())
    picture = np.asarray(flat.convert("RGB").reduce(OVERSAMPLE), np.float32)

    # The palette has black for the background, so its share of each pixel can be added.
    background_share = _covered(labels == BACKGROUND).astype(np.float32) / OVERSAMPLE**2
    picture = picture + background_share[..., None] * background

    # Uneven light, then noise that is equal in the three channels.
    light = _ramp(size, rng.uniform(0, 2 * np.pi)) - np.float32(0.5)
    picture *= (1 + np.float32(rng.uniform(0, 0.12)) * light)[..., None]
    picture += rng.standard_normal((size, size, 1), np.float32) * np.float32(rng.uniform(1, 4))
    return Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))


def textured_background(rng: np.random.Generator, size: int, level: float) -> np.ndarray:
    """Draw a muted background: noise, stripes, a gradient or a checkerboard.

    Args:
        level: mean brightness.

    Returns:
        float32 [S, S, 3].
    """
    tint = rng.uniform(-12, 12, 3)
    contrast = rng.uniform(14, 34) * rng.choice((-1, 1))
    unit = size / REFERENCE_SIDE

    match int(rng.integers(4)):
        case 0:  # noise
            cells = int(rng.integers(5, 14))
            coarse = Image.fromarray(rng.integers(0, 256, (cells, cells), np.uint8))
            smooth = coarse.resize((size, size), Image.Resampling.BICUBIC)
            pattern = np.asarray(smooth, np.float32) / 255
        case 1:  # stripes
            angle = rng.uniform(0, 2 * np.pi)
            period = rng.uniform(6, 18) * unit
            wave = np.sin(2 * np.pi * _ramp(size, angle) * size * 1.4 / period)
            pattern = np.clip(0.5 + wave, 0, 1)
        case 2:  # a gradient
            pattern = _ramp(size, rng.uniform(0, 2 * np.pi))
        case _:  # a checkerboard
            cell = rng.uniform(6, 16) * unit
            index = (np.arange(size) / cell + rng.uniform(0, 1)).astype(int)
            pattern = (index[:, None] + index[None, :]) % 2

    centered = np.asarray(pattern, np.float32)[..., None] - 0.5
    return (level + centered * contrast + tint).astype(np.float32)


def _palette(objects: list[SceneObject], bars: list[Bar]) -> np.ndarray:
    """Return the color of every label, uint8 [256, 3]."""
    palette = np.zeros((256, 3), np.uint8)
    for number, item in enumerate(objects):
        palette[2 * number + 1] = np.multiply(item.paint, RIM_SHADE)
        palette[2 * number + 2] = item.paint
    for number, bar in enumerate(bars):
        palette[CLUTTER + number] = bar.paint
    return palette


def _ramp(size: int, angle: float) -> np.ndarray:
    """Return float32 [S, S] that rises from 0 to 1 along a direction."""
    y, x = np.mgrid[:size, :size].astype(np.float32)
    ramp = x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle))
    return (ramp - ramp.min()) / (ramp.max() - ramp.min())


# -------------------------------------------------------------------------------------- Polygons


def trace_polygons(mask: np.ndarray) -> list[list[int]]:
    """Trace a mask into COCO polygons along pixel borders: flat lists [x0, y0, x1, y1, …].

    Each 4-connected part has a polygon. COCO polygons cannot express a hole, so a mask with a hole
    is cut in two through it, until no part has any. Rasterizing the union of the polygons (with
    pycocotools, or by the even-odd rule at pixel centers) gives back the exact mask.
    """
    loops = _trace_loops(mask)
    for loop in loops:
        is_hole = polygon_area(loop) < 0
        if is_hole:
            xs = [x for x, _ in loop]
            middle = (min(xs) + max(xs) + 1) // 2
            columns = np.arange(mask.shape[1])
            left, right = mask & (columns < middle), mask & (columns >= middle)
            return trace_polygons(left) + trace_polygons(right)
    return [[value for point in loop for value in point] for loop in loops]


def _trace_loops(mask: np.ndarray) -> list[list[Point]]:
    """Walk along every border with the mask on the right-hand side; return the corners.

    Outer borders come out clockwise, holes counterclockwise.
    """
    steps = _border_steps(mask)
    loops = []
    while steps:
        loop = _follow_border(steps)
        # The walk may have started in the middle of a straight line.
        if len(loop) > 1 and _on_one_line(loop[-1], loop[0], loop[1]):
            loop.pop(0)
        loops.append(loop)
    return loops


def _border_steps(mask: np.ndarray) -> dict[Point, list[Point]]:
    """Return the steps (dx, dy) along the borders, by the point where each starts."""
    rows = np.flatnonzero(mask.any(1))
    columns = np.flatnonzero(mask.any(0))
    if not len(rows):
        return {}

    # Only the bounding box matters; the padding gives its outer pixels neighbors.
    top, left = int(rows[0]), int(columns[0])
    padded = np.pad(mask[top : rows[-1] + 1, left : columns[-1] + 1], 1)
    inside = padded[1:-1, 1:-1]

    # Each side of a pixel: the neighbor across, the step along, and the corner where it starts.
    sides = (
        (padded[:-2, 1:-1], (1, 0), (0, 0)),  # top
        (padded[1:-1, 2:], (0, 1), (1, 0)),  # right
        (padded[2:, 1:-1], (-1, 0), (1, 1)),  # bottom
        (padded[1:-1, :-2], (0, -1), (0, 1)),  # left
    )
    steps: dict[Point, list[Point]] = {}
    for neighbor, step, (corner_x, corner_y) in sides:
        for y, x in np.argwhere(inside & ~neighbor).tolist():
            start = (x + corner_x + left, y + corner_y + top)
            steps.setdefault(start, []).append(step)
    return steps


def _follow_border(steps: dict[Point, list[Point]]) -> list[Point]:
    """Take the steps of one closed border out of `steps`; return its start and its corners."""
    start = next(iter(steps))
    point, direction = start, steps[start][0]
    loop: list[Point] = []
    while point in steps:
        # Where two pixels touch at a corner only, a right turn stays at the pixel we came along.
        choices = steps[point]
        right_turn = (-direction[1], direction[0])
        step = right_turn if right_turn in choices else choices[0]
        choices.remove(step)
        if not choices:
            del steps[point]

        if step != direction or not loop:
            loop.append(point)
        direction = step
        point = (point[0] + step[0], point[1] + step[1])

        right_turn = (-direction[1], direction[0])
        if point == start and right_turn not in steps.get(start, ()):
            break
    return loop


def _on_one_line(a: Point, b: Point, c: Point) -> bool:
    return (a[0] == b[0] == c[0]) or (a[1] == b[1] == c[1])
