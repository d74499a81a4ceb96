"""What all stages that train a reward model share: its evaluation, and sharing it among processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.optim import AdamW
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from zr.data import Batch
from zr.metrics import (
    MARGIN,
    Choices,
    Coverage,
    ExpectedCalibrationError,
    RankedProbabilityScore,
    VotesNegativeLogLikelihood,
    hpa,
    plcc,
    srcc,
)
from zr.models import RewardModel
from zr.models.sharding import anyone, sharded
from zr.rubric import Rubric
from zr.scores import ScoreDistribution, kl_divergence
from zr.stages.training import TrainingStage

__all__ = ["ScoreMetrics", "ScoringStage"]

LEVELS = (0.5, 0.8, 0.9)  # of the central intervals whose coverage is measured


class ScoreMetrics(Metric):
    """The measures of one evaluation, per dimension and as their macro mean, by the same functions as the final tables.

    HPA goes by annotated choices first, then by scores, as :func:`zr.metrics.hpa` says; choices are the pairs of a batch that
    annotators compared directly. Everything is kept until :meth:`compute`, a few numbers per image, so that several processes
    give exactly what one gives, also when one of them had nothing to evaluate.

    Args:
        rubric: names the dimensions and bins.
    """

    full_state_update = False
    mu: list[Tensor]
    score: list[Tensor]
    votes: list[Tensor]
    logits: list[Tensor]
    teacher: list[Tensor]
    off_scale: list[Tensor]
    prompt: list[Tensor]
    image: list[Tensor]
    choice: list[Tensor]
    choice_dimension: list[Tensor]
    choice_share: list[Tensor]

    def __init__(self, rubric: Rubric) -> None:
        super().__init__()
        self.rubric = rubric
        for name in self._nothing():
            self.add_state(name, [], dist_reduce_fx="cat")
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        for name, empty in self._nothing().items():
            getattr(self, name).append(empty)  # of the shape that a process without data must gather

    def update(self, prediction: ScoreDistribution, batch: Batch) -> None:
        """Take in a batch; prediction has batch shape ``(N, D)``."""
        records = [key.rsplit(".", 1)[0] for key in batch.keys]
        image = _numbers(batch.keys).to(batch.scores.device)
        given = {
            "mu": prediction.mean.detach(),
            "score": batch.scores,
            "votes": batch.votes,
            "logits": prediction.logits.detach(),
            "teacher": torch.zeros_like(batch.votes) if batch.teacher is None else batch.teacher,
            "off_scale": _off_scale(prediction),
            "prompt": _numbers(records).to(batch.scores.device),
            "image": image,
            "choice": image[batch.pairs[batch.chosen]],
            "choice_dimension": batch.pair_dimension[batch.chosen],
            "choice_share": batch.pair_dimension[:0] if batch.preference is None else batch.preference[batch.chosen],
        }
        for name, values in given.items():
            state = getattr(self, name)
            state.append(values.to(state[0].dtype))

    def compute(self) -> dict[str, Tensor]:
        """The measures, each as ``NAME/DIMENSION``, and their mean as ``NAME``.

        hpa, of scores and choices; of scores, margin_hpa, plcc, srcc, nll, rps, ece, and coverage_50, coverage_80 and
        coverage_90; off_scale where the head computes it; of a labeller's distributions, teacher_kl, the mean KL from them in
        nats, and teacher_hpa, the HPA against their means. A dimension without scores, without choices or labels has none of
        theirs. A measure that is not defined in a dimension (no pair, a constant) is NaN there and left out of the mean. The
        mean of hpa is always there, NaN without any pair.
        """
        kept = {name: dim_zero_cat(getattr(self, name)).cpu() for name in self._nothing()}
        found: dict[str, list[Tensor]] = {"hpa": []}
        named: dict[str, Tensor] = {}
        for index, dimension in enumerate(self.rubric.dimensions):
            for name, value in self._of_dimension(kept, index).items():
                named[f"{name}/{dimension}"] = torch.as_tensor(float(value))
                found.setdefault(name, []).append(named[f"{name}/{dimension}"])
        return named | {name: torch.tensor(values).nanmean() for name, values in found.items()}

    def _of_dimension(self, kept: dict[str, Tensor], index: int) -> dict[str, Any]:
        known = ~kept["score"][:, index].isnan()
        mu, score = kept["mu"][:, index].double().numpy(), kept["score"][:, index].double().numpy()
        prompt, choices = kept["prompt"].numpy(), _choices(kept, index)
        values: dict[str, Any] = {}
        if bool(known.any()) or len(choices.share):
            values["hpa"] = hpa(mu, score, prompt, choices=choices)
        if bool(known.any()):
            x, y, where = (part[known.numpy()] for part in (mu, score, prompt))
            values |= {"margin_hpa": hpa(x, y, where, margin=MARGIN), "plcc": plcc(x, y), "srcc": srcc(x, y)}
            for name, metric in _of_votes().items():
                distribution = ScoreDistribution(kept["logits"][known, index], self.rubric.bins)
                metric.update(distribution, kept["votes"][known, index])
                values[name] = metric.compute()
        labelled = kept["teacher"][:, index].sum(-1) > 0
        if bool(labelled.any()):
            teacher = ScoreDistribution(kept["teacher"][labelled, index].log(), self.rubric.bins)
            student = ScoreDistribution(kept["logits"][labelled, index], self.rubric.bins)
            values["teacher_kl"] = kl_divergence(teacher, student).mean()
            values["teacher_hpa"] = hpa(mu[labelled.numpy()], teacher.mean.double().numpy(), prompt[labelled.numpy()])
        mass = kept["off_scale"][:, index]
        if not bool(mass.isnan().all()):
            values["off_scale"] = mass.nanmean()
        return values

    def _nothing(self) -> dict[str, Tensor]:
        """An empty batch's worth of each state."""
        count, bins = len(self.rubric.dimensions), len(self.rubric.bins)
        shapes = {"mu": (0, count), "score": (0, count), "off_scale": (0, count), "choice_share": (0,)}
        real = shapes | dict.fromkeys(("votes", "logits", "teacher"), (0, count, bins))
        whole = {"prompt": (0,), "image": (0,), "choice": (0, 2), "choice_dimension": (0,)}
        return {name: torch.empty(shape, device=self.device) for name, shape in real.items()} | {
            name: torch.empty(shape, dtype=torch.int64, device=self.device) for name, shape in whole.items()
        }


