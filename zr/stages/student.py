"""The student: a teacher's reasoning internalised into one forward pass (RISD)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.optim import AdamW

from zr.data import Batch
from zr.losses import DistillationLoss, ForwardKL
from zr.models import RewardModel, Scorer
from zr.stages.frozen import FrozenTeacher
from zr.stages.supervised import Supervised
from zr.stages.terms import Term

__all__ = ["Student"]


class Student(FrozenTeacher, Supervised):
    r"""Reasoning-internalised score distillation (RISD): the student's distribution learns to be the teacher's.

    .. math:: L = E\, KL(q_T(s \mid p, I, d, \rho_T) \,\|\, q_\phi(s \mid p, I, d)) + \sum \alpha \, L_{annotated}

    All that a student needs of its teacher are K numbers per image and dimension, so it may be of any family, size and
    tokenizer. Usually they are stored in the shards (``zr label``), by a labeller that the data module names. An item takes
    part in the terms that it has something for: those that compare with the teacher where the teacher answered, the others
    where it is annotated. It may have both, and a batch may hold items of every kind.

    Args:
        model: the student.
        terms: the objective: named losses with weights; the forward KL alone for None (eq. 15).
        teacher: a scorer that is asked for each batch, without gradient, where no labels are stored; a teacher that reasons
            gives an image the same distribution each time. It is no part of the checkpoint. Measures of validation go by
            stored labels only.
        optimizer: makes the optimiser.
        warmup: share of all steps in which the learning rate rises.
        decay: share of all steps, at the end, in which it falls to 0.

    Raises:
        ValueError: no loss that compares with a teacher; a teacher of another scale, or one that shares weights with the
            student; in training, labels both stored and asked for, a batch that no term has a use for, an epoch in which no
            image had a label.

    Reference: Z-Reward (arXiv 2606.09076), eq. (15).
    """

    def __init__(
        self,
        model: RewardModel,
        terms: dict[str, Term] | None = None,
        teacher: RewardModel | Scorer | None = None,
        optimizer: OptimizerCallable = AdamW,
        warmup: float = 0.05,
        decay: float = 0.5,
    ) -> None:
        super().__init__(model, {"kl": Term(ForwardKL())} if terms is None else terms, optimizer, warmup, decay)
        self.hparams.pop("teacher", None)  # else a checkpoint could not be read where the teacher is not
        weighted = [part.loss for part in self.terms.values() if isinstance(part, Term) and part.weight]
        kinds = [isinstance(loss, DistillationLoss) for loss in weighted]
        if not any(kinds):
            raise ValueError(
                "no term compares with a teacher: add zr.losses.ForwardKL or its kin, or learn from annotations alone by "
                "zr.stages.Supervised"
            )
        self.put_beside(teacher, model)
        self.labels_alone = all(kinds)
        self.labelled = False

    def training_step(self, batch: Batch) -> Tensor:
        """The objective on a batch of each process; see :func:`zr.stages.objective`."""
        given = self.taught(batch)
        found = given.teacher is not None and bool((given.teacher > 0).any())
        if self.labels_alone and not found:
            raise ValueError(f"a batch ({batch.keys[0]}, ...) has nothing to learn: {self._remedy}")
        self.labelled |= found
        return super().training_step(given)

    def on_train_epoch_end(self) -> None:
        """Look back whether there was a teacher at all."""
        if not float(self.mean_over_processes(torch.tensor(float(self.labelled), device=self.device))):
            raise ValueError(f"no image since the start had a distribution by the teacher: {self._remedy}")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep whether there was a teacher: the rest of a resumed epoch may be annotated only."""
        checkpoint["labelled"] = self.labelled

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remember whether there was one."""
        self.labelled = checkpoint.get("labelled", False)  # of another stage: none

    @torch.no_grad()
    def taught(self, batch: Batch) -> Batch:
        """A batch with the teacher's distributions: the stored ones, or those of the teacher that was given.

        Raises:
            ValueError: both of them.
        """
        if self.teacher is None:
            return batch
        if batch.teacher is not None:
            raise ValueError("labels are stored and a teacher is given too: name no labeller, or give no teacher")
        return replace(batch, teacher=self.teacher(images=batch.images, prompts=batch.prompts).probs)

    @property
    def _remedy(self) -> str:
        return "label the split (zr label) and name the labeller in the data, or give the stage a teacher"
