"""A judge of the built-in world that reads pixels, without learning: what it says depends on no model's mistakes.

:func:`read` explains a picture by drawing it again. Stripes and speckles are undone first; wall, floor and horizon are
measured in the middle, where no thing can stand; every corner is compared with every thing in every state, drawn by the
world's own hand at three resolutions; the best are moved into place by least squares, the runners-up too, and compared
once more. What still differs is clutter, softness, or not of this world: the *legibility* of a picture is the share of
it that the drawing explains, and the points above the lowest score are earned with its square.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import cast

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import ArrayLike, NDArray
from PIL.Image import Image
from torch import Tensor

from zr.data.shapes import scene as world
from zr.data.shapes.lots import rubric
from zr.data.shapes.scene import (
    BLOCKY,
    CELL,
    COLOURS,
    CORNERS,
    DARK,
    DIMENSIONS,
    MAIN,
    SEVERITY,
    SHAPES,
    SIZE,
    SPECKLE,
    SPECKLED,
    STATES,
    TILT,
    Array,
    Thing,
)
from zr.scores import ScoreDistribution

Mask = NDArray[np.bool_]
Floats = NDArray[np.float32]

THINGS = tuple(Thing(colour, shape, state) for shape, state, colour in product(SHAPES, STATES, COLOURS))
KINDS: tuple[Thing | None, ...] = (None, *THINGS)
"""What a slot may hold: nothing, or one of 48 things."""

SCRAP, FRAME = np.array(world.SCRAP), np.array(world.FRAME)
SCRAPS = 10.0  # least area in pixels of the scraps in a cell

TOLERANCE = 0.10  # a pixel that differs by this much is half explained
DOUBT = 0.1  # squared error, summed over a cell, that makes one kind e times less likely than another
UNCLEAR, CLEAR = 0.40, 0.92  # share of a thing that is explained, where it is taken for no thing, and where for one


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

        A slot costs what its kinds cost on average, and the dearest defect as far as it is unclear. What is left of the
        four points above the lowest score is multiplied by the squared legibility.

        Raises:
            ValueError: not a prompt of this world.
        """
        states = [0.0 if kind is None else SEVERITY["plausibility"].get(kind.state, 0.0) for kind in KINDS]
        points = {name: sum(cost * self.evidence.get(d, 0.0) for d, cost in SEVERITY[name].items()) for name in DIMENSIONS}
        for name, costs in (("alignment", _alignment_costs(prompt)), ("plausibility", np.array(states))):
            slots = self.clarity * (self.belief * costs).sum(1) + (1 - self.clarity) * max(SEVERITY[name].values())
            points[name] = float(slots @ (MAIN, 1.0, 1.0, 1.0))
        return {name: 1 + max(0.0, 4 - points[name]) * self.legibility**2 for name in DIMENSIONS}


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
        >>> seen.things == things, seen.evidence["speckled"], seen.evidence["striped"]
        (True, 1.0, 0.0)
    """
    image = np.array(pixels, np.float64)
    if image.shape != (SIZE, SIZE, 3):
        raise ValueError(
            f"the judge reads pictures of ({SIZE}, {SIZE}, 3) pixels, height first, got {image.shape}: resize them"
        )
    if not (image.min() >= -1e-3 and image.max() <= 1 + 1e-3):  # NaN fails too
        low, high = image.min(), image.max()
        raise ValueError(
            f"the judge reads pixels in [0, 1], got {low:.3g} to {high:.3g}: clamp the picture, or divide it by 255"
        )
    image, stripes = _without_stripes(image)
    white = _speckles(image)
    valid = ~white
    wall, floor, horizon = _measure_room(image, valid)
    framed = _frame(image, valid, wall, floor)
    clash, room = _known_room(wall, floor)

    plan = _Plan(*room, horizon, framed > 0.5, things=(None,) * 4, shares=np.zeros((4, 3)))
    belief, softness, shares = _match(image, valid, np.stack([wall, wall, floor, floor]), plan)
    best, next_best = belief.argsort(1)[:, :-3:-1].T
    plan, left = _settle(image, valid, plan.holding(best, shares), softness)
    if belief[range(4), next_best].max() > 1e-3:  # a second look
        other, other_left = _settle(image, valid, plan.holding(next_best, shares), softness)
        both = np.stack([best, next_best], 1)
        mass = np.take_along_axis(belief, both, 1).sum(1, keepdims=True)
        np.put_along_axis(belief, both, mass * _believe(np.stack([left, other_left], 1)), 1)
        plan = plan.mixed(other, other_left < left)

    plain, woven = plan.render(), plan.render(weave=True)
    explained, clutter, grain = _explain(image, valid, _soften(woven, softness))
    explained = np.where(white, min(1.0, 1.3 * SPECKLED / max(white.mean(), 1e-9)), explained)
    body = abs(plain - replace(plan, things=(None,) * 4).render()).max(-1).clip(0, 1)
    clarity = np.array([np.average(explained[cell], weights=0.1 + body[cell]) for cell in _cells(CORNERS)])
    blurred, blocky = _softness(image, valid, plain, woven)
    evidence = {
        "striped": _ramp(stripes / DARK),
        "speckled": _ramp(grain / SPECKLED),
        "blurred": _ramp(blurred),
        "blocky": _ramp(blocky / BLOCKY),
        "framed": _ramp(framed, 0.15, 0.6),  # blur and blocks wash a frame out
        "tilted": _ramp(abs(plan.horizon[1]) / TILT[0]),
        "cluttered": clutter,
        "clashing": clash,
    }
    return Reading(belief, ((clarity - UNCLEAR) / (CLEAR - UNCLEAR)).clip(0, 1), evidence, float(explained.mean()))


def _ramp(value: float, low: float = 0.2, high: float = 0.8) -> float:
    """0 up to ``low``, 1 from ``high`` on, a line between."""
    return float(min(max((value - low) / (high - low), 0.0), 1.0))


def _cells(places: Sequence[tuple[int, int]]) -> list[tuple[slice, slice]]:
    return [(slice(r * CELL, (r + 1) * CELL), slice(c * CELL, (c + 1) * CELL)) for r, c in places]


CENTRE = (1, 1)
BETWEEN = ((0, 1), (1, 0), (1, 2), (2, 1))  # the cells where clutter may lie


# The whole picture


def _without_stripes(image: Array) -> tuple[Array, float]:
    """The picture with its striped rows lit up again, and the share of light that they lacked."""
    light = image.mean(-1)
    ratio = light[1:-1] / ((light[:-2] + light[2:]) / 2).clip(0.02)
    factor, phase = min((float(np.median(ratio[(p - 1) % 4 :: 4])), p) for p in range(4))
    image = image.copy()
    if factor < 1 - 0.2 * DARK:
        image[phase::4] /= max(factor, 0.5)
    return image, 1 - factor


def _speckles(image: Array) -> Mask:
    """``(48, 48)``: pixels that are nearer to the speckles' white than to the wall, unless most around them are so too."""
    wall = np.median(image[4:18, 18:30].reshape(-1, 3), 0)
    white = abs(image - SPECKLE).max(-1) < np.clip(abs(wall - SPECKLE).max() / 2, 0.05, 0.12)
    around = sliding_window_view(np.pad(white, 2), (5, 5)).mean((-1, -2))
    return np.asarray(white & (around < 0.5), np.bool_)


