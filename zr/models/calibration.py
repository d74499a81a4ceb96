"""Calibration: a model's distributions moved towards annotators' votes by a few numbers, fitted on held-out images."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression, minimize_scalar
from torch import Tensor

from zr.rubric import Rubric
from zr.scores import ScoreDistribution

__all__ = ["Calibration", "Isotonic", "Temperature"]

BOUNDS = (0.05, 20.0)
"""Temperatures that are looked at. One that ends at a bound has no votes to hold it: the highest where the distributions say
nothing of the votes, the lowest where no vote was ever off the mode."""

EDGE = 1e-3
"""Share of the range: nearer to an end of the scale than this no level of an isotonic map comes, where no tilt could follow."""

NEAR = 1e-6  # share of the range: expected scores closer than this are one to an isotonic map


@dataclass(frozen=True)
class Calibration:
    """Distributions in, calibrated distributions out, dimension by dimension; see :class:`Temperature`, :class:`Isotonic`.

    Args:
        scale_id: identity of the scale that it was fitted for.
        dimensions: D names, all of the scale.
    """

    scale_id: str
    dimensions: tuple[str, ...]

    def __call__(self, scores: ScoreDistribution, dimensions: Sequence[str] | None = None) -> ScoreDistribution:
        """Calibrate distributions.

        Args:
            scores: batch shape ``(..., D)``.
            dimensions: their D names; all for None.

        Raises:
            ValueError: an unknown dimension, another number of columns than names.
        """
        raise TypeError(f"{type(self).__name__} must define __call__(scores, dimensions)")

    def numbers(self) -> dict[str, str]:
        """By dimension, what was fitted, in words; for tables."""
        raise TypeError(f"{type(self).__name__} must define numbers()")

    def check(self, rubric: Rubric) -> None:
        """Whether it was fitted for this scale.

        Raises:
            ValueError: it was not.
        """
        if self.scale_id != rubric.scale_id or self.dimensions != rubric.dimensions:
            raise ValueError(
                f"the calibration was fitted for scale {self.scale_id} ({', '.join(self.dimensions)}), the model answers on "
                f"scale {rubric.scale_id} ({', '.join(rubric.dimensions)}): fit one for this model (zr calibrate)"
            )

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: another content.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            kind = Isotonic if "knots" in data else Temperature
            return kind(**{name: _tuples(value) for name, value in data.items()})
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} holds no calibration ({error}): fit it again (zr calibrate)") from None

    def _columns(self, scores: ScoreDistribution, dimensions: Sequence[str] | None) -> list[int]:
        """The dimension of each column."""
        names = self.dimensions if dimensions is None else tuple(dimensions)
        unknown = [name for name in names if name not in self.dimensions]
        if unknown or scores.batch_shape[-1:] != (len(names),):
            raise ValueError(
                f"scores of batch shape {tuple(scores.batch_shape)} for dimensions {names}; the calibration is of "
                f"{self.dimensions}"
            )
        return [self.dimensions.index(name) for name in names]


@dataclass(frozen=True)
class Temperature(Calibration):
    r"""Logits divided by a temperature of each dimension: :math:`q^{1/T}`, normalised.

    It mends distributions that are too sure (T above one) or not sure enough, and leaves each mode where it is. Expected
    scores move towards the middle of the scale or away from it, by different amounts, so that close images may change their
    order. Gradients flow through it: those of the logits, divided by T.

    Args:
        scale_id: see :class:`Calibration`.
        dimensions: see :class:`Calibration`.
        temperature: D temperatures above zero.

    Raises:
        ValueError: temperatures that are not one for each dimension, or not above zero.

    Reference: Guo et al. 2017, On Calibration of Modern Neural Networks, section 4.2.

    Example:
        >>> rubric = Rubric.load("zr:direct").select(["realism"])
        >>> sure = torch.full((2, 1, 9), -9.0)
        >>> sure[:, :, 4] = 0.0                                               # both images: a 3.0, nearly for certain
        >>> votes = torch.zeros(2, 1, 9)
        >>> votes[0, 0, 4], votes[1, 0, 4], votes[1, 0, 5] = 2, 1, 1           # one vote of four is off
        >>> calibration = Temperature.fit(ScoreDistribution(sure, rubric.bins), votes, rubric)
        >>> round(calibration.temperature[0], 2)                              # then all other bins together hold a quarter
        2.83
        >>> round(calibration(ScoreDistribution(sure, rubric.bins)).probs[0, 0, 4].item(), 3)
        0.75
    """

    temperature: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.temperature) != len(self.dimensions) or not all(0 < t < math.inf for t in self.temperature):
            raise ValueError(f"one temperature above zero for each of {self.dimensions} is needed, got {self.temperature}")

    @classmethod
    def fit(
        cls, prediction: ScoreDistribution, votes: Tensor, rubric: Rubric, dimensions: Sequence[str] | None = None
    ) -> Temperature:
        """The temperatures with the smallest negative log-likelihood of the votes, each vote counted once.

        The likelihood has one minimum (it is convex in 1/T), which is looked for in ``BOUNDS``.

        Args:
            prediction: batch shape ``(N, D)``, of held-out images.
            votes: ``(N, D, K)`` annotators per bin; images without votes do not count.
            rubric: its scale is that of both.
            dimensions: which to fit; the others keep a temperature of one. All for None.

        Raises:
            ValueError: shapes or bins that do not fit, an unknown dimension, one without votes, votes on bins that have
                probability zero.
        """
        fitted = [
            1.0 if part is None else _temperature(*part, name)
            for name, part in zip(rubric.dimensions, _voted(prediction, votes, rubric, dimensions), strict=True)
        ]
        return cls(rubric.scale_id, rubric.dimensions, tuple(fitted))

    def __call__(self, scores: ScoreDistribution, dimensions: Sequence[str] | None = None) -> ScoreDistribution:
        """See :class:`Calibration`."""
        columns = self._columns(scores, dimensions)
        return scores.tempered(scores.logits.new_tensor([self.temperature[d] for d in columns]))

    def numbers(self) -> dict[str, str]:
        """By dimension, its temperature."""
        found = zip(self.dimensions, self.temperature, strict=True)
        low, high = BOUNDS
        return {name: f"temperature {t:.3f}{'' if 1.01 * low < t < high / 1.01 else ' (at its bound)'}" for name, t in found}


@dataclass(frozen=True)
class Isotonic(Calibration):
    r"""Expected scores moved along an ascending line, distributions tilted after them.

    It mends scores that lie too high or too low, and keeps every order of two images. The map f of the expected score joins the
    centres of the flat pieces of an isotonic regression by straight lines, since the regression's own steps would make ties of
    images that differ. From the first centre down to the lowest score that was seen, and from the last one up, it is all but
    flat; from there it leads to the ends of the scale.

    A distribution becomes the one with mean :math:`f(\mu)` that is nearest to it, :math:`q(s)\,e^{\lambda s}`, normalised
    (:meth:`~zr.scores.ScoreDistribution.tilted`): its shape is kept as far as the mean allows. Gradients flow through it: those
    of the expected score are :math:`\mu`'s own times the slope of f at :math:`\mu`, which is above zero everywhere and changes
    at the knots.

    Args:
        scale_id: see :class:`Calibration`.
        dimensions: see :class:`Calibration`.
        knots: for each dimension, pairs (expected score, its value), both ascending, the first and the last of them the ends of
            the scale.

    Raises:
        ValueError: knots that are not one list for each dimension, or do not ascend.

    Reference: Oron and Flournoy 2017, Centered Isotonic Regression: Point and Interval Estimation for Dose-Response Studies.

    Example:
        >>> rubric = Rubric.load("zr:direct").select(["realism"])
        >>> q = ScoreDistribution(torch.zeros(3, 1, 9), rubric.bins).tilted(torch.tensor([[2.0], [3.0], [4.0]]))
        >>> votes = torch.zeros(3, 1, 9)
        >>> votes[0, 0, 3], votes[1, 0, 2], votes[2, 0, 7] = 1, 1, 2           # 2.5 and 2.0, then twice 4.5
        >>> calibration = Isotonic.fit(q, votes, rubric)
        >>> [(round(x, 2), round(y, 2)) for x, y in calibration.knots[0]]     # the first two together have 2.25, at 2.5
        [(1.0, 1.0), (2.0, 2.25), (2.5, 2.25), (4.0, 4.5), (5.0, 5.0)]
        >>> [round(mean, 2) for mean in calibration(q).mean[:, 0].tolist()]
        [2.25, 3.0, 4.5]
    """

    knots: tuple[tuple[tuple[float, float], ...], ...]

    def __post_init__(self) -> None:
        fine = len(self.knots) == len(self.dimensions) and all(_ascend(line) for line in self.knots)
        if not fine:
            raise ValueError(
                f"ascending knots (expected score, value) for each of {self.dimensions} are needed, got {self.knots}"
            )

    @classmethod
    def fit(
        cls, prediction: ScoreDistribution, votes: Tensor, rubric: Rubric, dimensions: Sequence[str] | None = None
    ) -> Isotonic:
        """The ascending map of expected scores with the smallest squared distance to the votes, each vote counted once.

        Args:
            prediction: batch shape ``(N, D)``, of held-out images.
            votes: ``(N, D, K)`` annotators per bin; images without votes do not count.
            rubric: its scale is that of both.
            dimensions: which to fit; the others stay as they are. All for None.

        Raises:
            ValueError: as :meth:`Temperature.fit`.
        """
        low, high = rubric.bins[0], rubric.bins[-1]
        parts = _voted(prediction, votes, rubric, dimensions)
        lines = [((low, low), (high, high)) if part is None else _knots(*part, np.asarray(rubric.bins)) for part in parts]
        return cls(rubric.scale_id, rubric.dimensions, tuple(lines))

    def __call__(self, scores: ScoreDistribution, dimensions: Sequence[str] | None = None) -> ScoreDistribution:
        """See :class:`Calibration`."""
        columns, mean = self._columns(scores, dimensions), scores.mean
        return scores.tilted(torch.stack([_follow(mean[..., i], self.knots[d]) for i, d in enumerate(columns)], -1))

    def numbers(self) -> dict[str, str]:
        """By dimension, where the map leads from and to."""
        return {
            name: ", ".join(f"{x:.2f} to {y:.2f}" for x, y in _few(line[1:-1])) or "unchanged"
            for name, line in zip(self.dimensions, self.knots, strict=True)
        }


def _voted(
    prediction: ScoreDistribution, votes: Tensor, rubric: Rubric, dimensions: Sequence[str] | None
) -> list[tuple[ScoreDistribution, NDArray[np.float64]] | None]:
    """For each dimension of the rubric, distributions and votes of the images that have any; None where it is not asked for."""
    wanted = (len(votes), len(rubric.dimensions), len(rubric.bins))
    bins = torch.tensor(rubric.bins, dtype=torch.float64)
    if tuple(votes.shape) != wanted or tuple(prediction.logits.shape) != wanted:
        raise ValueError(
            f"a calibration is fitted on distributions and votes (N, D, K) with D = {wanted[1]} and K = {wanted[2]} of the "
            f"rubric, got {tuple(prediction.logits.shape)} and {tuple(votes.shape)}"
        )
    if not torch.allclose(prediction.bins.cpu().double(), bins):
        raise ValueError(f"the distributions have bins {prediction.bins.tolist()}, the rubric has {list(rubric.bins)}")
    asked, parts = rubric.index(dimensions), []
    for d, name in enumerate(rubric.dimensions):
        counts = votes[:, d].detach().cpu().double()
        voted = counts.sum(-1) > 0
        if d in asked and not bool(voted.any()):
            raise ValueError(f"none of {wanted[0]} images has votes in {name}: leave it out of the dimensions to fit")
        q = prediction.detach()[:, d].to("cpu", torch.float64)
        parts.append((q[voted], counts[voted].numpy()) if d in asked else None)
    return parts


def _temperature(q: ScoreDistribution, votes: NDArray[np.float64], name: str) -> float:
    counts = torch.from_numpy(votes)
    impossible = int(counts[q.logits.isneginf()].sum())
    if impossible:
        raise ValueError(f"{impossible} votes in {name} are on scores of probability zero: no temperature gives them any")

    def loss(power: float) -> float:
        return -float((counts * q.tempered(math.exp(power)).logits.masked_fill(counts == 0, 0.0)).sum())

    ends = (math.log(BOUNDS[0]), math.log(BOUNDS[1]))
    return math.exp(minimize_scalar(loss, bounds=ends, method="bounded", options={"xatol": 1e-7}).x)


def _knots(q: ScoreDistribution, votes: NDArray[np.float64], bins: NDArray[np.float64]) -> tuple[tuple[float, float], ...]:
    low, high = bins[0].item(), bins[-1].item()
    near, edge = NEAR * (high - low), EDGE * (high - low)
    x, place = np.unique(np.round(q.mean.numpy() / near) * near, return_inverse=True)
    weight = np.bincount(place, votes.sum(-1))
    level = isotonic_regression(np.bincount(place, votes @ bins) / weight, weights=weight).x.clip(low + edge, high - edge)
    rises = np.diff(level, prepend=low) > 0
    piece = np.cumsum(rises) - 1
    centre, value = np.bincount(piece, weight * x) / np.bincount(piece, weight), level[rises]
    seen = [(x[0].item(), (1 - EDGE) * value[0].item() + EDGE * low)] if centre[0] - x[0] > near else []
    seen += zip(centre.tolist(), value.tolist(), strict=True)
    seen += [(x[-1].item(), (1 - EDGE) * value[-1].item() + EDGE * high)] if x[-1] - centre[-1] > near else []
    return ((low, low), *((at, to) for at, to in seen if low + near < at < high - near), (high, high))


def _follow(mean: Tensor, line: Sequence[tuple[float, float]]) -> Tensor:
    """The map at expected scores."""
    x, y = mean.new_tensor(line).T.contiguous()
    piece = torch.searchsorted(x, mean.detach().contiguous(), right=True).clamp(1, len(x) - 1)
    slope = (y[piece] - y[piece - 1]) / (x[piece] - x[piece - 1])
    value: Tensor = y[piece - 1] + slope * (mean - x[piece - 1])
    return value.clamp(line[0][1], line[-1][1])


def _ascend(line: Any) -> bool:
    """Whether knots are at least two pairs of finite numbers that ascend."""
    points = np.asarray(line, np.float64)
    if points.ndim != 2 or points.shape[1] != 2 or len(points) < 2 or not np.isfinite(points).all():
        return False
    return bool((np.diff(points, axis=0) > 0).all())


def _few(line: Sequence[tuple[float, float]], most: int = 3) -> Sequence[tuple[float, float]]:
    """First, last and middle ones of many knots."""
    return line if len(line) <= most else [line[0], line[len(line) // 2], line[-1]]


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
