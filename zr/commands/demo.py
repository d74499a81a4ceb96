"""``zr demo``: the main job on the built-in world, from shards to a report; interrupted, it goes on where it stopped."""

from __future__ import annotations

import json
import logging
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    from zr.commands.measuring import HeldOut

__all__ = ["demo"]

PROMPTS = {"base": 2500, "train": 150, "validation": 100, "test": 200}
"""Prompts of each split, with four candidate images each."""

TRACE = 24
"""Most tokens of a trace in this world; the longest that it teaches has 16."""


def demo(folder: Path = Path("zr-demo"), seed: int = 0) -> None:
    """Run the main job on the built-in world: shards, a base model, a supervised model, its evaluation, a report.

    Args:
        folder: where everything goes. Parts that are complete are kept, so a second run goes on, or finds all done.
        seed: of the world, the models and the training.
    """
    console = Console()
    seconds = folder / "seconds.json"
    parts: list[tuple[str, Path, Callable[[], None]]] = [
        ("write the world's shards", folder / "data", lambda: _write(folder / "data", seed)),
        *(
            (what, folder / name / "model", lambda name=name, start=start: _fit(folder, name, start, seed))  # type: ignore[misc]
            for name, start, what in (
                ("look", "", "base model, first half: learn to look (zr fit --config zr:look)"),
                ("base", "look", "base model, second half: all dimensions (zr fit --config zr:base)"),
                ("supervised", "base", "supervised score distributions (zr fit --config zr:supervised)"),
            )
        ),
        ("measure on held-out prompts", folder / "results.json", lambda: _measure(folder, seed)),
        ("report", folder / "report.html", lambda: _report(folder)),
    ]
    settings = {"seed": seed, "prompts": PROMPTS}
    _same_settings(folder, settings)
    _quiet()
    took: dict[str, float] = json.loads(seconds.read_text()) if seconds.is_file() else {}
    for number, (what, product, action) in enumerate(parts, start=1):
        if product.exists():
            console.print(f"[dim]{number}/{len(parts)} {what}: done[/dim]")
            continue
        console.print(f"[bold]{number}/{len(parts)} {what}[/bold]")
        begin = time.perf_counter()
        action()
        took[what.split(":")[0].split(" (")[0]] = round(time.perf_counter() - begin, 1)
        seconds.write_text(json.dumps(took, indent=2) + "\n")
    _show(console, folder, took)


def _same_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Refuse to mix two runs in one folder."""
    file = folder / "settings.json"
    folder.mkdir(parents=True, exist_ok=True)
    if file.is_file() and (found := json.loads(file.read_text())) != settings:
        raise ValueError(f"{folder} holds a demo with other settings ({found}): choose another folder, or remove it")
    file.write_text(json.dumps(settings) + "\n")


def _quiet() -> None:
    """Silence what is not about the job: the demo tells its own story."""
    import transformers

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")


def _write(folder: Path, seed: int) -> None:
    from rich.progress import track

    from zr.data import shapes, write_shards

    staging = folder.with_name(f".{folder.name}-{os.getpid()}")  # the folder appears when all its splits are there
    for split, count in PROMPTS.items():
        records = shapes.records(split, count, seed=seed)  # type: ignore[arg-type]
        write_shards(track(records, split, total=count), staging, shapes.rubric().scale, split=split)
    staging.rename(folder)


def _fit(folder: Path, name: str, start: str, seed: int) -> None:
    from zr.commands.training import run

    options = ["--seed_everything", str(seed), "--folder", str(folder / "data"), "--run", str(folder / name)]
    run(["fit", "--config", f"zr:{name}", *options, *(["--start", str(folder / start)] if start else [])])


def _held_out(folder: Path) -> HeldOut:
    from zr.commands.measuring import HeldOut
    from zr.data import ScoreData, shapes

    return HeldOut(list(ScoreData(folder / "data", shapes.rubric(), batch_size=16).test_dataloader()), shapes.DIMENSIONS)


def _measure(folder: Path, seed: int) -> None:
    """Score the test images by three scorers, and write their measures and distributions."""
    import torch
    from safetensors.torch import save_file

    from zr.commands.measuring import predict
    from zr.data import shapes
    from zr.metrics import compare
    from zr.models import SamplingRule, load
    from zr.models.reward import reasoning

    held_out = _held_out(folder)
    base, tuned = load(folder / "base"), load(folder / "supervised")
    reasoner = reasoning(base, shapes.rubric(reasoning=True), rule=SamplingRule(length=TRACE), seed=seed)
    found = {
        "zero-shot": predict(base, held_out.batches),
        "zero-shot, reasoning": predict(reasoner, held_out.batches),
        "supervised": predict(tuned, held_out.batches),
    }
    drawn = shapes.scenes("test", PROMPTS["test"], seed=seed)
    true = [[shapes.true_scores(s, p)[d] for d in shapes.DIMENSIONS] for p, candidates in drawn for s in candidates]
    scores = held_out.scores.double().numpy()
    known = ~held_out.scores.isnan().numpy()
    pair = (found["supervised"].mean.double().numpy(), found["zero-shot"].mean.double().numpy())
    results = {
        "methods": {name: held_out.table(q.mean) for name, q in found.items()},
        "noise-free rubric": held_out.table(torch.tensor(true)),
        "supervised - zero-shot": compare(*pair, scores, known, held_out.records, shapes.DIMENSIONS),
    }
    save_file({name: q.probs.contiguous() for name, q in found.items()}, folder / "distributions.safetensors")
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")


def _report(folder: Path) -> None:
    raise ValueError("no report yet")


def _show(console: Console, folder: Path, took: dict[str, float]) -> None:
    """The table that a reader wants first."""
    from rich.table import Table

    results = json.loads((folder / "results.json").read_text())
    table = Table(title="Human preference accuracy on held-out prompts, with 95% intervals over prompts")
    table.add_column("dimension")
    columns = {**results["methods"], "noise-free rubric": results["noise-free rubric"]}
    for name in columns:
        table.add_column(name)
    for dimension in results["noise-free rubric"]["dimensions"]:
        cells = [c["dimensions"][dimension]["hpa"] for c in columns.values()]
        table.add_row(dimension, *(f"{c['estimate']:.3f} [{c['low']:.3f}, {c['high']:.3f}]" for c in cells))
    console.print(table)
    console.print(f"{sum(took.values()):.0f} s in all: " + ", ".join(f"{name} {value:.0f}" for name, value in took.items()))
    console.print(f"model: {folder / 'supervised'} (zr.load), numbers: {folder / 'results.json'}, report: {folder / 'report.html'}")
