"""Learning which of two images is better from both at once: the yes token of RewardDance."""

from __future__ import annotations

import numpy as np
import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.optim import AdamW
from torchmetrics import Metric

from zr.data import Batch, ScoreData
from zr.losses import ItemLoss, ScoreTarget
from zr.metrics import MARGIN, Choices, pair_counts, same_prompt_pairs
from zr.models import ComparisonReward
from zr.rubric import Rubric
from zr.scores import ScoreDistribution
from zr.stages.scoring import ScoringStage

__all__ = ["Comparison", "ComparisonMetrics"]


class ComparisonMetrics(Metric):
    """HPA of a model that is shown both images of a pair, per dimension and as the macro mean.

    A pair counts by the model's answer to this very pair, as the figures published for such models do, and not by scores that
    were made of its answers to many pairs: those need not agree on an order. Only counts are kept, and they are summed over
    processes.

    Args:
        rubric: names the dimensions.
    """

    full_state_update = False
    correct: Tensor
    total: Tensor
    steady: Tensor
    asked: Tensor

    def __init__(self, rubric: Rubric) -> None:
        super().__init__()
        self.rubric = rubric
        count = len(rubric.dimensions)
        for name, shape in {"correct": (2, count), "total": (2, count), "steady": (count,), "asked": (count,)}.items():
            self.add_state(name, torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, answers: Tensor, shown: Tensor, batch: Batch) -> None:
        """Count pairs.

        Args:
            answers: ``(2, R, D)`` probabilities that the first image of each pair is better, by either order of showing them.
            shown: ``(R, 2)`` positions of two images of one prompt, each two of them once.
            batch: with their scores and choices.
        """
        wins = answers.mean(0).double().cpu().numpy()
        scores = batch.scores[shown].double().cpu().numpy()
        own = np.arange(len(shown)).repeat(2)  # each pair is a prompt of its own
        pairs, of, share = (part[batch.chosen] for part in (batch.pairs, batch.pair_dimension, _share(batch)))
        row, turned = _located(pairs, shown)
        for d in range(wins.shape[1]):
            mu = np.stack([wins[:, d], 1 - wins[:, d]], axis=1).ravel()
            mine = of == d
            first = (2 * row + turned)[mine].cpu().numpy()
            choices = Choices(first, first ^ 1, share[mine].double().cpu().numpy())
            for m, margin in enumerate((0.0, MARGIN)):
                correct, total = pair_counts(mu, scores[:, :, d].ravel(), own, margin, choices)
                self.correct[m, d] += int(correct.sum())
                self.total[m, d] += int(total.sum())
        self.steady += ((answers[0] > 0.5) == (answers[1] > 0.5)).sum(0)
        self.asked += len(shown)

    def compute(self) -> dict[str, Tensor]:
        """The measures, each as ``NAME/DIMENSION``, and their mean as ``NAME``.

        hpa, by choices first and then by scores, and margin_hpa, each pair asked in both orders; consistency, the share of
        pairs in which both orders name the same winner. A measure that is not defined in a dimension is left out there and in
        the mean. The mean of hpa is always there, NaN without any pair.
        """
        shares = {
            "hpa": self.correct[0] / self.total[0],
            "margin_hpa": self.correct[1] / self.total[1],
            "consistency": self.steady / self.asked,
        }
        found: dict[str, Tensor] = {}
        for name, values in shares.items():
            each = zip(self.rubric.dimensions, values, strict=True)
            defined = {f"{name}/{dimension}": value for dimension, value in each if not value.isnan()}
            found |= defined
            if defined or name == "hpa":
                found[name] = values.nanmean()
        return found


