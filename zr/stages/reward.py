"""A reward of a generator: a frozen scorer, and what of its answer is wanted."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import relu

from zr.models import RewardModel, Scorer
from zr.models.aggregation import Aggregation

__all__ = ["Reward"]


class Reward:
    r"""One number for an image and its prompt, :math:`R(p, I) = A(\{\mu(p, I, d)\}_d)`, of which more is better.

    The loss of it is :math:`-w R`, or with a ceiling c the bounded :math:`w \max(c - R, 0)`: an image that has reached the
    ceiling pulls no more. Above what real images earn there is little to gain but the scorer's mistakes.

    Args:
        scorer: with gradients to its images, if it is to be optimised. Its weights are frozen, and it is no part of a
            checkpoint.
        aggregation: A; a risk-averse one takes the scorer's uncertainty into account.
        weight: w, beside other rewards.
        ceiling: c, in the unit of the aggregation; None for none.
        dimensions: which ones are scored; all for None.

    Raises:
        ValueError: a weight that is not above zero, an unknown dimension.

    Reference: Z-Reward (arXiv 2606.09076), eq. (20).

    Example:
        >>> import torch
        >>> from zr.data.shapes import judge
        >>> from zr.models import Minimum
        >>> Reward(judge, Minimum(), weight=0.5, ceiling=4.0).loss(torch.tensor([1.0, 3.0, 4.5]))
        tensor([1.5000, 0.5000, 0.0000])
    """

    def __init__(
        self,
        scorer: RewardModel | Scorer,
        aggregation: Aggregation,
        weight: float = 1.0,
        ceiling: float | None = None,
        dimensions: list[str] | None = None,
    ) -> None:
        if not 0 < weight < float("inf"):
            raise ValueError(f"the weight of a reward must be above zero, got {weight}: leave the reward out instead")
        self.dimensions = [scorer.rubric.dimensions[i] for i in scorer.rubric.index(dimensions)]
        self.scorer: RewardModel | Scorer = scorer
        self.aggregation = aggregation
        self.weight = weight
        self.ceiling = ceiling
        if isinstance(scorer, nn.Module):
            scorer.requires_grad_(False).eval()

    def loss(self, reward: Tensor) -> Tensor:
        """``(B,)`` of rewards ``(B,)``."""
        return self.weight * (-reward if self.ceiling is None else relu(self.ceiling - reward))
