"""What the built-in world's models learn, per dimension: perception, zero-shot, SFT, ceiling; seconds beside them.

    python benchmarks/world.py                 three seeds, about N minutes on two cores
    python benchmarks/world.py --seeds 0       one seed

Each seed draws its own data, trains its own base model (zr:look, zr:base) and its own supervised model (zr:supervised), and
measures them on 250 held-out prompts (1000 images). Written to OUT/world.json and printed as a table. Zero-shot and SFT
answer with one token; "reasoning" is the base model's score after one sampled trace; "perception" is the share of images
whose greedy trace is exactly what is drawn; "ceiling" is the noise-free rubric, measured against the same annotators.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import zr
from zr.commands.demo import CANDIDATES, PROMPTS
from zr.commands.measuring import HeldOut, predict
from zr.commands.training import run
from zr.data import ScoreData, shapes, write_shards
from zr.metrics import compare
from zr.models import Policy, SamplingRule
from zr.models.reward import reasoning



def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/world"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
    about = {"machine": machine, "zr": zr.__version__, "torch": torch.__version__}
    results: dict[str, Any] = {"about": about, "seeds": {}}
    for seed in arguments.seeds:
        results["seeds"][str(seed)] = one_seed(seed, arguments.out / f"seed-{seed}")
        (arguments.out / "world.json").write_text(json.dumps(results, indent=2) + "\n")
    show(results)


def one_seed(seed: int, folder: Path) -> dict[str, Any]:
    seconds: dict[str, float] = {}
    data = folder / "data"
    if not data.exists():
        with Timer(seconds, "data"):
            for split, count in PROMPTS.items():
                write_shards(shapes.records(split, count, CANDIDATES[split], seed=seed), data, shapes.rubric().scale, split=split)
    for name, start in (("look", None), ("base", "look"), ("supervised", "base")):
        if not (folder / name / "model").exists():
            options = ["--seed_everything", str(seed), "--folder", str(data), "--run", str(folder / name)]
            options += ["--start", str(folder / start)] if start else []
            with Timer(seconds, name):
                run(["fit", "--config", f"zr:{name}", *options])
    held_out = HeldOut(
        list(ScoreData(data, shapes.rubric(), batch_size=16).test_dataloader()), shapes.DIMENSIONS, shapes.rubric().bins
    )
    base, tuned = zr.load(folder / "base"), zr.load(folder / "supervised")
    reasoner = reasoning(base, shapes.rubric(reasoning=True), rule=SamplingRule(length=24), seed=seed)
    mu = {"ceiling": torch.tensor(true_scores(seed), dtype=torch.float64)}
    for name, scorer in (("zero-shot", base), ("reasoning", reasoner), ("SFT", tuned)):
        with Timer(seconds, f"score {name}"):
            mu[name] = predict(scorer, held_out.batches).mean
    scores = held_out.scores.double().numpy()
    gain = compare(
        mu["SFT"].numpy(), mu["zero-shot"].numpy(), scores, np.ones_like(scores), held_out.records, shapes.DIMENSIONS
    )
    return {
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "perception": perception(reasoner.policy, seed),
        "methods": {name: held_out.table(m) for name, m in mu.items()},
        "SFT - zero-shot": gain,
    }


def true_scores(seed: int) -> list[list[float]]:
    """The noise-free scores of the test images."""
    drawn = shapes.scenes("test", PROMPTS["test"], seed=seed)
    return [[shapes.true_scores(s, p)[d] for d in shapes.DIMENSIONS] for p, candidates in drawn for s in candidates]


@torch.inference_mode()
def perception(policy: Policy, seed: int, prompts: int = 60) -> dict[str, float]:
    """Share of images whose greedy trace says exactly what is drawn, per dimension."""
    exact: dict[str, list[bool]] = {d: [] for d in shapes.DIMENSIONS}
    greedy = SamplingRule(temperature=0.0, length=24)
    for prompt, scenes in shapes.scenes("test", prompts, seed=seed):
        images = [torch.from_numpy(shapes.draw(s)).permute(2, 0, 1) for s in scenes]
        prefix = policy.backbone.encode(images, [prompt] * len(images))
        for dimension in shapes.DIMENSIONS:
            written = policy.texts(policy.sample(prefix, [dimension] * len(images), group_size=1, rule=greedy))
            for text, scene in zip(written, scenes, strict=True):
                exact[dimension].append(text.split() == shapes.describe(scene, prompt)[dimension].replace(",", " ,").split())
    return {name: float(np.mean(values)) for name, values in exact.items()}


class Timer:
    """Seconds that a block took, kept under a name."""

    def __init__(self, into: dict[str, float], name: str) -> None:
        self.into, self.name = into, name

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.into[self.name] = time.perf_counter() - self.start


def show(results: dict[str, Any]) -> None:
    console = Console(width=150)
    console.print(results["about"])
    for seed, result in results["seeds"].items():
        table = Table(title=f"seed {seed}, seconds {result['seconds']}")
        for column in ("dimension", "perception exact", *result["methods"], "SFT - zero-shot (95%)", "PLCC SFT", "SRCC SFT"):
            table.add_column(column)
        for name in shapes.DIMENSIONS:
            hpa = [f"{m['dimensions'][name]['hpa']['estimate']:.3f}" for m in result["methods"].values()]
            gain, tuned = result["SFT - zero-shot"]["dimensions"][name]["hpa"], result["methods"]["SFT"]["dimensions"][name]
            table.add_row(
                name,
                f"{result['perception'][name]:.3f}",
                *hpa,
                f"{gain['estimate']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]",
                f"{tuned['plcc']['estimate']:.3f}",
                f"{tuned['srcc']['estimate']:.3f}",
            )
        console.print(table)


if __name__ == "__main__":
    main()
