"""Terms of a training objective, and the one place that hands each kind of loss what it needs of a batch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from zr.data import Batch
from zr.losses import DistillationLoss, ItemLoss, PairLoss, ScoreTarget
from zr.scores import ScoreDistribution

__all__ = ["Term", "objective"]


class Term(nn.Module):
    """A loss and its weight in the objective.

    Args:
        loss: of one of the three call forms.
        weight: factor of its mean over a batch; with 0 it is not computed.

    Example:
        >>> from zr.losses import GapLoss
        >>> Term(GapLoss(), weight=0.5)
        Term(weight=0.5, (loss): GapLoss())
    """

    def __init__(self, loss: ItemLoss | PairLoss | DistillationLoss, weight: float = 1.0) -> None:
        super().__init__()
        if not isinstance(loss, ItemLoss | PairLoss | DistillationLoss):
            raise ValueError(f"a term takes an ItemLoss, PairLoss or DistillationLoss, got {type(loss).__name__}")
        if not weight >= 0:
            raise ValueError(f"the weight of a term must be at least 0, got {weight}")
        self.loss = loss
        self.weight = weight

    def forward(self, prediction: ScoreDistribution, batch: Batch) -> Tensor | None:
        """Mean of the loss over the items or pairs of a batch that it applies to.

        Args:
            prediction: batch shape ``(N, D)``.
            batch: N images, D dimensions.

        Returns:
            A scalar, or None when the batch holds nothing for it.
        """
        match self.loss:
            case ItemLoss():
                values = self._items(self.loss, prediction, batch)
            case PairLoss():
                values = self._pairs(self.loss, prediction, batch)
            case DistillationLoss():
                values = self._distillation(self.loss, prediction, batch)
        return values.mean() if values.numel() else None

    def __repr__(self) -> str:
        return f"Term(weight={self.weight:g}, (loss): {self.loss!r})"

    @staticmethod
    def _items(loss: ItemLoss, prediction: ScoreDistribution, batch: Batch) -> Tensor:
        known = batch.known
        target = ScoreTarget(batch.scores[known], known[known], votes=batch.votes[known])
        return loss(prediction[known], target) if len(target.score) else prediction.mean[:0, 0]

    @staticmethod
    def _pairs(loss: PairLoss, prediction: ScoreDistribution, batch: Batch) -> Tensor:
        if batch.preference is None:
            raise ValueError(
                f"{type(loss).__name__} compares images in pairs: give the data module a pair policy (pairs=AllPairs())"
            )
        dimension = batch.pair_dimension[:, None].expand(-1, 2)
        target = ScoreTarget(
            batch.scores[batch.pairs, dimension], batch.known[batch.pairs, dimension], preference=batch.preference
        )
        usable = target.known.all(-1) | (not loss.needs_scores)
        pairs, dimension, target = batch.pairs[usable], dimension[usable], target[usable]
        return loss(prediction[pairs, dimension][..., None], target) if len(pairs) else prediction.mean[:0, 0]

    @staticmethod
    def _distillation(loss: DistillationLoss, prediction: ScoreDistribution, batch: Batch) -> Tensor:
        if batch.teacher is None:
            raise ValueError(f"{type(loss).__name__} needs a teacher's distributions: name the data module's labeller")
        given = batch.teacher.sum(-1) > 0
        teacher = ScoreDistribution(batch.teacher[given].log(), prediction.bins)
        return loss(prediction[given], teacher) if bool(given.any()) else prediction.mean[:0, 0]


def objective(terms: Mapping[str, Term], prediction: ScoreDistribution, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of the terms, and the unweighted value of each term that had anything to work on.

    Args:
        terms: by name.
        prediction: batch shape ``(N, D)``.
        batch: N images, D dimensions.

    Returns:
        A scalar with gradient (a zero that keeps the graph when nothing in the batch is known, so that every rank runs the
        same backward pass), and the values by name, detached.
    """
    total = torch.zeros_like(prediction.mean.sum()) * prediction.mean.sum()
    values: dict[str, Tensor] = {}
    for name, term in terms.items():
        value = term(prediction, batch) if term.weight else None
        if value is not None:
            total = total + term.weight * value
            values[name] = value.detach()
    return total, values
