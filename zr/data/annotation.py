"""From several annotators' scores to one: trimmed mean, votes, variance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Aggregate", "aggregate", "bin_position"]


@dataclass(frozen=True)
class Aggregate:
    """What several annotators say together about one image in one dimension; made by :func:`aggregate`.

    Args:
        score: their common score, in score units; need not be a bin.
        votes: K counts, one per bin.
        variance: of all scores around their plain mean (population variance), in squared score units.
        trimmed: True when the highest and the lowest score were dropped, False when there were too few for it.
    """

    score: float
    votes: tuple[float, ...]
    variance: float
    trimmed: bool


def aggregate(scores: Sequence[float], bins: Sequence[float]) -> Aggregate:
    """Drop the highest and the lowest score and average the rest; with fewer than three scores, average them all.

    Votes and variance keep every score.

    Args:
        scores: one per annotator, at least one; each must be a bin.
        bins: the K ascending scores of the scale.

    Returns:
        Score, votes, variance, and whether the mean was trimmed.

    Raises:
        ValueError: no score, NaN, or a score that is no bin.

    Reference: Z-Reward (arXiv 2606.09076), section on annotation.

    Example:
        >>> aggregate([1.0, 4.0, 4.5, 5.0], bins=(1.0, 4.0, 4.5, 5.0))       # (4 + 4.5) / 2
        Aggregate(score=4.25, votes=(1.0, 1.0, 1.0, 1.0), variance=2.421875, trimmed=True)
        >>> aggregate([4.0, 5.0], bins=(4.0, 5.0)).trimmed
        False
    """
    if not scores:
        raise ValueError("aggregate needs at least one score: leave an image that nobody scored out")
    votes = [0.0] * len(bins)
    for score in scores:
        votes[bin_position(score, bins)] += 1.0
    trimmed = len(scores) >= 3
    kept = sorted(scores)[1:-1] if trimmed else scores
    mean = math.fsum(scores) / len(scores)
    variance = math.fsum((s - mean) ** 2 for s in scores) / len(scores)
    return Aggregate(math.fsum(kept) / len(kept), tuple(votes), variance, trimmed)


def bin_position(score: float, bins: Sequence[float]) -> int:
    """Index of the bin that ``score`` is.

    Raises:
        ValueError: NaN, a score off the scale, or one between two bins; the message names what is near.

    Example:
        >>> bin_position(3.0, (1.0, 3.0, 5.0))
        1
        >>> bin_position(4.2, (1.0, 3.0, 5.0))
        Traceback (most recent call last):
        ...
        ValueError: score 4.2 is no bin: its neighbours are 3 and 5
    """
    if math.isnan(score):
        raise ValueError("score is NaN: leave unknown scores out")
    nearest = min(range(len(bins)), key=lambda k: abs(bins[k] - score))
    if abs(bins[nearest] - score) <= 1e-5 * (bins[-1] - bins[0]):  # rounding of float32, as in zr.scores
        return nearest
    if not bins[0] < score < bins[-1]:
        raise ValueError(f"score {score:g} is off the scale {bins[0]:g} to {bins[-1]:g}")
    above = next(k for k, b in enumerate(bins) if b > score)
    raise ValueError(f"score {score:g} is no bin: its neighbours are {bins[above - 1]:g} and {bins[above]:g}")
