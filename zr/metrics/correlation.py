"""Linear and rank correlation of expected scores with annotated ones, for weighted items.

In a training loop, take :class:`torchmetrics.PearsonCorrCoef` and :class:`torchmetrics.SpearmanCorrCoef`. These are the same
numbers for many weightings of the items at once, in the call form of a :class:`zr.metrics.Statistic`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["plcc", "srcc"]

FLAT = 1e-12  # a standard deviation below this share of the values is rounding


def plcc(mu: ArrayLike, score: ArrayLike, prompt: ArrayLike | None = None, weight: ArrayLike | None = None) -> Any:
    """Pearson's linear correlation coefficient.

    Args:
        mu: ``(..., N)`` expected scores.
        score: ``(..., N)``, in score units.
        prompt: has no influence: all items are compared, whatever their prompts.
        weight: ``(..., N)``, how often each item counts; None for once.

    Returns:
        ``(...)`` float64 in [-1, 1]; NaN where either is constant, and so for fewer than two items.

    Example:
        >>> round(float(plcc([1, 2, 3], [1, 3, 2])), 4)
        0.5
    """
    x, y = np.asarray(mu, np.float64), np.asarray(score, np.float64)
    times = np.ones(x.shape[-1]) if weight is None else np.asarray(weight, np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        share = times / times.sum(-1, keepdims=True)
        (dx, sx), (dy, sy) = _centred(x, share), _centred(y, share)
        return np.clip((share * dx * dy).sum(-1) / (sx * sy), -1.0, 1.0)


def srcc(mu: ArrayLike, score: ArrayLike, prompt: ArrayLike | None = None, weight: ArrayLike | None = None) -> Any:
    """Spearman's rank correlation coefficient; equal values share the mean of their ranks.

    Args:
        mu: ``(N,)`` expected scores.
        score: ``(N,)``, in score units.
        prompt: has no influence: all items are compared, whatever their prompts.
        weight: ``(..., N)``, how often each item counts; None for once.

    Returns:
        ``(...)`` float64 in [-1, 1]; NaN where either is constant, and so for fewer than two items.

    Example:
        >>> round(float(srcc([1, 2, 30], [1, 3, 2])), 4)
        0.5
    """
    times = np.ones(len(np.asarray(mu))) if weight is None else np.asarray(weight, np.float64)
    return plcc(_ranks(np.asarray(mu), times), _ranks(np.asarray(score), times), prompt, times)


def _centred(x: NDArray[np.float64], share: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Deviations from the mean, and their standard deviation, NaN where there is none."""
    deviation = x - (share * x).sum(-1, keepdims=True)
    std = np.sqrt((share * deviation**2).sum(-1))
    size = np.abs(x).max(-1, initial=0.0)
    return deviation, np.where(std > FLAT * size, std, np.nan)


def _ranks(values: NDArray[Any], times: NDArray[np.float64]) -> NDArray[np.float64]:
    """``(..., N)`` ranks in the sample that holds each item ``times`` times; ties get their mean rank."""
    if len(values) == 0:
        return np.zeros(times.shape)
    order = np.argsort(values, kind="stable")
    steps = np.flatnonzero(np.diff(values[order])) + 1
    count = np.add.reduceat(times[..., order], np.r_[0, steps], axis=-1)  # of each distinct value
    mean_rank = count.cumsum(-1) - (count - 1) / 2
    place = np.empty(len(values), dtype=np.int64)
    place[order] = np.searchsorted(steps, np.arange(len(values)), side="right")
    ranks: NDArray[np.float64] = mean_rank[..., place]
    return ranks
