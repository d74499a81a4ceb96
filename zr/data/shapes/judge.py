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

_CELLS = tuple((slice(r * CELL, (r + 1) * CELL), slice(c * CELL, (c + 1) * CELL)) for r, c in CORNERS)
_CENTRE = (slice(CELL, 2 * CELL), slice(CELL, 2 * CELL))
_EDGES = ((0, 1), (1, 0), (1, 2), (2, 1))  # cells where clutter may lie

KINDS: tuple[Thing | None, ...] = (None, *(Thing(c, h, t) for h, t, c in product(SHAPES, STATES, COLOURS)))
"""What a slot may hold: nothing, or one of 48 things."""

SCRAP, FRAME, SPECKLE = (0.36, 0.30, 0.22), (0.25, 0.12, 0.05), 0.95
DARK, SHARE = 0.35, 0.12  # how much a stripe takes away; how many pixels are speckled
TOLERANCE = 0.10  # a pixel that far from its drawing is half explained
DOUBT = 0.1  # squared error, summed over a cell, that makes one reading e times less likely than another


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
    wall, floor, horizon = _measure_room(image, valid)
    framed = _frame(image, valid, wall, floor)
    clash, known_wall, known_floor = _known_room(wall, floor)

    belief, softness, shares = _match(image, valid, np.stack([wall, wall, floor, floor]), framed > 0.5)
    plan = _Plan(known_wall, known_floor, framed > 0.5, tuple(KINDS[k] for k in belief.argmax(1)))
    shares, horizon = _settle(image, valid, plan, shares, horizon, softness)

    plain, woven = plan.render(shares, horizon), plan.render(shares, horizon, weave=True)
    blurred, blocky = _softness(image, valid, plain, woven)
    explained, clutter, grain = _explain(image, valid, _soften(woven, softness))
    share = float(speckled.mean())
    explained = np.where(speckled, min(1.0, 1.3 * SHARE / max(share, 1e-9)), explained)
    footprint = abs(plain - plan.render(shares, horizon, empty=True)).max(-1).clip(0, 1)
    clarity = np.array([np.average(explained[cell], weights=0.1 + footprint[cell]) for cell in _CELLS])
    evidence = {
        "striped": _ramp(stripes / DARK),
        "speckled": _ramp(grain / SHARE),
        "blurred": _ramp(blurred),
        "blocky": _ramp(blocky / 0.6),
        "framed": _ramp(framed, 0.15, 0.6),
        "tilted": _ramp(abs(horizon[1]) / 0.2),
        "cluttered": clutter,
        "clashing": clash,
    }
    return Reading(belief, ((clarity - 0.4) / 0.52).clip(0, 1), evidence, float(explained.mean()))


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
    wall = np.median(image[4:18, 18:30].reshape(-1, 3), 0)
    tolerance = np.clip(abs(wall - SPECKLE).max() / 2, 0.05, 0.12)  # nearer to white than to the wall
    white = (abs(image - SPECKLE).max(-1) < tolerance).astype(np.float64)
    padded = np.pad(white, 2)
    near = np.lib.stride_tricks.sliding_window_view(padded, (5, 5)).mean((-1, -2))
    found: NDArray[np.bool_] = (white > 0) & (near < 0.5)
    return found


def _measure_room(image: Array, valid: NDArray[np.bool_]) -> tuple[Array, Array, Array]:
    """Colours of wall and floor, and the horizon: its height at x = 24 in pixels, and its slope."""
    middle = slice(18, 30)
    wall, floor = (
        np.median(image[rows, middle][valid[rows, middle]], axis=0)
        if valid[rows, middle].any()
        else image[rows, middle].mean((0, 1))
        for rows in (slice(4, 18), slice(30, 44))
    )
    span = floor - wall
    below = ((image[_CENTRE] - wall) @ span / max(float(span @ span), 1e-6)).clip(-0.5, 1.5)
    seen = valid[_CENTRE]
    # Columns are summed; a masked pixel takes the mean of its row's neighbours in the cell.
    rows = (below * seen).sum(1) / seen.sum(1).clip(1)
    below = np.where(seen, below, rows[:, None])
    heights = 2 * CELL - below.sum(0) - 0.5
    x = np.arange(CELL) + CELL - SIZE / 2
    slope, level = np.polyfit(x, heights, 1)
    return wall, floor, np.array([level.clip(20, 28), slope.clip(-0.4, 0.4)])


