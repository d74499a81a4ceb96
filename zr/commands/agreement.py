"""``zr agreement``: a student beside its teacher on the same images: agreement, where they disagree most, cost."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Literal

__all__ = ["agreement"]

LABELS = "labels:"
"""What stands before the name of a labeller, where a teacher's stored labels are meant."""


def agreement(
    teacher: str,
    student: str,
    shards: str,
    split: str = "test",
    dimensions: list[str] | None = None,
    prompts: int | None = None,
    output: Path | None = None,
    numbers: Path | None = None,
    pictures: int = 12,
    batch_size: int = 4,
    budget: int | None = None,
    device: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
) -> None:
    """Compare a student with its teacher on the same images, in one run.

    Shown are: the share of same-prompt image pairs that the student orders as the teacher does, of all that the teacher tells
    apart and of those more than 0.5 apart; PLCC and SRCC of expected scores; mean KL(teacher || student); both against the
    annotators, where the shards have scores or choices; time for an image and output tokens for a score, measured batch by
    batch in turn.

    TEACHER is a model, or labels:NAME, the distributions by the labeller NAME in the shards (zr label); those cost nothing
    here. Two models stand in memory together; where they do not fit, label the shards first.

    Args:
        teacher: folder of a saved model, or of a run, a name on the hub, or labels:NAME.
        student: folder of a saved model, or of a run, or a name on the hub.
        shards: folder of shards.
        split: which of its splits; that of another folder is OTHER_FOLDER/SPLIT.
        dimensions: which of the models' dimensions; all without it.
        prompts: look at the first so many prompts only, rounded up to whole batches; at all without it.
        output: HTML page to write, with a sheet of the pictures on which they disagree most.
        numbers: JSON file to write the numbers to.
        pictures: number of pictures in the sheet.
        batch_size: prompts that are scored together.
        budget: most tokens in one pass of a model; without it a batch is one pass.
        device: such as cpu or cuda:1; auto is cuda where there is one.
        dtype: of the backbones' weights; auto is the one they were saved in.

    Raises:
        FileNotFoundError: no model, folder or split.
        ValueError: two scales, shards of another scale, an image without the labels asked for, a bad option.
    """
    for name, path, suffix in (("output", output, ".html"), ("numbers", numbers, ".json")):
        if path is not None and path.suffix != suffix:
            raise ValueError(f"--{name} {path} must end in {suffix}")
    for name, count, least in (("prompts", prompts, 1), ("pictures", pictures, 0), ("batch_size", batch_size, 1)):
        if count is not None and count < least:
            raise ValueError(f"--{name} must be at least {least}, got {count}")

    import torch
    from rich.console import Console
    from rich.progress import track
    from rich.text import Text

    from zr.commands.agreeing import Contestant, page, run
    from zr.commands.measuring import loaded
    from zr.data import ScoreData
    from zr.report import write_page
    from zr.report.text import plain
    from zr.version import __version__

    labeller = teacher.removeprefix(LABELS) if teacher.startswith(LABELS) else None
    learned = loaded(student, device, dtype, budget=budget)
    taught = None if labeller is not None else loaded(teacher, device, dtype, budget=budget)
    rubric = learned.rubric if taught is None else taught.rubric
    names = [learned.rubric.dimensions[i] for i in learned.rubric.index(dimensions)]
    data = ScoreData(shards, learned.rubric, batch_size=batch_size, test=split, labeller=labeller)
    batches = data.test_dataloader()
    count = len(batches) if prompts is None else min(len(batches), -(-prompts // batch_size))
    found = run(
        Contestant(teacher, rubric, taught),
        Contestant(student, learned.rubric, learned),
        track(islice(batches, count), description="agreement", total=count, transient=True),
        names,
        pictures if output is not None else 0,
    )
    values = {"agreement": found.agreement(), "annotated": found.annotated(), "cost": found.cost()}
    facts = [
        ("teacher", teacher),
        ("student", student),
        ("shards", f"{shards}, split {split}, {len(found.held_out.records):,} images"),
        ("batch", f"{batch_size} prompts"),
        ("device", f"{learned.backbone.device}, {torch.get_num_threads()} threads, torch {torch.__version__}, dtype {dtype}"),
        ("zr", __version__),
    ]
    summary = page(found, values, facts)
    console = Console()
    for section in summary.sections:
        for table in section.tables:
            console.print(Text(section.title, style="bold"))
            console.print(table.terminal())
    for line in summary.lead:
        console.print(Text(plain(line)))
    if numbers is not None:
        numbers.write_text(json.dumps({**dict(facts), **values}, indent=2) + "\n", encoding="utf-8")
        console.print(Text(plain(f"numbers: {numbers}")))
    if output is not None:
        console.print(Text(plain(f"page: {write_page(output, summary)}")))
