"""What rewards do for a generator of the built-in world: held-out prompts, seen by the judge that no run optimises.

    zr compare zr:generators --only generator small-risd sft        its models, into zr-compare/generators
    python benchmarks/generator.py zr-compare/generators
    python benchmarks/generator.py zr-compare/generators --seeds 0 --split validation --cells refl last-4 --rates 3e-5 1e-4
    python benchmarks/generator.py zr-compare/generators --seconds 60 --prompts 100

Of the plan's cells it takes the data, the ``generator``, the reward ``small-risd`` and what is held out, ``sft``. All cells
but the first two train for the same wall time on one core, ``--seconds``, on prompts without annotations, by ``zr fit --config
zr:text_to_image_small`` with one part changed; how many steps that are is measured first, in turn, in the same process:

    start        the generator as it is
    best-of-4    of four pictures of it for each prompt the one of the largest reward, which takes four times as long
    last-4       the recipe: gradients through the last four steps
    last-1, last-10, truncation-4      the last K steps; a drawn number of the last ones
    refl         the clean image that one drawn step predicts
    free         without any guard: no distance to the start, no ceiling, no clip, no warm-up, ten times the rate
    lora         the recipe on adapters of rank 8

Measured on the split's prompts, a picture for each from the same noise: the judge's mean score of each dimension, its
difference from the start with a paired bootstrap over prompts, Good-Same-Bad (band half a bin) with its interval, and what the
reward and the held-out scorer say. Curves: the judge on some validation prompts whenever the stage validates. Printed as a
table, written to improved/seed-0.json and improved/seed-0.html in the plan's folder; what is done is kept in improved/seed-0,
an interrupted run goes on. Runs train and draw without guidance, or with --guidance, in both.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import platform
import shutil
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from rich.console import Console
from torch import Tensor

import zr
from zr.commands.comparing.cell import DONE, HELD_OUT, digest, product
from zr.commands.training import run as fit
from zr.data import PromptBatch, read_prompts, shapes
from zr.metrics import bootstrap_interval, gsb
from zr.models import RiskAverse
from zr.models.generators import FlowGenerator, FullGuidance
from zr.models.generators.noise import source
from zr.report import Estimate, Page, Section, Table, curves, write_page

PATHS = {
    "refl": ["--model.path=zr.stages.ReFL", "--model.path.earliest=3", "--model.path.latest=10"],
    "last-1": ["--model.path.count=1"],
    "last-4": [],
    "last-10": ["--model.path.count=10"],
    "truncation-4": ["--model.path=zr.stages.RandomTruncation", "--model.path.most=4"],
    "free": [
        "--model.velocity_distance=0",
        "--model.gradient_clip=null",
        "--model.warmup=0",
        "--model.rewards.student.ceiling=100",
        "--model.rewards.student.aggregation.deviations=0",
    ],
    "lora": [
        "--model.generator.lora=peft.LoraConfig",
        "--model.generator.lora.r=8",
        "--model.generator.lora.target_modules=all-linear",
    ],
}
"""What each cell changes of the recipe."""

CELLS = ["start", "best-of-4", *PATHS]
FASTER = {"free": 10.0, "lora": 3.0}
"""What a cell's learning rate is multiplied by."""

NEEDED = ("data", "generator", "small-risd", "sft")
"""Cells of the plan that are read."""

