"""Learning from sampled traces: what a rollout earns, how it compares with its group, and what that does to its tokens.

The losses of tokens give one value per rollout, not reduced: a sum over its sampled tokens divided by a constant L. Their mean
over the 2G rollouts of a pair (and over pairs) is the objective, whatever the split into micro-batches.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from zr.losses.base import check_pair, check_shape, score_range
from zr.losses.expectation import absolute_expectation_loss
from zr.losses.pairwise import gap_loss
from zr.scores import ScoreDistribution

__all__ = [
    "K1",
    "K2",
    "K3",
    "Advantage",
    "BatchAdvantage",
    "CentredAdvantage",
    "ClippedPolicyGradient",
    "ExactGradientLoss",
    "GroupAdvantage",
    "K3ValueK2Gradient",
    "KLEstimator",
    "LeaveOneOutAdvantage",
    "PolicyGradient",
    "PolicyLoss",
    "RawAdvantage",
    "ScoreReward",
    "batch_advantage",
    "centred_advantage",
    "clipped_policy_gradient_loss",
    "exact_gradient_loss",
    "group_advantage",
    "k1",
    "k2",
    "k3",
    "k3_value_k2_gradient",
    "leave_one_out_advantage",
    "on_policy_distillation_loss",
    "pairwise_reward",
    "pathwise_loss",
    "pointwise_reward",
    "policy_gradient_loss",
    "score_function_weight",
    "score_reward",
]

LIMIT = 20.0  # of the log of a ratio: exp(20) = 5e8; beyond it a ratio is constant, so that no value or gradient overflows


# Rewards


def pointwise_reward(prediction: ScoreDistribution, score: Tensor) -> Tensor:
    r"""Closeness of each output's expected score to the annotated one, :math:`1 - |\mu_i - s| / R`.

    Args:
        prediction: batch shape ``(..., G)``, G outputs for each item.
        score: ``(...)``, in score units.

    Returns:
        ``(..., G)``, in [0, 1] for a score within the bins.

    Raises:
        ValueError: shapes that do not fit.

    Reference: Z-Reward (arXiv 2606.09076), eq. (7).

    Example:
        >>> q = ScoreDistribution(torch.tensor([[0.5, 0.5], [0.0, 1.0]]).log(), bins=(1.0, 5.0))    # means 3 and 5
        >>> pointwise_reward(q, torch.tensor(4.0)).tolist()                  # 1 - 1 / 4, twice
        [0.75, 0.75]
    """
    if not prediction.batch_shape:
        raise ValueError("pointwise_reward needs a prediction of batch shape (..., G), G outputs for each item, got ()")
    check_shape("score", score, prediction.batch_shape[:-1])
    return 1 - absolute_expectation_loss(prediction, score.unsqueeze(-1).expand(prediction.batch_shape))


def pairwise_reward(prediction: ScoreDistribution, score: Tensor) -> Tensor:
    r"""Closeness of each output's gaps to the annotated gap, :math:`1 - \frac1G \sum_k |(\mu_i - \mu'_k) - (s - s')| / R`.

    Args:
        prediction: batch shape ``(..., 2, G)``, the two items of a pair, G outputs each; k runs over the other side's.
        score: ``(..., 2)``, in score units.

    Returns:
        ``(..., 2, G)``, in [-1, 1] for scores within the bins.

    Raises:
        ValueError: shapes that do not fit.

    Reference: Z-Reward (arXiv 2606.09076), eq. (10).

    Example:
        >>> q = ScoreDistribution(torch.tensor([[[0.0, 1.0]], [[0.5, 0.5]]]).log(), bins=(1.0, 5.0))    # means 5 and 3
        >>> pairwise_reward(q, torch.tensor([4.0, 3.0])).tolist()            # 1 - |(5 - 3) - (4 - 3)| / 4 on both sides
        [[0.75], [0.75]]
    """
    check_pair(prediction, score)
    mu = prediction.mean
    error = mu - score.to(mu.dtype).unsqueeze(-1)
    miss = (error[..., 0, :, None] - error[..., 1, None, :]).abs() / score_range(prediction)
    return 1 - torch.stack([miss.mean(-1), miss.mean(-2)], -2)


def score_reward(prediction: ScoreDistribution, score: Tensor, pointwise: float = 1.0, pairwise: float = 1.0) -> Tensor:
    r"""Weighted sum of both rewards, :math:`\lambda_{pt} r_{pt} + \lambda_{pw} r_{pw}`.

    Args:
        prediction: batch shape ``(..., 2, G)``, the two items of a pair, G outputs each.
        score: ``(..., 2)``, in score units.
        pointwise: weight of :func:`pointwise_reward`; 0: not computed.
        pairwise: weight of :func:`pairwise_reward`; 0: not computed.

    Returns:
        ``(..., 2, G)``, in [-pairwise, pointwise + pairwise] for scores within the bins. The gradient is kept; advantages
        drop it.

    Raises:
        ValueError: shapes that do not fit; a weight below 0, or both 0.

    Reference: Z-Reward (arXiv 2606.09076), eq. (13).

    Example:
        >>> q = ScoreDistribution(torch.tensor([[[0.0, 1.0]], [[0.5, 0.5]]]).log(), bins=(1.0, 5.0))    # means 5 and 3
        >>> score_reward(q, torch.tensor([4.0, 3.0]), pointwise=1.0, pairwise=2.0).tolist()    # .75 + 2 * .75, 1 + 2 * .75
        [[2.25], [2.5]]
    """
    check_pair(prediction, score)
    _check_weights(pointwise, pairwise)
    total = torch.zeros_like(prediction.mean)
    if pointwise:
        total = total + pointwise * pointwise_reward(prediction, score)
    if pairwise:
        total = total + pairwise * pairwise_reward(prediction, score)
    return total


class ScoreReward(nn.Module):
    """One reward per rollout, by :func:`score_reward`; see there for shapes and units."""

    def __init__(self, pointwise: float = 1.0, pairwise: float = 1.0) -> None:
        super().__init__()
        _check_weights(pointwise, pairwise)
        self.pointwise, self.pairwise = pointwise, pairwise

    def forward(self, prediction: ScoreDistribution, score: Tensor) -> Tensor:
        """``(..., 2, G)`` rewards."""
        return score_reward(prediction, score, self.pointwise, self.pairwise)

    def extra_repr(self) -> str:
        """The weights."""
        return f"pointwise={self.pointwise:g}, pairwise={self.pairwise:g}"


# Advantages


def group_advantage(reward: Tensor, kept: Tensor | None = None, floor: float = 1e-3) -> Tensor:
    r"""Rewards centred and scaled within their group, :math:`(r_i - \bar r) / (std + \epsilon)`.

    Args:
        reward: ``(..., G)``, G >= 2 outputs of one item.
        kept: ``(..., G)`` bool, the rollouts that count. The others (say, those that the length limit cut) enter neither mean
            nor std, and get advantage zero. None: all.
        floor: :math:`\epsilon`, in units of the reward. Eqs. (7) and (10) are shares of the score range, so 1e-3 is a
            thousandth of it: it keeps groups that all but agree from turning noise into advantages of one.

    Returns:
        ``(..., G)`` without gradient; std is the unbiased one. A group without spread, or with one kept rollout, gets zeros.

    Raises:
        ValueError: G = 1, shapes that differ, a kept reward that is not finite, a floor that is not positive.

    Reference: Shao et al., DeepSeekMath, arXiv 2402.03300; Z-Reward (arXiv 2606.09076), eq. (3).

    Example:
        >>> group_advantage(torch.tensor([[0.25, 0.75], [0.5, 0.5]]), floor=1e-9).mul(2**0.5).round(decimals=4).tolist()
        [[-1.0, 1.0], [0.0, 0.0]]
    """
    _check_floor(floor)
    reward, kept = _group(reward, kept)
    centred, count = _centred(reward, kept)
    std = (centred.square().sum(-1, keepdim=True) / (count - 1).clamp_min(1)).sqrt()
    return centred / (std + floor)


def batch_advantage(reward: Tensor, kept: Tensor | None = None, floor: float = 1e-3) -> Tensor:
    r"""Rewards centred within their group, scaled by the batch's spread, :math:`(r_i - \bar r) / (std_{batch} + \epsilon)`.

    A group that all but agrees stays small; but the scale depends on which groups share the batch.

    Args:
        reward: ``(..., G)``, G >= 2 outputs of one item.
        kept: ``(..., G)`` bool, as in :func:`group_advantage`.
        floor: :math:`\epsilon`, as in :func:`group_advantage`.

    Returns:
        ``(..., G)`` without gradient; std is the unbiased one of all kept rewards.

    Raises:
        ValueError: as :func:`group_advantage`.

    Reference: TRL's ``scale_rewards="batch"``; Liu et al., Tricks or Traps?, arXiv 2508.08221.

    Example:
        >>> batch_advantage(torch.tensor([[0.0, 1.0], [0.0, 1.0]]), floor=1e-9).mul(12**0.5).round(decimals=4).tolist()
        [[-3.0, 3.0], [-3.0, 3.0]]
    """
    _check_floor(floor)
    reward, kept = _group(reward, kept)
    centred, _ = _centred(reward, kept)
    counted = reward[kept]
    return centred / (counted.std() + floor) if len(counted) > 1 else centred


def centred_advantage(reward: Tensor, kept: Tensor | None = None) -> Tensor:
    r"""Rewards centred within their group and not scaled, :math:`r_i - \bar r`.

    Args:
        reward: ``(..., G)``, G >= 2 outputs of one item.
        kept: ``(..., G)`` bool, as in :func:`group_advantage`.

    Returns:
        ``(..., G)`` without gradient. (G - 1) / G of :func:`leave_one_out_advantage`.

    Raises:
        ValueError: as :func:`group_advantage`.

    Reference: Liu et al., Understanding R1-Zero-Like Training (Dr. GRPO), arXiv 2503.20783.

    Example:
        >>> centred_advantage(torch.tensor([0.0, 0.25, 0.5])).tolist()
        [-0.25, 0.0, 0.25]
    """
    return _centred(*_group(reward, kept))[0]


def leave_one_out_advantage(reward: Tensor, kept: Tensor | None = None) -> Tensor:
    r"""Each reward minus the mean of the others of its group, :math:`r_i - \frac{1}{G-1} \sum_{k \ne i} r_k`.

    The baseline does not depend on its rollout, so the expected policy gradient is that of the bare reward.

    Args:
        reward: ``(..., G)``, G >= 2 outputs of one item.
        kept: ``(..., G)`` bool, as in :func:`group_advantage`.

    Returns:
        ``(..., G)`` without gradient.

    Raises:
        ValueError: as :func:`group_advantage`.

    Reference: Kool et al. 2019, Buy 4 REINFORCE Samples, Get a Baseline for Free!; Ahmadian et al., arXiv 2402.14740.

    Example:
        >>> leave_one_out_advantage(torch.tensor([0.0, 0.25, 0.5])).tolist()         # 0 - .375, .25 - .25, .5 - .125
        [-0.375, 0.0, 0.375]
    """
    centred, count = _centred(*_group(reward, kept))
    return centred * count / (count - 1).clamp_min(1)


class Advantage(nn.Module, ABC):
    """From the rewards of groups to the weights of their rollouts; constants for the gradient."""

    @abstractmethod
    def forward(self, reward: Tensor, kept: Tensor | None = None) -> Tensor:
        """One weight per rollout.

        Args:
            reward: ``(..., G)``, G outputs of one item.
            kept: ``(..., G)`` bool, the rollouts that count; None: all.

        Returns:
            ``(..., G)`` without gradient.
        """


class GroupAdvantage(Advantage):
    """One value per rollout, by :func:`group_advantage`, the default of GRPO and GDSO; see there."""

    def __init__(self, floor: float = 1e-3) -> None:
        super().__init__()
        _check_floor(floor)
        self.floor = floor

    def forward(self, reward: Tensor, kept: Tensor | None = None) -> Tensor:
        """``(..., G)`` advantages."""
        return group_advantage(reward, kept, self.floor)

    def extra_repr(self) -> str:
        """The floor."""
        return f"floor={self.floor:g}"


class BatchAdvantage(Advantage):
    """One value per rollout, by :func:`batch_advantage`; see there."""

    def __init__(self, floor: float = 1e-3) -> None:
        super().__init__()
        _check_floor(floor)
        self.floor = floor

    def forward(self, reward: Tensor, kept: Tensor | None = None) -> Tensor:
        """``(..., G)`` advantages."""
        return batch_advantage(reward, kept, self.floor)

    def extra_repr(self) -> str:
        """The floor."""
        return f"floor={self.floor:g}"


class CentredAdvantage(Advantage):
    """One value per rollout, by :func:`centred_advantage`: no scaling; see there."""

    def forward(self, reward: Tensor, kept: Tensor | None = None) -> Tensor:
        """``(..., G)`` advantages."""
        return centred_advantage(reward, kept)


class LeaveOneOutAdvantage(Advantage):
    """One value per rollout, by :func:`leave_one_out_advantage`; see there."""

    def forward(self, reward: Tensor, kept: Tensor | None = None) -> Tensor:
        """``(..., G)`` advantages."""
        return leave_one_out_advantage(reward, kept)


class RawAdvantage(Advantage):
    """The reward itself, without baseline: plain REINFORCE (Williams 1992), here to compare. Rollouts not kept get zero."""

    def forward(self, reward: Tensor, kept: Tensor | None = None) -> Tensor:
        """``(..., G)`` rewards."""
        reward, kept = _group(reward, kept)
        return torch.where(kept, reward, 0.0)


# Policy gradients


def policy_gradient_loss(log_probs: Tensor, advantage: Tensor, mask: Tensor, length: float | Tensor = 1.0) -> Tensor:
    r"""REINFORCE: :math:`-\frac{A}{L} \sum_t \log \pi(o_t)` over the sampled tokens.

    Args:
        log_probs: ``(..., T)`` log-probabilities of the tokens, in nats, with gradient. Anything where ``mask`` is False.
        advantage: ``(...)``, one per rollout, a constant.
        mask: ``(..., T)`` bool, True where a token was sampled.
        length: L, the same for all rollouts (1 is eq. (4)), or ``(...)`` one per rollout: ``mask.sum(-1)`` is the mean over
            tokens of the first GRPO, which favours long wrong traces.

    Returns:
        ``(...)``, one value per rollout, in nats. Their mean over the 2G rollouts is eq. (4).

    Raises:
        ValueError: shapes that differ, a mask that is not bool, a length that is not positive.

    Reference: Williams 1992; Z-Reward (arXiv 2606.09076), eq. (4).

    Example:
        >>> log_probs = torch.tensor([[-1.0, -2.0, float("nan")]])
        >>> policy_gradient_loss(log_probs, torch.tensor([0.5]), torch.tensor([[True, True, False]])).tolist()
        [1.5]
    """
    log_probs, advantage = _tokens(mask, log_probs), _per_rollout(advantage, mask)
    return -advantage * _over_tokens(log_probs, mask, length)


def clipped_policy_gradient_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantage: Tensor,
    mask: Tensor,
    length: float | Tensor = 1.0,
    low: float = 0.2,
    high: float = 0.2,
) -> Tensor:
    r"""PPO's and GRPO's clipped surrogate, :math:`-\frac1L \sum_t \min(\rho_t A, clip(\rho_t, 1 - low, 1 + high) A)`.

    :math:`\rho_t = \pi(o_t) / \pi_{old}(o_t)`. At equal weights its gradient is that of :func:`policy_gradient_loss`.

    Args:
        log_probs: ``(..., T)`` log-probabilities of the tokens, in nats, with gradient. Anything where ``mask`` is False.
        old_log_probs: ``(..., T)``, those under the weights that sampled, constants.
        advantage: ``(...)``, one per rollout, a constant.
        mask: ``(..., T)`` bool, True where a token was sampled.
        length: L, as in :func:`policy_gradient_loss`.
        low: how far below 1 a ratio may go before it stops counting, in [0, 1].
        high: how far above 1, at least 0.

    Returns:
        ``(...)``, one value per rollout. A ratio counts as constant beyond :math:`e^{\pm 20}`.

    Raises:
        ValueError: as :func:`policy_gradient_loss`; clipping bounds out of range.

    Reference: Schulman et al., arXiv 1707.06347; Shao et al., arXiv 2402.03300; two bounds: Yu et al., arXiv 2503.14476.

    Example:
        >>> old, new = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.55, 1.0]]).log()       # ratios 1.1 and 2
        >>> mask = torch.tensor([[True, True]])
        >>> [round(x, 4) for x in clipped_policy_gradient_loss(new, old, torch.tensor([1.0]), mask).tolist()]  # 1.1 + 1.2
        [-2.3]
    """
    _check_clip(low, high)
    log_probs, old_log_probs, advantage = (
        _tokens(mask, log_probs),
        _tokens(mask, old_log_probs, "old_log_probs").detach(),
        _per_rollout(advantage, mask).unsqueeze(-1),
    )
    ratio = (log_probs - old_log_probs).clamp(-LIMIT, LIMIT).exp()
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
    return -_over_tokens(gain, mask, length)


def on_policy_distillation_loss(log_probs: Tensor, old_log_probs: Tensor, teacher_log_probs: Tensor, mask: Tensor) -> Tensor:
    r"""On-policy distillation, :math:`-\frac1T \sum_t A_t \log \pi(y_t)`, :math:`A_t = \log \pi_T(y_t) - \log \pi_{old}(y_t)`.

    On a trace that the student sampled itself. The expected gradient at each position, the tokens before it held fixed, is that
    of :math:`KL(\pi \| \pi_T)` over the vocabulary.

    Args:
        log_probs: ``(..., T)`` log-probabilities of the student's sampled tokens, in nats, with gradient. Anything where
            ``mask`` is False.
        old_log_probs: ``(..., T)``, those under the weights that sampled.
        teacher_log_probs: ``(..., T)``, those of the teacher, which must share the vocabulary.
        mask: ``(..., T)`` bool, True where a token was sampled.

    Returns:
        ``(...)``, one value per rollout, the mean over its own sampled tokens; zero for a rollout without any.

    Raises:
        ValueError: shapes that differ, a mask that is not bool.

    Reference: Z-Reward (arXiv 2606.09076), eqs. (18), (19); Agarwal et al., arXiv 2306.13649.

    Example:
        >>> student, teacher = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-2.0, -1.0]])            # advantages -1 and 1
        >>> on_policy_distillation_loss(student, student, teacher, torch.tensor([[True, True]])).tolist()  # (-1 + 2) / 2
        [0.5]
    """
    log_probs = _tokens(mask, log_probs)
    old, teacher = _tokens(mask, old_log_probs, "old_log_probs"), _tokens(mask, teacher_log_probs, "teacher_log_probs")
    advantage = (teacher - old).detach()
    return -_over_tokens(advantage * log_probs, mask, mask.sum(-1).clamp_min(1))


class PolicyLoss(nn.Module, ABC):
    """What advantages do to the log-probabilities of sampled tokens. ``length`` is L, a constant of the run."""

    def __init__(self, length: float = 1.0) -> None:
        super().__init__()
        _check_length(length)
        self.length = length

    @abstractmethod
    def forward(self, log_probs: Tensor, old_log_probs: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:
        """One value per rollout.

        Args:
            log_probs: ``(..., T)``, with gradient.
            old_log_probs: ``(..., T)`` under the weights that sampled; ``log_probs`` itself where these are the same.
            advantage: ``(...)``, constants.
            mask: ``(..., T)`` bool, True where a token was sampled.

        Returns:
            ``(...)``, not reduced.
        """

    def extra_repr(self) -> str:
        """The constant L."""
        return f"length={self.length:g}"


class PolicyGradient(PolicyLoss):
    """One value per rollout, by :func:`policy_gradient_loss`, for one update per sample: old log-probs are not looked at."""

    def forward(self, log_probs: Tensor, old_log_probs: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:
        """``(...)`` values."""
        return policy_gradient_loss(log_probs, advantage, mask, self.length)


class ClippedPolicyGradient(PolicyLoss):
    """One value per rollout, by :func:`clipped_policy_gradient_loss`, for several updates on one sample; see there."""

    def __init__(self, length: float = 1.0, low: float = 0.2, high: float = 0.2) -> None:
        super().__init__(length)
        _check_clip(low, high)
        self.low, self.high = low, high

    def forward(self, log_probs: Tensor, old_log_probs: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:
        """``(...)`` values."""
        return clipped_policy_gradient_loss(log_probs, old_log_probs, advantage, mask, self.length, self.low, self.high)

    def extra_repr(self) -> str:
        """The constant L and the bounds."""
        return f"length={self.length:g}, low={self.low:g}, high={self.high:g}"


# The exact gradient of the expected reward


def score_function_weight(
    prediction: ScoreDistribution, score: Tensor, pointwise: float = 1.0, pairwise: float = 1.0
) -> Tensor:
    r"""Weight of each trace in the exact gradient of the reward, :math:`\lambda_{pt} r_{pt} + 2 \lambda_{pw} r_{pw} - b`.

    The 2: a rollout also enters the rewards of the other side. b is the mean of the same expression over the others of its own.
    As printed, eqs. (3), (4), (10) give the pairwise part half of this weight, scale it by (G - 1) / G and by 1 / std.

    Args:
        prediction: batch shape ``(..., 2, G)``, G >= 2 outputs of each item of a pair.
        score: ``(..., 2)``, in score units.
        pointwise: weight of :func:`pointwise_reward` in the expected reward.
        pairwise: weight of :func:`pairwise_reward` in it.

    Returns:
        ``(..., 2, G)`` without gradient; advantages for :func:`policy_gradient_loss` at L = 1.

    Raises:
        ValueError: shapes that do not fit, G = 1, a weight below 0, or both 0.

    Reference: ours; the rewards are eqs. (7), (10), (13) of Z-Reward (arXiv 2606.09076).

    Example:
        >>> q = ScoreDistribution(torch.tensor([[[0.0, 1.0], [0.5, 0.5]], [[0.5, 0.5], [0.5, 0.5]]]).log(), bins=(1.0, 5.0))
        >>> score_function_weight(q, torch.tensor([5.0, 3.0]), pointwise=0.0).tolist()       # r_pw: 1, .5 and .75, .75
        [[1.0, -1.0], [0.0, 0.0]]
    """
    return leave_one_out_advantage(score_reward(prediction, score, pointwise, 2 * pairwise))


def pathwise_loss(prediction: ScoreDistribution, score: Tensor, pointwise: float = 1.0, pairwise: float = 1.0) -> Tensor:
    r"""What the reward lacks, through q, traces fixed: :math:`\lambda_{pt} \overline{|\mu - s|} / R + \lambda_{pw} L_{pw}`.

    Args:
        prediction: batch shape ``(..., 2, G)``, the two items of a pair, G outputs each.
        score: ``(..., 2)``, in score units.
        pointwise: weight of the mean distance from the scores.
        pairwise: weight of :func:`zr.losses.gap_loss`.

    Returns:
        ``(...)``, one value per pair: ``pointwise + pairwise`` minus the mean of :func:`score_reward`.

    Raises:
        ValueError: shapes that do not fit; a weight below 0, or both 0.

    Reference: ours; L_pw is eq. (11) of Z-Reward (arXiv 2606.09076).

    Example:
        >>> q = ScoreDistribution(torch.tensor([[[0.0, 1.0]], [[0.5, 0.5]]]).log(), bins=(1.0, 5.0))    # means 5 and 3
        >>> pathwise_loss(q, torch.tensor([4.0, 3.0])).item()        # (1 / 4 + 0) / 2 + |(5 - 3) - (4 - 3)| / 4
        0.375
    """
    check_pair(prediction, score)
    _check_weights(pointwise, pairwise)
    total = torch.zeros_like(prediction.mean[..., 0, 0])
    if pointwise:
        total = total + pointwise * (1 - pointwise_reward(prediction, score)).mean((-2, -1))
    if pairwise:
        total = total + pairwise * gap_loss(prediction, score)
    return total


def exact_gradient_loss(
    prediction: ScoreDistribution,
    score: Tensor,
    log_probs: Tensor,
    mask: Tensor,
    pointwise: float = 1.0,
    pairwise: float = 1.0,
) -> Tensor:
    r"""A loss whose expected gradient is exactly :math:`-\nabla E[\frac{1}{2G} \sum_{j,i} r_{j,i}]`, both halves of it.

    GDSO as printed differs, see :func:`score_function_weight`; this is the variant to compare. In parts, it is ``ScoreReward``
    with the pairwise weight doubled, ``LeaveOneOutAdvantage``, ``PolicyGradient(length=1)``, and the terms
    ``AbsoluteExpectationLoss`` and ``GapLoss`` at the weights of the reward.

    Args:
        prediction: batch shape ``(..., 2, G)``, G >= 2 outputs of each item of a pair, with gradient.
        score: ``(..., 2)``, in score units.
        log_probs: ``(..., 2, G, T)`` log-probabilities of the tokens of the traces, in nats, with gradient. The score is no
            token of the trace: it has no influence on the reward, and its log-probability would only add variance.
        mask: ``(..., 2, G, T)`` bool, True where a token was sampled.
        pointwise: weight of :func:`pointwise_reward` in the expected reward.
        pairwise: weight of :func:`pairwise_reward` in it.

    Returns:
        ``(...)``, one value per pair. Only its gradient has a meaning.

    Raises:
        ValueError: shapes that do not fit, G = 1, a weight below 0, or both 0.

    Reference: ours; the rewards are eqs. (7), (10), (13) of Z-Reward (arXiv 2606.09076).

    Example:
        >>> q = ScoreDistribution(torch.tensor([[[0.0, 1.0], [0.5, 0.5]], [[0.5, 0.5], [0.5, 0.5]]]).log(), bins=(1.0, 5.0))
        >>> log_probs = torch.tensor([[[-1.0], [-2.0]], [[-3.0], [-4.0]]])
        >>> mask = torch.ones_like(log_probs, dtype=torch.bool)
        >>> exact_gradient_loss(q, torch.tensor([5.0, 3.0]), log_probs, mask, pointwise=0.0).item()  # -(-1 + 2) / 4 + .25
        0.0
    """
    weight = score_function_weight(prediction, score, pointwise, pairwise)
    traces = policy_gradient_loss(log_probs, weight, mask).mean((-2, -1))
    return traces + pathwise_loss(prediction, score, pointwise, pairwise)


class ExactGradientLoss(nn.Module):
    """One value per pair, by :func:`exact_gradient_loss`; see there for shapes and units."""

    def __init__(self, pointwise: float = 1.0, pairwise: float = 1.0) -> None:
        super().__init__()
        _check_weights(pointwise, pairwise)
        self.pointwise, self.pairwise = pointwise, pairwise

    def forward(self, prediction: ScoreDistribution, score: Tensor, log_probs: Tensor, mask: Tensor) -> Tensor:
        """``(...)`` values."""
        return exact_gradient_loss(prediction, score, log_probs, mask, self.pointwise, self.pairwise)

    def extra_repr(self) -> str:
        """The weights."""
        return f"pointwise={self.pointwise:g}, pairwise={self.pairwise:g}"


# Distance from the reference policy


def k1(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    r"""The log-ratio :math:`d = \log \pi - \log \pi_{ref}` of sampled tokens.

    Its mean over samples of :math:`\pi` is :math:`KL(\pi \| \pi_{ref})`. Its expected gradient is zero: fit to be watched or
    subtracted from a reward, but as a loss it descends nothing.

    Args:
        log_probs: log-probabilities of tokens sampled from the policy, in nats, with gradient.
        reference_log_probs: the same shape, a constant.

    Returns:
        The same shape, in nats; may be negative.

    Raises:
        ValueError: shapes that differ.

    Reference: Schulman 2020, Approximating KL Divergence (joschu.net/blog/kl-approx.html).

    Example:
        >>> round(k1(torch.tensor(0.5).log(), torch.tensor(0.25).log()).item(), 4)                   # log 2
        0.6931
    """
    return log_probs - check_shape("reference_log_probs", reference_log_probs, log_probs.shape).detach()


def k2(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    r"""Half the squared log-ratio, :math:`d^2 / 2`.

    Its mean is close to :math:`KL(\pi \| \pi_{ref})` when that is small, with a bias. Its expected gradient is exactly that of
    :math:`KL(\pi \| \pi_{ref})`, at each position with the tokens before it held fixed, on samples of the present policy.

    Args:
        log_probs: log-probabilities of tokens sampled from the policy, in nats, with gradient.
        reference_log_probs: the same shape, a constant.

    Returns:
        The same shape, at least 0.

    Raises:
        ValueError: shapes that differ.

    Reference: Schulman 2020, as :func:`k1`; Tang and Munos, arXiv 2506.09477.

    Example:
        >>> k2(torch.tensor(-1.0), torch.tensor(-3.0)).item()                                         # 2 ** 2 / 2
        2.0
    """
    return k1(log_probs, reference_log_probs).square() / 2


def k3(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    r"""The estimator :math:`e^{-d} - 1 + d` of GRPO.

    Its mean is :math:`KL(\pi \| \pi_{ref})` without bias and with little variance. But its expected gradient, as a loss, is
    that of the other divergence, :math:`KL(\pi_{ref} \| \pi)`, at each position with the tokens before it held fixed, on
    samples of the present policy.

    Args:
        log_probs: log-probabilities of tokens sampled from the policy, in nats, with gradient.
        reference_log_probs: the same shape, a constant.

    Returns:
        The same shape, at least 0. The ratio counts as constant beyond :math:`e^{20}`.

    Raises:
        ValueError: shapes that differ.

    Reference: Schulman 2020, as :func:`k1`; Shao et al., arXiv 2402.03300, eq. (4).

    Example:
        >>> round(k3(torch.tensor(0.25).log(), torch.tensor(0.5).log()).item(), 4)                    # 2 - 1 - log 2
        0.3069
    """
    d = k1(log_probs, reference_log_probs)
    return torch.expm1(-d.clamp_min(-LIMIT)) + d


def k3_value_k2_gradient(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    r"""The value of :func:`k3` with the gradient of :func:`k2`: both are those of :math:`KL(\pi \| \pi_{ref})`.

    Args:
        log_probs: log-probabilities of tokens sampled from the policy, in nats, with gradient.
        reference_log_probs: the same shape, a constant.

    Returns:
        The same shape, at least 0.

    Raises:
        ValueError: shapes that differ.

    Reference: ours; see :func:`k2` and :func:`k3`.

    Example:
        >>> log_probs = torch.tensor(0.25).log().requires_grad_()
        >>> value = k3_value_k2_gradient(log_probs, torch.tensor(0.5).log())
        >>> value.backward()
        >>> round(value.item(), 4), round(log_probs.grad.item(), 4)                                   # 2 - 1 - log 2, log(1/2)
        (0.3069, -0.6931)
    """
    gradient = k2(log_probs, reference_log_probs)
    return gradient + (k3(log_probs, reference_log_probs) - gradient).detach()


class KLEstimator(nn.Module, ABC):
    """Distance of a rollout from the reference policy, summed over its sampled tokens and divided by a constant ``length``."""

    def __init__(self, length: float = 1.0) -> None:
        super().__init__()
        _check_length(length)
        self.length = length

    @abstractmethod
    def token(self, log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
        """One value per token."""

    def forward(self, log_probs: Tensor, reference_log_probs: Tensor, mask: Tensor) -> Tensor:
        """One value per rollout.

        Args:
            log_probs: ``(..., T)``, with gradient. Anything where ``mask`` is False.
            reference_log_probs: ``(..., T)``, constants.
            mask: ``(..., T)`` bool, True where a token was sampled.

        Returns:
            ``(...)``, in nats at ``length`` 1.

        Raises:
            ValueError: shapes that differ, a mask that is not bool.
        """
        reference = _tokens(mask, reference_log_probs, "reference_log_probs")
        return _over_tokens(self.token(_tokens(mask, log_probs), reference), mask, self.length)

    def extra_repr(self) -> str:
        """The constant L."""
        return f"length={self.length:g}"


class K1(KLEstimator):
    """By :func:`k1`. As a loss it descends nothing: its expected gradient is zero."""

    def token(self, log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
        """``(..., T)`` values."""
        return k1(log_probs, reference_log_probs)


class K2(KLEstimator):
    """By :func:`k2`. As a loss it descends KL(policy || reference)."""

    def token(self, log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
        """``(..., T)`` values."""
        return k2(log_probs, reference_log_probs)


class K3(KLEstimator):
    """By :func:`k3`. As a loss it descends KL(reference || policy), though its value estimates KL(policy || reference)."""

    def token(self, log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
        """``(..., T)`` values."""
        return k3(log_probs, reference_log_probs)


class K3ValueK2Gradient(KLEstimator):
    """By :func:`k3_value_k2_gradient`. As a loss it descends KL(policy || reference), which its value estimates."""

    def token(self, log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
        """``(..., T)`` values."""
        return k3_value_k2_gradient(log_probs, reference_log_probs)


# What the functions share


def _group(reward: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    """The rewards, float32 or wider and without gradient, and the mask of those that count."""
    if reward.dim() < 1 or reward.shape[-1] < 2:
        raise ValueError(
            f"advantages compare the outputs of one item: reward must be (..., G), G >= 2, got {tuple(reward.shape)}"
        )
    reward = reward.detach().to(torch.promote_types(reward.dtype, torch.float32))
    if kept is None:
        kept = torch.ones_like(reward, dtype=torch.bool)
    _check_mask("kept", kept, reward)
    wrong = kept & ~reward.isfinite()
    if bool(wrong.any()):
        raise ValueError(f"{int(wrong.sum())} rewards are not finite (first at index {wrong.nonzero()[0].tolist()})")
    return reward, kept


def _centred(reward: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """``(..., G)`` kept rewards minus their group's mean, exactly zero without spread; ``(..., 1)`` how many are kept."""
    count = kept.sum(-1, keepdim=True)
    mean = torch.where(kept, reward, 0.0).sum(-1, keepdim=True) / count.clamp_min(1)
    highest = torch.where(kept, reward, -torch.inf).amax(-1, keepdim=True)
    lowest = torch.where(kept, reward, torch.inf).amin(-1, keepdim=True)
    return torch.where(kept & (highest > lowest), reward - mean, 0.0), count


