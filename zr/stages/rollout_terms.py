"""What rewards make of sampled traces: the parts of the teacher's objective that go by log-probs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zr.losses import Advantage, GroupAdvantage, KLEstimator, PolicyGradient, PolicyLoss, ScoreReward
from zr.models.policy import Rollouts
from zr.scores import ScoreDistribution

__all__ = ["Credit", "Decoding", "ExpectedScore", "ParsedScore", "PolicyTerm", "ReferenceTerm"]


class Decoding(nn.Module, ABC):
    """Which score of a rollout is rewarded."""

    label_weight = 1.0
    """Of a drawn label's log-prob in the policy gradient, where a token of the trace has 1."""

    @abstractmethod
    def forward(self, scores: ScoreDistribution, seeds: Sequence[int]) -> tuple[ScoreDistribution, Tensor | None]:
        """Read the answers of M rollouts.

        Args:
            scores: batch shape ``(M,)``.
            seeds: M, one for each rollout.

        Returns:
            Distributions ``(M,)`` whose means are rewarded, and the ``(M,)`` positions of the drawn labels, whose log-probs are
            then part of the rollouts'; None where no label is drawn.
        """


class ExpectedScore(Decoding):
    """The expectation, eq. (2): no label is drawn, so none is blamed."""

    def forward(self, scores: ScoreDistribution, seeds: Sequence[int]) -> tuple[ScoreDistribution, Tensor | None]:
        """The distributions as they are."""
        return scores, None


class ParsedScore(Decoding):
    """A label drawn from the distribution, as who parses the text of an answer has it: the ablation of the paper's figure 4.

    Args:
        step: of the scores that the text can say, from the lowest bin upwards: the drawn one becomes the nearest of these (of
            two as near, that an even number of steps up). None for all bins.
        label_weight: of the drawn label's log-prob in the policy gradient, where a token of the trace has 1.

    Raises:
        ValueError: a step that is not positive, a weight below 0.

    Example:
        >>> import torch
        >>> from zr import ScoreDistribution
        >>> drawn = ScoreDistribution(torch.tensor([[-9.0, 0.0, -9.0], [-9.0, -9.0, 0.0]]), (1.0, 1.5, 2.0))
        >>> read, label = ParsedScore(step=1.0)(drawn, seeds=[0, 1])
        >>> label.tolist(), read.mean.tolist()
        ([1, 2], [1.0, 2.0])
    """

    def __init__(self, step: float | None = None, label_weight: float = 1.0) -> None:
        super().__init__()
        if step is not None and not step > 0:
            raise ValueError(f"step is that of the scores which the text can say, above 0, got {step}")
        if not label_weight >= 0:
            raise ValueError(f"label_weight must be at least 0, got {label_weight}")
        self.step = step
        self.label_weight = label_weight

    def forward(self, scores: ScoreDistribution, seeds: Sequence[int]) -> tuple[ScoreDistribution, Tensor | None]:
        """Distributions with all their mass on what the drawn label says.

        Raises:
            ValueError: a step that leads to scores which are no bins.
        """
        probs = scores.probs.detach().cpu().double()
        drawn = [torch.multinomial(row, 1, generator=_generator(seed)) for row, seed in zip(probs, seeds, strict=True)]
        label = torch.cat(drawn).to(scores.logits.device)
        said = label if self.step is None else self._said(scores.bins, self.step)[label.cpu()].to(label)
        return ScoreDistribution(nn.functional.one_hot(said, probs.shape[-1]).to(scores.logits).log(), scores.bins), label

    @staticmethod
    def _said(bins: Tensor, step: float) -> Tensor:
        """The position of what a text of this step says for each bin."""
        places = bins.double().cpu()
        wanted = places[0] + step * torch.round((places - places[0]) / step)
        near = (wanted[:, None] - places).abs()
        if float(near.amin(-1).max()) > 1e-6:
            raise ValueError(f"a step of {step} leads to scores that are no bins, such as {wanted[near.amin(-1).argmax()]:g}")
        return near.argmin(-1)


@dataclass(frozen=True)
class Credit:
    """What a batch of M rollouts earned.

    Args:
        reward: ``(M,)``.
        advantage: ``(M,)``, constants.
        label: ``(M,)`` positions of drawn labels, or None.
    """

    reward: Tensor
    advantage: Tensor
    label: Tensor | None

    def select(self, index: Tensor | slice) -> Credit:
        """That of some of the rollouts."""
        return Credit(self.reward[index], self.advantage[index], None if self.label is None else self.label[index])