def _measure_room(image: Array, valid: Mask) -> tuple[Array, Array, Array]:
    """Colours of wall and floor, and the horizon: its height at x = 24 in pixels, and its slope."""
    wall, floor = (_median(image[rows, 18:30], valid[rows, 18:30]) for rows in (slice(4, 18), slice(30, 44)))
    (cell,) = _cells([CENTRE])
    span = floor - wall
    below = ((image[cell] - wall) @ span / max(float(span @ span), 1e-6)).clip(-0.5, 1.5)
    rows = (below * valid[cell]).sum(1) / valid[cell].sum(1).clip(1)  # what a speckle hides is taken from its row
    heights = 2 * CELL - 0.5 - np.where(valid[cell], below, rows[:, None]).sum(0)
    slope, level = np.polyfit(np.arange(CELL) + CELL - SIZE / 2, heights, 1)
    return wall, floor, np.array([level, slope]).clip((18, -0.5), (30, 0.5))


def _median(pixels: Array, valid: Mask) -> Array:
    """``(3,)`` median colour of the valid pixels, of all if there is none."""
    chosen = pixels[valid] if valid.any() else pixels.reshape(-1, 3)
    return np.array(np.median(chosen, 0))


def _frame(image: Array, valid: Mask, wall: Array, floor: Array) -> float:
    """How far the outermost pixels have gone from the room's colours to the frame's: 0 not at all, 1 all the way."""
    y, _ = world._grid()
    room = np.where((y < SIZE / 2)[..., None], wall, floor)
    way = FRAME - room
    gone = ((image - room) * way).sum(-1) / (way**2).sum(-1).clip(1e-3)
    sides = ((0, slice(None)), (-1, slice(None)), (slice(None), 0), (slice(None), -1))
    return float(np.mean([np.median(gone[side][valid[side]]) if valid[side].any() else 0.0 for side in sides]).clip(0, 1))