def _tokens(mask: Tensor, values: Tensor, name: str = "log_probs") -> Tensor:
    """Values of the sampled tokens, float32 or wider; zero elsewhere, whatever stood there."""
    if mask.dim() < 1:
        raise ValueError("mask must be (..., T), T tokens of each rollout, got ()")
    check_shape(name, values, mask.shape)
    _check_mask("mask", mask, values)
    return torch.where(mask, values, 0.0).to(torch.promote_types(values.dtype, torch.float32))


def _per_rollout(advantage: Tensor, mask: Tensor) -> Tensor:
    check_shape("advantage", advantage, mask.shape[:-1])
    return advantage.detach().to(torch.promote_types(advantage.dtype, torch.float32))


def _over_tokens(values: Tensor, mask: Tensor, length: float | Tensor) -> Tensor:
    if isinstance(length, Tensor):
        check_shape("length", length, mask.shape[:-1])
        if not bool((length > 0).all()):
            raise ValueError("length must be positive: leave out rollouts without a sampled token, or count them as 1")
    else:
        _check_length(length)
    return torch.where(mask, values, 0.0).sum(-1) / length


def _check_mask(name: str, mask: Tensor, values: Tensor) -> None:
    check_shape(name, mask, values.shape)
    if mask.dtype != torch.bool:
        raise ValueError(f"{name} must be a bool tensor, got {mask.dtype}")


def _check_length(length: float) -> None:
    if not 0 < length < math.inf:
        raise ValueError(f"length, the constant L that a sum over tokens is divided by, must be positive, got {length}")


def _check_clip(low: float, high: float) -> None:
    if not (0 <= low <= 1 and 0 <= high < math.inf):
        raise ValueError(f"clipping needs low in [0, 1] and high >= 0, got low={low} and high={high}")


def _check_floor(floor: float) -> None:
    if not 0 < floor < math.inf:
        raise ValueError(
            f"floor must be positive, got {floor}: without it a group that all but agrees has unbounded advantages"
        )


def _check_weights(pointwise: float, pairwise: float) -> None:
    if not (0 <= pointwise < math.inf and 0 <= pairwise < math.inf and pointwise + pairwise > 0):
        raise ValueError(f"the weights of a reward must be at least 0 and not both 0, got {pointwise} and {pairwise}")
