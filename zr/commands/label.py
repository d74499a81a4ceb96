"""``zr label``: a model's distributions into copies of shards; interrupted, it goes on where it stopped."""

from __future__ import annotations

import logging
import signal
from collections.abc import Mapping
from contextlib import nullcontext
from datetime import timedelta
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # imported in the function: the stack takes seconds, `zr label --help` must not
    import lightning as L
    from rich.progress import Progress

    from zr.report import Table

__all__ = ["label"]

PATIENCE = timedelta(days=30)
"""How long a process that has labelled its shards waits for the others."""


def label(
    model: str,
    shards: str,
    out: Path,
    split: str | None = None,
    dimensions: list[str] | None = None,
    labeller: str = "teacher",
    traces: int | None = None,
    seed: int = 0,
    keep_traces: bool = False,
    batch_size: int = 8,
    rubric: str | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    accelerator: str = "auto",
    devices: int = 1,
    num_nodes: int = 1,
) -> None:
    """Write a model's distributions over scores into copies of shards, for a student to learn from.

    OUT gets the tars of SHARDS, with a distribution by LABELLER for each image and dimension: a reasoning teacher's mean over
    TRACES traces, with their spread. Training reads them with `labeller: NAME` of its data.

    Run the same command again after an interruption of any kind: tars that are finished stay, and the result is that of an
    uninterrupted run, byte for byte on the same machine and with the same batch size. Another model, seed or number of traces
    is refused. One run at a time may write to OUT; a run may have several processes, on several machines that see OUT:
    --devices 8 --num_nodes 2, started as `zr fit` is (torchrun, SLURM). Each labels its share of the tars, so there should be
    several for each process.

    At the end OUT/labelling/SPLIT.summary.json says, per dimension: labels, mean score and entropy, the spread (disagreement
    between the traces of an image, in nats), the shares of traces that the limit of length cut (forced) and of probability
    outside the scale (where the model tells it), tokens of a trace.

    Args:
        model: folder of a saved model, or of a run, or a name on the hub.
        shards: folder of shards, or an address such as s3://bucket/folder.
        out: folder for the copies; made if needed.
        split: which split of the shards; all of them without it.
        dimensions: which of the model's dimensions; all without it.
        labeller: name under which the distributions are kept.
        traces: traces of a reasoning teacher for each image and dimension; as many as it was saved with without it.
        seed: of the traces; each is drawn from it, the image's key, the dimension and the trace's number.
        keep_traces: keep each trace, as text and as ids, and the distribution after it.
        batch_size: images that are labelled together.
        rubric: YAML file or packaged rubric (zr:direct) to ask a plain vision-language model under, or in whose wording a saved
            model is asked.
        dtype: of the backbone's weights; auto is the one they were saved in.
        accelerator: such as cpu or gpu; auto is gpu where there is one.
        devices: processes on each machine, one for each device.
        num_nodes: machines.

    Raises:
        FileNotFoundError: no model, shards or split.
        FileExistsError: OUT has the split, and it was not labelled.
        ValueError: a bad record, another run in OUT, other settings than the run began with, a bad option.
    """
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from transformers.utils.logging import disable_progress_bar

    from zr.commands.score import fingerprint
    from zr.data import Index, LabelData, LabelledFolder
    from zr.models import load
    from zr.report.text import plain
    from zr.stages import Labelling, WriteLabels

    disable_progress_bar()
    try:
        trainer = _trainer(accelerator, devices, num_nodes)
    except MisconfigurationException as error:
        raise ValueError(str(error)) from error
    source = Index.load(shards)
    options: dict[str, Any] = {} if dtype == "auto" else {"dtype": dtype}
    scorer = load(model, rubric=rubric, **options)
    stage = Labelling(scorer, dimensions, traces, seed, keep_traces)
    wording = blake2b(repr(scorer.rubric).encode(), digest_size=6).hexdigest()
    about = {"wording": wording, "dtype": dtype, **stage.settings}
    if trainer.is_global_zero:
        about["model"] = fingerprint(model)
    splits = None if split is None else [split]
    target = LabelledFolder(out, source, scorer.rubric.scale, labeller, stage.dimensions, about, splits)
    data = LabelData(target, batch_size)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), disable=not trainer.is_global_zero)
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    callbacks += [WriteLabels(target), _shown(bar)]
    with target.begin() if trainer.is_global_zero else nullcontext():
        with bar:
            _predict(trainer, stage, data)
        if not trainer.is_global_zero:
            return
        summaries = target.finish()
    console = Console()
    for name, summary in summaries.items():
        console.print(_table(name, summary).terminal())
    console.print(plain(f"labels by {labeller}: {out}, summaries in {out / 'labelling'}"), markup=False)


def _trainer(accelerator: str, devices: int, num_nodes: int) -> L.Trainer:
    """A trainer that says nothing and keeps nothing."""
    import lightning as L
    from lightning.pytorch.strategies import DDPStrategy

    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return L.Trainer(
        accelerator=accelerator,
        devices=devices,
        num_nodes=num_nodes,
        strategy="auto" if devices * num_nodes == 1 else DDPStrategy(timeout=PATIENCE),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


def _shown(bar: Progress) -> L.Callback:
    """Counts the records of this process's share."""
    from lightning.pytorch.callbacks import LambdaCallback

    task = bar.add_task("label", total=None)

    def start(trainer: L.Trainer, module: L.LightningModule) -> None:
        loader: Any = trainer.predict_dataloaders
        total = sum(shard.records for shard in loader.shards)
        share = f", process 1 of {trainer.world_size}" if trainer.world_size > 1 else ""
        bar.update(task, total=total, description=f"label{share}")

    return LambdaCallback(
        on_predict_start=start,
        on_predict_batch_end=lambda trainer, module, outputs, batch, *_: bar.advance(task, len(batch.ended)),
    )


def _predict(trainer: L.Trainer, stage: Any, data: Any) -> None:
    """Label this process's share, and wait for the others; where this one fails, those that it started end too."""
    try:
        trainer.predict(stage, datamodule=data, return_predictions=False)
        _wait(trainer)
    except BaseException as error:
        if trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(signal.SIGKILL)
        if isinstance(error, SystemExit):  # what Lightning makes of Ctrl-C
            raise KeyboardInterrupt from None
        raise


def _wait(trainer: L.Trainer) -> None:
    try:
        trainer.strategy.barrier("labels")
    except RuntimeError:
        raise ValueError(
            "another process of the run ended early, and said why: run the same command again, it goes on"
        ) from None


def _table(split: str, summary: Mapping[str, Any]) -> Table:
    """A summary for people."""
    from zr.report import Table

    columns = ("labels", "score", "entropy", "spread", "forced", "off_scale", "tokens")
    rows = [
        (name, f"{values['labels']:,}", *("-" if values[c] is None else f"{values[c]:.3f}" for c in columns[1:]))
        for name, values in {**summary["dimensions"], "all": summary["overall"]}.items()
    ]
    heads = [column.replace("_", " ") for column in columns]
    return Table(f"{split}: {summary['records']:,} prompts", ("dimension", *heads), rows)
