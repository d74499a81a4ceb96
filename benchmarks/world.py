"""What the built-in world's models learn, per dimension: perception, zero-shot, supervised, ceiling; seconds beside them.

    python benchmarks/world.py                       three seeds
    python benchmarks/world.py --seeds 0             one
    python benchmarks/world.py --picture FILE.png    no training: the picture of the world that the README shows

Each seed is one `zr demo`: its own data, base model and supervised model, measured on 250 held-out prompts (1000 images).
Zero-shot and supervised answer with one token; "reasoning" is the base model's score after one sampled trace; "perception" is
the share of images whose greedy trace is exactly what is drawn; "ceiling" is the noise-free rubric against the same annotators.
Printed as tables and written to OUT/world.json.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console

import zr
from zr.commands.demo import TRACE, demo
from zr.data import shapes
from zr.models import Policy, SamplingRule, reasoning
from zr.report import Estimate, Table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/world"))
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    if arguments.picture:
        draw_world(arguments.picture)
        return
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    results: dict[str, Any] = {"zr": zr.__version__, "machine": machine, "seeds": {}}
    console = Console(width=170)
    for seed in arguments.seeds:
        folder = arguments.out / f"seed-{seed}"
        demo(folder, seed)
        found = json.loads((folder / "results.json").read_text())
        found["seconds"] = json.loads((folder / "seconds.json").read_text())
        found["perception"] = perception(reasoning(zr.load(folder / "base"), shapes.rubric(reasoning=True)).policy, seed)
        results["seeds"][str(seed)] = found
        (arguments.out / "world.json").write_text(json.dumps(results, indent=2) + "\n")
        console.print(world_table(found, f"seed {seed}, {machine}, seconds {found['seconds']}").terminal())


@torch.inference_mode()
def perception(policy: Policy, seed: int, prompts: int = 60) -> dict[str, float]:
    """Share of images whose greedy trace says exactly what is drawn, per dimension."""
    exact: dict[str, list[bool]] = {name: [] for name in shapes.DIMENSIONS}
    greedy = SamplingRule(temperature=0.0, length=TRACE)
    for prompt, scenes in shapes.scenes("test", prompts, seed=seed):
        images = [torch.from_numpy(shapes.draw(scene)).permute(2, 0, 1) for scene in scenes]
        prefix = policy.backbone.encode(images, [prompt] * len(images))
        for name in shapes.DIMENSIONS:
            written = policy.texts(policy.sample(prefix, [name] * len(images), group_size=1, rule=greedy))
            for text, scene in zip(written, scenes, strict=True):
                exact[name].append(text.split() == shapes.describe(scene, prompt)[name].replace(",", " ,").split())
    return {name: float(np.mean(values)) for name, values in exact.items()}


def draw_world(path: Path, enlarge: int = 3) -> None:
    """Each defect alone, then candidates of three prompts as they are drawn by lot."""
    prompt = shapes.prompts("train")[2]
    things = tuple(shapes.Thing(colour, shape) for colour, shape in shapes.read_prompt(prompt))
    alone = [shapes.Scene(things)]
    alone += [shapes.Scene(things, realism=frozenset({name})) for name in shapes.SEVERITY["realism"]]
    alone += [shapes.Scene(things, aesthetics=frozenset({name})) for name in shapes.SEVERITY["aesthetics"]]
    alone += [
        shapes.Scene(tuple(shapes.Thing(t.colour, t.shape, state) for t in things)) for state in shapes.SEVERITY["plausibility"]
    ]
    drawn = [scene for _, several in shapes.scenes("train", 3, candidates=8) for scene in several]
    pictures = [np.pad(shapes.draw(scene), ((1, 1), (1, 1), (0, 0)), constant_values=255) for scene in [*alone, *drawn]]
    rows = [np.concatenate(pictures[i : i + 12], axis=1) for i in range(0, 36, 12)]
    image = Image.fromarray(np.concatenate(rows))
    image.resize((image.width * enlarge, image.height * enlarge), Image.Resampling.BICUBIC).save(path, optimize=True)


def world_table(found: dict[str, Any], title: str) -> Table:
    """The row of each dimension: perception, HPA of every scorer, the gain of supervision."""
    scorers = {**found["methods"], "ceiling": found["noise-free rubric"]}
    rows = [
        (
            name,
            f"{found['perception'][name]:.3f}",
            *(Estimate.of(table["dimensions"][name]["hpa"]) for table in scorers.values()),
            Estimate.of(found["supervised - zero-shot"]["dimensions"][name]["hpa"], signed=True),
        )
        for name in shapes.DIMENSIONS
    ]
    return Table(title, ("dimension", "perception exact", *scorers, "supervised - zero-shot"), rows)


if __name__ == "__main__":
    main()
