"""What stages share that learn from traces which they sample: seeds, backward passes in parts, the step, the log."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from hashlib import blake2b
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.optim import AdamW

from zr.data import Batch
from zr.models.policy import Policy
from zr.models.reward import ReasoningReward
from zr.models.sharding import whole
from zr.stages.scoring import ScoringStage

__all__ = ["RolloutStage"]


class RolloutStage(ScoringStage):
    """A stage that samples traces, and descends a loss of them in parts on a cut prefix.

    Args:
        model: the policy to improve and its sampling rule.
        micro_batch: rollouts in one pass; None for all.
        gradient_clip: largest norm of the gradient; None for any.
        frozen: modules of the transformers model that keep their weights.
        optimizer: makes the optimiser.
        warmup: share of all steps in which the learning rate rises.
        decay: share of all steps, at the end, in which it falls to 0.
        seed: of the traces.

    Raises:
        ValueError: a micro-batch below 1, greedy traces, dropout, an unknown module to freeze; in training, gradients that
            are scaled (16-mixed), a gradient that is not finite.

    Attributes:
        batches: sampled and learnt from so far, a part of the checkpoint.
    """

    model: ReasoningReward
    batches: Tensor

    def __init__(
        self,
        model: ReasoningReward,
        micro_batch: int | None = None,
        gradient_clip: float | None = 1.0,
        frozen: list[str] | None = None,
        optimizer: OptimizerCallable = AdamW,
        warmup: float = 0.05,
        decay: float = 0.5,
        seed: int = 0,
    ) -> None:
        super().__init__(model, optimizer, warmup, decay)
        if micro_batch is not None and micro_batch < 1:
            raise ValueError(f"micro_batch must be at least 1, got {micro_batch}")
        if model.rule.temperature == 0:
            raise ValueError("greedy traces have no log-probs to learn from: give a rule with temperature > 0")
        if any(isinstance(part, nn.Dropout) and part.p > 0 for part in model.modules()):
            raise ValueError("with dropout the model that learns is not the one that wrote: set it (lora_dropout) to 0")
        self.automatic_optimization = False
        self.micro_batch = micro_batch
        self.gradient_clip = gradient_clip
        self.seed = seed
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))
        inner = dict(model.policy.backbone.model.named_modules())
        for name in frozen or []:
            if name not in inner:
                raise ValueError(f"frozen names {name!r}, the model has no such module, but {', '.join(list(inner)[1:8])}, ...")
            inner[name].requires_grad_(False)

    @property
    def policy(self) -> Policy:
        """What is trained."""
        return self.model.policy

    def on_fit_start(self) -> None:
        """Refuse what would be silently wrong.

        Raises:
            ValueError: gradients that are scaled.
        """
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            raise ValueError("gradients of 16-mixed are scaled, which clipping would not see: use bf16-mixed, or 32")

    def trace_seed(self, *what: Any) -> int:
        """Of one trace; by what it is about and not by where it stands, so that processes may share a batch in any way."""
        text = repr((self.seed, int(self.batches), *what))
        return int.from_bytes(blake2b(text.encode(), digest_size=7).digest(), "big")

    def parts(self, count: int) -> list[slice]:
        """``count`` rollouts in micro-batches."""
        size = self.micro_batch or count
        return [slice(start, start + size) for start in range(0, count, size)]

    def unsynchronised(self) -> AbstractContextManager[Any]:
        """Gradients stay in this process until the last backward pass, where the strategy averages them in passing (DDP)."""
        block = getattr(self.trainer.strategy, "block_backward_sync", None)
        return nullcontext() if block is None else block()

    def join(self, loss: Tensor) -> None:
        """The last backward pass: on into what the rollouts share.

        DDP averages what this pass comes by, so it visits all that have a gradient: the output layer, for one, has no part in
        a prefix, and each process would silently keep its own.
        """
        if isinstance(self.trainer.strategy, DDPStrategy):
            loss = loss + sum(p.sum() * 0.0 for p in self.trained() if p.grad is not None)
        if loss.requires_grad:
            self.manual_backward(loss)

    def step(self, batch: Batch) -> None:
        """Clip, look, step.

        Raises:
            ValueError: a gradient that is not finite.
        """
        optimizer: Any = self.optimizers()
        most = float("inf") if self.gradient_clip is None else self.gradient_clip
        norm = whole(nn.utils.clip_grad_norm_(self.trained(), most))
        if not bool(norm.isfinite()):
            optimizer.zero_grad()
            raise ValueError(
                f"the gradient of the batch {batch.keys[0]}, ... is not finite ({float(norm)}): the weights are as they were; "
                "look for NaN among the inputs, or lower the learning rate"
            )
        optimizer.step()
        optimizer.zero_grad()
        schedule: Any = self.lr_schedulers()
        schedule.step()
        self.log("train/gradient_norm", norm)

    def log_each(self, each: dict[str, Tensor], dimension: Tensor) -> None:
        """Log means of what each of M rollouts had, over all and per dimension, of all processes.

        Args:
            each: ``(M,)`` values by name.
            dimension: ``(M,)`` of each rollout.
        """
        names = self.policy.rubric.dimensions
        table = torch.stack([*each.values(), torch.ones_like(dimension, dtype=torch.float32)], dim=-1)
        sums = self.mean_over_processes(table.new_zeros(len(names), table.shape[-1]).index_add(0, dimension, table))
        self.log_dict({f"train/{name}": value for name, value in zip(each, sums.sum(0) / sums[:, -1].sum(), strict=False)})
        for name, row in zip(names, sums, strict=True):
            if row[-1]:
                self.log_dict({f"train/{key}/{name}": value for key, value in zip(each, row / row[-1], strict=False)})

    def trained(self) -> list[Tensor]:
        """What the optimiser changes."""
        optimizer: Any = self.optimizers()
        return [parameter for group in optimizer.param_groups for parameter in group["params"]]