def _frame(image: Array, valid: NDArray[np.bool_], wall: Array, floor: Array) -> float:
    """How far the outermost pixels have gone from the room's colours to the frame's: 0 none, 1 all."""
    y, _ = world._grid()
    room = np.where((y < SIZE / 2)[..., None], wall, floor)
    way = np.asarray(FRAME) - room
    gone = ((image - room) * way).sum(-1) / (way**2).sum(-1).clip(1e-3)
    sides = ((0, slice(None)), (-1, slice(None)), (slice(None), 0), (slice(None), -1))
    return float(np.mean([np.median(gone[side][valid[side]]) if valid[side].any() else 0.0 for side in sides]).clip(0, 1))


def _known_room(wall: Array, floor: Array) -> tuple[float, Array, Array]:
    """Evidence of a clashing room, and the known wall and floor that are nearest to those seen."""
    calm = [(np.array(w), np.array(f)) for w, f in zip(world._WALLS, world._FLOORS, strict=True)]
    loud = [(np.array(w).clip(0, 1), 0.8 * np.array(w)) for w in world._CLASHING]
    off = [float(np.sqrt(((wall - w) ** 2).sum() + ((floor - f) ** 2).sum())) for w, f in calm + loud]
    nearest_calm, nearest_loud = min(off[: len(calm)]), min(off[len(calm) :])
    best = (calm + loud)[int(np.argmin(off))]
    return _ramp(nearest_calm / (nearest_calm + nearest_loud + 1e-9)), *best


# Things


