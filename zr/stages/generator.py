"""The SFT generator: pictures and their prompts learned by matching velocities, before any reward improves it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import AdamW

from zr.data import Batch
from zr.data.shapes import Judge
from zr.losses import flow_matching_loss, on_the_way
from zr.models import RewardModel, Scorer
from zr.models.generators import FlowGenerator
from zr.models.generators.flow import RUN_GENERATOR
from zr.models.generators.noise import source
from zr.stages.training import TrainingStage

__all__ = ["FlowMatching", "KeepGenerator"]


class FlowMatching(TrainingStage):
    r"""Teaches a generator the velocities of straight paths from noise :math:`\epsilon` to pictures x.

    .. math:: L = E_{x, p, \epsilon, t} \, \|v_\theta((1 - t)\,\epsilon + t\,x, t, p) - (x - \epsilon)\|^2

    Every image of a batch is learned, whatever its scores, with its record's prompt. Validation logs ``val/loss``, always at
    the same noise and times, and with a scorer ``val/score/DIMENSION``, the mean expected score of one picture for each
    prompt, always from the same noise.

    Args:
        generator: what learns.
        scorer: what scores the pictures that it makes, without gradient; None for none. In YAML a reward model or the world's
            judge. It is no part of the checkpoint.
        drop_prompts: share of the images that are learned without their prompt, which guidance needs.
        location: of the times, whose log-odds are normal: below 0 more of them lie near the noise.
        spread: standard deviation of these log-odds.
        optimizer: makes the optimiser.
        warmup: share of all steps in which the learning rate rises.
        decay: share of all steps, at the end, in which it falls to 0.
        seed: of noise, times and dropped prompts, which are drawn from (seed, batch of the run, key of the batch).

    Raises:
        ValueError: a share outside [0, 1], a spread that is not positive; in training, pictures of another size than the
            generator makes, a loss that is not finite, which is found before the weights change.

    Reference: rectified flow (arXiv 2209.03003); log-odds normal times: Esser et al. (arXiv 2403.03206), section 3.1.
    """

    batches: Tensor

    def __init__(
        self,
        generator: FlowGenerator,
        scorer: RewardModel | Judge | Scorer | None = None,  # what YAML may name, and whatever else scores
        drop_prompts: float = 0.1,
        location: float = -0.4,
        spread: float = 1.0,
        optimizer: OptimizerCallable = AdamW,
        warmup: float = 0.05,
        decay: float = 0.5,
        seed: int = 0,
    ) -> None:
        super().__init__(optimizer, warmup, decay)
        if not 0 <= drop_prompts <= 1 or not spread > 0:
            raise ValueError(f"drop_prompts is a share in [0, 1], spread more than 0: got {drop_prompts} and {spread}")
        self.generator = generator
        self.drop_prompts = drop_prompts
        self.location = location
        self.spread = spread
        self.seed = seed
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))
        self._beside = (scorer,)  # in a tuple: no part of the checkpoint
        self.keep_plain_hyperparameters()
        self.hparams.pop("scorer", None)  # else a checkpoint could not be read where the scorer is not

    def training_step(self, batch: Batch) -> Tensor:
        """The mean loss of a batch's images."""
        loss = self._losses(batch, source(self.seed, "train", int(self.batches), batch.keys[0]), self.drop_prompts).mean()
        if not bool(loss.isfinite()):
            raise ValueError(f"the loss of the batch of {batch.keys[0]} is {loss.item()}: lower the learning rate, or clip")
        self.batches += 1
        self.log("train/loss", self.mean_over_processes(loss.detach()), prog_bar=True, batch_size=len(batch.keys))
        return loss

    def validation_step(self, batch: Batch) -> None:
        """The loss of a batch's images, and scores of pictures for its prompts."""
        chance = source(self.seed, "validation", batch.keys[0])
        self._log("loss", self._losses(batch, chance, 0.0))
        (scorer,) = self._beside
        if scorer is not None:
            prompts = list(dict(zip(batch.prompt_index.tolist(), batch.prompts, strict=True)).values())
            scores = scorer(images=self.generator.sample(prompts, chance), prompts=prompts).mean
            for name, column in zip(scorer.rubric.dimensions, scores.unbind(-1), strict=True):
                self._log(f"score/{name}", column)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What moves the stage, called by ``to`` and its kin: the scorer comes along."""
        (scorer,) = self._beside
        if isinstance(scorer, nn.Module):
            scorer._apply(fn, recurse)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _losses(self, batch: Batch, chance: torch.Generator, drop: float) -> Tensor:
        """``(N,)``, of a batch's N images."""
        clean = self.generator.encode(batch.images)
        noise = self.generator.noise(len(clean), chance)
        time = torch.randn(len(clean), generator=chance).mul(self.spread).add(self.location).sigmoid().to(clean)
        kept = (torch.rand(len(clean), 1, generator=chance) >= drop).to(clean.device)
        words = self.generator.condition(batch.prompts) * kept
        velocity = self.generator.transformer(on_the_way(noise, clean, time), time, words)
        return flow_matching_loss(velocity, noise, clean)

    def _log(self, name: str, values: Tensor) -> None:
        self.log(f"val/{name}", values.mean(), batch_size=len(values), sync_dist=True)


class KeepGenerator(L.Callback):
    """Writes the generator of a stage into the run's folder at the end of training: ``RUN/generator``, safetensors."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make sure that another run's generator is not replaced.

        Raises:
            FileExistsError: the folder holds one, and this run does not go on from a checkpoint.
        """
        place = _place(trainer)
        if place.exists() and trainer.ckpt_path is None:
            raise FileExistsError(
                f"{place} holds the generator of another run: choose another run folder (--run), remove that one, or go on "
                "from its checkpoint (--ckpt_path last)"
            )

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep it.

        Raises:
            ValueError: a stage without a generator that can be saved.
        """
        generator: Any = getattr(pl_module, "generator", None)
        if not hasattr(generator, "save_pretrained"):
            raise ValueError(f"KeepGenerator keeps generators; {type(pl_module).__name__} has none that can be saved")
        if trainer.is_global_zero:
            generator.save_pretrained(_place(trainer))


def _place(trainer: L.Trainer) -> Path:
    return Path(trainer.default_root_dir) / RUN_GENERATOR
