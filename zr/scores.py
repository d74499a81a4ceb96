"""The distribution over rubric scores, and the one place where its expectation is taken."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Size, Tensor
from torch.distributions import Distribution, constraints, kl_divergence, register_kl

__all__ = ["ScoreDistribution", "kl_divergence"]


class ScoreDistribution(Distribution):
    r"""A categorical distribution whose outcomes are the scores of a rubric.

    The outcomes are the ``bins``, not indices: ``sample()`` gives scores, ``log_prob(3.0)`` is the log-probability of the
    score 3.0, and :attr:`mean` is :math:`\mu = \sum_s s\,q(s)` (eq. 2), the number that rewards, losses, measures and
    text-to-image use. Computation is in float32 or wider, whatever the dtype of ``logits``.

    Args:
        logits: ``(..., K)``, unnormalised log-probabilities of the K bins. ``-inf`` is a bin of probability zero.
        bins: ``(K,)``, strictly ascending scores, K >= 2.
        off_scale: ``(...)``, probability that the model put outside the K labels, or None when it was not computed.
        validate_args: check the arguments; None follows :meth:`torch.distributions.Distribution.set_default_validate_args`.

    Raises:
        ValueError: shapes that do not fit, bins that do not ascend, logits with NaN or +inf.

    Reference: Z-Reward (arXiv 2606.09076), eqs. (1), (2), (6), (16).

    Example:
        >>> q = ScoreDistribution(torch.tensor([0.2, 0.3, 0.5]).log(), bins=(1.0, 3.0, 5.0))
        >>> round(q.mean.item(), 4)         # .2 * 1 + .3 * 3 + .5 * 5
        3.6
        >>> round(q.log_prob(3.0).exp().item(), 4)
        0.3
        >>> q.quantile(0.5).item()
        3.0
    """

    arg_constraints = {"logits": constraints.real_vector}  # noqa: RUF012 (the base class declares it so)
    has_enumerate_support = True

    logits: Tensor
    bins: Tensor

    def __init__(
        self,
        logits: Tensor,
        bins: Tensor | Sequence[float],
        off_scale: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        raw = logits.to(dtype)
        self.bins = torch.as_tensor(bins, dtype=dtype, device=logits.device)
        if raw.dim() < 1 or self.bins.dim() != 1 or raw.shape[-1] != self.bins.shape[0]:
            raise ValueError(
                f"logits must be (..., K) for K bins: got logits {tuple(logits.shape)} and bins {tuple(self.bins.shape)}"
            )
        if off_scale is not None and off_scale.shape != raw.shape[:-1]:
            raise ValueError(f"off_scale must have the batch shape {tuple(raw.shape[:-1])}, got {tuple(off_scale.shape)}")
        if validate_args or (validate_args is None and Distribution._validate_args):
            _check_values(raw, self.bins)
        self.logits = raw.log_softmax(-1)
        self._off_scale = None if off_scale is None else off_scale.to(dtype)
        super().__init__(batch_shape=raw.shape[:-1], event_shape=Size(), validate_args=False)
        # The arguments were checked above, with messages that name the remedy; log_prob checks its own.

    @property
    def probs(self) -> Tensor:
        """``(..., K)`` probabilities of the bins."""
        return self.logits.exp()

    @property
    def mean(self) -> Tensor:
        """``(...)`` expected score, in score units (eq. 2)."""
        return (self.probs * self.bins).sum(-1)

    @property
    def mode(self) -> Tensor:
        """``(...)`` most probable score; the lower one of a tie."""
        return self.bins[self.logits.argmax(-1)]

    @property
    def variance(self) -> Tensor:
        """``(...)`` variance, in squared score units."""
        return (self.probs * (self.bins - self.mean.unsqueeze(-1)).square()).sum(-1)

    @property
    def stddev(self) -> Tensor:
        """``(...)`` standard deviation, in score units; its gradient is finite at zero variance."""
        return self.variance.clamp_min(torch.finfo(self.logits.dtype).tiny).sqrt()

    @property
    def off_scale(self) -> Tensor:
        """``(...)`` probability outside the labels.

        Raises:
            ValueError: the head did not compute it.
        """
        if self._off_scale is None:
            raise ValueError(
                "off_scale was not computed: it needs the logits of the whole vocabulary. "
                "Build the head with off_scale=True (ScoreTokenHead) to have it."
            )
        return self._off_scale

    @property
    def support(self) -> constraints.Constraint:
        """The interval that holds all bins; ``log_prob`` is stricter and takes bins only."""
        return constraints.interval(self.bins[0], self.bins[-1])  # type: ignore[no-untyped-call]

    def entropy(self) -> Tensor:
        """``(...)`` entropy in nats."""
        return -(self.probs * self.logits.masked_fill(self.logits.isneginf(), 0.0)).sum(-1)

    def log_prob(self, value: Tensor | float) -> Tensor:
        """Log-probability of scores.

        Args:
            value: scores, broadcast against the batch shape. Each must be a bin.

        Returns:
            Log-probabilities, in nats, of the broadcast shape.

        Raises:
            ValueError: a score that is no bin; the message names its neighbours.
        """
        index = bin_index(torch.as_tensor(value, dtype=self.bins.dtype, device=self.bins.device), self.bins)
        shape = torch.broadcast_shapes(index.shape, self.batch_shape)  # type: ignore[no-untyped-call]
        logits = self.logits.expand(*shape, len(self.bins))
        return logits.gather(-1, index.expand(shape).unsqueeze(-1)).squeeze(-1)

    def cdf(self, value: Tensor | float) -> Tensor:
        """P(score <= value), for any real ``value`` that broadcasts against the batch shape."""
        x = torch.as_tensor(value, dtype=self.bins.dtype, device=self.bins.device)
        return (self.probs * (self.bins <= x.unsqueeze(-1) + _tolerance(self.bins))).sum(-1).clamp(max=1.0)

    def quantile(self, q: Tensor | float) -> Tensor:
        """Smallest bin whose cumulative probability reaches ``q``.

        Args:
            q: probabilities in [0, 1] that broadcast against the batch shape.

        Returns:
            Scores of the broadcast shape; no gradient (the quantile of a discrete distribution is a step function).

        Raises:
            ValueError: ``q`` outside [0, 1].
        """
        level = torch.as_tensor(q, dtype=self.bins.dtype, device=self.bins.device)
        if not bool(((level >= 0) & (level <= 1)).all()):
            raise ValueError(f"quantile takes probabilities in [0, 1], got {level.tolist()}")
        cumulative = self.probs.detach().cumsum(-1)
        below = cumulative < level.unsqueeze(-1) - 1e-6  # rounding in the sum must not skip a bin
        return self.bins[below.sum(-1).clamp(max=len(self.bins) - 1)]

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Scores of shape ``sample_shape + batch_shape``, without gradient."""
        with torch.no_grad():
            flat = self.probs.reshape(-1, len(self.bins))
            count = Size(sample_shape).numel()
            index = torch.multinomial(flat, count, replacement=True).T
            return self.bins[index].reshape(Size(sample_shape) + self.batch_shape)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """All bins along a new first dimension, as :meth:`torch.distributions.Distribution.enumerate_support` says."""
        values = self.bins.reshape(-1, *([1] * len(self.batch_shape)))
        return values.expand(-1, *self.batch_shape) if expand else values

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> ScoreDistribution:
        """The same distribution with the batch dimensions broadcast to ``batch_shape``."""
        off = None if self._off_scale is None else self._off_scale.expand(*batch_shape)
        return self._like(self.logits.expand(*batch_shape, len(self.bins)), off)

    def __getitem__(self, index: Any) -> ScoreDistribution:
        # An ellipsis must stand for batch dimensions only, so the bins get a place of their own at the end.
        where = index if isinstance(index, tuple) else (index,)
        if not any(part is Ellipsis for part in where):
            where = (*where, Ellipsis)
        off = None if self._off_scale is None else self._off_scale[where]
        return self._like(self.logits[(*where, slice(None))], off)

    def detach(self) -> ScoreDistribution:
        """The same distribution without gradient."""
        return self._like(self.logits.detach(), None if self._off_scale is None else self._off_scale.detach())

    def to(self, *args: Any, **kwargs: Any) -> ScoreDistribution:
        """Moved or converted as :meth:`torch.Tensor.to`; half precision is widened to float32 again."""
        off = None if self._off_scale is None else self._off_scale.to(*args, **kwargs)
        return self._like(self.logits.to(*args, **kwargs), off)

    def mixture(self, dim: int) -> ScoreDistribution:
        """The equal-weight mixture along batch dimension ``dim``: the mean of the probabilities, not of the logits.

        Example:
            >>> q = ScoreDistribution(torch.tensor([[0.9, 0.1], [0.1, 0.9]]).log(), bins=(1.0, 5.0))
            >>> [round(p, 4) for p in q.mixture(0).probs.tolist()]
            [0.5, 0.5]
        """
        axes = len(self.batch_shape)
        if not -axes <= dim < axes:
            raise ValueError(f"mixture needs a batch dimension in [-{axes}, {axes}), got {dim}")
        axis = dim % axes
        off = None if self._off_scale is None else self._off_scale.mean(axis)
        count = torch.tensor(float(self.batch_shape[axis]))
        nowhere = self.logits.isneginf().all(axis)  # the gradient of logsumexp is NaN where every component is -inf
        logits = self.logits.clamp_min(torch.finfo(self.logits.dtype).min).logsumexp(axis).masked_fill(nowhere, -torch.inf)
        return self._like(logits - count.log().to(self.logits), off)

    def tempered(self, temperature: Tensor | float) -> ScoreDistribution:
        """The distribution with logits divided by a temperature: flatter above one, sharper below; its mode stays.

        Args:
            temperature: above zero; numbers that broadcast against the batch shape. Gradients flow through both.

        Example:
            >>> q = ScoreDistribution(torch.tensor([0.1, 0.9]).log(), bins=(1.0, 5.0))
            >>> [round(p, 4) for p in q.tempered(2.0).probs.tolist()]             # square roots, 1 to 3
            [0.25, 0.75]
        """
        divisor = torch.as_tensor(temperature, dtype=self.logits.dtype, device=self.logits.device)
        whole = self.expand(torch.broadcast_shapes(divisor.shape, self.batch_shape))  # type: ignore[no-untyped-call]
        return self._like(whole.logits / divisor.unsqueeze(-1), whole._off_scale)

    def tilted(self, mean: Tensor | float) -> ScoreDistribution:
        r"""The nearest distribution with another mean: :math:`p(s) \propto q(s)\,e^{\lambda s}`.

        Of all distributions with that mean it has the smallest :math:`KL(p \| q)`. Bins of probability zero keep it, so the
        mean stays between the lowest and the highest bin that have some: of a mean beyond them, the nearest that can be had.

        Args:
            mean: wanted expected scores, in score units, that broadcast against the batch shape.

        Returns:
            A distribution of the broadcast shape. Its gradients, into this distribution and into ``mean``, are those of the
            equation that defines :math:`\lambda`, to first order.

        Raises:
            ValueError: a mean outside the scale.

        Reference: Csiszar 1975, I-Divergence Geometry of Probability Distributions and Minimization Problems, section 3.

        Example:
            >>> q = ScoreDistribution(torch.zeros(3), bins=(1.0, 2.0, 3.0))
            >>> [round(p, 4) for p in q.tilted(2 + 3 / 7).probs.tolist()]         # 1 : 2 : 4
            [0.1429, 0.2857, 0.5714]
        """
        wanted = torch.as_tensor(mean, dtype=self.logits.dtype, device=self.logits.device)
        slack = _tolerance(self.bins)
        wrong = ~((wanted >= self.bins[0] - slack) & (wanted <= self.bins[-1] + slack))
        if bool(wrong.any()):
            ends = f"{float(self.bins[0]):g} to {float(self.bins[-1]):g}"
            raise ValueError(f"a mean of {float(wanted[wrong].flatten()[0]):g} lies outside the bins, {ends}")
        whole = self.expand(torch.broadcast_shapes(wanted.shape, self.batch_shape))  # type: ignore[no-untyped-call]
        way = self.bins - wanted.detach().unsqueeze(-1)  # as good as the bins, and small where the probability is
        tilt = _tilt(whole.logits.detach(), wanted.detach(), way, self.bins)
        moved = self._like(whole.logits + tilt.unsqueeze(-1) * way, None)
        # One step of Newton's method, of value zero and with the gradient of the root; none where the mean is out of reach.
        missing = wanted - moved.mean
        step = torch.where(missing.detach().abs() <= slack, missing - missing.detach(), 0.0)
        tilt = tilt + step / moved.variance.detach().clamp_min(slack**2)
        return self._like(whole.logits + tilt.unsqueeze(-1) * way, whole._off_scale)

    def _like(self, logits: Tensor, off_scale: Tensor | None) -> ScoreDistribution:
        bins = self.bins.to(logits.device)
        return ScoreDistribution(logits, bins, off_scale=off_scale, validate_args=False)

    def __repr__(self) -> str:
        scores = ", ".join(f"{s:g}" for s in self.bins.tolist())
        return f"ScoreDistribution(batch_shape={tuple(self.batch_shape)}, bins=({scores}))"


