"""Learning from annotated scores in one forward pass: SFT, soft labels, regression, gaps, Bradley-Terry, and their mixes."""

from __future__ import annotations

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
        ValueError: no term with a positive weight.

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
        self.terms = nn.ModuleDict(terms)
        self.keep_plain_hyperparameters()

    def training_step(self, batch: Batch) -> Tensor:
        """The objective on a batch."""
        loss, values = objective(dict(self.terms.items()), self(batch), batch)  # type: ignore[arg-type]
        count = len(batch.prompts)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=count)
        self.log_dict({f"train/{name}": value for name, value in values.items()}, batch_size=count)
        return loss