def _numbers(names: Sequence[str]) -> Tensor:
    """``(N,)`` a number for each name: positions start again in each batch, names are the same everywhere."""
    return torch.tensor([int.from_bytes(blake2b(name.encode(), digest_size=7).digest(), "big") for name in names])


def _off_scale(prediction: ScoreDistribution) -> Tensor:
    """The mass outside the labels, NaN where the head did not compute it."""
    try:
        return prediction.off_scale.detach()
    except ValueError:
        return torch.full_like(prediction.mean.detach(), torch.nan)


def _choices(kept: dict[str, Tensor], index: int) -> Choices:
    """The choices of a dimension, by position among all images."""
    number, place = np.unique(kept["image"].numpy(), return_index=True)
    mine = kept["choice_dimension"] == index
    position = place[np.searchsorted(number, kept["choice"][mine].numpy())]
    return Choices(position[:, 0], position[:, 1], kept["choice_share"][mine].double().numpy())


def _of_votes() -> dict[str, Metric]:
    """Metrics fed with what all processes gathered already, so they do not gather again."""
    return {
        "nll": VotesNegativeLogLikelihood(sync_on_compute=False),
        "rps": RankedProbabilityScore(sync_on_compute=False),
        "ece": ExpectedCalibrationError(sync_on_compute=False),
        **{f"coverage_{level:.0%}".rstrip("%"): Coverage(level, sync_on_compute=False) for level in LEVELS},
    }