def bin_index(score: Tensor, bins: Tensor) -> Tensor:
    """Index of the bin that each score is.

    Args:
        score: ``(...)`` scores.
        bins: ``(K,)`` ascending bins.

    Returns:
        ``(...)`` int64 indices into ``bins``.

    Raises:
        ValueError: a score that is no bin; the message names its neighbours.

    Example:
        >>> bin_index(torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.5, 5.0])).tolist()
        [0, 1]
    """
    distance = (score.unsqueeze(-1) - bins).abs()
    nearest = distance.argmin(-1)
    wrong = ~(distance.amin(-1) <= _tolerance(bins))
    if bool(wrong.any()):
        bad = float(score[wrong].flatten()[0])
        scale = ", ".join(f"{s:g}" for s in bins.tolist())
        if bad != bad:
            raise ValueError(f"a score is NaN: unknown scores must be left out, not filled (bins: {scale})")
        lower = [s for s in bins.tolist() if s < bad][-1:]
        upper = [s for s in bins.tolist() if s > bad][:1]
        near = " and ".join(f"{s:g}" for s in lower + upper)
        raise ValueError(f"score {bad:g} is no bin: its neighbours are {near} (bins: {scale})")
    return nearest


def _tilt(logits: Tensor, mean: Tensor, way: Tensor, bins: Tensor) -> Tensor:
    """``(...)`` tilts, by bisection: the mean grows with the tilt.

    Args:
        logits: ``(..., K)`` log-probabilities.
        mean: ``(...)`` wanted.
        way: ``(..., K)`` bins less the mean.
        bins: ``(K,)``.
    """
    eps = torch.finfo(logits.dtype).eps
    inside = torch.minimum(mean - bins[0], bins[-1] - mean).clamp_min(eps * (bins[-1] - bins[0]))
    lowest = logits.masked_fill(logits.isneginf(), torch.inf).amin(-1)
    reach = logits.amax(-1) - lowest + (len(bins) * (bins[-1] - bins[0]) / inside).log() + 1
    high = reach / bins.diff().min()  # beyond it an end bin outweighs all others
    low = -high
    for _ in range(2 * round(-math.log2(eps))):  # to the last bit
        middle = (low + high) / 2
        above = ((logits + middle.unsqueeze(-1) * way).softmax(-1) * way).sum(-1) > 0
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return (low + high) / 2