@cache
def _softeners() -> tuple[tuple[Array, float], ...]:
    """Sharp, blurred and blocky as (matrix, share): a picture is mixed with itself between matrix and transpose."""
    ramp = np.repeat(np.eye(SIZE)[:, None], SIZE, 1)  # the channel k of this picture is 1 in row k
    blur = world._blur(ramp)[:, 0]
    blocks = np.kron(np.eye(SIZE // 4), np.full((4, 4), 0.25))
    return (np.eye(SIZE), 0.0), (blur, 1.0), (blocks, 0.6)


def _soften(image: Array, softness: int) -> Array:
    """Blur or block a ``(48, 48, C)`` picture as the world does; ``softness`` indexes :func:`_softeners`."""
    matrix, share = _softeners()[softness]
    if not share:
        return image
    return (1 - share) * image + share * np.tensordot(matrix, np.tensordot(matrix, image, 1), ([1], [1])).swapaxes(0, 1)


class _Told:
    """Stands in for the world's random generator: ``uniform`` returns the given shares of its intervals."""

    def __init__(self, shares: ArrayLike) -> None:
        self._shares = iter(np.asarray(shares).tolist())

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * float(next(self._shares))


def _put(image: Array, thing: Thing, slot: int, shares: ArrayLike) -> Array:
    """The world's own drawing of a thing, in place; ``shares`` (3,) of its ranges of x, y and radius."""
    return world._place(image, thing, CORNERS[slot], cast(np.random.Generator, _Told(shares)))


JITTER = np.array(list(product((0.15, 0.5, 0.85), (0.15, 0.5, 0.85), (0.2, 0.8))))


@dataclass(frozen=True)
class _Templates:
    """Things on a ground of unknown colour b: a pixel is ``paint + (1 + hole) b``. J placements, T = 48 J templates.

    Args:
        paint: ``(3, T, 256)`` per channel.
        hole: ``(T, 256)``, minus the share of the ground that is hidden.
        squares: ``paint**2`` over channels, ``(T, 256)``.
        crossed: ``paint * hole`` per channel, ``(3, T, 256)``.
    """

    paint: NDArray[np.float32]
    hole: NDArray[np.float32]
    squares: NDArray[np.float32]
    crossed: NDArray[np.float32]


@cache
def _templates(softness: int) -> _Templates:
    layers = []
    for kind in KINDS[1:]:
        for shares in JITTER:
            assert kind is not None
            black = _put(np.zeros((SIZE, SIZE, 3)), kind, 0, shares)
            white = _put(np.ones((SIZE, SIZE, 3)), kind, 0, shares)
            layers.append(np.concatenate([black, (white - black)[..., :1] - 1], -1))
    soft = _soften(np.concatenate(layers, -1), softness)[:CELL, :CELL].reshape(CELL * CELL, len(layers), 4)
    paint, hole = (np.ascontiguousarray(soft[..., c].T, np.float32) for c in (slice(3), 3))
    return _Templates(paint, hole, (paint**2).sum(0), paint * hole)


def _match(image: Array, valid: NDArray[np.bool_], grounds: Array, framed: bool) -> tuple[Array, int, Array]:
    """Compare every corner with every template.

    Args:
        image: ``(48, 48, 3)``.
        valid: pixels to look at.
        grounds: ``(4, 3)`` colour behind each slot.
        framed: whether the border hides what is under it.

    Returns:
        ``(4, 49)`` probabilities, the softness of the picture, ``(4, 3)`` placements of the best things.
    """
    found = []
    borders = [_soften(framed * _border()[..., None], softness)[..., 0] for softness in range(3)]
    valid = valid & (np.max(borders, 0) < 0.8)
    for softness, border in enumerate(borders):
        weight = valid * (1 - border) ** 2
        bare = (image - border[..., None] * FRAME) / (1 - border).clip(0.2)[..., None]
        ink, seen = np.empty((3, CELL * CELL, 4), np.float32), np.empty((CELL * CELL, 4), np.float32)
        lit, empty = np.empty_like(seen), np.empty(4)
        for n, (row, column) in enumerate(CORNERS):
            cell = (slice(row * CELL, (row + 1) * CELL), slice(column * CELL, (column + 1) * CELL))
            seen[:, n] = weight[cell].ravel()
            away = (bare[cell] - grounds[n]) * weight[cell][..., None]
            ink[..., n] = away.reshape(-1, 3).T
            lit[:, n] = (away @ grounds[n]).ravel()
            empty[n] = (away * (bare[cell] - grounds[n])).sum()
        t = _templates(softness)
        ground = grounds.T[:, None]  # (3, 1, 4)
        agree = (t.paint @ ink).sum(0) + t.hole @ lit
        size = t.squares @ seen + 2 * ((t.crossed @ seen) * ground).sum(0) + (t.hole**2 @ seen) * (grounds**2).sum(1)
        error = (size - 2 * agree).reshape(len(KINDS) - 1, len(JITTER), 4)  # beyond that of an empty slot
        left = np.concatenate([empty[None], empty + error.min(1)]).T  # (4, 49) squared errors
        found.append((left, error.argmin(1)))
    softness = int(np.argmin([left.min(1).sum() for left, _ in found]))
    left, place = found[softness]
    doubt = DOUBT + 0.05 * left.min(1, keepdims=True).clip(0)
    belief = np.exp(-(left - left.min(1, keepdims=True)) / doubt)
    best = place[(left.argmin(1) - 1).clip(0), np.arange(4)]
    return belief / belief.sum(1, keepdims=True), softness, JITTER[best]


def _border() -> Array:
    y, x = world._grid()
    return world._cover(np.minimum.reduce([x, y, SIZE - 1 - x, SIZE - 1 - y]) - 1.6)


# Drawing it again


@dataclass(frozen=True)
class _Plan:
    """A scene as far as it was read; ``render`` draws it sharp, without clutter, stripes and speckles."""

    wall: Array
    floor: Array
    framed: bool
    things: tuple[Thing | None, ...]

    def render(self, shares: Array, horizon: Array, weave: bool = False, empty: bool = False) -> Array:
        """``(48, 48, 3)``; ``shares`` (4, 3) place the things, ``horizon`` is (height at x = 24, slope)."""
        y, x = world._grid()
        below = world._cover(horizon[0] + horizon[1] * (x - SIZE / 2) - y)
        image = self.wall + (self.floor - self.wall) * below[..., None]
        if weave:
            image = image + 0.035 * _weave()[..., None]
        for slot, thing in enumerate(self.things):
            if thing is not None and not empty:
                image = _put(image, thing, slot, shares[slot])
        return world._paint(image, _border(), FRAME) if self.framed else image


@cache
def _weave() -> Array:
    y, x = world._grid()
    return np.sin(2.1 * x) * np.sin(2.1 * y)


def _settle(
    image: Array, valid: NDArray[np.bool_], plan: _Plan, shares: Array, horizon: Array, softness: int, steps: int = 2
) -> tuple[Array, Array]:
    """Move things and horizon to where the squared error is least (Gauss-Newton; cells do not depend on each other)."""
    step = 0.05
    for _ in range(steps):
        now = _soften(plan.render(shares, horizon), softness)
        moves = [_soften(plan.render(shares + step * np.eye(3)[k], horizon), softness) - now for k in range(3)]
        tilts = [_soften(plan.render(shares, horizon + step * np.array(d)), softness) - now for d in ((1, 0), (0, 0.1))]
        off = (image - now) * valid[..., None]
        new = shares.copy()
        for slot, cell in enumerate(_CELLS):
            new[slot] += step * _least(moves, off, valid, cell)
        shares = new.clip(0, 1)
        horizon = horizon + step * np.array((1, 0.1)) * _least(tilts, off, valid, _CENTRE)
    return shares, horizon


def _least(changes: list[Array], off: Array, valid: NDArray[np.bool_], cell: tuple[slice, slice]) -> Array:
    """Coefficients of ``changes`` that come nearest to ``off`` in a cell; changes that do nothing get none."""
    design = np.stack([(change[cell] * valid[cell][..., None]).ravel() for change in changes])
    gram = design @ design.T
    return np.linalg.solve(gram + 1e-4 * np.eye(len(gram)), design @ off[cell].ravel())


def _softness(image: Array, valid: NDArray[np.bool_], plain: Array, woven: Array) -> tuple[float, float]:
    """How blurred (0 to 1) and how blocky (0 to 0.6) a picture is.

    Half of the blur is read from edges, half from the weave, which only a sharp picture keeps.
    """
    changes = [_soften(plain, 1) - plain, (_soften(plain, 2) - plain) / 0.6]
    middle = valid.copy()
    for row, column in _EDGES:
        middle[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL] = False  # where clutter may lie
    edges, blocks = _least(changes, image - plain, middle, (slice(None), slice(None)))
    weave = (woven - plain)[middle].mean(-1)
    grain = (image - plain)[middle].mean(-1)
    threads = float(weave @ (grain - grain.mean())) / max(float(weave @ weave), 1e-3)
    lost = 1 - threads / max(1 - blocks, 0.4)
    return float((np.clip(edges, 0, 1) + np.clip(lost, 0, 1)) / 2), float(np.clip(blocks, 0, 0.6))


def _explain(image: Array, valid: NDArray[np.bool_], drawn: Array) -> tuple[Array, float, float]:
    """How well each pixel is explained, ``(48, 48)`` in [0, 1], the evidence of clutter, and the share of grain.

    Where clutter may lie, a pixel is explained by what was drawn, by a scrap's colour, and by what lies between; up to
    the area that scraps can take.
    """
    off = image - drawn
    evidence = []
    for row, column in _EDGES:
        cell = (slice(row * CELL, (row + 1) * CELL), slice(column * CELL, (column + 1) * CELL))
        way = np.asarray(SCRAP) - drawn[cell]
        covered = ((off[cell] * way).sum(-1) / (way**2).sum(-1).clip(1e-2)).clip(0, 1)
        covered = np.where(valid[cell] & (covered > 0.15), covered, 0)
        area = float(covered.sum())
        credit = min(1.0, 32 / max(area, 1e-9))
        off[cell] -= credit * covered[..., None] * way
        evidence.append(_ramp(area / 10))
    nine = np.lib.stride_tricks.sliding_window_view(np.pad(off, ((1, 1), (1, 1), (0, 0)), mode="edge"), (3, 3), (0, 1))
    alone = np.sqrt(((off - np.median(nine, (-1, -2))) ** 2).mean(-1))
    grain = ((alone - 0.04) / 0.03).clip(0, 1).mean()
    return _near(off), float(np.mean(evidence)), float(grain)


def _near(off: Array) -> Array:
    """1 where nothing differs, 1/2 at ``TOLERANCE`` (root mean square over channels)."""
    return 1 / (1 + (off**2).mean(-1) / TOLERANCE**2)


# Scoring


class Judge:
    """Scores pictures of the built-in world against their prompts, by pixels only.

    A scorer: ``judge(images=..., prompts=..., dimensions=None)``.

    Args:
        images: ``(B, 3, 48, 48)`` in [0, 1], or B pictures: PIL, ``(3, 48, 48)`` uint8, or float in [0, 1].
        prompts: B prompts of the world.
        dimensions: which dimensions, in order; all four for None.

    Returns:
        A distribution of batch shape ``(B, D)`` over the nine bins of the world's rubric, on the device of ``images``. At
        most two neighbouring bins have probability, and its mean is the score. There is no gradient.

    Raises:
        ValueError: another size, pixels outside [0, 1], as many prompts as pictures not given, an unknown prompt or dimension.

    Example:
        >>> from zr.data.shapes import Scene, draw, judge
        >>> things = (Thing("red", "ring"), None, Thing("green", "ring"), Thing("red", "square", "floating"))
        >>> image = torch.from_numpy(draw(Scene(things, realism=frozenset({"speckled"})))).permute(2, 0, 1)
        >>> judge([image], ["red ring, blue square; green triangle, red square"]).mean.round(decimals=1)
        tensor([[2.5, 4.0, 5.0, 4.0]])
    """

    def __init__(self) -> None:
        self.rubric: Rubric = rubric()

    def __call__(
        self, images: Tensor | Sequence[Tensor | Image], prompts: Sequence[str], dimensions: Sequence[str] | None = None
    ) -> ScoreDistribution:
        index = self.rubric.index(dimensions)
        if isinstance(prompts, str) or len(images) != len(prompts):
            raise ValueError(
                f"the judge needs a list of one prompt per picture, got {len(images)} pictures and {prompts!r:.80}"
            )
        scores = [
            [list(read(_pixels(image, i)).scores(prompt).values())[d] for d in index]
            for i, (image, prompt) in enumerate(zip(images, prompts, strict=True))
        ]
        device = images.device if isinstance(images, Tensor) else None
        bins = torch.tensor(self.rubric.bins)
        score = torch.tensor(scores).reshape(len(prompts), len(index), 1)
        gaps = bins.diff()[0]
        logits = (1 - (score - bins).abs() / gaps).clamp_min(0).log()
        return ScoreDistribution(logits.to(device), self.rubric.bins)

    def __repr__(self) -> str:
        return "Judge()"


judge = Judge()
"""The one judge there is: it has nothing to choose."""


def _pixels(image: Tensor | Image, number: int) -> Array:
    """``(48, 48, 3)`` in [0, 1]."""
    if isinstance(image, Image):
        pixels = np.asarray(image.convert("RGB"), np.float64) / 255
    elif isinstance(image, Tensor) and image.dim() == 3 and (image.is_floating_point() or image.dtype == torch.uint8):
        scale = 1.0 if image.is_floating_point() else 255.0
        pixels = image.detach().permute(1, 2, 0).double().cpu().numpy() / scale
    else:
        what = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(
            f"picture {number}: needed a PIL image or a (3, {SIZE}, {SIZE}) tensor, uint8 or float in [0, 1], got {what}"
        )
    return pixels
