"""Whether the distribution, not only its mean, is that of the annotators."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from zr.metrics.plotting import Plotted
from zr.scores import ScoreDistribution

__all__ = [
    "Coverage",
    "ExpectedCalibrationError",
    "OffScaleMass",
    "RankedProbabilityScore",
    "ReliabilityCurve",
    "VotesNegativeLogLikelihood",
    "reliability",
]


class VotesNegativeLogLikelihood(Plotted):
    r"""Negative log-likelihood of the annotators' votes: mean of :math:`-\log q(s)` over all votes, in nats.

    Items without votes add nothing; without any vote the value is NaN. A vote on a bin of probability zero gives infinity.

    Args:
        kwargs: of :class:`torchmetrics.Metric`.

    Example:
        >>> q = ScoreDistribution(torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log(), bins=(1.0, 5.0))
        >>> metric = VotesNegativeLogLikelihood()
        >>> metric.update(q, torch.tensor([[1, 1], [1, 0]]))
        >>> round(metric.compute().item(), 4)                                # (log 2 + log 2 + log 4) / 3
        0.9242
    """

    is_differentiable = True
    higher_is_better = False
    full_state_update = False
    plot_lower_bound = 0.0

    loss: Tensor
    votes: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("loss", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("votes", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, prediction: ScoreDistribution, votes: Tensor) -> None:
        """Add a batch.

        Args:
            prediction: batch shape ``(N,)``.
            votes: ``(N, K)`` counts of annotators per bin.

        Raises:
            ValueError: shapes that do not fit.
        """
        _check(prediction, votes)
        logits = torch.where(votes > 0, prediction.logits, 0.0)  # 0 log 0 = 0
        self.loss = self.loss - (votes * logits).sum()
        self.votes = self.votes + votes.sum()

    def compute(self) -> Tensor:
        """Mean over the votes, in nats; NaN without votes."""
        return self.loss / self.votes


class RankedProbabilityScore(Plotted):
    r"""Ranked probability score: :math:`\int (F(x) - V(x))^2\,dx` of predicted and voted CDF, mean over the items with votes.

    In score units, also for uneven bins; 0 where the distributions agree. NaN without any vote.

    Args:
        kwargs: of :class:`torchmetrics.Metric`.

    Reference: Epstein 1969; Gneiting and Raftery 2007, Strictly Proper Scoring Rules, section 4.2.

    Example:
        >>> q = ScoreDistribution(torch.tensor([[0.5, 0.5, 0.0]]).log(), bins=(1.0, 2.0, 5.0))
        >>> metric = RankedProbabilityScore()
        >>> metric.update(q, torch.tensor([[1, 1, 2]]))
        >>> metric.compute().item()                                          # (.5 - .25) ** 2 * 1 + (1 - .5) ** 2 * 3
        0.8125
    """

    is_differentiable = True
    higher_is_better = False
    full_state_update = False
    plot_lower_bound = 0.0

    distance: Tensor
    items: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("distance", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("items", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, prediction: ScoreDistribution, votes: Tensor) -> None:
        """Add a batch.

        Args:
            prediction: batch shape ``(N,)``.
            votes: ``(N, K)`` counts of annotators per bin; items without votes are left out.

        Raises:
            ValueError: shapes that do not fit.
        """
        _check(prediction, votes)
        voted = votes.sum(-1) > 0
        share = votes[voted] / votes[voted].sum(-1, keepdim=True)
        difference = (prediction.probs[voted] - share).cumsum(-1)[..., :-1]
        self.distance = self.distance + (prediction.bins.diff() * difference.square()).sum()
        self.items = self.items + voted.sum()

    def compute(self) -> Tensor:
        """Mean over the items, in score units; NaN without votes."""
        return self.distance / self.items


class ReliabilityCurve(NamedTuple):
    """Points of a reliability plot, one per group of items, in order of confidence.

    Attributes:
        confidence: ``(M,)`` mean probability of the top bin.
        share: ``(M,)`` mean share of annotators in the top bin; equal to ``confidence`` when calibrated.
        weight: ``(M,)`` share of the items; sums to one.
    """

    confidence: Tensor
    share: Tensor
    weight: Tensor

    @property
    def error(self) -> Tensor:
        """Expected calibration error: the weighted mean distance of the points from the diagonal. NaN without points."""
        if len(self.weight) == 0:
            return self.weight.new_tensor(torch.nan)
        return (self.weight * (self.confidence - self.share).abs()).sum()

    def plot(self, ax: Any = None) -> tuple[Any, Any]:
        """The reliability diagram: points on the diagonal are calibrated, larger ones hold more items.

        Args:
            ax: matplotlib axes to draw on; None makes a figure.

        Returns:
            The figure (None where ``ax`` was given) and the axes.
        """
        figure = None
        if ax is None:
            from matplotlib import pyplot

            figure, ax = pyplot.subplots()
        confidence, share, weight = (part.detach().double().cpu().numpy() for part in self)
        ax.plot([0, 1], [0, 1], color="grey", linestyle="dashed", linewidth=1)
        ax.scatter(confidence, share, s=10 + 300 * weight)
        ax.set(xlabel="probability of the top bin", ylabel="share of annotators", xlim=(0, 1), ylim=(0, 1))
        return figure, ax


def reliability(confidence: Tensor, share: Tensor, groups: int = 10) -> ReliabilityCurve:
    """Group items by confidence into groups of equal mass and average within each.

    Args:
        confidence: ``(N,)`` probability that the model gives to its top bin.
        share: ``(N,)`` share of the annotators who chose that bin.
        groups: number of groups. Items of equal confidence stay together, so that the order of the items has no influence;
            the groups are then uneven and may be fewer.

    Returns:
        The points of the curve, at most ``groups``; none for no items.

    Raises:
        ValueError: shapes that differ, no group.

    Reference: Guo et al. 2017, On Calibration of Modern Neural Networks; equal-mass bins: Nguyen and O'Connor 2015.

    Example:
        >>> curve = reliability(torch.tensor([0.5, 0.75, 1.0, 0.5]), torch.tensor([0.0, 0.5, 1.0, 1.0]), groups=2)
        >>> curve.confidence.tolist(), curve.share.tolist()
        ([0.5, 0.875], [0.5, 0.75])
        >>> curve.error.item()                                                # (0 + .125) / 2
        0.0625
    """
    if confidence.shape != share.shape or confidence.dim() != 1:
        raise ValueError(
            f"confidence and share must be (N,) of one length, got {tuple(confidence.shape)}, {tuple(share.shape)}"
        )
    if groups < 1:
        raise ValueError(f"groups must be at least 1, got {groups}")
    _, value, count = torch.unique(confidence, return_inverse=True, return_counts=True)
    middle = 2 * count.cumsum(0) - count  # twice the mean rank of a value, from 0 to 2N
    group = (middle * groups // max(2 * len(confidence), 1))[value]
    size: Tensor
    _, group, size = torch.unique(group, return_inverse=True, return_counts=True)

    def mean(x: Tensor) -> Tensor:
        total: Tensor = x.new_zeros(len(size)).index_add_(0, group, x)
        return total / size

    return ReliabilityCurve(mean(confidence), mean(share), size / size.sum())


class ExpectedCalibrationError(Plotted):
    """Expected calibration error of the top bin: its probability against the share of annotators who chose it.

    The error of the curve by :func:`reliability`; see there for the grouping. Items without votes are left out; without any
    vote the value is NaN. :meth:`curve` has the points, and ``metric.curve().plot()`` draws them.

    Args:
        groups: number of equal-mass groups.
        kwargs: of :class:`torchmetrics.Metric`.

    Example:
        >>> q = ScoreDistribution(torch.tensor([[0.8, 0.2], [0.4, 0.6]]).log(), bins=(1.0, 5.0))
        >>> metric = ExpectedCalibrationError()
        >>> metric.update(q, torch.tensor([[3, 1], [2, 2]]))                  # shares .75 and .5
        >>> round(metric.compute().item(), 4)                                # (.05 + .1) / 2
        0.075
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    confidence: list[Tensor]
    share: list[Tensor]

    def __init__(self, groups: int = 10, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if groups < 1:
            raise ValueError(f"groups must be at least 1, got {groups}")
        self.groups = groups
        self.add_state("confidence", [], dist_reduce_fx="cat")
        self.add_state("share", [], dist_reduce_fx="cat")

    def update(self, prediction: ScoreDistribution, votes: Tensor) -> None:
        """Add a batch.

        Args:
            prediction: batch shape ``(N,)``.
            votes: ``(N, K)`` counts of annotators per bin; items without votes are left out.

        Raises:
            ValueError: shapes that do not fit.
        """
        _check(prediction, votes)
        voted = votes.sum(-1) > 0
        confidence, top = prediction.probs.detach()[voted].max(-1)
        self.confidence.append(confidence)
        self.share.append(votes[voted].gather(-1, top.unsqueeze(-1)).squeeze(-1) / votes[voted].sum(-1))

    def compute(self) -> Tensor:
        """Expected calibration error, in [0, 1]; NaN without votes."""
        return self._points().error

    def curve(self) -> ReliabilityCurve:
        """The points of the reliability plot, over all processes: every process must ask for it."""
        with self.sync_context():
            return self._points()

    def _points(self) -> ReliabilityCurve:
        return reliability(dim_zero_cat(self.confidence), dim_zero_cat(self.share), self.groups)


class Coverage(Plotted):
    r"""Coverage: the share of the annotators' votes inside the central interval of the model's distribution.

    The interval holds the probability ``level``, with half of the rest on each side. On a scale of few bins its ends fall
    inside a bin; a vote for that bin then counts by the share of the bin's probability that is inside. So the value of a
    calibrated model is ``level`` itself, however coarse the scale; below it, the model is too sure, above, not sure enough.
    (With the whole bin counted, a calibrated model would cover more than ``level``, by an amount that depends on the scale.)
    Items without votes add nothing; without any vote the value is NaN.

    Args:
        level: probability of the interval, such as 0.5, 0.8 or 0.9.
        kwargs: of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: a level outside (0, 1).

    Reference: Czado, Gneiting and Held 2009, Predictive Model Assessment for Count Data, section 2.1 (the nonrandomised
    probability integral transform, of which this is a central interval).

    Example:
        >>> q = ScoreDistribution(torch.tensor([[0.25, 0.5, 0.25]]).log(), bins=(1.0, 3.0, 5.0))
        >>> metric = Coverage(0.8)                                           # from .1 to .9: all of bin 3, .15 of each other
        >>> metric.update(q, torch.tensor([[1, 2, 1]]))                      # votes as predicted
        >>> round(metric.compute().item(), 4)
        0.8
        >>> metric.reset()
        >>> metric.update(q, torch.tensor([[1, 0, 0]]))                      # .15 / .25
        >>> round(metric.compute().item(), 4)
        0.6
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    inside: Tensor
    votes: Tensor

    def __init__(self, level: float = 0.8, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 < level < 1:
            raise ValueError(f"level must be between 0 and 1, got {level}: 0.8 is the central 80 % interval")
        self.level = level
        self.add_state("inside", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("votes", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, prediction: ScoreDistribution, votes: Tensor) -> None:
        """Add a batch.

        Args:
            prediction: batch shape ``(N,)``.
            votes: ``(N, K)`` counts of annotators per bin.

        Raises:
            ValueError: shapes that do not fit.
        """
        _check(prediction, votes)
        # On the host, where float64 is to be had on every machine.
        probs = prediction.logits.detach().cpu().double().softmax(-1)
        above = probs.cumsum(-1)
        below = above - probs
        low, high = (1 - self.level) / 2, (1 + self.level) / 2
        overlap = (above.clamp(max=high) - below.clamp(min=low)).clamp(min=0)
        middle = (above + below) / 2
        # A bin of (nearly) no probability is a point: it is inside or outside as a whole.
        share = torch.where(probs > 1e-9, overlap / probs, ((middle > low) & (middle < high)).double()).clamp(max=1)
        self.inside = self.inside + (share * votes.cpu()).sum().to(self.inside)
        self.votes = self.votes + votes.sum()

    def compute(self) -> Tensor:
        """Share of the votes inside, in [0, 1]; NaN without votes."""
        return self.inside / self.votes


class OffScaleMass(Plotted):
    """The mean probability that the model puts outside the labels of the scale; near zero when it answers as asked.

    NaN without items.

    Args:
        kwargs: of :class:`torchmetrics.Metric`.

    Example:
        >>> q = ScoreDistribution(torch.zeros(2, 9), bins=range(1, 10), off_scale=torch.tensor([0.25, 0.75]))
        >>> metric = OffScaleMass()
        >>> metric.update(q)
        >>> metric.compute().item()
        0.5
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    mass: Tensor
    items: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("mass", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("items", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, prediction: ScoreDistribution) -> None:
        """Add a batch.

        Args:
            prediction: any batch shape.

        Raises:
            ValueError: the head did not compute the mass; the message says how to ask for it.
        """
        mass = prediction.off_scale.detach()
        self.mass = self.mass + mass.sum()
        self.items = self.items + mass.numel()

    def compute(self) -> Tensor:
        """Mean over the items, in [0, 1]; NaN without items."""
        return self.mass / self.items


def _check(prediction: ScoreDistribution, votes: Tensor) -> None:
    if len(prediction.batch_shape) != 1 or votes.shape != prediction.logits.shape:
        raise ValueError(
            f"needed are N distributions and votes (N, K): got batch shape {tuple(prediction.batch_shape)}, "
            f"{len(prediction.bins)} bins and votes {tuple(votes.shape)}"
        )
