"""A scene, the defects it has, what they cost, and how it is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
SIZE = 48  # pixels; three cells of 16, which is one image token of the tiny backbone each
CELL = 16
CORNERS = ((0, 0), (0, 2), (2, 0), (2, 2))  # (row, column) of the four slots, in the order of the prompt

COLOURS: Mapping[str, tuple[float, float, float]] = {
    "red": (0.86, 0.16, 0.16),
    "green": (0.13, 0.62, 0.24),
    "blue": (0.14, 0.34, 0.86),
    "yellow": (0.97, 0.80, 0.10),
}
SHAPES = ("ring", "square", "triangle")
STATES = ("grounded", "shadowless", "floating", "pierced")

SEVERITY: Mapping[str, Mapping[str, float]] = {
    "alignment": {"colour": 0.5, "shape": 1.0, "missing": 1.5},
    "realism": {"striped": 0.5, "speckled": 1.0, "blurred": 1.5, "blocky": 2.5},
    "aesthetics": {"framed": 0.5, "tilted": 1.0, "cluttered": 1.0, "clashing": 1.5},
    "plausibility": {"shadowless": 0.5, "floating": 1.0, "pierced": 1.5},
}
"""Points that each defect costs, out of the four between the best and the worst score. Every bin is reached."""

MAIN = 1.5
"""The first object of the prompt is the subject: its defects cost this much more."""

MISTAKEN: Mapping[str, Mapping[str, float]] = {
    "alignment": {"colour": 1.5, "shape": 0.5, "missing": 0.5},
    "realism": {"striped": 2.0, "speckled": 1.5, "blurred": 0.5, "blocky": 0.5},
    "aesthetics": {"framed": 1.5, "tilted": 0.5, "cluttered": 1.5, "clashing": 0.5},
    "plausibility": {"shadowless": 1.5, "floating": 0.5, "pierced": 0.5},
}
"""What the base model is taught to believe: it sees well and weighs badly, as a model does that nobody has aligned."""

DIMENSIONS = tuple(SEVERITY)

FINE = {
    "realism": {"striped": "even", "speckled": "clean", "blurred": "sharp", "blocky": "sharp"},
    "aesthetics": {"framed": "open", "tilted": "level", "cluttered": "tidy", "clashing": "calm"},
}

"""What a careful viewer writes where a defect of the whole picture is absent."""

DARK, SPECKLED, SPECKLE, BLOCKY = 0.35, 0.12, 0.95, 0.6
"""Light that a stripe takes, share of speckled pixels and their brightness, weight of the blocks."""

WEAVE, TILT = 0.055, (0.27, 0.33)
"""Height of the faint weave that only a sharp picture keeps; slope of a tilted horizon."""

FRAME, SCRAP = (0.25, 0.12, 0.05), (0.36, 0.30, 0.22)

_WALLS = ((0.87, 0.86, 0.80), (0.80, 0.86, 0.88), (0.86, 0.82, 0.84))
_FLOORS = ((0.74, 0.70, 0.62), (0.66, 0.71, 0.74), (0.72, 0.67, 0.70))
_CLASHING = ((0.98, 0.25, 0.90), (0.70, 0.20, 0.98))


@dataclass(frozen=True)
class Thing:
    """One object: what it is and how it stands. ``state`` is one of ``STATES``."""

    colour: str
    shape: str
    state: str = "grounded"


@dataclass(frozen=True)
class Scene:
    """What is drawn: four things (None: missing) and the defects of the whole picture.

    Args:
        things: the four corners, in the order of the prompt.
        realism: among ``striped``, ``speckled``, ``blurred``, ``blocky``; the last two exclude each other.
        aesthetics: among ``framed``, ``tilted``, ``cluttered``, ``clashing``.
        seed: decides everything that earns no score: colours of the room, jitter, grain.
    """

    things: tuple[Thing | None, Thing | None, Thing | None, Thing | None]
    realism: frozenset[str] = frozenset()
    aesthetics: frozenset[str] = frozenset()
    seed: int = 0


Request = tuple[tuple[str, str], ...]


def write_prompt(request: Request) -> str:
    """The prompt that asks for four (colour, shape) pairs.

    Example:
        >>> write_prompt((("red", "ring"), ("blue", "square"), ("green", "triangle"), ("red", "square")))
        'red ring, blue square; green triangle, red square'
    """
    a, b, c, d = (f"{colour} {shape}" for colour, shape in request)
    return f"{a}, {b}; {c}, {d}"


def read_prompt(prompt: str) -> Request:
    """The four (colour, shape) pairs that a prompt asks for.

    Raises:
        ValueError: not a prompt of this world.
    """
    words = [tuple(part.split()) for part in prompt.replace(";", ",").split(",")]
    if len(words) != 4 or any(len(w) != 2 or w[0] not in COLOURS or w[1] not in SHAPES for w in words):
        raise ValueError(f"not a prompt of the built-in world (four 'colour shape', as in write_prompt): {prompt!r}")
    return tuple((w[0], w[1]) for w in words)


def alignment_defect(thing: Thing | None, asked: tuple[str, str]) -> str | None:
    """What is wrong with a slot: ``missing``, ``shape``, ``colour`` (the worst one only) or None."""
    if thing is None:
        return "missing"
    if thing.shape != asked[1]:
        return "shape"
    return "colour" if thing.colour != asked[0] else None


def defects(scene: Scene, prompt: str) -> dict[str, list[tuple[str, float]]]:
    """Per dimension, the defects of a scene as (name, weight); the weight is ``MAIN`` for the first object, else 1."""
    slots = list(zip(scene.things, read_prompt(prompt), (MAIN, 1.0, 1.0, 1.0), strict=True))
    aligned = [(alignment_defect(thing, asked), weight) for thing, asked, weight in slots]
    return {
        "alignment": [(name, weight) for name, weight in aligned if name is not None],
        "realism": [(name, 1.0) for name in SEVERITY["realism"] if name in scene.realism],
        "aesthetics": [(name, 1.0) for name in SEVERITY["aesthetics"] if name in scene.aesthetics],
        "plausibility": [(t.state, weight) for t, _, weight in slots if t is not None and t.state != "grounded"],
    }


def true_scores(scene: Scene, prompt: str, severity: Mapping[str, Mapping[str, float]] = SEVERITY) -> dict[str, float]:
    """The score of each dimension by the world's rubric: 5 minus the weighted severities, not below 1.

    Example:
        >>> things = (Thing("red", "ring"), None, Thing("green", "ring"), Thing("red", "square", "floating"))
        >>> true_scores(Scene(things, realism=frozenset({"speckled"})), "red ring, blue square; green triangle, red square")
        {'alignment': 2.5, 'realism': 4.0, 'aesthetics': 5.0, 'plausibility': 4.0}
    """
    found = defects(scene, prompt)
    return {name: max(1.0, 5.0 - sum(severity[name][d] * w for d, w in found[name])) for name in DIMENSIONS}


def draw(scene: Scene) -> NDArray[np.uint8]:
    """Draw a scene.

    Returns:
        ``(48, 48, 3)`` uint8 RGB.
    """
    rng = np.random.default_rng([scene.seed, 1])
    y, x = _grid()
    room = int(rng.integers(len(_WALLS)))
    wall, floor = np.array(_WALLS[room]), np.array(_FLOORS[room])
    if "clashing" in scene.aesthetics:
        wall = np.array(_CLASHING[int(rng.integers(len(_CLASHING)))])
        floor = wall * 0.8
    slope = float(rng.choice([-1, 1])) * rng.uniform(*TILT) if "tilted" in scene.aesthetics else 0.0
    horizon = 24 + rng.uniform(-0.5, 0.5) + slope * (x - SIZE / 2)
    image = wall + (floor - wall) * _cover(horizon - y)[..., None] + weave()
    if "cluttered" in scene.aesthetics:
        image = _clutter(image, rng)
    for thing, corner in zip(scene.things, CORNERS, strict=True):
        if thing is not None:
            image = _place(image, thing, corner, rng)
    if "framed" in scene.aesthetics:
        edge = np.minimum.reduce([x, y, SIZE - 1 - x, SIZE - 1 - y])
        image = _paint(image, _cover(edge - 1.6), FRAME)
    return (_degrade(image, scene.realism, rng).clip(0, 1) * 255).round().astype(np.uint8)


@cache
def _grid() -> tuple[Array, Array]:
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float64)
    return y, x


def weave() -> Array:
    """``(48, 48, 1)``, the texture of the room, to be added to its colours."""
    y, x = _grid()
    return WEAVE * (np.sin(2.1 * x) * np.sin(2.1 * y))[..., None]


def _cover(signed_distance: Array) -> Array:
    """Share of each pixel that a region covers, from its signed distance in pixels (negative inside)."""
    return (0.5 - signed_distance).clip(0, 1)


def _paint(image: Array, cover: Array, colour: Sequence[float] | Array) -> Array:
    return image + (np.asarray(colour) - image) * cover[..., None]


def shape_distance(shape: str, dx: Array, dy: Array, radius: float) -> Array:
    """Signed distance in pixels to a shape of this radius around the origin; y points down."""
    if shape == "ring":
        return abs(np.hypot(dx, dy) - 0.72 * radius) - 0.28 * radius
    if shape == "square":
        return np.maximum(abs(dx), abs(dy)) - 0.88 * radius
    return np.maximum(abs(dx) * 0.87 - (dy + radius) * 0.5, dy - 0.8 * radius)  # a triangle that stands on its base


def _place(image: Array, thing: Thing, corner: tuple[int, int], rng: np.random.Generator) -> Array:
    """Draw one thing and its shadow, in place, within its cell and a margin of two pixels."""
    top, left = (max(0, k * CELL - 2) for k in corner)
    window = (slice(top, (corner[0] + 1) * CELL + 2), slice(left, (corner[1] + 1) * CELL + 2))
    y, x = (axis[window] for axis in _grid())
    part = image[window]
    cx = corner[1] * CELL + 7.5 + rng.uniform(-0.7, 0.7)
    ground = corner[0] * CELL + 13.0 + rng.uniform(-0.5, 0.5)
    radius = rng.uniform(4.6, 5.3)
    foot = {"ring": 1.0, "square": 0.88, "triangle": 0.8}[thing.shape] * radius
    cy = ground - foot - (3.2 if thing.state == "floating" else 0.3)
    if thing.state != "shadowless":
        shadow = np.hypot((x - cx - 0.6) / (radius * 1.05), (y - ground) / 1.5)
        part = _paint(part, (1.5 - shadow).clip(0, 1) * 0.75, (0.12, 0.11, 0.14))
    dx, dy = x - cx, y - cy
    shade = 1.0 + 0.10 * (-(dx + dy) / radius).clip(-1, 1)  # lit from the upper left
    body = (np.asarray(COLOURS[thing.colour]) * shade[..., None]).clip(0, 1)
    part = _paint(part, _cover(shape_distance(thing.shape, dx, dy, radius)), body)
    if thing.state == "pierced":
        along, across = (dx + dy) * 0.7071, (dx - dy) * 0.7071
        part = _paint(part, _cover(np.maximum(abs(along) - 7.4, abs(across) - 0.9)), (0.16, 0.16, 0.20))
    image[window] = part
    return image


def _clutter(image: Array, rng: np.random.Generator) -> Array:
    """Scraps on the floor and the wall, in the four cells between the corners."""
    y, x = _grid()
    for row, column in ((0, 1), (1, 0), (1, 2), (2, 1)):
        for _ in range(2):
            cy, cx = row * CELL + rng.uniform(4, 12), column * CELL + rng.uniform(4, 12)
            turn = rng.uniform(0, np.pi / 2)
            u = (x - cx) * np.cos(turn) + (y - cy) * np.sin(turn)
            v = (y - cy) * np.cos(turn) - (x - cx) * np.sin(turn)
            scrap = np.maximum(abs(u) - rng.uniform(1.6, 2.6), abs(v) - 1.3)
            image = _paint(image, _cover(scrap), SCRAP)
    return image


def _degrade(image: Array, realism: frozenset[str], rng: np.random.Generator) -> Array:
    y, _ = _grid()
    if "blurred" in realism:
        image = _blur(image)
    if "blocky" in realism:
        blocks = image.reshape(SIZE // 4, 4, SIZE // 4, 4, 3).mean((1, 3)).repeat(4, 0).repeat(4, 1)
        image = (1 - BLOCKY) * image + BLOCKY * blocks  # shapes stay readable, so that one defect does not hide another
    if "speckled" in realism:
        image = image + (SPECKLE - image) * (rng.random((SIZE, SIZE, 1)) < SPECKLED)
    if "striped" in realism:
        image = image * (1 - DARK * ((y + rng.integers(4)) % 4 == 0))[..., None]
    return image


def _blur(image: Array, sigma: float = 1.3) -> Array:
    taps = np.exp(-0.5 * (np.arange(-4, 5) / sigma) ** 2)
    taps /= taps.sum()
    for axis in (0, 1):
        padded = np.pad(image, [(4, 4) if a == axis else (0, 0) for a in range(3)], mode="edge")
        image = sum(t * padded.take(range(i, i + SIZE), axis) for i, t in enumerate(taps))
    return image
