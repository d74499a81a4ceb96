"""What the built-in world can teach: how much of it a base model sees, and how well its own rubric agrees with annotators.

    python benchmarks/world.py RUN [RUN ...]         folders of `zr demo`, one for each seed
    python benchmarks/world.py --picture FILE.png    the picture of the world that the README shows

"Perception" is the share of images whose greedy trace is exactly what is drawn; "ceiling" is the HPA of the noise-free rubric
against the annotators, on the run's held-out prompts: nobody can be expected to do better.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console

import zr
from zr.commands.measuring import HeldOut
from zr.data import ScoreData, shapes
from zr.models import Policy, SamplingRule, reasoning
from zr.report import Estimate, Table

TRACE = 24
"""Most tokens of a trace in this world; the longest that it teaches has 16."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="*")
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    if arguments.picture:
        draw_world(arguments.picture)
    for run in arguments.runs:
        seed = json.loads((run / "settings.json").read_text())["seed"]
        seen = perception(reasoning(zr.load(run / "base"), shapes.rubric(reasoning=True)).policy, seed)
        best = ceiling(run, seed)
        rows = [(name, f"{seen[name]:.3f}", Estimate.of(best[name]["hpa"])) for name in shapes.DIMENSIONS]
        table = Table(f"seed {seed}, torch {torch.__version__}", ("dimension", "perception exact", "ceiling"), rows)
        Console().print(table.terminal())


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


def ceiling(run: Path, seed: int) -> dict[str, dict[str, dict[str, float]]]:
    """The noise-free rubric's measures on the run's test split, per dimension.

    Images that it scores alike are told apart at random: HPA counts a tie as wrong, and nobody can do better than chance on a
    pair that only the annotators' noise orders.
    """
    rubric = shapes.rubric()
    data = ScoreData(run / "data", rubric, batch_size=16)
    held_out = HeldOut(list(data.test_dataloader()), rubric.dimensions, rubric.bins)
    drawn = shapes.scenes("test", len(set(held_out.records)), seed=seed)
    true = torch.tensor([list(shapes.true_scores(s, prompt).values()) for prompt, several in drawn for s in several])
    noise = torch.rand(true.shape, generator=torch.Generator().manual_seed(seed))
    found: dict[str, dict[str, dict[str, float]]] = held_out.table(true + 1e-3 * noise)["dimensions"]
    return found


if __name__ == "__main__":
    main()
