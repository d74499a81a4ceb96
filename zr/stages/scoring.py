"""What all stages that train a reward model share: its evaluation, its optimiser and what a checkpoint remembers."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import PearsonCorrCoef, SpearmanCorrCoef

from zr.data import Batch
from zr.metrics import HPA, ExpectedCalibrationError, RankedProbabilityScore, VotesNegativeLogLikelihood
from zr.models import RewardModel
from zr.rubric import Rubric
from zr.scores import ScoreDistribution

__all__ = ["ScoreMetrics", "ScoringStage"]


class ScoreMetrics(nn.Module):
    """The measures of one evaluation, per dimension and as their macro mean.

    Args:
        rubric: names the dimensions.
    """

    def __init__(self, rubric: Rubric) -> None:
        super().__init__()
        self.dimensions = rubric.dimensions
        self.parts = nn.ModuleDict({name: _measures() for name in rubric.dimensions})

    def update(self, prediction: ScoreDistribution, batch: Batch) -> None:
        """Take in a batch; prediction has batch shape ``(N, D)``."""
        for index, name in enumerate(self.dimensions):
            known = batch.known[:, index]
            if not bool(known.any()):
                continue
            parts, q = self.parts[name], prediction[known, index].detach()
            score, votes = batch.scores[known, index], batch.votes[known, index]
            for key in ("hpa", "margin_hpa"):
                parts[key].update(q, score, batch.prompt_index[known])
            for key in ("plcc", "srcc"):
                parts[key].update(q.mean, score.to(q.mean))
            for key in ("nll", "rps", "ece"):
                parts[key].update(q, votes)

    def compute(self) -> dict[str, Tensor]:
        """``hpa``, ``margin_hpa``, ``plcc``, ``srcc``, ``nll``, ``rps``, ``ece``: ``NAME/DIMENSION``, and ``NAME`` the mean."""
        found: dict[str, Tensor] = {}
        for key in _measures():
            values = []
            for name in self.dimensions:
                metric = self.parts[name][key]
                if metric.update_called:
                    found[f"{key}/{name}"] = metric.compute().float()
                    values.append(found[f"{key}/{name}"])
            if values:
                found[key] = torch.stack(values).mean()
        return found

    def reset(self) -> None:
        """Begin anew."""
        for parts in self.parts.values():
            for metric in parts.values():
                metric.reset()


def _measures() -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "hpa": HPA(),
            "margin_hpa": HPA(margin=0.5),
            "plcc": PearsonCorrCoef(),
            "srcc": SpearmanCorrCoef(),
            "nll": VotesNegativeLogLikelihood(),
            "rps": RankedProbabilityScore(),
            "ece": ExpectedCalibrationError(),
        }
    )


class ScoringStage(L.LightningModule):
    """A stage that trains ``model``, a reward model, and evaluates it against annotators.

    A subclass sets everything in its constructor and writes ``training_step``.

    Args:
        model: the reward model.
        optimizer: makes the optimiser for the parameters that take a gradient.
        warmup: share of all steps in which the learning rate rises linearly from 0.
        decay: share of all steps, at the end, in which it falls linearly to 0.

    Raises:
        ValueError: shares outside [0, 1] or that overlap.
    """

    def __init__(self, model: RewardModel, optimizer: OptimizerCallable, warmup: float, decay: float) -> None:
        super().__init__()
        if not (0 <= warmup <= 1 and 0 <= decay <= 1 and warmup + decay <= 1):
            raise ValueError(f"warmup and decay are shares of all steps whose sum is at most 1, got {warmup} and {decay}")
        self.model = model
        self.optimizer = optimizer
        self.warmup = warmup
        self.decay = decay
        self.evaluations = nn.ModuleDict({"val": ScoreMetrics(model.rubric), "test": ScoreMetrics(model.rubric)})

    def keep_plain_hyperparameters(self) -> None:
        """Remember the constructor's arguments that could stand in YAML; live objects are not for a checkpoint.

        From the command line these are all arguments, so ``load_from_checkpoint(path, weights_only=True)`` builds the stage
        again; in a notebook pass the parts once more: ``load_from_checkpoint(path, model=..., terms=...)``.
        """
        self.save_hyperparameters(logger=False)
        for name in [name for name, value in self.hparams.items() if not _plain(value)]:
            del self.hparams[name]
        self._hparams_initial = {name: value for name, value in self._hparams_initial.items() if name in self.hparams}

    def forward(self, batch: Batch) -> ScoreDistribution:
        """Scores of a batch's images, batch shape ``(N, D)``."""
        scores: ScoreDistribution = self.model(images=batch.images, prompts=batch.prompts)
        return scores

    def validation_step(self, batch: Batch) -> None:
        """Measure a batch."""
        self.evaluations["val"].update(self(batch), batch)

    def test_step(self, batch: Batch) -> None:
        """Measure a batch."""
        self.evaluations["test"].update(self(batch), batch)

    def predict_step(self, batch: Batch) -> dict[str, Any]:
        """Keys ``N`` and ``probs (N, D, K)`` of a batch."""
        return {"keys": batch.keys, "probs": self(batch).probs.cpu()}

    def on_validation_epoch_end(self) -> None:
        """Log the measures under ``val/``."""
        self._log_measures("val")

    def on_test_epoch_end(self) -> None:
        """Log the measures under ``test/``."""
        self._log_measures("test")

    def configure_optimizers(self) -> dict[str, Any]:
        """The optimiser, and the schedule by steps."""
        optimizer = self.optimizer([p for p in self.parameters() if p.requires_grad])
        total = max(1, int(self.trainer.estimated_stepping_batches))
        schedule = LambdaLR(optimizer, lambda step: _ramp(step / total, 1 / total, self.warmup, self.decay))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _log_measures(self, name: str) -> None:
        evaluation = self.evaluations[name]
        values = evaluation.compute()
        evaluation.reset()
        shown = {f"{name}/hpa", f"{name}/plcc"}
        for key, value in values.items():
            # Metrics of torchmetrics are synchronised when they are computed, so every rank logs the same value.
            self.log(f"{name}/{key}", value, prog_bar=f"{name}/{key}" in shown, rank_zero_only=True)


def _ramp(progress: float, step: float, warmup: float, decay: float) -> float:
    rising = (progress + step) / warmup if warmup else 1.0
    falling = (1 - progress) / decay if decay else 1.0
    return max(0.0, min(1.0, rising, falling))


def _plain(value: Any) -> bool:
    """Whether a value could stand in a YAML file."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    return value is None or isinstance(value, bool | int | float | str)
