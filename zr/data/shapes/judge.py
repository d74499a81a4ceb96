"""A judge of the built-in world that reads pixels, without learning: it is no model, so no model's error is in it.

:func:`read` explains a picture by drawing it. Stripes and speckles are undone first; wall, floor and horizon are
measured where nothing can stand; every corner is compared with every thing in every state, drawn by the world itself
at three resolutions; the best of them are moved into place by least squares, and the whole picture is drawn again.
What differs then is clutter, softness, or not of this world: the *legibility* of a picture is the share of it that
the drawing explains, and the points above the lowest score are earned in proportion to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL.Image import Image
from torch import Tensor

from zr.data.shapes import scene as world
from zr.data.shapes.lots import rubric
from zr.data.shapes.scene import CELL, COLOURS, CORNERS, DIMENSIONS, MAIN, SEVERITY, SHAPES, SIZE, STATES, Array, Thing
from zr.rubric import Rubric
from zr.scores import ScoreDistribution

KINDS: tuple[Thing | None, ...] = (None, *(Thing(c, h, t) for h, t, c in product(SHAPES, STATES, COLOURS)))
"""What a slot may hold: nothing, or one of 48 things."""

SCRAP, FRAME, SPECKLE = (0.36, 0.30, 0.22), (0.25, 0.12, 0.05), 0.95
DARK, SHARE = 0.35, 0.12  # how much a stripe takes away; how many pixels are speckled
TOLERANCE = 0.10  # a pixel that far from its drawing is half explained
DOUBT = 0.5  # squared error, summed over a cell, that makes one reading e times less likely than another


@dataclass(frozen=True)
class Reading:
    """What :func:`read` sees.

    Args:
        belief: ``(4, 49)`` probabilities of ``KINDS`` in each slot.
        clarity: ``(4,)`` in [0, 1], whether what stands in a slot looks like anything of this world.
        evidence: for each defect of the whole picture, in [0, 1]; what the world draws gives 0 or 1, or nearly so.
        legibility: share of the picture that its drawing explains, in [0, 1].
    """

    belief: Array
    clarity: Array
    evidence: Mapping[str, float]
    legibility: float

    @property
    def things(self) -> tuple[Thing | None, ...]:
        """The most probable content of each slot."""
        return tuple(KINDS[k] for k in self.belief.argmax(1))

    def scores(self, prompt: str) -> dict[str, float]:
        """The world's rubric applied to what is seen, in score units.

        A slot costs what its readings cost on average, and the dearest defect where it is unclear. The points above 1
        are then multiplied by the legibility.

        Raises:
            ValueError: not a prompt of this world.
        """
        points: dict[str, float] = {}
        weights = np.array([MAIN, 1.0, 1.0, 1.0])
        state = np.array([0.0 if kind is None else SEVERITY["plausibility"].get(kind.state, 0.0) for kind in KINDS])
        for name, costs in (("alignment", _alignment_costs(prompt)), ("plausibility", np.tile(state, (4, 1)))):
            seen = (self.belief * costs).sum(1)
            unclear = max(SEVERITY[name].values())
            points[name] = float(weights @ (self.clarity * seen + (1 - self.clarity) * unclear))
        for name in ("realism", "aesthetics"):
            points[name] = sum(cost * self.evidence[defect] for defect, cost in SEVERITY[name].items())
        return {name: 1 + max(0.0, 4 - points[name]) * self.legibility for name in DIMENSIONS}


def _alignment_costs(prompt: str) -> Array:
    """``(4, 49)`` points that each kind costs in each slot."""
    found = [[world.alignment_defect(kind, asked) for kind in KINDS] for asked in world.read_prompt(prompt)]
    return np.array([[0.0 if name is None else SEVERITY["alignment"][name] for name in row] for row in found])


def read(pixels: ArrayLike) -> Reading:
    """Read a picture.

    Args:
        pixels: ``(48, 48, 3)`` RGB in [0, 1].

    Raises:
        ValueError: another shape, values that are not in [0, 1].

    Example:
        >>> from zr.data.shapes import Scene, draw
        >>> things = (Thing("red", "ring"), None, Thing("green", "ring", "pierced"), Thing("red", "square", "floating"))
        >>> seen = read(draw(Scene(things, realism=frozenset({"speckled"}))) / 255)
        >>> seen.things == things, round(seen.evidence["speckled"], 1), round(seen.evidence["striped"], 1)
        (True, 1.0, 0.0)
    """
    image = np.array(pixels, np.float64)
    if image.shape != (SIZE, SIZE, 3):
        raise ValueError(f"the judge reads pictures of ({SIZE}, {SIZE}, 3) pixels, got {image.shape}")
    if not (image.min() >= -1e-3 and image.max() <= 1 + 1e-3):  # NaN fails too
        raise ValueError("the judge reads pixels in [0, 1]: clamp the picture, and look for NaN")
    image, stripes = _without_stripes(image)
    speckled = _speckles(image)
    valid = ~speckled
    wall, floor, level, slope = _measure_room(image, valid)
    framed = _frame(image, valid, wall, floor)
    clash, wall_known, floor_known = _known_room(wall, floor)

    grounds = np.stack([wall, wall, floor, floor])
    belief, softness, shares = _match(image, valid, grounds, framed > 0.5)
    things = tuple(KINDS[k] for k in belief.argmax(1))
    plan = _Plan(wall_known, floor_known, level, slope, framed > 0.5, things)
    shares = _settle(image, valid, plan, shares, softness)

    plain, woven = plan.render(shares), plan.render(shares, weave=True)
    blurred, blocky = _softness(image, valid, plain, woven)
    drawn = _soften(woven, softness)
    explained, scraps = _explain(image, drawn)
    share = float(speckled.mean())
    explained = np.where(speckled, min(1.0, 1.3 * SHARE / max(share, 1e-9)), explained)
    footprint = abs(plain - plan.render(shares, empty=True)).max(-1).clip(0, 1)
    cells = [(slice(r * CELL, (r + 1) * CELL), slice(c * CELL, (c + 1) * CELL)) for r, c in CORNERS]
    clarity = [float(np.average(explained[cell], weights=0.1 + footprint[cell])) for cell in cells]
    evidence = {
        "striped": _ramp(stripes / DARK),
        "speckled": _ramp(share / SHARE),
        "blurred": _ramp(blurred),
        "blocky": _ramp(blocky / 0.6),
        "framed": _ramp(framed),
        "tilted": _ramp(abs(slope) / 0.2),
        "cluttered": scraps,
        "clashing": clash,
    }
    return Reading(belief, _ramp_all(np.array(clarity), 0.4, 0.85), evidence, float(explained.mean()))


def _ramp_all(value: Array, low: float = 0.2, high: float = 0.8) -> Array:
    return ((value - low) / (high - low)).clip(0, 1)


def _ramp(value: float, low: float = 0.2, high: float = 0.8) -> float:
    """0 up to ``low``, 1 from ``high`` on, a line between."""
    return float(min(max((value - low) / (high - low), 0.0), 1.0))


# The whole picture


def _without_stripes(image: Array) -> tuple[Array, float]:
    """The picture with its striped rows lit up again, and the share of light that they lacked."""
    light = image.mean(-1)
    ratio = light[1:-1] / ((light[:-2] + light[2:]) / 2).clip(0.02)
    phase, factor = min(((p, float(np.median(ratio[(p - 1) % 4 :: 4]))) for p in range(4)), key=lambda found: found[1])
    if factor > 1 - 0.2 * DARK:
        return image, 1 - factor
    image = image.copy()
    image[phase::4] /= max(factor, 0.5)
    return image, 1 - factor


def _speckles(image: Array) -> NDArray[np.bool_]:
    """``(48, 48)``: pixels of the speckles' white, unless most of their neighbours are so too."""
    white = (abs(image - SPECKLE).max(-1) < 0.065).astype(np.float64)
    padded = np.pad(white, 2)
    near = np.lib.stride_tricks.sliding_window_view(padded, (5, 5)).mean((-1, -2))
    found: NDArray[np.bool_] = (white > 0) & (near < 0.5)
    return found


def _measure_room(image: Array, valid: NDArray[np.bool_]) -> tuple[Array, Array, float, float]:
    """Colours of wall and floor, height of the horizon at x = 24 in pixels, and its slope."""
    middle = slice(18, 30)
    wall, floor = (
        np.median(image[rows, middle][valid[rows, middle]], axis=0) if valid[rows, middle].any() else image[rows, middle].mean((0, 1))
        for rows in (slice(4, 18), slice(30, 44))
    )
    cell = (slice(CELL, 2 * CELL), slice(CELL, 2 * CELL))
    span = floor - wall
    below = ((image[cell] - wall) @ span / max(float(span @ span), 1e-6)).clip(-0.5, 1.5)
    seen = valid[cell]
    # Columns are summed; a masked pixel takes the mean of its row's neighbours in the cell.
    rows = (below * seen).sum(1) / seen.sum(1).clip(1)
    below = np.where(seen, below, rows[:, None])
    heights = 2 * CELL - below.sum(0) - 0.5
    x = np.arange(CELL) + CELL - SIZE / 2
    slope, level = np.polyfit(x, heights, 1)
    return wall, floor, float(level), float(slope)