class PolicyTerm(nn.Module):
    """The policy gradient of rewards that compare scores with annotations.

    Args:
        reward: of a rollout, by its score and those of the pair's other side (eqs. 7, 10, 13).
        advantage: of the rewards within a group (eq. 3).
        loss: what advantages do to log-probs (eq. 4).
        weight: of the loss.
        decoding: which score is rewarded.
        length_penalty: taken from the reward of a trace of full length; in proportion for shorter ones.
        forced_penalty: taken from the reward of a trace that the length limit cut.

    Raises:
        ValueError: a weight or penalty below 0.

    Reference: Z-Reward (arXiv 2606.09076), eqs. (3), (4), (13). With ``ScoreReward(pointwise, 2 * pairwise)``,
    ``LeaveOneOutAdvantage()`` and, among the direct terms, ``AbsoluteExpectationLoss`` and ``GapLoss`` of the weights
    ``pointwise`` and ``pairwise``, the whole is the exact gradient of the expected reward.
    """

    def __init__(
        self,
        reward: ScoreReward | None = None,
        advantage: Advantage | None = None,
        loss: PolicyLoss | None = None,
        weight: float = 1.0,
        decoding: Decoding | None = None,
        length_penalty: float = 0.0,
        forced_penalty: float = 0.0,
    ) -> None:
        super().__init__()
        for name, value in (("weight", weight), ("length_penalty", length_penalty), ("forced_penalty", forced_penalty)):
            if not value >= 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        self.reward = reward or ScoreReward()
        self.advantage = advantage or GroupAdvantage()
        self.loss = loss or PolicyGradient()
        self.weight = weight
        self.decoding = decoding or ExpectedScore()
        self.length_penalty = length_penalty
        self.forced_penalty = forced_penalty

    @torch.no_grad()
    def credit(
        self,
        scores: ScoreDistribution,
        annotated: Tensor,
        rollouts: Rollouts,
        length: int,
        seeds: Sequence[int],
        over: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor] = lambda function, values: function(values),
    ) -> Credit:
        """Rewards and advantages of rollouts.

        Args:
            scores: batch shape ``(P, 2, G)``.
            annotated: ``(P, 2)`` scores of the pairs' sides.
            rollouts: the ``2PG`` rollouts, in this order.
            length: the limit of a trace, in tokens.
            seeds: one for each rollout.
            over: applies a function to the values of all processes, and gives what is this one's; the default is for one
                process alone. So advantages are those of the joined batch, whatever they compare.
        """
        shape = scores.logits.shape
        read, label = self.decoding(ScoreDistribution(scores.logits.reshape(-1, shape[-1]), scores.bins), seeds)
        reward = self.reward(ScoreDistribution(read.logits.reshape(shape), scores.bins), annotated)
        used = (self.length_penalty / length) * rollouts.mask.sum(-1) + self.forced_penalty * rollouts.forced
        reward = reward - used.reshape(reward.shape)
        return Credit(reward.flatten(), over(self.advantage, reward).flatten(), label)

    def forward(self, log_probs: Tensor, old: Tensor, rollouts: Rollouts, credit: Credit, scores: ScoreDistribution) -> Tensor:
        """The loss of each rollout.

        Args:
            log_probs: ``(M, T)`` of the sampled tokens, with gradient.
            old: ``(M, T)`` under the weights that sampled; with one column more for drawn labels.
            rollouts: M of them.
            credit: of the M.
            scores: batch shape ``(M,)``, with gradient.

        Returns:
            ``(M,)``, without the weight.
        """
        log_probs, mask = self.with_label(log_probs, rollouts, credit, scores)
        loss: Tensor = self.loss(log_probs, old, credit.advantage, mask)
        return loss

    def with_label(
        self, log_probs: Tensor, rollouts: Rollouts, credit: Credit, scores: ScoreDistribution
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and mask, with a column more where labels were drawn."""
        if credit.label is None:
            return log_probs, rollouts.mask
        drawn = scores.logits.gather(-1, credit.label[:, None])
        drawn = drawn.detach() + self.decoding.label_weight * (drawn - drawn.detach())  # of its gradient, not of its value
        return torch.cat([log_probs, drawn], dim=-1), nn.functional.pad(rollouts.mask, (0, 1), value=True)


class ReferenceTerm(nn.Module):
    """Distance from a snapshot of what is trained, taken again at the beginning of each outer iteration.

    Args:
        estimator: of the divergence; each says which one it descends.
        weight: beta of eq. (4).
        refresh: sampled batches in an outer iteration, M of Algorithm 1.

    Raises:
        ValueError: a weight that is not positive (leave the term out), fewer than one batch.
    """

    def __init__(self, estimator: KLEstimator, weight: float, refresh: int = 100) -> None:
        super().__init__()
        if not weight > 0 or refresh < 1:
            raise ValueError(f"a reference needs a weight above 0 and refresh of at least 1, got {weight} and {refresh}")
        self.estimator = estimator
        self.weight = weight
        self.refresh = refresh


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
