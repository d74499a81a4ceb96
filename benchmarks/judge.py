"""How far the judge of the built-in world agrees with what was drawn, and what it makes of noise.

Command: python benchmarks/judge.py [--count 400] [--seed 0]
"""

import argparse
import os
import platform
import sys
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from scipy.stats import spearmanr

from zr.data.shapes import DIMENSIONS, SEVERITY, STATES, draw, read, scenes, true_scores


def main(count, seed):
    print(f"command: python {' '.join(sys.argv)}")
    print(f"machine: {platform.platform()}, {os.cpu_count()} CPUs, numpy {np.__version__}, torch {torch.__version__}", end="")
    print(f", OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}")
    print(f"pictures: {count} of the split test, one for each prompt, seed {seed}, all defects on\n")
    sample = [(prompt, scene, draw(scene) / 255) for prompt, (scene,) in scenes("test", count, candidates=1, seed=seed)]
    read(sample[0][2])  # draws the templates
    start = time.process_time()
    readings = [read(picture) for _, _, picture in sample]
    print(f"CPU time a picture: {1e3 * (time.process_time() - start) / count:.0f} ms\n")

    slots = [pair for r, (_, s, _) in zip(readings, sample, strict=True) for pair in zip(r.things, s.things, strict=True)]
    objects = [(a and (a.colour, a.shape)) == (b and (b.colour, b.shape)) for a, b in slots]
    print(f"{'read right':<24}{'share':>8}{'n':>7}")
    print(f"{'object or nothing':<24}{np.mean(objects):>8.4f}{len(objects):>7}")
    for state in STATES:
        right = [a is not None and a.state == state for a, b in slots if b is not None and b.state == state]
        print(f"{'state ' + state:<24}{np.mean(right):>8.4f}{len(right):>7}")
    for dimension in ("realism", "aesthetics"):
        for defect in SEVERITY[dimension]:
            there = [defect in getattr(scene, dimension) for _, scene, _ in sample]
            right = [(r.evidence[defect] > 0.5) == t for r, t in zip(readings, there, strict=True)]
            print(f"{defect:<24}{np.mean(right):>8.4f}{len(right):>7}")

    true = [true_scores(scene, prompt) for prompt, scene, _ in sample]
    seen = [reading.scores(prompt) for reading, (prompt, _, _) in zip(readings, sample, strict=True)]
    print(f"\n{'against the rubric':<24}{'Spearman':>9}{'same bin':>9}{'mean |d|':>9}{'max |d|':>9}")
    for name in DIMENSIONS:
        a, b = (np.array([scores[name] for scores in side]) for side in (seen, true))
        off = abs(a - b)
        rho = spearmanr(a, b).statistic
        print(f"{name:<24}{rho:>9.4f}{np.mean(off < 0.25):>9.3f}{off.mean():>9.3f}{off.max():>9.3f}")

    few = sample[:24]
    rng = np.random.default_rng(seed)
    noise = [rng.random(picture.shape) for _, _, picture in few]
    print(f"\nblended with uniform noise, (1 - t) picture + t noise, mean scores of the first {len(few)}")
    print(f"{'t':>5}" + "".join(f"{name:>14}" for name in (*DIMENSIONS, "legibility")))
    for t in (0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1):
        seen_at = [(prompt, read((1 - t) * picture + t * n)) for (prompt, _, picture), n in zip(few, noise, strict=True)]
        row = np.mean([[*reading.scores(prompt).values(), reading.legibility] for prompt, reading in seen_at], 0)
        print(f"{t:>5}" + "".join(f"{value:>14.3f}" for value in row))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    main(options.count, options.seed)
