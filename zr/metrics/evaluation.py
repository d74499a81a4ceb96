"""The table that says how good a scorer is, and how much better than another: one code for tests, demo and benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from zr.metrics.bootstrap import Interval, Statistic, resample
from zr.metrics.correlation import plcc, srcc
from zr.metrics.preference import MARGIN, hpa, pair_counts

__all__ = ["compare", "evaluate"]

margin_hpa = partial(hpa, margin=MARGIN)
STATISTICS: dict[str, Statistic] = {"hpa": hpa, "margin_hpa": margin_hpa, "plcc": plcc, "srcc": srcc}
POOLED: dict[str, Statistic] = {"pooled_hpa": hpa, "pooled_margin_hpa": margin_hpa}  # pairs of all dimensions together


def evaluate(
    mu: ArrayLike,
    score: ArrayLike,
    known: ArrayLike,
    prompt: ArrayLike,
    dimensions: Sequence[str],
    *,
    samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """HPA, margin HPA, PLCC and SRCC of a scorer, per dimension and overall, with intervals over resampled prompts.

    Args:
        mu: ``(N, D)`` expected scores.
        score: ``(N, D)`` annotated scores; anything where not known.
        known: ``(N, D)`` bool, which were annotated.
        prompt: ``(N,)`` ids of the items' prompts, numbers or texts; not indices that start again in each batch.
        dimensions: D names.
        samples: number of resamples.
        level: share of the resamples that an interval holds.
        seed: of the resampling.

    Returns:
        Plain data, ready for JSON. ``"dimensions"``: by name, ``images``, ``pairs`` and ``margin_pairs`` (counts), and
        ``hpa``, ``margin_hpa``, ``plcc``, ``srcc``, each as :meth:`Interval.to_dict`. ``"overall"``: the same four as the
        mean over the dimensions, ``pooled_hpa`` and ``pooled_margin_hpa`` over the pairs of all dimensions together, the
        counts, and ``prompts``. A number that is not defined (no pair, a constant) is None, and so is a mean that needs it.

    Raises:
        ValueError: shapes that do not fit, a NaN among the known items; the message names item and dimension.

    Reference: Z-Reward (arXiv 2606.09076), eq. (17) and its evaluation protocol.

    Example:
        >>> score = np.array([[4, 3], [3, 5], [5, 2], [3, 2]])
        >>> mu = score + np.array([[0, 0], [2, 0], [0, 0], [0, 0]])           # one image too high in alignment
        >>> table = evaluate(mu, score, np.ones((4, 2)), ["cat", "cat", "dog", "dog"], ["alignment", "realism"])
        >>> table["dimensions"]["alignment"]["hpa"]["estimate"], table["dimensions"]["realism"]["hpa"]["estimate"]
        (0.5, 1.0)
        >>> table["overall"]["hpa"]["estimate"], round(table["overall"]["pooled_hpa"]["estimate"], 4)   # 2 of 3 pairs
        (0.75, 0.6667)
    """
    data = _Items(score, known, prompt, dimensions)
    means = data.means("mu", mu)
    return data.table(
        resample(lambda weight: data.numbers(means, weight), data.prompt, samples=samples, level=level, seed=seed)
    )


def compare(
    first: ArrayLike,
    second: ArrayLike,
    score: ArrayLike,
    known: ArrayLike,
    prompt: ArrayLike,
    dimensions: Sequence[str],
    *,
    samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """The numbers of :func:`evaluate` for ``first`` minus those for ``second``, with intervals of the paired difference.

    Args:
        first: ``(N, D)`` expected scores of one scorer.
        second: ``(N, D)`` expected scores of the other, on the same items.
        score: ``(N, D)`` annotated scores; anything where not known.
        known: ``(N, D)`` bool, which were annotated.
        prompt: ``(N,)`` ids of the items' prompts.
        dimensions: D names.
        samples: number of resamples.
        level: share of the resamples that an interval holds.
        seed: of the resampling.

    Returns:
        As :func:`evaluate`. An interval that leaves out zero: one scorer is better beyond the choice of prompts.

    Raises:
        ValueError: as :func:`evaluate`.

    Reference: as :func:`evaluate`.

    Example:
        >>> score, prompt = np.array([[4], [3], [5], [2]]), [0, 0, 1, 1]
        >>> table = compare(score, -score, score, np.ones((4, 1)), prompt, ["realism"])
        >>> table["dimensions"]["realism"]["hpa"]["estimate"], round(table["dimensions"]["realism"]["plcc"]["low"], 4)
        (1.0, 2.0)
    """
    data = _Items(score, known, prompt, dimensions)
    a, b = data.means("first", first), data.means("second", second)
    return data.table(
        resample(
            lambda weight: data.numbers(a, weight) - data.numbers(b, weight),
            data.prompt,
            samples=samples,
            level=level,
            seed=seed,
        )
    )


class _Items:
    """The annotated items of an evaluation, and the layout of its table."""

    def __init__(self, score: ArrayLike, known: ArrayLike, prompt: ArrayLike, dimensions: Sequence[str]) -> None:
        self.prompt = np.unique(np.asarray(prompt), return_inverse=True)[1]
        self.dimensions = tuple(dimensions)
        self.known = self._matrix("known", known).astype(bool)
        self.score = self.means("score", score)

    def _matrix(self, name: str, values: ArrayLike) -> NDArray[np.float64]:
        matrix = np.asarray(values, np.float64)
        shape = (len(self.prompt), len(self.dimensions))
        if matrix.shape != shape:
            raise ValueError(f"{name} must be (N, D) = {shape} for N prompt ids and D dimensions, got {matrix.shape}")
        return matrix

    def means(self, name: str, values: ArrayLike) -> NDArray[np.float64]:
        """``(N, D)`` numbers, finite where the score is known."""
        matrix = self._matrix(name, values)
        bad = np.argwhere(self.known & ~np.isfinite(matrix))
        if len(bad):
            item, column = bad[0].tolist()
            raise ValueError(
                f"{name} is {matrix[item, column]} at item {item}, {self.dimensions[column]}: {len(bad)} known items have "
                f"no finite number; look at their inputs, or mark them as unknown"
            )
        return matrix

    def numbers(self, mu: NDArray[np.float64], weight: NDArray[np.float64]) -> NDArray[np.float64]:
        """``(B, M)`` numbers of the table for ``(B, N)`` multiplicities: the dimensions', their means, the pooled ones."""
        columns = []
        for d, take in enumerate(self.known.T):
            items = (mu[take, d], self.score[take, d], self.prompt[take], weight[:, take])
            columns.append([statistic(*items) for statistic in STATISTICS.values()])
        row, d_of_row = np.nonzero(self.known)
        items = (mu[self.known], self.score[self.known], self.prompt[row] * len(self.dimensions) + d_of_row, weight[:, row])
        pooled = [statistic(*items) for statistic in POOLED.values()]
        return np.concatenate([*columns, np.mean(columns, axis=0), pooled]).T

    def table(self, intervals: list[Interval]) -> dict[str, Any]:
        """Plain data from the intervals of :meth:`numbers`."""
        numbers = [interval.to_dict() for interval in intervals]
        size = len(STATISTICS)
        rows = [
            {**self._counts(d), **dict(zip(STATISTICS, numbers[d * size : (d + 1) * size], strict=True))}
            for d in range(len(self.dimensions))
        ]
        overall = {
            "images": int(self.known.any(1).sum()),
            "prompts": len(np.unique(self.prompt[self.known.any(1)])),
            **{key: sum(row[key] for row in rows) for key in ("pairs", "margin_pairs")},
            **dict(zip((*STATISTICS, *POOLED), numbers[len(rows) * size :], strict=True)),
        }
        return {"dimensions": dict(zip(self.dimensions, rows, strict=True)), "overall": overall}

    def _counts(self, d: int) -> dict[str, Any]:
        take = self.known[:, d]
        score, group = self.score[take, d], self.prompt[take]
        pairs, margin_pairs = (int(pair_counts(score, score, group, margin)[1].sum()) for margin in (0.0, MARGIN))
        return {"images": int(take.sum()), "pairs": pairs, "margin_pairs": margin_pairs}
