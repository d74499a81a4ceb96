"""How sure a measured number is: resampling of prompts, the unit in which data were collected."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Interval", "Statistic", "bootstrap_difference", "bootstrap_interval", "resample"]

BLOCK = 1 << 20  # numbers held at once per array of resampled items


class Statistic(Protocol):
    """A number of N scored items, such as :func:`zr.metrics.hpa`."""

    def __call__(
        self, mu: NDArray[np.float64], score: NDArray[np.float64], prompt: NDArray[Any], weight: NDArray[np.float64], /
    ) -> Any:
        """``(B,)`` values for B resamples; ``weight (B, N)`` says how often each item's prompt was drawn in each."""
        ...


@dataclass(frozen=True)
class Interval:
    """A number and how far resampling moves it.

    Args:
        estimate: on the data as they are.
        low: lower end of the percentile interval.
        high: upper end.
        standard_error: standard deviation over the resamples.
        level: share of the resamples inside the interval.
        samples: resamples in which the number was defined; a correlation of constants is not. Without any, ``low``,
            ``high`` and ``standard_error`` are NaN.
    """

    estimate: float
    low: float
    high: float
    standard_error: float
    level: float
    samples: int

    def __str__(self) -> str:
        return f"{self.estimate:.4f} [{self.low:.4f}, {self.high:.4f}]"

    def to_dict(self) -> dict[str, float | int | None]:
        """Plain data for JSON, where NaN becomes None."""
        return {key: None if math.isnan(value) else value for key, value in asdict(self).items()}


def bootstrap_interval(
    statistic: Statistic,
    mu: ArrayLike,
    score: ArrayLike,
    prompt: ArrayLike,
    *,
    samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Interval of a statistic, by resampling prompts with all their items.

    Args:
        statistic: for example :func:`zr.metrics.hpa`, or any function of the form :class:`Statistic`.
        mu: ``(N,)`` expected scores.
        score: ``(N,)``, in score units.
        prompt: ``(N,)`` ids of the items' prompts.
        samples: number of resamples.
        level: share of the resamples that the interval holds.
        seed: of the resampling; equal seeds draw the same prompts.

    Returns:
        Estimate, percentile interval and standard error.

    Raises:
        ValueError: no item, a level outside (0, 1), no sample.

    Reference: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13; clusters: Field and Welsh 2007.

    Example:
        >>> mu, score, prompt = [3, 2, 3, 4], [4, 3, 5, 3], [0, 0, 1, 1]
        >>> def bias(mu, score, prompt, weight):
        ...     return weight @ (mu - score) / weight.sum(-1)
        >>> bootstrap_interval(bias, mu, score, prompt).estimate                       # 3 - 3.75
        -0.75
    """
    x, y, group = np.asarray(mu, np.float64), np.asarray(score, np.float64), np.asarray(prompt)

    def values(weight: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(statistic(x, y, group, weight))[:, None]

    return resample(values, group, samples=samples, level=level, seed=seed)[0]


def bootstrap_difference(
    statistic: Statistic,
    first: ArrayLike,
    second: ArrayLike,
    score: ArrayLike,
    prompt: ArrayLike,
    *,
    samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Interval of the difference of two scorers on the same items: both are evaluated on the same resampled prompts.

    Args:
        statistic: as in :func:`bootstrap_interval`.
        first: ``(N,)`` expected scores of one scorer.
        second: ``(N,)`` expected scores of the other.
        score: ``(N,)``, in score units.
        prompt: ``(N,)`` ids of the items' prompts.
        samples: number of resamples.
        level: share of the resamples that the interval holds.
        seed: of the resampling.

    Returns:
        Interval of ``statistic(first) - statistic(second)``.

    Raises:
        ValueError: as :func:`bootstrap_interval`.

    Reference: as :func:`bootstrap_interval`.

    Example:
        >>> from zr.metrics import hpa
        >>> score, prompt = [4, 3, 5, 3], [0, 0, 1, 1]
        >>> difference = bootstrap_difference(hpa, [4, 3, 5, 3], [3, 4, 3, 5], score, prompt)    # all right, all wrong
        >>> difference.estimate, difference.low, difference.high
        (1.0, 1.0, 1.0)
    """
    a, b, y, group = (*(np.asarray(v, np.float64) for v in (first, second, score)), np.asarray(prompt))

    def values(weight: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(statistic(a, y, group, weight) - statistic(b, y, group, weight))[:, None]

    return resample(values, group, samples=samples, level=level, seed=seed)[0]


def resample(
    values: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    prompt: ArrayLike,
    *,
    samples: int,
    level: float,
    seed: int,
) -> list[Interval]:
    """Intervals of M numbers on one set of resamples, so that functions of several of them are resampled together.

    Args:
        values: from ``(B, N)``, how often each item counts in each of B resamples, to ``(B, M)`` numbers.
        prompt: ``(N,)`` ids of the items' prompts.
        samples: number of resamples.
        level: share of the resamples that an interval holds.
        seed: of the resampling.

    Returns:
        M intervals.

    Raises:
        ValueError: no item, a level outside (0, 1), no sample.

    Example:
        >>> count, = resample(lambda weight: weight.sum(-1, keepdims=True), ["a", "a", "b"], samples=100, level=0.9, seed=0)
        >>> count.estimate, count.low, count.high                             # two draws of 2 or 1 items
        (3.0, 2.0, 4.0)
    """
    names, code = np.unique(np.asarray(prompt), return_inverse=True)
    if len(names) == 0 or samples < 1 or not 0 < level < 1:
        raise ValueError(
            f"a bootstrap needs items, samples >= 1 and 0 < level < 1, got {len(code)} items, {samples} samples, level {level}"
        )
    generator = np.random.default_rng(seed)
    block = max(1, BLOCK // len(code))
    drawn = [
        values(generator.multinomial(len(names), np.full(len(names), 1 / len(names)), size=size)[:, code].astype(np.float64))
        for size in (min(block, samples - start) for start in range(0, samples, block))
    ]
    estimates = values(np.ones((1, len(code))))[0]
    return [_interval(e, column, level) for e, column in zip(estimates, np.concatenate(drawn).T, strict=True)]


def _interval(estimate: float, values: NDArray[np.float64], level: float) -> Interval:
    defined = values[~np.isnan(values)]
    if len(defined) == 0:
        return Interval(float(estimate), math.nan, math.nan, math.nan, level, 0)
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(estimate), float(low), float(high), float(defined.std()), level, len(defined))