BAND = 0.25
"""Half a bin: pictures whose scores differ by no more are the same."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("home", type=Path, help="of zr compare zr:generators")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=CELLS)
    parser.add_argument("--split", default="test", choices=["validation", "test"])
    parser.add_argument("--seconds", type=float, default=120.0, help="of training, in each cell")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4], help="of learning; a row each")
    parser.add_argument("--guidance", type=float, default=1.0, help="of training and drawing; 1 for none")
    parser.add_argument("--prompts", type=int, default=250, help="that pictures are made for")
    parser.add_argument("--looks", type=int, default=6, help="validations of a cell")
    parser.add_argument("--set", action="append", default=[], dest="words", help="one more option of zr fit, for all cells")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    console = Console(width=190)
    runs = [Run(options.home.resolve(), seed) for seed in options.seeds]
    for missing in (job for run in runs for job in run.missing()):
        raise SystemExit(f"{options.home} has no finished cell {missing}: run the zr compare of the first lines of --help")
    for run in runs:
        found = measure(run, options)
        run.folder.with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n")
        write_page(run.folder.with_suffix(".html"), report(found))
        console.print(table(found).terminal())


@dataclass(frozen=True)
class Run:
    """A seed of the plan."""

    home: Path
    seed: int

    @property
    def folder(self) -> Path:
        """Where what is done here is kept."""
        return self.home / "improved" / f"seed-{self.seed}"

    def missing(self) -> list[str]:
        """Cells that are not done."""
        return [f"{cell}, seed {self.seed}" for cell in NEEDED if not (self.made(cell) / DONE).is_file()]

    def made(self, cell: str) -> Path:
        """Where a cell of the plan is kept."""
        return self.home / "cells" / cell / f"seed-{self.seed}"

    def model(self, cell: str) -> Path:
        """What a cell of the plan made; of ``data`` the shards to train on."""
        return Path(product(self.made(cell)))

    def prompts(self, split: str, count: int) -> PromptBatch:
        """The first prompts of validation or test."""
        data = self.model("data")
        found = read_prompts((data.parent / HELD_OUT if split == "test" else data) / split)
        return found.select(slice(0, count))


def measure(run: Run, options: argparse.Namespace) -> dict[str, Any]:
    """All cells of a seed."""
    prompts = run.prompts(options.split, options.prompts)
    found: dict[str, Any] = {"seed": run.seed, "cells": {}}
    found["machine"] = f"{platform.machine()}, {torch.get_num_threads()} thread, torch {torch.__version__}, zr {zr.__version__}"
    found["options"] = {name: value for name, value in vars(options).items() if name not in ("home", "seeds")}
    start = once(run, "start", options, 0.0, lambda folder: {})
    before = judged(run, start, prompts, options, 1)
    for cell in options.cells:
        for rate in options.rates if cell in PATHS else [0.0]:
            about = once(run, cell, options, rate, partial(train, run, cell, rate, options)) if cell in PATHS else start
            count = 4 if cell == "best-of-4" else 1
            name = cell if len(options.rates) == 1 or cell not in PATHS else f"{cell}, {rate:g}"
            found["cells"][name] = about | compared(judged(run, about, prompts, options, count), before, prompts)
            print(name, found["cells"][name]["judge"]["mean"], flush=True)
    return found


def once(run: Run, cell: str, options: argparse.Namespace, rate: float, make: Any) -> dict[str, Any]:
    """What a cell's folder keeps, made if it is not there."""
    settings = {name: getattr(options, name) for name in ("seconds", "guidance", "looks", "words")} | {"rate": rate}
    settings["models"] = [digest(run.made(name) / DONE) for name in NEEDED]
    mark = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    folder = run.folder / f"{cell}-{mark}"
    done = folder / "done.json"
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        about = {"folder": str(folder), "settings": settings, **make(folder)}
        done.write_text(json.dumps(about, indent=2) + "\n")
    found: dict[str, Any] = json.loads(done.read_text())
    return found


