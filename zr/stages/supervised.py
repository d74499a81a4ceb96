"""Learning from annotated scores in one forward pass: SFT, soft labels, regression, gaps, Bradley-Terry, and their mixes."""

from __future__ import annotations

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import AdamW

from zr.data import Batch
from zr.models import RewardModel
from zr.stages.scoring import ScoringStage
from zr.stages.terms import Term, objective

__all__ = ["Supervised"]


class Supervised(ScoringStage):
    """Trains a reward model on a weighted sum of losses against annotations.

    Args:
        model: the reward model.
        terms: the objective: named losses with weights.
        optimizer: makes the optimiser.
        warmup: share of all steps in which the learning rate rises.
        decay: share of all steps, at the end, in which it falls to 0.

    Raises:
        ValueError: no term with a positive weight, a term named ``loss``.

    Reference: the SFT baseline of Z-Reward (arXiv 2606.09076) is one term, :class:`zr.losses.BinCrossEntropy` or one of its
    kin.
    """

    def __init__(
        self,
        model: RewardModel,
        terms: dict[str, Term],
        optimizer: OptimizerCallable = AdamW,
        warmup: float = 0.05,
        decay: float = 0.5,
    ) -> None:
        super().__init__(model, optimizer, warmup, decay)
        if not any(term.weight for term in terms.values()):
            raise ValueError("terms has no loss with a positive weight: there is nothing to learn")
        if "loss" in terms:
            raise ValueError("terms: train/loss is their weighted sum in the log; give the term 'loss' another name")
        self.terms = nn.ModuleDict(terms)
        self.keep_plain_hyperparameters()

    def training_step(self, batch: Batch) -> Tensor:
        """The objective on a batch of each process; see :func:`zr.stages.objective`. What is logged is over all of them."""
        terms: dict[str, Term] = dict(self.terms.items())  # type: ignore[arg-type]
        loss, means = objective(terms, self(batch), batch, self.mean_over_processes)
        whole = sum((terms[name].weight * value for name, value in means.items()), torch.zeros_like(loss.detach()))
        count = len(batch.prompts)
        self.log("train/loss", whole, prog_bar=True, batch_size=count)
        self.log_dict({f"train/{name}": value for name, value in means.items()}, batch_size=count)
        return loss