class Comparison(ScoringStage):
    """Trains a model that is shown two images of a prompt and says, per dimension, whether the first is better.

    Training shows each two images that a batch compares once, asked for all dimensions, in the order that the loader has drawn
    (:func:`zr.data.collate` shuffles it by seed, epoch, record and dimension). The loss is that of the two-bin distribution
    against the share that prefers the image shown first: 1 or 0, one half for a tie. Evaluation asks about all pairs of images
    of a prompt, in both orders, so its cost grows with the square of their number.

    Args:
        model: the model that compares.
        loss: of items whose score is a share in [0, 1]; :class:`zr.losses.InterpolatedCrossEntropy` is the cross-entropy of yes
            and no.
        optimizer: makes the optimiser.
        warmup: share of all steps in which the learning rate rises.
        decay: share of all steps, at the end, in which it falls to 0.

    Raises:
        ValueError: data of other dimensions; in training, a batch without pairs; in prediction, an image that is the only one
            of its prompt.

    Reference: RewardDance (Wu et al., arXiv 2509.08826).
    """

    model: ComparisonReward

    def __init__(
        self,
        model: ComparisonReward,
        loss: ItemLoss,
        optimizer: OptimizerCallable = AdamW,
        warmup: float = 0.05,
        decay: float = 0.5,
    ) -> None:
        super().__init__(model, optimizer, warmup, decay)
        self.loss = loss
        self.measures = ComparisonMetrics(model.rubric)
        self.keep_plain_hyperparameters()

    def setup(self, stage: str) -> None:
        """Refuse data of other dimensions. Its bins may be any: they only say which image is better."""
        data, own = getattr(self.trainer, "datamodule", None), self.model.rubric.dimensions
        if isinstance(data, ScoreData) and data.rubric.dimensions != own:
            raise ValueError(
                f"the data has the dimensions {data.rubric.dimensions}, the model compares in {own}: give the model a rubric "
                "of the same ones, in the same order"
            )

    def training_step(self, batch: Batch) -> Tensor:
        """The mean loss of the pairs of a batch; what is logged is over all processes."""
        if not len(batch.pairs):
            raise ValueError(
                f"a batch ({batch.keys[0]}, ...) has no pair to compare: give the data module a pair policy and a number of "
                "pairs (pairs=AllPairs(), pairs_per_batch=64)"
            )
        once = {frozenset(pair): pair for pair in batch.pairs.tolist()}
        shown = batch.pairs.new_tensor(list(once.values()))
        row, turned = _located(batch.pairs, shown)
        share = _share(batch)
        images = [[batch.images[a], batch.images[b]] for a, b in once.values()]
        answers = self.model(images=images, prompts=[batch.prompts[a] for a, _ in once.values()])
        target = ScoreTarget.from_scores(torch.where(turned, 1 - share, share))
        values: Tensor = self.loss(answers[row, batch.pair_dimension], target)
        sums = self.mean_over_processes(torch.stack([values.detach().sum(), values.new_tensor(len(values))]))
        self.log("train/loss", sums[0] / sums[1], prog_bar=True, batch_size=len(batch.prompts))
        return values.sum() / sums[1]

    def forward(self, batch: Batch) -> ScoreDistribution:
        """How likely each image is to be better than another one of its prompt, batch shape ``(N, D)``: the mean preference.

        Raises:
            ValueError: an image that is the only one of its prompt.
        """
        shown, answers = self._all_pairs(batch)
        others = shown.flatten().bincount(minlength=len(batch.prompts))
        if not bool(others.all()):
            alone = batch.keys[int(others.argmin())]
            raise ValueError(f"{alone} is the only image of its prompt: there is nothing to compare it with, so leave it out")
        wins = answers.mean(0)
        sums = wins.new_zeros(len(batch.prompts), wins.shape[-1])
        sums = sums.index_add(0, shown[:, 0], wins).index_add(0, shown[:, 1], 1 - wins)
        mean = sums / others[:, None]
        return ScoreDistribution(torch.stack([1 - mean, mean], dim=-1).log(), self.model.rubric.bins)

    def validation_step(self, batch: Batch) -> None:
        """Measure a batch."""
        self._measure(batch)

    def test_step(self, batch: Batch) -> None:
        """Measure a batch."""
        self._measure(batch)

    def _measure(self, batch: Batch) -> None:
        shown, answers = self._all_pairs(batch)
        self.measures.update(answers, shown, batch)

    def _all_pairs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Each two images of a prompt ``(R, 2)``, and what both orders say of them ``(2, R, D)``."""
        pairs = np.stack(same_prompt_pairs(batch.prompt_index.cpu().numpy()), axis=1)
        shown = torch.from_numpy(pairs).to(batch.pairs)
        if not len(shown):
            return shown, batch.scores.new_zeros(2, 0, len(self.model.rubric.dimensions))
        first, second = ([batch.images[i] for i in side] for side in pairs.T)
        return shown, self.model.both_orders(first, second, [batch.prompts[i] for i in pairs[:, 0]])


def _share(batch: Batch) -> Tensor:
    """``(P,)`` shares that prefer the first image of each pair."""
    return batch.scores.new_zeros(0) if batch.preference is None else batch.preference


def _located(pairs: Tensor, shown: Tensor) -> tuple[Tensor, Tensor]:
    """Of ``pairs (P, 2)`` the rows of ``shown (R, 2)`` with the same two images ``(P,)``, and which stand there reversed."""
    same = (pairs[:, None] == shown).all(-1)
    turned = (pairs[:, None].flip(-1) == shown).all(-1)
    return (same | turned).int().argmax(-1) if len(pairs) else pairs[:, 0], turned.any(-1)
