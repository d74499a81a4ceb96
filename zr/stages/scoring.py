"""What all stages that train a reward model share: its evaluation, its optimiser and what a checkpoint remembers."""

from __future__ import annotations

import inspect
from hashlib import blake2b
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.core.mixins.hparams_mixin import HyperparametersMixin
from lightning.pytorch.utilities.parsing import collect_init_args
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from zr.data import Batch
from zr.metrics import (
    ExpectedCalibrationError,
    RankedProbabilityScore,
    VotesNegativeLogLikelihood,
    hpa,
    plcc,
    srcc,
)
from zr.models import RewardModel
from zr.rubric import Rubric
from zr.scores import ScoreDistribution

__all__ = ["ScoreMetrics", "ScoringStage"]


class ScoreMetrics(Metric):
    """The measures of one evaluation, per dimension and as their macro mean, by the same functions as the final tables.

    Everything is kept until :meth:`compute`, a few numbers per image, so that several processes give exactly what one gives.

    Args:
        rubric: names the dimensions and bins.
    """

    full_state_update = False
    mu: list[Tensor]
    score: list[Tensor]
    votes: list[Tensor]
    logits: list[Tensor]
    prompt: list[Tensor]

    def __init__(self, rubric: Rubric) -> None:
        super().__init__()
        self.rubric = rubric
        for name in ("mu", "score", "votes", "logits", "prompt"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, prediction: ScoreDistribution, batch: Batch) -> None:
        """Take in a batch; prediction has batch shape ``(N, D)``."""
        self.mu.append(prediction.mean.detach())
        self.logits.append(prediction.logits.detach())
        self.score.append(batch.scores)
        self.votes.append(batch.votes)
        records = [key.rsplit(".", 1)[0] for key in batch.keys]  # a record never crosses a process, its name does
        numbers = [int.from_bytes(blake2b(record.encode(), digest_size=7).digest(), "big") for record in records]
        self.prompt.append(torch.tensor(numbers, device=batch.scores.device))

    def compute(self) -> dict[str, Tensor]:
        """hpa, margin_hpa, plcc, srcc, nll, rps and ece: each as ``NAME/DIMENSION``, and their mean as ``NAME``.

        A measure that is not defined in a dimension (no pair, a constant) is NaN there and left out of the mean.
        """
        mu, score, votes = dim_zero_cat(self.mu), dim_zero_cat(self.score), dim_zero_cat(self.votes)
        logits, prompt = dim_zero_cat(self.logits), dim_zero_cat(self.prompt)
        found: dict[str, list[Tensor]] = {}
        named: dict[str, Tensor] = {}
        for index, dimension in enumerate(self.rubric.dimensions):
            known = ~score[:, index].isnan()
            if not bool(known.any()):
                continue
            x, y = (t[known, index].cpu().double().numpy() for t in (mu, score))  # on the host: not every device has float64
            where = prompt[known].cpu().numpy()
            values = {
                "hpa": hpa(x, y, where),
                "margin_hpa": hpa(x, y, where, margin=0.5),
                "plcc": plcc(x, y),
                "srcc": srcc(x, y),
            }
            for name, metric in _of_votes().items():
                metric.update(ScoreDistribution(logits[known, index], self.rubric.bins), votes[known, index])
                values[name] = metric.compute()
            for name, value in values.items():
                named[f"{name}/{dimension}"] = torch.as_tensor(float(value))
                found.setdefault(name, []).append(named[f"{name}/{dimension}"])
        return named | {name: torch.stack(values).nanmean() for name, values in found.items()}


def _of_votes() -> dict[str, Metric]:
    """Metrics fed with what all processes gathered already, so they do not gather again."""
    return {
        "nll": VotesNegativeLogLikelihood(sync_on_compute=False),
        "rps": RankedProbabilityScore(sync_on_compute=False),
        "ece": ExpectedCalibrationError(sync_on_compute=False),
    }


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
        self.model = model.train()
        self.optimizer = optimizer
        self.warmup = warmup
        self.decay = decay
        self.measures = ScoreMetrics(model.rubric)

    def keep_plain_hyperparameters(self) -> None:
        """Remember the constructor's arguments that could stand in YAML; live objects are not for a checkpoint.

        From the command line these are all arguments, so ``load_from_checkpoint(path, weights_only=True)`` builds the stage
        again; in a notebook pass the parts once more: ``load_from_checkpoint(path, model=..., terms=...)``.
        """
        try:
            self.save_hyperparameters("_instantiator", logger=False)  # Lightning's own, where a configuration built the stage
        except KeyError:
            frame = inspect.currentframe()
            given = collect_init_args(frame, [], classes=(HyperparametersMixin,))  # type: ignore[arg-type]
            live = [name for arguments in given for name, value in arguments.items() if not _plain(value)]
            self.save_hyperparameters(ignore=live, frame=frame, logger=False)  # left out before Lightning would copy them
        else:
            self.save_hyperparameters(logger=False)

    def forward(self, batch: Batch) -> ScoreDistribution:
        """Scores of a batch's images, batch shape ``(N, D)``."""
        scores: ScoreDistribution = self.model(images=batch.images, prompts=batch.prompts)
        return scores

    def validation_step(self, batch: Batch) -> None:
        """Measure a batch."""
        self.measures.update(self(batch), batch)

    def test_step(self, batch: Batch) -> None:
        """Measure a batch."""
        self.measures.update(self(batch), batch)

    def predict_step(self, batch: Batch) -> dict[str, Any]:
        """Keys ``N`` and ``probs (N, D, K)`` of a batch."""
        return {"keys": batch.keys, "probs": self(batch).probs.cpu()}

    def on_validation_epoch_end(self) -> None:
        """Log the measures under ``val/``."""
        self._log_measures("val")

    def on_test_epoch_end(self) -> None:
        """Log the measures under ``test/``."""
        self._log_measures("test")

    def configure_optimizers(self) -> Any:
        """The optimiser, and the schedule by steps."""
        optimizer = self.optimizer([p for p in self.parameters() if p.requires_grad])
        total = max(1, int(self.trainer.estimated_stepping_batches))
        schedule = LambdaLR(optimizer, lambda step: _ramp(step / total, 1 / total, self.warmup, self.decay))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _log_measures(self, name: str) -> None:
        values = self.measures.compute()
        self.measures.reset()
        for key, value in values.items():
            # Gathered from all processes when computed, so every rank logs the same value.
            self.log(f"{name}/{key}", value, prog_bar=key in ("hpa", "plcc"))


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
