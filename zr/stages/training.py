"""What all stages that train share: the optimiser and its schedule, resuming, and what a checkpoint remembers."""

from __future__ import annotations

import inspect
from typing import Any

import lightning as L
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.core.mixins.hparams_mixin import HyperparametersMixin
from lightning.pytorch.utilities.parsing import collect_init_args
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

__all__ = ["TrainingStage"]


class TrainingStage(L.LightningModule):
    """A stage with an optimiser, whose learning rate rises and falls by steps.

    Args:
        optimizer: makes the optimiser for the parameters that take a gradient.
        warmup: share of all steps in which the learning rate rises linearly from 0.
        decay: share of all steps, at the end, in which it falls linearly to 0.

    Raises:
        ValueError: shares outside [0, 1] or that overlap.
    """

    def __init__(self, optimizer: OptimizerCallable = AdamW, warmup: float = 0.05, decay: float = 0.5) -> None:
        super().__init__()
        if not (0 <= warmup <= 1 and 0 <= decay <= 1 and warmup + decay <= 1):
            raise ValueError(f"warmup and decay are shares of all steps whose sum is at most 1, got {warmup} and {decay}")
        self.optimizer = optimizer
        self.warmup = warmup
        self.decay = decay

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

    def on_train_start(self) -> None:
        """Go on in the middle of an epoch where the checkpoint says.

        To count the steps of the run Lightning set up the loader before it read the checkpoint's loops; by itself it does not
        hand the place on afterwards, and the epoch's first batches would come again.
        """
        self.trainer.fit_loop._load_combined_loader_states()

    def configure_optimizers(self) -> Any:
        """The optimiser, and the schedule by steps."""
        optimizer = self.optimizer([p for p in self.parameters() if p.requires_grad])
        total = max(1, self.total_steps())
        schedule = LambdaLR(optimizer, lambda step: _ramp(step / total, 1 / total, self.warmup, self.decay))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def total_steps(self) -> int:
        """Steps of the optimiser in the whole run."""
        return int(self.trainer.estimated_stepping_batches)

    def mean_over_processes(self, values: Tensor) -> Tensor:
        """The mean of ``values`` over the processes of the run; every process must ask for it. As they are, without a run."""
        if self._trainer is None:
            return values
        mean: Tensor = self._trainer.strategy.reduce(values, reduce_op="mean")
        return mean


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
