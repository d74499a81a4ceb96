"""How far the student's score distribution is from the teacher's."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from zr.losses.base import DistillationLoss
from zr.scores import ScoreDistribution, kl_divergence

__all__ = ["ForwardKL", "JensenShannon", "ReverseKL", "forward_kl", "jensen_shannon", "reverse_kl"]


def forward_kl(student: ScoreDistribution, teacher: ScoreDistribution, temperature: float = 1.0) -> Tensor:
    r"""Forward divergence, :math:`\tau^2\,KL(q_T^\tau \| q_\phi^\tau)`: the student covers all that the teacher holds possible.

    Args:
        student: batch shape ``(...)``; gets the gradient.
        teacher: batch shape ``(...)``, a constant.
        temperature: :math:`\tau`, divides the logits of both; :math:`\tau^2` keeps the size of the gradient.

    Returns:
        ``(...)``, in nats at temperature 1. Zero where the two agree.

    Raises:
        ValueError: bins that differ, a temperature that is not positive and finite.

    Reference: Z-Reward (arXiv 2606.09076), eq. (15); temperature: Hinton et al., arXiv 1503.02531.

    Example:
        >>> student = ScoreDistribution(torch.tensor([0.5, 0.5]).log(), bins=(1.0, 5.0))
        >>> teacher = ScoreDistribution(torch.tensor([1.0, 0.0]).log(), bins=(1.0, 5.0))
        >>> round(forward_kl(student, teacher).item(), 4)               # 1 * log(1 / .5)
        0.6931
    """
    return temperature**2 * kl_divergence(_softened(teacher.detach(), temperature), _softened(student, temperature))


def reverse_kl(student: ScoreDistribution, teacher: ScoreDistribution, temperature: float = 1.0) -> Tensor:
    r"""Reverse divergence, :math:`\tau^2\,KL(q_\phi^\tau \| q_T^\tau)`: the student seeks the teacher's main mode.

    Args:
        student: batch shape ``(...)``; gets the gradient.
        teacher: batch shape ``(...)``, a constant; every bin has some probability.
        temperature: :math:`\tau`, divides the logits of both; :math:`\tau^2` keeps the size of the gradient.

    Returns:
        ``(...)``, in nats at temperature 1. Zero where the two agree.

    Raises:
        ValueError: bins that differ, a temperature that is not positive and finite, a teacher with a bin of probability zero
            (the divergence is infinite).

    Reference: Gu et al., MiniLLM, arXiv 2306.08543; a variant of Z-Reward (arXiv 2606.09076), eq. (15).

    Example:
        >>> student = ScoreDistribution(torch.tensor([1.0, 0.0]).log(), bins=(1.0, 5.0))
        >>> teacher = ScoreDistribution(torch.tensor([0.5, 0.5]).log(), bins=(1.0, 5.0))
        >>> round(reverse_kl(student, teacher).item(), 4)               # 1 * log(1 / .5)
        0.6931
    """
    without = teacher.logits.isneginf().any(-1)
    if bool(without.any()):
        raise ValueError(
            f"{int(without.sum())} of {without.numel()} teacher distributions give a bin no probability (first at index "
            f"{without.nonzero()[0].tolist()}), so the reverse KL is infinite: use ForwardKL or JensenShannon"
        )
    return temperature**2 * kl_divergence(_softened(student, temperature), _softened(teacher.detach(), temperature))


def jensen_shannon(student: ScoreDistribution, teacher: ScoreDistribution, temperature: float = 1.0) -> Tensor:
    r"""Mean divergence of both from their mixture, :math:`\tau^2\,(KL(q_T \| m) + KL(q_\phi \| m)) / 2`, m their mean.

    Symmetric and bounded, so that one confident mistake of the teacher costs little.

    Args:
        student: batch shape ``(...)``; gets the gradient.
        teacher: batch shape ``(...)``, a constant.
        temperature: :math:`\tau`, divides the logits of both; :math:`\tau^2` keeps the size of the gradient.

    Returns:
        ``(...)``, in nats at temperature 1: zero where the two agree, log 2 where they share no bin.

    Raises:
        ValueError: bins that differ, a temperature that is not positive and finite.

    Reference: Lin 1991, Divergence Measures Based on the Shannon Entropy; for distillation: Agarwal et al., arXiv 2306.13649.

    Example:
        >>> student = ScoreDistribution(torch.tensor([0.0, 1.0]).log(), bins=(1.0, 5.0))
        >>> teacher = ScoreDistribution(torch.tensor([1.0, 0.0]).log(), bins=(1.0, 5.0))
        >>> round(jensen_shannon(student, teacher).item(), 4)           # log 2
        0.6931
    """
    p, q = _softened(teacher.detach(), temperature), _softened(student, temperature)
    lowest = torch.finfo(q.logits.dtype).min  # logaddexp has no gradient where both are -inf
    log_mixture = torch.logaddexp(p.logits.clamp_min(lowest), q.logits.clamp_min(lowest)) - math.log(2)
    mixture = ScoreDistribution(log_mixture, q.bins, validate_args=False)
    return temperature**2 * (kl_divergence(p, mixture) + kl_divergence(q, mixture)) / 2


class _Tempered(DistillationLoss):
    """A divergence at a temperature."""

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        _check_temperature(temperature)
        self.temperature = temperature

    def extra_repr(self) -> str:
        """The temperature."""
        return f"temperature={self.temperature:g}"


class ForwardKL(_Tempered):
    """One value per item, by :func:`forward_kl`; see there for shapes, units and the temperature."""

    def forward(self, student: ScoreDistribution, teacher: ScoreDistribution) -> Tensor:
        """``(...)`` values."""
        return forward_kl(student, teacher, self.temperature)


class ReverseKL(_Tempered):
    """One value per item, by :func:`reverse_kl`; see there for shapes, units and the temperature."""

    def forward(self, student: ScoreDistribution, teacher: ScoreDistribution) -> Tensor:
        """``(...)`` values."""
        return reverse_kl(student, teacher, self.temperature)


class JensenShannon(_Tempered):
    """One value per item, by :func:`jensen_shannon`; see there for shapes, units and the temperature."""

    def forward(self, student: ScoreDistribution, teacher: ScoreDistribution) -> Tensor:
        """``(...)`` values."""
        return jensen_shannon(student, teacher, self.temperature)


def _check_temperature(temperature: float) -> None:
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")


def _softened(distribution: ScoreDistribution, temperature: float) -> ScoreDistribution:
    _check_temperature(temperature)
    return distribution.tempered(temperature)