def _known_room(wall: Array, floor: Array) -> tuple[float, tuple[Array, Array]]:
    """Evidence of a clashing room, and the wall and floor of the world's room that is nearest to the one seen."""
    calm = [(np.array(w), np.array(f)) for w, f in zip(world._WALLS, world._FLOORS, strict=True)]
    rooms = [*calm, *((np.array(w), 0.8 * np.array(w)) for w in world._CLASHING)]
    far = [float(np.hypot(np.linalg.norm(wall - w), np.linalg.norm(floor - f))) for w, f in rooms]
    quiet, loud = min(far[: len(calm)]), min(far[len(calm) :])
    return _ramp(quiet / (quiet + loud + 1e-9)), rooms[int(np.argmin(far))]


# Things


class _Told:
    """Stands in for the world's random generator: ``uniform`` returns the given shares of its ranges."""

    def __init__(self, shares: Array) -> None:
        self._shares = iter(shares.tolist())

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * float(next(self._shares))


def _put(image: Array, thing: Thing, slot: int, shares: Array) -> Array:
    """The world's own drawing of a thing, in place; ``shares`` (3,) of the ranges of its x, ground and radius."""
    return world._place(image, thing, CORNERS[slot], cast(np.random.Generator, _Told(shares)))


@cache
def _softeners() -> tuple[tuple[Array, float], ...]:
    """Sharp, blurred and blocky, each as (matrix M, share s): a picture X becomes (1 - s) X + s M X M'."""
    blur = world._blur(np.repeat(np.eye(SIZE)[:, None], SIZE, 1))[:, 0]  # channel k of this picture is 1 in row k only
    return (np.eye(SIZE), 0.0), (blur, 1.0), (np.kron(np.eye(SIZE // 4), np.full((4, 4), 0.25)), BLOCKY)


def _soften(image: Array, softness: int) -> Array:
    """Blur or block a ``(48, 48, C)`` picture as the world does; ``softness`` counts :func:`_softeners`."""
    matrix, share = _softeners()[softness]
    if not share:
        return image
    return (1 - share) * image + share * np.tensordot(matrix, np.tensordot(matrix, image, 1), ([1], [1])).swapaxes(0, 1)


@cache
def _border() -> Array:
    """``(48, 48)`` share of each pixel that a frame covers."""
    y, x = world._grid()
    return world._cover(np.minimum.reduce([x, y, SIZE - 1 - x, SIZE - 1 - y]) - 1.6)


PLACES = np.array(list(product((0.15, 0.5, 0.85), (0.15, 0.5, 0.85), (0.2, 0.8))))
"""``(P, 3)`` placements of the templates, as shares of the world's ranges."""


@dataclass(frozen=True)
class _Templates:
    """Things on a ground of any colour b: a pixel is ``paint + (1 + hole) b``. T = 48 P of them.

    Args:
        paint: ``(3, T, 256)``.
        hole: ``(T, 256)``, minus the share of the ground that is hidden.
        paint_squared: ``(T, 256)``, summed over channels.
        paint_hole: ``(3, T, 256)``.
        hole_squared: ``(T, 256)``.
    """

    paint: Floats
    hole: Floats
    paint_squared: Floats
    paint_hole: Floats
    hole_squared: Floats


@cache
def _templates() -> list[_Templates]:
    """One for each softness; drawn once, in a second or two."""
    layers = []
    for thing, shares in product(THINGS, PLACES):
        black, white = (_put(np.full((SIZE, SIZE, 3), ground), thing, 0, shares) for ground in (0.0, 1.0))
        layers.append(np.concatenate([black, (white - black)[..., :1] - 1], -1))
    sharp, found = np.concatenate(layers, -1), []
    for softness in range(3):
        soft = _soften(sharp, softness)[:CELL, :CELL].reshape(CELL * CELL, len(layers), 4)
        paint, hole = (np.ascontiguousarray(soft[..., channel].T, np.float32) for channel in (slice(3), 3))
        found.append(_Templates(paint, hole, (paint**2).sum(0), paint * hole, hole**2))
    return found


def _match(image: Array, valid: Mask, grounds: Array, empty_room: _Plan) -> tuple[Array, int, Array]:
    """Compare every corner with every template at every softness.

    Args:
        image: ``(48, 48, 3)``.
        valid: pixels to look at.
        grounds: ``(4, 3)`` colour behind each slot.
        empty_room: the picture without things; its middle has a say on the softness.

    Returns:
        ``(4, 49)`` probabilities of ``KINDS``, the softness that fits best, ``(49, 4, 3)`` best places of each kind.
    """
    borders = [_soften(empty_room.framed * _border()[..., None], softness) for softness in range(3)]
    valid = valid & (np.max(borders, 0)[..., 0] < 0.8)
    (centre,) = _cells([CENTRE])
    room, found, totals = empty_room.render(weave=True), [], []
    for softness, border in enumerate(borders):
        bare = (image - border * FRAME) / (1 - border).clip(0.2)  # the picture without its frame
        weight = valid[..., None] * (1 - border) ** 2
        away = np.stack([bare[cell] - ground for cell, ground in zip(_cells(CORNERS), grounds, strict=True)]).reshape(4, -1, 3)
        seen = np.stack([weight[cell] for cell in _cells(CORNERS)]).reshape(4, -1, 1)
        empty = (seen * away**2).sum((1, 2))  # (4,) squared errors of empty slots
        ink = (seen * away).transpose(2, 1, 0).astype(np.float32)  # (3, 256, 4)
        look = seen[..., 0].T.astype(np.float32)  # (256, 4)
        behind = grounds.T.astype(np.float32)  # (3, 4)
        t = _templates()[softness]
        agree = (t.paint @ ink).sum(0) + t.hole @ (ink * behind[:, None]).sum(0)
        cross = ((t.paint_hole @ look) * behind[:, None]).sum(0)
        size = t.paint_squared @ look + 2 * cross + (t.hole_squared @ look) * (behind**2).sum(0)
        errors = empty + (size - 2 * agree).reshape(len(THINGS), len(PLACES), 4)
        found.append((np.concatenate([empty[None], errors.min(1)]), errors.argmin(1)))
        middle = ((image - _soften(room, softness))[centre] ** 2).sum(-1)[valid[centre]].sum()
        totals.append(middle + found[-1][0].min(0).sum())
    softness = int(np.argmin(totals))
    left, place = found[softness]
    return _believe(left.T), softness, PLACES[np.concatenate([place[:1], place])]


def _believe(left: Array) -> Array:
    """Probabilities along the last axis from squared errors; the more even the best one leaves, the more doubt."""
    best = left.min(-1, keepdims=True)
    belief = np.exp((best - left) / (DOUBT + 0.05 * best.clip(0)))
    return np.asarray(belief / belief.sum(-1, keepdims=True), np.float64)


# Drawing it again


@dataclass(frozen=True)
class _Plan:
    """A scene as far as it was read; ``horizon`` is (height at x = 24, slope), ``shares`` (4, 3) place the things."""

    wall: Array
    floor: Array
    horizon: Array
    framed: bool
    things: tuple[Thing | None, ...]
    shares: Array

    def holding(self, kinds: NDArray[np.intp], shares: Array) -> _Plan:
        """With the kinds (4,) in the slots, each at its place in ``shares`` (49, 4, 3)."""
        return replace(self, things=tuple(KINDS[k] for k in kinds), shares=shares[kinds, range(4)])

    def mixed(self, other: _Plan, chosen: Mask) -> _Plan:
        """With the ``chosen`` (4,) slots of another plan."""
        things = tuple(b if turn else a for a, b, turn in zip(self.things, other.things, chosen, strict=True))
        return replace(self, things=things, shares=np.where(chosen[:, None], other.shares, self.shares))

    def render(self, weave: bool = False) -> Array:
        """``(48, 48, 3)``, sharp, without clutter, stripes and speckles."""
        y, x = world._grid()
        below = world._cover(self.horizon[0] + self.horizon[1] * (x - SIZE / 2) - y)
        image = self.wall + (self.floor - self.wall) * below[..., None]
        if weave:
            image = image + world.weave()
        for slot, thing in enumerate(self.things):
            if thing is not None:
                image = _put(image, thing, slot, self.shares[slot])
        return world._paint(image, _border(), FRAME) if self.framed else image


def _settle(image: Array, valid: Mask, plan: _Plan, softness: int, steps: int = 2, step: float = 0.05) -> tuple[_Plan, Array]:
    """Move things and horizon to where the squared error is least (Gauss-Newton; the cells are independent).

    Returns:
        The plan, and the ``(4,)`` squared errors that it leaves in the slots.
    """
    (centre,) = _cells([CENTRE])
    tilts = step * np.diag((1, 0.1))
    for _ in range(steps):
        now = _soften(plan.render(), softness)
        moved = [replace(plan, shares=plan.shares + step * axis) for axis in np.eye(3)]
        moves = [_soften(other.render(), softness) - now for other in moved]
        turns = [_soften(replace(plan, horizon=plan.horizon + tilt).render(), softness) - now for tilt in tilts]
        go = np.stack([_least(moves, image - now, valid, cell) for cell in _cells(CORNERS)])
        horizon = plan.horizon + _least(turns, image - now, valid, centre) @ tilts
        shares = (plan.shares + step * go).clip(0, 1)
        plan = replace(plan, shares=shares, horizon=horizon.clip((18, -0.5), (30, 0.5)))
    off = ((image - _soften(plan.render(weave=True), softness)) ** 2).sum(-1) * valid
    return plan, np.array([off[cell].sum() for cell in _cells(CORNERS)])


def _least(changes: list[Array], off: Array, valid: Mask, where: tuple[slice, slice] | Mask) -> Array:
    """Coefficients of ``changes`` that come nearest to ``off`` in a part of the picture; 0 for a change of nothing."""
    design = np.stack([(change * valid[..., None])[where].ravel() for change in changes])
    gram = design @ design.T + 1e-4 * np.eye(len(design))
    return np.asarray(np.linalg.solve(gram, design @ off[where].ravel()), np.float64)


def _softness(image: Array, valid: Mask, plain: Array, woven: Array) -> tuple[float, float]:
    """How blurred (0 to 1) and how blocky (0 to 0.6) a picture is, beside its drawing without and with the weave.

    Half of the blur is read from edges, half from the weave, which only a sharp picture keeps.
    """
    clear = valid.copy()
    for cell in _cells(BETWEEN):
        clear[cell] = False
    changes = [_soften(plain, 1) - plain, (_soften(plain, 2) - plain) / BLOCKY]
    edges, blocks = _least(changes, image - plain, clear, clear).clip(0, (1, BLOCKY))
    weave, grain = ((other - plain)[clear].mean(-1) for other in (woven, image))
    threads = float(weave @ (grain - grain.mean())) / max(float(weave @ weave), 1e-3)
    lost = np.clip(1 - threads / (1 - blocks), 0, 1)
    return float(edges + lost) / 2, float(blocks)


def _explain(image: Array, valid: Mask, drawn: Array) -> tuple[Array, float, float]:
    """How well each pixel is explained, ``(48, 48)`` in [0, 1], the evidence of clutter, and the share of lone pixels.

    Where clutter may lie, a pixel is explained by the drawing, by the scraps' colour, and by what lies between them, up
    to the area that scraps can have.
    """
    off = image - drawn
    evidence = []
    for cell in _cells(BETWEEN):
        way = SCRAP - drawn[cell]
        covered = ((off[cell] * way).sum(-1) / (way**2).sum(-1).clip(1e-2)).clip(0, 1)
        covered = np.where(valid[cell] & (covered > 0.15), covered, 0)
        area = float(covered.sum())
        off[cell] -= min(1.0, 3.2 * SCRAPS / max(area, 1e-9)) * covered[..., None] * way
        evidence.append(_ramp(area / SCRAPS))
    nine = sliding_window_view(np.pad(off, ((1, 1), (1, 1), (0, 0)), mode="edge"), (3, 3), (0, 1))
    alone = np.sqrt(((off - np.median(nine, (-1, -2))) ** 2).mean(-1))
    explained = 1 / (1 + (off**2).mean(-1) / TOLERANCE**2)
    return explained, float(np.mean(evidence)), float(((alone - 0.04) / 0.03).clip(0, 1).mean())


# Scoring


class Judge:
    """Scores pictures of the built-in world against their prompts by pixels only: ``judge`` is the one there is.

    Example:
        >>> from zr.data.shapes import Scene, draw, judge
        >>> things = (Thing("red", "ring"), None, Thing("green", "ring"), Thing("red", "square", "floating"))
        >>> image = torch.from_numpy(draw(Scene(things, realism=frozenset({"speckled"})))).permute(2, 0, 1)
        >>> judge([image], ["red ring, blue square; green triangle, red square"]).mean.round(decimals=1)
        tensor([[2.5000, 4.0000, 5.0000, 4.0000]])
    """

    def __init__(self) -> None:
        self.rubric = rubric()

    def __call__(
        self, images: Tensor | Sequence[Tensor | Image], prompts: Sequence[str], dimensions: Sequence[str] | None = None
    ) -> ScoreDistribution:
        """Score pictures; a scorer as any other, without gradient. About 30 ms a picture on one core.

        Args:
            images: ``(B, 3, 48, 48)`` float in [0, 1], or B pictures: PIL, or ``(3, 48, 48)`` uint8 or float in [0, 1].
            prompts: B prompts of the world.
            dimensions: names, in order; all four for None.

        Returns:
            Batch shape ``(B, D)`` over the nine bins of the world's rubric, on the device of ``images``. The mean is the
            score; the bins beside it share the probability.

        Raises:
            ValueError: not one prompt for each picture, a picture of another size or not in [0, 1] (the message says
                which), an unknown prompt or dimension.
        """
        index = self.rubric.index(dimensions)
        if isinstance(prompts, str) or len(images) != len(prompts):
            given = "one text" if isinstance(prompts, str) else f"{len(prompts)} prompts"
            raise ValueError(f"the judge needs a list with one prompt for each picture, got {len(images)} pictures and {given}")
        scores = []
        for number, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
            try:
                scores.append(list(read(_pixels(image)).scores(prompt).values()))
            except ValueError as error:
                raise ValueError(f"picture {number}: {error}") from None
        score = torch.tensor(scores).reshape(-1, len(DIMENSIONS))[:, index, None]
        bins = torch.tensor(self.rubric.bins)
        weights = (1 - (score - bins).abs() / (bins[1] - bins[0])).clamp_min(0)
        device = images.device if isinstance(images, Tensor) else None
        return ScoreDistribution(weights.log().to(device), self.rubric.bins)

    def __repr__(self) -> str:
        return "Judge()"


judge = Judge()


def _pixels(image: Tensor | Image) -> Array:
    """``(48, 48, 3)`` in [0, 1]."""
    if isinstance(image, Image):
        return np.asarray(image.convert("RGB"), np.float64) / 255
    known = isinstance(image, Tensor) and (image.is_floating_point() or image.dtype == torch.uint8)
    if not known or image.dim() != 3 or image.shape[0] != 3:
        what = f"a {image.dtype} tensor of shape {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(f"the judge reads PIL images and (3, {SIZE}, {SIZE}) tensors, uint8 or float in [0, 1], got {what}")
    pixels = image.detach().permute(1, 2, 0).cpu().double().numpy()
    return np.asarray(pixels if image.is_floating_point() else pixels / 255, np.float64)
