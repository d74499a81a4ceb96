"""``zr fit | validate | test | predict``: LightningCLI over the stages."""

from __future__ import annotations

from collections.abc import Sequence
from pickle import UnpicklingError
from typing import Any

import lightning as L
from jsonargparse import set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger

from zr.commands.configs import PREFIX, packaged
from zr.rubric import Rubric

__all__ = ["TrainingCLI", "run"]

set_parsing_settings(subclasses_enabled=[Rubric])  # a dataclass that YAML builds by class_path, as zr.Rubric.load


class TrainingCLI(LightningCLI):
    """LightningCLI with this library's defaults: any stage, any data module, interpolation, CSV logs, plain errors."""

    def __init__(self, command: str, args: Sequence[str] | dict[str, Any]) -> None:
        super().__init__(
            model_class=L.LightningModule,
            datamodule_class=L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            parser_kwargs={"parser_mode": "omegaconf+", "prog": f"zr {command}"},
            args=args,  # type: ignore[arg-type]
            run=False,  # without subcommands inside, the configuration is flat, so that ${folder} means folder
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Names that recipes refer to by interpolation."""
        parser.add_argument("--run", default="zr-run", help="the run's folder: logs, checkpoints, model; ${run} in a recipe")
        parser.add_argument("--folder", default="zr-data", help="the data's folder; ${folder} in a recipe")
        parser.add_argument("--ckpt_path", default=None, type=str | None, help="a Lightning checkpoint, or `last`")
        parser.add_argument("--start", default="", help="a saved model to start from; ${start} in a recipe")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """As LightningCLI does, without its warning about ``sys.argv``: the dispatcher has read it already."""
        self.config = parser.parse_object(args) if isinstance(args, dict) else parser.parse_args(args)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """A trainer that keeps everything in the run's folder, and logs CSV unless the configuration says otherwise."""
        run = self._get(self.config, "run")
        kwargs.setdefault("default_root_dir", run)
        if self._get(self.config_init, "trainer.logger") is None:
            kwargs.setdefault("logger", CSVLogger(run, name="logs"))
        return super().instantiate_trainer(**kwargs)


def run(args: Sequence[str]) -> None:
    """Run one training command.

    Args:
        args: ``fit``, ``validate``, ``test`` or ``predict``, and its options; ``--config zr:NAME`` reads a packaged recipe.

    Raises:
        ValueError: a checkpoint that holds more than tensors and plain values; it is not loaded.
    """
    command, *options = args
    cli = TrainingCLI(command, [_resolve(options, i) for i in range(len(options))])
    action = getattr(cli.trainer, command)
    extra = {"return_predictions": False} if command == "predict" else {}
    try:
        action(cli.model, datamodule=cli.datamodule, ckpt_path=cli.config.ckpt_path, weights_only=True, **extra)
    except UnpicklingError as error:
        raise ValueError(
            f"the checkpoint {cli.config.ckpt_path} holds more than tensors and plain values, which could run code: refused"
        ) from error


def _resolve(args: Sequence[str], index: int) -> str:
    """An argument with a packaged recipe's name replaced by its path, where it follows ``--config``."""
    value = args[index]
    if value.startswith(f"--config={PREFIX}"):
        return f"--config={packaged(value.removeprefix('--config='))}"
    if value.startswith(PREFIX) and index and args[index - 1] in ("--config", "-c"):
        return str(packaged(value))
    return value
