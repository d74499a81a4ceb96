"""How the training of a cell ended: after how many steps, and whether an alarm stopped it."""

from __future__ import annotations

import math
from typing import Any

import lightning as L

from zr.stages import Alarm

__all__ = ["Ending"]


class Ending(L.Callback):
    """Keeps how a training ended.

    Attributes:
        about: plain data, empty until then: ``steps``; ``of``, how many there would have been at most, None for no such
            limit; ``alarms``, of each its ``monitor``, ``above`` and ``below`` (None for no line there), and whether it
            ``stopped`` the run.
    """

    def __init__(self) -> None:
        self.about: dict[str, Any] = {}

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look at the trainer and its alarms."""
        alarms = [
            {
                "monitor": alarm.monitor,
                "above": alarm.above if math.isfinite(alarm.above) else None,
                "below": alarm.below if math.isfinite(alarm.below) else None,
                "stopped": alarm.stop and alarm.beyond >= alarm.patience,
            }
            for alarm in trainer.callbacks  # type: ignore[attr-defined]
            if isinstance(alarm, Alarm)
        ]
        most = trainer.max_steps if trainer.max_steps >= 0 else None
        self.about = {"steps": trainer.global_step, "of": most, "alarms": alarms}
