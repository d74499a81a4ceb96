"""How well a score distribution fits what annotators said about one item."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from zr.losses.base import ItemLoss, ScoreTarget, check_shape
from zr.scores import ScoreDistribution

__all__ = [
    "BinCrossEntropy",
    "InterpolatedCrossEntropy",
    "RankedProbabilityLoss",
    "SoftLabelCrossEntropy",
    "TiltedGaussianCrossEntropy",
    "VotesRankedProbabilityLoss",
    "bin_cross_entropy",
    "interpolated_cross_entropy",
    "linear_weights",
    "ranked_probability_loss",
    "soft_cross_entropy",
    "soft_label",
    "tilted_gaussian_label",
    "votes_ranked_probability_loss",
    "votes_variance",
]

NARROW = 0.03  # share of the least distance of bins: a Gaussian narrower than this gives linear weights, to 1e-20


def bin_cross_entropy(prediction: ScoreDistribution, score: Tensor) -> Tensor:
    r"""Cross-entropy on the annotated bin, :math:`-\log q(s)`.

    Args:
        prediction: batch shape ``(...)``.
        score: ``(...)``, in score units; each must be a bin.

    Returns:
        ``(...)``, in nats.

    Raises:
        ValueError: shapes that differ; a score that is no bin (:func:`interpolated_cross_entropy` takes those).

    Reference: Z-Reward (arXiv 2606.09076), eq. (8), one of its summands.

    Example:
        >>> q = ScoreDistribution(torch.tensor([0.2, 0.3, 0.5]).log(), bins=(1.0, 3.0, 5.0))
        >>> bin_cross_entropy(q, torch.tensor(5.0)).neg().exp().item()
        0.5
    """
    return -prediction.log_prob(check_shape("score", score, prediction.batch_shape))


def interpolated_cross_entropy(prediction: ScoreDistribution, score: Tensor) -> Tensor:
    """Cross-entropy on the two bins around the annotated score, with :func:`linear_weights`; on a bin, on that bin alone.

    Args:
        prediction: batch shape ``(...)``.
        score: ``(...)``, in score units; within the bins' range.

    Returns:
        ``(...)``, in nats. Its least value is the entropy of the two weights.

    Raises:
        ValueError: shapes that differ; a score outside the range.

    Reference: the targets on two neighbouring bins of MuZero (Schrittwieser et al., arXiv 1911.08265), appendix F.

    Example:
        >>> q = ScoreDistribution(torch.tensor([0.25, 0.25, 0.5]).log(), bins=(1.0, 3.0, 5.0))
        >>> round(interpolated_cross_entropy(q, torch.tensor(4.0)).item(), 4)        # (log 4 + log 2) / 2
        1.0397
    """
    return soft_cross_entropy(prediction, linear_weights(check_shape("score", score, prediction.batch_shape), prediction.bins))


def soft_cross_entropy(prediction: ScoreDistribution, label: Tensor) -> Tensor:
    r"""Cross-entropy on a soft label, :math:`-\sum_s p(s) \log q(s)`. Minus the label's entropy, it is KL(p || q).

    Args:
        prediction: batch shape ``(...)``.
        label: ``(..., K)`` probabilities of the bins, for example from :func:`soft_label`.

    Returns:
        ``(...)``, in nats.

    Raises:
        ValueError: shapes that differ.

    Reference: soft labels of quality: DeQA-Score (You et al., arXiv 2501.11561).

    Example:
        >>> q = ScoreDistribution(torch.tensor([0.5, 0.5, 0.0]).log(), bins=(1.0, 3.0, 5.0))
        >>> round(soft_cross_entropy(q, torch.tensor([0.3, 0.7, 0.0])).item(), 4)      # log 2, whatever the label on 1 and 3
        0.6931
    """
    check_shape("label", label, prediction.logits.shape)
    logits = torch.where(label > 0, prediction.logits, 0.0)  # 0 log 0 = 0
    return -(label.to(logits.dtype) * logits).sum(-1)


def ranked_probability_loss(prediction: ScoreDistribution, score: Tensor) -> Tensor:
    r"""Ranked probability score against one score, :math:`\int (F(x) - 1[x \ge s])^2\,dx` with F the predicted CDF.

    Unlike cross-entropy it knows that bins have an order and distances, also uneven ones. Equal to
    :math:`E|X - s| - \tfrac12 E|X - X'|`, and to :math:`|\mu - s|` for a distribution on one bin.

    Args:
        prediction: batch shape ``(...)``.
        score: ``(...)``, in score units; within the bins' range, a bin or not.

    Returns:
        ``(...)``, in score units.

    Raises:
        ValueError: shapes that differ; a score outside the range.

    Reference: Epstein 1969; Gneiting and Raftery 2007, Strictly Proper Scoring Rules, section 4.2.

    Example:
        >>> q = ScoreDistribution(torch.tensor([0.5, 0.5, 0.0]).log(), bins=(1.0, 2.0, 5.0))
        >>> ranked_probability_loss(q, torch.tensor(2.0)).item()          # .5 ** 2 from 1 to 2, nothing beyond
        0.25
        >>> ranked_probability_loss(q, torch.tensor(5.0)).item()          # .5 ** 2 from 1 to 2, 1 ** 2 from 2 to 5
        3.25
    """
    check_shape("score", score, prediction.batch_shape)
    below = _share_below(score, prediction.bins)
    cdf = prediction.probs.cumsum(-1)[..., :-1]
    return (prediction.bins.diff() * (below * cdf.square() + (1 - below) * (1 - cdf).square())).sum(-1)


def votes_ranked_probability_loss(prediction: ScoreDistribution, votes: Tensor) -> Tensor:
    r"""Ranked probability score against a histogram of votes, :math:`\int (F(x) - V(x))^2\,dx`, V the CDF of the votes.

    Args:
        prediction: batch shape ``(...)``.
        votes: ``(..., K)`` counts or shares; only their ratio matters.

    Returns:
        ``(...)``, in score units; 0 where the two distributions agree.

    Raises:
        ValueError: shapes that differ; an item without votes.

    Reference: as :func:`ranked_probability_loss`; the squared Cramer distance of the two distributions.

    Example:
        >>> q = ScoreDistribution(torch.tensor([0.5, 0.5, 0.0]).log(), bins=(1.0, 2.0, 5.0))
        >>> votes_ranked_probability_loss(q, torch.tensor([1, 1, 2])).item()     # (.5 - .25) ** 2 * 1 + (1 - .5) ** 2 * 3
        0.8125
    """
    check_shape("votes", votes, prediction.logits.shape)
    difference = (prediction.probs - _shares(votes, prediction.bins.dtype)).cumsum(-1)[..., :-1]
    return (prediction.bins.diff() * difference.square()).sum(-1)


def linear_weights(score: Tensor, bins: Tensor) -> Tensor:
    """Probabilities on the two bins around each score whose mean is the score; one bin alone where the score is a bin.

    Args:
        score: ``(...)``, in score units.
        bins: ``(K,)`` ascending.

    Returns:
        ``(..., K)``, non-negative, summing to one, in the dtype of ``bins``.

    Raises:
        ValueError: a score that is NaN or outside the bins' range.

    Example:
        >>> linear_weights(torch.tensor([1.25, 5.0]), torch.tensor([1.0, 2.0, 5.0])).tolist()
        [[0.75, 0.25, 0.0], [0.0, 0.0, 1.0]]
    """
    below = _share_below(score, bins)
    return pad(below, (1, 0), value=1.0) - pad(below, (0, 1))


def soft_label(target: ScoreTarget, bins: Tensor) -> Tensor:
    """The annotators' distribution: their normalised votes; :func:`linear_weights` of the score for an item without votes.

    Args:
        target: ``(...)``, all known.
        bins: ``(K,)`` ascending.

    Returns:
        ``(..., K)`` probabilities.

    Raises:
        ValueError: votes of another number of bins; a score, where it is needed, outside the bins' range.

    Example:
        >>> target = ScoreTarget.from_scores(torch.tensor([2.0, 1.5]), votes=torch.tensor([[1, 3, 0], [0, 0, 0]]))
        >>> soft_label(target, torch.tensor([1.0, 2.0, 5.0])).tolist()
        [[0.25, 0.75, 0.0], [0.5, 0.5, 0.0]]
    """
    if target.votes is None:
        return linear_weights(target.score, bins)
    _check_bins(target.votes, bins)
    voted = target.votes.sum(-1) > 0
    label = torch.empty(target.votes.shape, dtype=bins.dtype, device=bins.device)
    label[voted] = _shares(target.votes[voted], bins.dtype)
    label[~voted] = linear_weights(target.score[~voted], bins)
    return label


def tilted_gaussian_label(score: Tensor, variance: Tensor, bins: Tensor) -> Tensor:
    r"""Soft label of the annotators' mean and variance: a Gaussian over cells between the bins' midpoints, tilted to the mean.

    Tails go to the end bins. Cells and tails move the mean; the tilt :math:`p \to p\,e^{\lambda s}` moves it back, and stays
    positive where a linear correction goes negative near the ends.

    Args:
        score: ``(...)`` mean of the annotators, in score units; within the bins' range.
        variance: ``(...)`` variance of the annotators, in squared score units. NaN is unknown.
        bins: ``(K,)`` ascending.

    Returns:
        ``(..., K)`` probabilities whose mean is the score, in the dtype of ``bins``, without gradient. :func:`linear_weights`
        where the variance is zero or unknown, and at the ends of the range, where no other label has the mean.

    Raises:
        ValueError: shapes that differ; a score that is NaN or outside the range; a variance that is negative or infinite.

    Reference: soft labels of DeQA-Score (You et al., arXiv 2501.11561); the tilt is ours.

    Example:
        >>> bins = torch.tensor([1.0, 2.0, 3.0])
        >>> label = tilted_gaussian_label(torch.tensor([2.0, 1.2]), torch.tensor([1.0, 1.0]), bins)
        >>> [round(p, 4) for p in label[0].tolist()]                     # Phi(-1/2), the middle, Phi(-1/2)
        [0.3085, 0.3829, 0.3085]
        >>> round((label[1] * bins).sum().item(), 4), bool((label > 0).all())
        (1.2, True)
    """
    check_shape("variance", variance, score.shape)
    wrong = (variance < 0) | variance.isinf()
    if bool(wrong.any()):
        raise ValueError(f"a variance must be at least 0 and finite (NaN: unknown), got {float(variance[wrong][0]):g}")
    label = linear_weights(score.detach(), bins)
    s, value, spread = bins.detach().double(), score.detach().double(), variance.detach().double().sqrt()
    slack = (s[-1] - s[0]) * 1e-5  # rounding, as for linear weights
    wide = (spread > NARROW * s.diff().min()) & (value > s[0] + slack) & (value < s[-1] - slack)
    cells = ScoreDistribution(_gaussian_cells(value[wide], spread[wide], s), s, validate_args=False)
    label[wide] = cells.tilted(value[wide]).probs.to(label.dtype)
    return label


def votes_variance(votes: Tensor, bins: Tensor) -> Tensor:
    """Unbiased variance of each item's votes; NaN, unknown, with fewer than two.

    Args:
        votes: ``(..., K)`` counts.
        bins: ``(K,)`` ascending.

    Returns:
        ``(...)``, in squared score units, in the dtype of ``bins``.

    Raises:
        ValueError: votes of another number of bins.

    Example:
        >>> votes_variance(torch.tensor([[1, 0, 1], [0, 1, 0]]), torch.tensor([1.0, 2.0, 5.0])).tolist()    # 2 ** 2 + 2 ** 2
        [8.0, nan]
    """
    _check_bins(votes, bins)
    count = votes.to(bins.dtype)
    total = count.sum(-1)
    mean = (count * bins).sum(-1) / total
    squares = (count * (bins - mean.unsqueeze(-1)).square()).sum(-1)
    return torch.where(total >= 2, squares / (total - 1), torch.nan)


class BinCrossEntropy(ItemLoss):
    """One value per item, by :func:`bin_cross_entropy`; see there for shapes and units."""

    def forward(self, prediction: ScoreDistribution, target: ScoreTarget) -> Tensor:
        """``(...)`` values against ``target.score``."""
        return bin_cross_entropy(prediction, target.score)


class InterpolatedCrossEntropy(ItemLoss):
    """One value per item, by :func:`interpolated_cross_entropy`; see there for shapes and units."""

    def forward(self, prediction: ScoreDistribution, target: ScoreTarget) -> Tensor:
        """``(...)`` values against ``target.score``."""
        return interpolated_cross_entropy(prediction, target.score)


class SoftLabelCrossEntropy(ItemLoss):
    """One value per item, by :func:`soft_cross_entropy` on :func:`soft_label`; see there for shapes and units."""

    def forward(self, prediction: ScoreDistribution, target: ScoreTarget) -> Tensor:
        """``(...)`` values against ``target.votes``, and ``target.score`` where there are none."""
        return soft_cross_entropy(prediction, soft_label(target, prediction.bins))


class TiltedGaussianCrossEntropy(ItemLoss):
    """One value per item, by :func:`soft_cross_entropy` on :func:`tilted_gaussian_label`; see there for shapes and units.

    Its gradient is that of DeQA's KL to the soft label; the value is larger by the label's entropy. DeQA's mix is this term and
    one for pairs, with a weight of your choice::

        terms:
          label:
            class_path: zr.stages.Term
            init_args: {loss: {class_path: zr.losses.TiltedGaussianCrossEntropy}}
          order:
            class_path: zr.stages.Term
            init_args: {loss: {class_path: zr.losses.FidelityLoss}, weight: 0.5}
    """

    def forward(self, prediction: ScoreDistribution, target: ScoreTarget) -> Tensor:
        """``(...)`` values against ``target.score`` and its variance: ``target.variance``, or that of ``target.votes``."""
        bins = prediction.bins
        if target.variance is not None:
            variance = target.variance
        elif target.votes is not None:
            variance = votes_variance(target.votes, bins)
        else:
            variance = torch.full_like(target.score, torch.nan)
        return soft_cross_entropy(prediction, tilted_gaussian_label(target.score, variance, bins))


class RankedProbabilityLoss(ItemLoss):
    """One value per item, by :func:`ranked_probability_loss`; see there for shapes and units."""

    def forward(self, prediction: ScoreDistribution, target: ScoreTarget) -> Tensor:
        """``(...)`` values against ``target.score``."""
        return ranked_probability_loss(prediction, target.score)


class VotesRankedProbabilityLoss(ItemLoss):
    """One value per item, by :func:`votes_ranked_probability_loss`; see there for shapes and units."""

    def forward(self, prediction: ScoreDistribution, target: ScoreTarget) -> Tensor:
        """``(...)`` values against ``target.votes``.

        Raises:
            ValueError: a target without votes.
        """
        if target.votes is None:
            raise ValueError(
                "VotesRankedProbabilityLoss needs target.votes, got None: use RankedProbabilityLoss for scores alone"
            )
        return votes_ranked_probability_loss(prediction, target.votes)


def _share_below(score: Tensor, bins: Tensor) -> Tensor:
    """``(..., K - 1)``: the share of each gap between neighbouring bins that lies below the score."""
    value = score.to(bins.dtype)
    low, high = bins[0], bins[-1]
    slack = (high - low) * 1e-5  # rounding, as in bin_index
    wrong = ~((value >= low - slack) & (value <= high + slack))
    if bool(wrong.any()):
        bad = float(value[wrong][0])
        raise ValueError(f"score {bad:g} lies outside the bins, {float(low):g} to {float(high):g}")
    return ((value.unsqueeze(-1) - bins[:-1]) / bins.diff()).clamp(0.0, 1.0)


def _shares(votes: Tensor, dtype: torch.dtype) -> Tensor:
    total = votes.sum(-1, keepdim=True)
    if not bool((total > 0).all()):
        where = (~(total.squeeze(-1) > 0)).nonzero()[0].tolist()
        raise ValueError(f"an item has no votes (index {where}): select the items with votes before the loss")
    return votes.to(dtype) / total.to(dtype)


def _check_bins(votes: Tensor, bins: Tensor) -> None:
    if votes.shape[-1] != len(bins):
        raise ValueError(f"votes must be (..., {len(bins)}) for {len(bins)} bins, got {tuple(votes.shape)}")


def _gaussian_cells(mean: Tensor, std: Tensor, bins: Tensor) -> Tensor:
    """``(N, K)`` log-probabilities of the cells between the midpoints of the bins, without cancellation far from the mean."""
    edges = ((bins[1:] + bins[:-1]) / 2 - mean.unsqueeze(-1)) / std.unsqueeze(-1)
    low, high = pad(edges, (1, 0), value=-torch.inf), pad(edges, (0, 1), value=torch.inf)
    mirrored = low > 0  # above the mean, the mirror image: there the logarithm of Phi is not rounded to 0
    low, high = torch.where(mirrored, -high, low), torch.where(mirrored, -low, high)
    upper = torch.special.log_ndtr(high)
    cells: Tensor = upper + (-torch.expm1(torch.special.log_ndtr(low) - upper)).log()
    return cells