class ScoringStage(TrainingStage):
    """A stage that trains ``model``, a reward model, and evaluates it against annotators. By itself it only evaluates.

    A subclass sets everything in its constructor and writes ``training_step``.

    Args:
        model: the reward model.
        optimizer: makes the optimiser for the parameters that take a gradient.
        warmup: share of all steps in which the learning rate rises linearly from 0.
        decay: share of all steps, at the end, in which it falls linearly to 0.

    Raises:
        ValueError: shares outside [0, 1] or that overlap.
    """

    def __init__(
        self, model: RewardModel, optimizer: OptimizerCallable = AdamW, warmup: float = 0.05, decay: float = 0.5
    ) -> None:
        super().__init__(optimizer, warmup, decay)
        self.model = model.train()
        self.measures: Metric = ScoreMetrics(model.rubric)
        self._seen: tuple[Batch, int] | None = None

    def configure_model(self) -> None:
        """Share the weights with the other processes, where ``ModelParallelStrategy`` asks for it.

        Raises:
            ValueError: tensor parallelism, inference mode, passes by a budget, a backbone or a head that cannot be sharded.
        """
        if self.device_mesh is None or sharded(self.model):
            return
        mesh, backbone = self.device_mesh["data_parallel"], self.model.backbone
        if mesh.size() != self.device_mesh.size():
            raise ValueError(
                "weights are sharded, never split: ModelParallelStrategy(data_parallel_size=N, tensor_parallel_size=1)"
            )
        if self.trainer.validate_loop.inference_mode:
            raise ValueError("what inference mode has gathered cannot be trained: set inference_mode of the trainer to False")
        if self.model.budget is not None:
            raise ValueError("sharded models make the same number of passes on all processes: leave out budget")
        if not hasattr(backbone, "shard"):
            raise ValueError(
                f"{type(backbone).__name__} is small enough for each process and cannot be sharded: use strategy ddp"
            )
        backbone.shard(mesh)
        if not sharded(self.model.head):
            fully_shard(self.model.head, mesh=mesh, reshard_after_forward=True)

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

    def on_validation_batch_start(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Tell the processes that share the weights."""
        self._begin(batch, batch_idx)

    def on_test_batch_start(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Tell the processes that share the weights."""
        self._begin(batch, batch_idx)

    def on_predict_batch_start(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Tell the processes that share the weights."""
        self._begin(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        """Log the measures under ``val/``."""
        self._wait()
        self._log_measures("val")

    def on_test_epoch_end(self) -> None:
        """Log the measures under ``test/``."""
        self._wait()
        self._log_measures("test")

    def on_predict_epoch_end(self) -> None:
        """Wait for the processes that share the weights."""
        self._wait()

    def accompany(self, batch: Batch, batch_idx: int) -> None:
        """Make the passes of an evaluation step, for processes with more batches than this one.

        Args:
            batch: the last one.
            batch_idx: of the others' step.
        """
        self(batch)

    def over_processes(self, function: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
        """``function`` of the values ``(..., N)`` of all processes, ``(W, ..., N)``; of its result this process's part.

        Every process must ask for it, with values of one shape. Without a run, or alone, ``function(values)``.
        """
        if self._trainer is None or self._trainer.world_size == 1:
            return function(values)
        own = values.new_zeros(self._trainer.world_size, *values.shape)
        own[self.global_rank] = values
        joined: Tensor = self._trainer.strategy.reduce(own, reduce_op="sum")
        return function(joined)[self.global_rank]

    def _begin(self, batch: Batch, batch_idx: int) -> None:
        self._seen = (batch, batch_idx)
        anyone(self.model, True)

    def _wait(self) -> None:
        """Go along with processes that share the weights and have batches left."""
        while anyone(self.model, False):
            if self._seen is None:
                raise ValueError("sharded weights need a batch on each process: evaluate more records, or on fewer devices")
            batch, batch_idx = self._seen
            self._seen = (batch, batch_idx + 1)
            self.accompany(batch, batch_idx + 1)
        self._seen = None

    def _log_measures(self, name: str) -> None:
        values = self.measures.compute()
        self.measures.reset()
        for key, value in values.items():
            # Gathered from all processes when computed, so every rank logs the same value.
            self.log(f"{name}/{key}", value, prog_bar=key in ("hpa", "plcc"))
