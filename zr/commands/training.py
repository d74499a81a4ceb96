"""``zr fit | validate | test | predict``: LightningCLI over the stages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import lightning as L
from jsonargparse import set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger
from transformers.utils.logging import disable_progress_bar

from zr.commands.configs import PREFIX, packaged
from zr.rubric import Rubric
from zr.stages import WriteDistributions

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
        parser.add_argument(
            "--ckpt_path", default=None, type=str | None, help="a Lightning checkpoint; `last`: the run's newest"
        )
        parser.add_argument(
            "--start",
            default="",
            help="what to start from, a model's or a run's folder, or a name on the hub; ${start} in a recipe",
        )

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


def run(args: Sequence[str], callbacks: Sequence[L.Callback] = ()) -> None:
    """Run one training command.

    Args:
        args: ``fit``, ``validate``, ``test`` or ``predict``, and its options; ``--config zr:NAME`` reads a packaged recipe.
        callbacks: of the trainer, beside those that the configuration names.

    Raises:
        FileNotFoundError: ``--ckpt_path last`` for a run that has no checkpoint; no model, shards or split where a part of the
            configuration looks for them.
        ValueError: a trainer that this machine cannot give; a checkpoint that holds more than tensors and plain values, which
            is not loaded.
    """
    command, *options = args
    disable_progress_bar()  # transformers draws one whenever a model is saved or loaded
    checkpoint = None
    try:
        cli = TrainingCLI(command, [_resolve(options, i) for i in range(len(options))])
        folder = Path(cli.config.run)
        checkpoint = _newest(folder) if cli.config.ckpt_path == "last" else cli.config.ckpt_path
        extra = {"return_predictions": False} if command == "predict" else {}
        all_callbacks: list[L.Callback] = cli.trainer.callbacks  # type: ignore[attr-defined]
        all_callbacks += callbacks
        if extra and not any(isinstance(c, WriteDistributions | BasePredictionWriter) for c in all_callbacks):
            all_callbacks.append(WriteDistributions(folder / "distributions.jsonl"))  # else nothing would be written
        action = getattr(cli.trainer, command)
        action(cli.model, datamodule=cli.datamodule, ckpt_path=checkpoint, weights_only=True, **extra)
    except ValueError as error:
        if isinstance(error.__cause__, OSError):  # a part found no file, and jsonargparse wrapped it in its whole configuration
            raise error.__cause__ from None
        raise
    except MisconfigurationException as error:
        raise ValueError(str(error)) from error
    except UnpicklingError as error:
        raise ValueError(
            f"the checkpoint {checkpoint} holds more than tensors and plain values, which could run code: refused"
        ) from error


def _newest(run: Path) -> str:
    """The newest checkpoint in a run's folder; Lightning's own ``last`` looks in the folder of the version that begins."""
    found = sorted(run.rglob("*.ckpt"), key=lambda file: file.stat().st_mtime)
    if not found:
        raise FileNotFoundError(f"{run} holds no checkpoint to go on from: leave --ckpt_path out, or name a file")
    return str(found[-1])


def _resolve(args: Sequence[str], index: int) -> str:
    """An argument with a packaged recipe's name replaced by its path, where it follows ``--config``."""
    value = args[index]
    if value.startswith(f"--config={PREFIX}"):
        return f"--config={packaged(value.removeprefix('--config='))}"
    if value.startswith(PREFIX) and index and args[index - 1] in ("--config", "-c"):
        return str(packaged(value))
    return value