def _tolerance(bins: Tensor) -> float:
    """How far a score may lie from its bin and still be it: rounding of float32, far below any distance of bins."""
    return float(bins[-1] - bins[0]) * 1e-5


def _check_values(logits: Tensor, bins: Tensor) -> None:
    if len(bins) < 2 or not bool(bins.isfinite().all()) or not bool((bins[1:] > bins[:-1]).all()):
        raise ValueError(f"bins must be at least two finite scores in strictly ascending order, got {bins.tolist()}")
    bad = (logits.isnan() | logits.isposinf()).any(-1) | logits.isneginf().all(-1)
    if bool(bad.any()):
        where = bad.reshape(-1).nonzero().flatten().tolist()
        raise ValueError(
            f"{len(where)} of {bad.numel()} score distributions have NaN or infinite logits (first at flat index "
            f"{where[0]}): look at the inputs of that sample and at the weights for NaN"
        )


@register_kl(ScoreDistribution, ScoreDistribution)  # type: ignore[no-untyped-call, untyped-decorator]
def _kl(p: ScoreDistribution, q: ScoreDistribution) -> Tensor:
    """KL(p || q) in nats, of the broadcast batch shape. Different bins raise."""
    if p.bins.shape != q.bins.shape or not torch.allclose(p.bins, q.bins.to(p.bins)):
        raise ValueError(f"KL needs one scale: bins {p.bins.tolist()} against {q.bins.tolist()}")
    ratio = (p.logits - q.logits).masked_fill(p.probs == 0, 0.0)  # 0 log 0 = 0, also where p underflows and q is -inf
    return (p.probs * ratio).sum(-1)
