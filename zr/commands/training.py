"""``zr fit | validate | test | predict``: LightningCLI over the stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
from lightning.pytorch.cli import LightningCLI

from zr.commands.configs import PREFIX, packaged

__all__ = ["TrainingCLI", "run"]


class TrainingCLI(LightningCLI):
    """LightningCLI with this library's defaults: any stage, any data module, interpolation, CSV logs, plain errors."""

    def __init__(self, args: Sequence[str] | dict[str, Any] | None = None, run: bool = True) -> None:
        super().__init__(
            model_class=L.LightningModule,
            datamodule_class=L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            parser_kwargs={"parser_mode": "omegaconf+", "prog": "zr"},
            args=args,  # type: ignore[arg-type]
            run=run,
        )


def run(args: Sequence[str]) -> None:
    """Run one training command.

    Args:
        args: the subcommand and its options; ``--config zr:NAME`` reads a packaged recipe.
    """
    resolved = [_resolve(args, i) for i in range(len(args))]
    TrainingCLI(args=resolved)


def _resolve(args: Sequence[str], index: int) -> str:
    """An argument with a packaged recipe's name replaced by its path, where it follows ``--config``."""
    value = args[index]
    if value.startswith(f"--config={PREFIX}"):
        return f"--config={packaged(value.removeprefix('--config='))}"
    if value.startswith(PREFIX) and index and args[index - 1] in ("--config", "-c"):
        return str(packaged(value))
    return value
