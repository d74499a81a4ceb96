"""How far the expected score is from the annotated one."""

from __future__ import annotations

from torch import Tensor

from zr.losses.base import ItemLoss, ScoreTarget, check_shape, score_range
from zr.scores import ScoreDistribution

__all__ = ["AbsoluteExpectationLoss", "SquaredExpectationLoss", "absolute_expectation_loss", "squared_expectation_loss"]


def absolute_expectation_loss(prediction: ScoreDistribution, score: Tensor) -> Tensor:
    r"""Distance of the expected score from the annotated one, :math:`|\mu - s| / R`.

    Args:
        prediction: batch shape ``(...)``.
        score: ``(...)``, in score units; any number, a bin or not.

    Returns:
        ``(...)``, as a share of the score range R, so that its weight does not depend on the scale.

    Raises:
        ValueError: shapes that differ.

    Reference: one minus the pointwise reward of Z-Reward (arXiv 2606.09076), eq. (7).

    Example:
        >>> import torch
        >>> q = ScoreDistribution(torch.tensor([0.5, 0.5]).log(), bins=(1.0, 5.0))
        >>> round(absolute_expectation_loss(q, torch.tensor(4.0)).item(), 4)        # |3 - 4| / 4
        0.25
    """
    return _error(prediction, score).abs()


def squared_expectation_loss(prediction: ScoreDistribution, score: Tensor) -> Tensor:
    r"""Squared distance of the expected score from the annotated one, :math:`((\mu - s) / R)^2`: regression of the mean.

    Args:
        prediction: batch shape ``(...)``.
        score: ``(...)``, in score units; any number, a bin or not.

    Returns:
        ``(...)``, as a squared share of the score range R, so that its weight does not depend on the scale.

    Raises:
        ValueError: shapes that differ.

    Reference: the expectation is eq. (2) of Z-Reward (arXiv 2606.09076).

    Example:
        >>> import torch
        >>> q = ScoreDistribution(torch.tensor([0.5, 0.5]).log(), bins=(1.0, 5.0))
        >>> round(squared_expectation_loss(q, torch.tensor(4.0)).item(), 4)         # (|3 - 4| / 4) ** 2
        0.0625
    """
    return _error(prediction, score).square()


class AbsoluteExpectationLoss(ItemLoss):
    """One value per item, by :func:`absolute_expectation_loss`; see there for shapes and units."""

    def forward(self, prediction: ScoreDistribution, target: ScoreTarget) -> Tensor:
        """``(...)`` values against ``target.score``."""
        return absolute_expectation_loss(prediction, target.score)


class SquaredExpectationLoss(ItemLoss):
    """One value per item, by :func:`squared_expectation_loss`; see there for shapes and units."""

    def forward(self, prediction: ScoreDistribution, target: ScoreTarget) -> Tensor:
        """``(...)`` values against ``target.score``."""
        return squared_expectation_loss(prediction, target.score)


def _error(prediction: ScoreDistribution, score: Tensor) -> Tensor:
    mu = prediction.mean
    return (mu - check_shape("score", score, mu.shape).to(mu.dtype)) / score_range(prediction)