def train(run: Run, cell: str, rate: float, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Improve the generator for the time that is given."""
    rate = rate * FASTER.get(cell, 1.0)
    words = ["fit", "--config", "zr:text_to_image_small", "--start", str(run.model("generator"))]
    words += ["--folder", str(run.model("data")), f"--data.train={run.model('data')}/unlabelled"]
    words += ["--seed_everything", str(run.seed), f"--model.seed={run.seed}", "--trainer.accelerator=cpu"]
    words += ["--trainer.devices=1", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    if options.guidance != 1:
        words += ["--model.generator.guidance=zr.models.generators.FullGuidance"]
        words += [f"--model.generator.guidance.scale={options.guidance}"]
    words += [f"--model.rewards.student.scorer.source={run.model('small-risd')}"]
    words += [f"--model.held_out.scorer.source={run.model('sft')}", f"--model.optimizer.lr={rate}"]
    words += PATHS[cell] + options.words
    clock = Clock()
    fit([*words, "--run", str(folder / "timing"), "--trainer.max_steps=9", "--trainer.limit_val_batches=0"], callbacks=[clock])
    steps = max(options.looks, int(options.seconds / clock.seconds))
    look = Look(run)
    begin = time.perf_counter()
    words += ["--run", str(folder), f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={steps // options.looks}"]
    fit(words, callbacks=[look])
    shutil.rmtree(folder / "timing")
    about = {"step": round(clock.seconds, 4), "steps": steps, "took": round(time.perf_counter() - begin, 1)}
    return about | {"rate": rate, "curve": look.seen, "logged": logged(folder), "stopped": look.stopped}


class Clock(L.Callback):
    """The median seconds of a step, after the first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    @property
    def seconds(self) -> float:
        """Of a step."""
        return float(np.median(np.diff(self.times)))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """A step more."""
        self.times.append(time.perf_counter())


class Look(L.Callback):
    """What the judge says of some validation prompts, whenever the stage validates."""

    def __init__(self, run: Run, count: int = 48) -> None:
        self.prompts = run.prompts("validation", count)
        self.seen: list[dict[str, Any]] = []
        self.stopped = False

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Draw and judge."""
        images = draw(pl_module.generator, self.prompts, 0)
        means = score(images, self.prompts.prompts)
        self.seen.append({"step": trainer.global_step, **dict(zip(shapes.DIMENSIONS, means.mean(0).tolist(), strict=True))})

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Whether the alarm ended it."""
        self.stopped = trainer.global_step < trainer.max_steps


def logged(folder: Path) -> list[dict[str, float]]:
    """What the stage logged at its validations."""
    (file,) = folder.glob("logs/version_0/metrics.csv")
    with file.open() as lines:
        rows = [row for row in csv.DictReader(lines) if row.get("val/student")]
    keep = ("step", "val/", "epoch")
    return [{name: float(v) for name, v in row.items() if v and name.startswith(keep)} for row in rows]


@torch.no_grad()
def draw(generator: FlowGenerator, prompts: PromptBatch, number: int) -> Tensor:
    """Picture ``number`` of each prompt, ``(N, 3, H, W)``, from noise that its key decides."""
    pictures = []
    for start in range(0, len(prompts), 32):
        part = prompts.select(slice(start, start + 32))
        sources = [source(0, key, number) for key in part.keys]
        pictures.append(generator.sample(part.prompts, sources))
    return torch.cat(pictures)


def score(images: Tensor, prompts: Sequence[str], scorer: Any = None) -> Tensor:
    """Expected scores ``(N, D)``; the judge's, if no other scorer is given."""
    if scorer is None:
        return shapes.judge(images, prompts).mean
    with torch.no_grad():
        return torch.cat(
            [scorer(images=images[i : i + 50], prompts=prompts[i : i + 50]).mean for i in range(0, len(images), 50)]
        )


def judged(run: Run, about: dict[str, Any], prompts: PromptBatch, options: argparse.Namespace, count: int) -> dict[str, Tensor]:
    """What judge, reward and held-out scorer say of a cell's pictures, of which the reward chooses one of ``count``."""
    path = Path(about["folder"]) / f"{options.split}-{len(prompts)}-{count}.pt"
    if not path.exists():
        home = run.model("generator") if Path(about["folder"]).name.startswith("start") else Path(about["folder"])
        guidance = None if options.guidance == 1 else FullGuidance(options.guidance)
        generator = FlowGenerator.from_pretrained(home, guidance=guidance).eval()
        reward, held = zr.load(run.model("small-risd")).eval(), zr.load(run.model("sft")).eval()
        begin, drawn = time.perf_counter(), [draw(generator, prompts, number) for number in range(count)]
        with torch.no_grad():
            wanted = torch.stack([RiskAverse(0.5)(reward(images=images, prompts=prompts.prompts)) for images in drawn])
        images = torch.stack(drawn)[wanted.argmax(0), torch.arange(len(prompts))]
        spent = time.perf_counter() - begin
        scores = {name: score(images, prompts.prompts, s) for name, s in (("judge", None), ("student", reward), ("held", held))}
        torch.save(scores | {"seconds": torch.tensor(spent / len(prompts)), "first": images[:24]}, path)
    found: dict[str, Tensor] = torch.load(path, weights_only=True)
    return found


def compared(after: dict[str, Tensor], before: dict[str, Tensor], prompts: PromptBatch) -> dict[str, Any]:
    """Means, differences and Good-Same-Bad of each dimension and of the mean over dimensions."""
    found: dict[str, Any] = {"ms": 1e3 * float(after["seconds"])}
    for who in ("judge", "student", "held"):
        found[who] = {}
        sides = [torch.cat([side[who], side[who].mean(1, keepdim=True)], 1).double().numpy() for side in (after, before)]
        for d, name in enumerate((*shapes.DIMENSIONS, "mean")):
            new, old = (side[:, d] for side in sides)
            zeros = np.zeros(len(new))
            gain = bootstrap_interval(lambda a, b, p, w: (w @ a) / w.sum(-1), new - old, zeros, prompts.keys)
            found[who][name] = {"mean": float(new.mean()), "gain": gain.to_dict()}
            found[who][name]["gsb"] = bootstrap_interval(_gsb, new, old, prompts.keys).to_dict()
    return found


def _gsb(new: Any, old: Any, prompt: Any, weight: Any) -> Any:
    return gsb(new, old, prompt, weight, band=BAND)


def table(found: dict[str, Any]) -> Table:
    heads = ["cell", "steps", "s", "ms", *shapes.DIMENSIONS, "mean", "gain", "GSB", "reward", "held out", "gap", "stopped"]
    rows: list[list[str | Estimate]] = []
    for cell, about in found["cells"].items():
        judge = about["judge"]
        each = ["{:.2f} ({:+.2f})".format(judge[d]["mean"], judge[d]["gain"]["estimate"]) for d in shapes.DIMENSIONS]
        told = [f"{judge['mean']['mean']:.3f}", *(Estimate.of(judge["mean"][key], signed=True) for key in ("gain", "gsb"))]
        both = ["{:+.2f}".format(about[who]["mean"]["gain"]["estimate"]) for who in ("student", "held")]
        gap = f"{about['logged'][-1]['val/gap']:.2f}" if about.get("logged") else ""
        took = [str(about.get("steps", "")), str(about.get("took", "")), f"{about['ms']:.0f}"]
        rows.append([cell, *took, *each, *told, *both, gap, "alarm" if about.get("stopped") else ""])
    return Table(f"seed {found['seed']}, split {found['options']['split']}, {found['machine']}", heads, rows)


def report(found: dict[str, Any]) -> Page:
    """What happened, and curves of each training."""
    trained = {cell: about for cell, about in found["cells"].items() if about.get("logged")}
    lead, sections = [], [Section("Cells", tables=[table(found)])]
    for cell, about in trained.items():
        gain = Estimate.of(about["judge"]["mean"]["gain"], signed=True)
        how = f"stopped by the alarm at step {about['logged'][-1]['step']:.0f}" if about["stopped"] else "ran to its end"
        lead.append(f"{cell} {how}: the judge's mean score changed by {gain}.")
        panels = {"the judge": {d: [(row["step"], row[d]) for row in about["curve"]] for d in shapes.DIMENSIONS}}
        logged = about["logged"]
        for title, who in (("the reward", "student"), ("the scorer that is held out", "held_out")):
            panels[title] = {
                d: [(0, logged[0][f"val/start/{who}/{d}"]), *((row["step"], row[f"val/{who}/{d}"]) for row in logged)]
                for d in shapes.DIMENSIONS
            }
        series = {"reward": "val/gain/student", "held out": "val/gain/held_out", "gap": "val/gap"}
        panels["gains, in deviations"] = {name: [(row["step"], row[key]) for row in logged] for name, key in series.items()}
        sections.append(Section(cell, figures=[curves(panels)]))
    facts = [(name, str(value)) for name, value in found["options"].items()]
    return Page(f"A generator improved by rewards, seed {found['seed']}", lead, sections, facts)


if __name__ == "__main__":
    main()
