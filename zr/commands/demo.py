"""``zr demo``: the whole way on the built-in world, from shards to an improved generator; interrupted, it goes on."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

__all__ = ["demo"]

MODELS = ("base", "supervised", "teacher", "student", "generator", "text_to_image")
"""Cells of the plan whose models lie in the folder under their names, for the commands of the README."""


def demo(folder: Path = Path("zr-demo"), seed: int = 0) -> None:
    """Run the whole way on the built-in world: a base model, a teacher that reasons, its student, a generator it improves.

    It is the plan zr:demo of `zr compare`, two processes with one thread each, in about a quarter of an hour: a base model
    learns to see; a teacher learns by GDSO from 148 annotated images to reason before it scores; it labels others; a small
    student learns these labels and answers at once; and the student's gradient improves a generator. All are measured on
    prompts that none has seen.

    FOLDER gets report.html, results.md, results.json, the data and copies of the models, which are yours to train on.

    Args:
        folder: where everything goes. What is complete is kept, so a second run goes on, or finds all done.
        seed: of the world, the models and the training.
    """
    from rich.console import Console

    from zr.commands.compare import carry_out
    from zr.commands.comparing.cell import HELD_OUT, product
    from zr.commands.comparing.jobs import Job
    from zr.commands.comparing.plan import DATA, Plan
    from zr.commands.results import write_json

    settings = folder / "settings.json"
    found: dict[str, Any] = json.loads(settings.read_text()) if settings.is_file() else {"seed": seed, "copies": {}}
    if found["seed"] != seed:
        raise ValueError(
            f"{folder} holds a demo with other settings (seed {found['seed']}): choose another folder, or remove it"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(settings, found)
    copies: dict[str, str] = found.get("copies", {})
    console, plan = Console(), replace(Plan.load("zr:demo"), seeds=(seed,))
    runner = carry_out(plan, folder, console)
    for name in (*MODELS, DATA):
        made = plan.digest(name, seed)
        if (folder / name).exists() and copies.get(name) == made:
            continue
        if (folder / name).exists():
            raise ValueError(
                f"{folder / name} is of an earlier run, and you may have trained on it: move it away, then run again"
            )
        write_json(settings, {"seed": seed, "copies": (copies := copies | {name: made})})
        if name in MODELS:
            _copy(Path(product(runner.folder(Job(name, seed)))), folder / name)
        else:
            data, curated = runner.folder(Job(DATA, seed)), runner.folder(Job("curated", seed))
            _join([Path(product(data)), data / HELD_OUT, Path(product(curated))], folder / "data")
    console.print(f"data and models: {folder / 'data'}, {', '.join(str(folder / name) for name in MODELS)}", markup=False)


def _copy(source: Path, target: Path) -> None:
    """A copy that appears whole."""
    staging = target.with_name(f".{target.name}-partial")
    shutil.rmtree(staging, ignore_errors=True)
    shutil.copytree(source, staging)
    staging.rename(target)


def _join(folders: list[Path], target: Path) -> None:
    """One folder with links to the shards of several, whose splits have different names; it appears whole."""
    from zr.data import Index

    found = [Index.load(folder.resolve()) for folder in folders]
    splits = {name: shards for index in found for name, shards in index.splits.items()}
    staging = target.with_name(f".{target.name}-partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    for shard in (shard for shards in splits.values() for shard in shards):
        path = Path(str(shard.path))
        (staging / path.name).symlink_to(os.path.relpath(path, staging.resolve()))  # a folder that is moved stays whole
    Index(staging, found[0].scale, splits).save()
    staging.rename(target)
