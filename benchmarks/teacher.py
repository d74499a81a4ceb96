"""What a teacher learns on the built-in world: GDSO beside GRPO, its direct terms alone, and the other forms, at equal steps.

    python benchmarks/teacher.py search RUN             every cell with every learning rate, on the validation split
    python benchmarks/teacher.py test RUN [RUN ...] --settings RUN/search.json
    python benchmarks/teacher.py test RUN --cells gdso --steps 40 --lr 3e-4

A RUN is a folder of `zr demo` (data, base, supervised), one for each seed. Every cell starts from the run's base model and
makes equally many steps on the same annotated pairs; those that reason sample the same number of traces of them, SFT learns
all labels of their images. Measured on the split's prompts with one trace per image and dimension, and, of models that answer
directly, with one token. Intervals: paired bootstraps over prompts. `search` writes the best learning rate of each cell by HPA
to RUN/search.json, `test` its table to RUN/teacher.json. What is done is kept in RUN/cells: an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.console import Console
from rich.table import Table

import zr
from zr.commands.measuring import HeldOut, predict
from zr.data import RandomPairs, ScoreData, shapes
from zr.data.batch import AllPairs
from zr.losses import (
    AbsoluteExpectationLoss,
    CentredAdvantage,
    GapLoss,
    InterpolatedCrossEntropy,
    K3ValueK2Gradient,
    LeaveOneOutAdvantage,
    ScoreReward,
)
from zr.metrics import compare
from zr.models import SamplingRule, reasoning
from zr.stages import ParsedScore, PolicyTerm, ReferenceTerm, Supervised, Teacher, Term

TRACE = 24
"""Most tokens of a trace in this world; the longest that it teaches has 16."""

RATES = (3e-4, 1e-3, 3e-3)
SFT = "sft"
REFERENCES = ("gdso", "gdso-centred")
"""Cells that the others are compared with."""
DIRECT = {"pointwise": (InterpolatedCrossEntropy, 0.5), "pairwise": (GapLoss, 0.5)}
EXACT = {"pointwise": (AbsoluteExpectationLoss, 1.0), "pairwise": (GapLoss, 1.0)}
CELLS: dict[str, tuple[dict[str, Any], Any]] = {
    "grpo": ({}, PolicyTerm),
    "grpo-parsed": ({}, partial(PolicyTerm, decoding=ParsedScore())),
    "direct": (DIRECT, None),
    "gdso": (DIRECT, PolicyTerm),
    "gdso-parsed": (DIRECT, partial(PolicyTerm, decoding=ParsedScore())),
    "gdso-centred": (DIRECT, partial(PolicyTerm, advantage=CentredAdvantage())),
    "exact": (EXACT, partial(PolicyTerm, reward=ScoreReward(1.0, 2.0), advantage=LeaveOneOutAdvantage())),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=["search", "test"])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--cells", nargs="+", default=[SFT, *CELLS], choices=[SFT, *CELLS])
    parser.add_argument("--settings", type=Path, help="what a search found: the learning rate of each cell")
    parser.add_argument("--lr", type=float, default=1e-3, help="of all cells, without --settings")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--group", type=int, default=4)
    parser.add_argument("--clip", type=float, default=1.0)
    parser.add_argument("--beta", type=float, default=0.02)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    console = Console(width=190)
    for run in options.runs:
        if options.job == "search":
            found = search(run, options)
        else:
            found = measure(run, options)
            console.print(table(found))
        name = "search" if options.job == "search" else "teacher"
        (run / f"{name}.json").write_text(json.dumps(found, indent=2) + "\n")


def search(run: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The best learning rate of each cell, and all that was measured."""
    held_out, batches = split(run, "validation")
    hpa: dict[str, dict[str, float]] = {}
    for cell in options.cells:
        hpa[cell] = {}
        for rate in RATES:
            mu, _ = cached(run, cell, rate, options, "validation", batches)
            hpa[cell][str(rate)] = held_out.table(mu)["overall"]["hpa"]["estimate"]
        print(cell, hpa[cell], flush=True)
    return about(run, options) | {
        "hpa": hpa,
        "lr": {cell: float(max(tried, key=tried.__getitem__)) for cell, tried in hpa.items()},
    }


def measure(run: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The table of the test split."""
    held_out, batches = split(run, "test")
    rates = dict.fromkeys(options.cells, options.lr)
    if options.settings:
        rates |= json.loads(options.settings.read_text())["lr"]
    mu: dict[str, torch.Tensor] = {}
    seconds: dict[str, float] = {}
    seed = json.loads((run / "settings.json").read_text())["seed"]
    base = zr.load(run / "base")
    mu["zero-shot, one token"] = predict(base, batches).mean
    mu["zero-shot, reasoning"] = predict(scorer(base, seed), batches).mean
    mu["the demo's supervised model"] = predict(zr.load(run / "supervised"), batches).mean
    for cell in options.cells:
        mu[cell], seconds[cell] = cached(run, cell, rates[cell], options, "test", batches)
    known = ~held_out.scores.isnan().numpy()
    against = {
        f"{reference} - {name}": compare(
            mu[reference].double().numpy(),
            value.double().numpy(),
            held_out.scores.double().numpy(),
            known,
            held_out.records,
            held_out.dimensions,
        )
        for reference in REFERENCES
        for name, value in mu.items()
        if reference in mu and name != reference
    }
    measures = {name: held_out.table(value) for name, value in mu.items()}
    return about(run, options) | {"lr": rates, "seconds": seconds, "measures": measures, "against": against}


def about(run: Path, options: argparse.Namespace) -> dict[str, Any]:
    settings = {name: getattr(options, name) for name in ("steps", "pairs", "group", "clip", "beta")}
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    return {"seed": json.loads((run / "settings.json").read_text())["seed"], "machine": machine, "options": settings}


def split(run: Path, name: str) -> tuple[HeldOut, list[Any]]:
    rubric = shapes.rubric()
    batches = list(ScoreData(run / "data", rubric, batch_size=16, test=name).test_dataloader())
    return HeldOut(batches, rubric.dimensions, rubric.bins), batches


def cached(
    run: Path, cell: str, rate: float, options: argparse.Namespace, name: str, batches: list[Any]
) -> tuple[torch.Tensor, float]:
    """Expected scores of a cell and its seconds, computed once."""
    settings = about(run, options)["options"] | {"seed": about(run, options)["seed"], "lr": rate}
    mark = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    path = run / "cells" / f"{cell}-{name}-{mark}.pt"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        begin = time.perf_counter()
        mu = predict(train(run, cell, rate, options), batches).mean
        torch.save({"mu": mu, "seconds": round(time.perf_counter() - begin, 1)}, path)
    found = torch.load(path, weights_only=True)
    return found["mu"], found["seconds"]


def scorer(model: Any, seed: int) -> Any:
    return reasoning(model, shapes.rubric(reasoning=True), rule=SamplingRule(length=TRACE), seed=seed)


def train(run: Path, cell: str, rate: float, options: argparse.Namespace) -> Any:
    """The model after equally many steps on the same pairs."""
    seed = about(run, options)["seed"]
    L.seed_everything(seed, verbose=False)
    base = zr.load(run / "base")
    optimizer = partial(torch.optim.AdamW, lr=rate, weight_decay=0.01)
    model = base if cell == SFT else scorer(base, seed)
    stage: L.LightningModule
    if cell == SFT:
        stage = Supervised(model, terms={"score": Term(InterpolatedCrossEntropy())}, optimizer=optimizer)
    else:
        direct, policy = CELLS[cell]
        stage = Teacher(
            model,
            terms={name: Term(loss(), weight) for name, (loss, weight) in direct.items()},
            policy=None if policy is None else policy(),
            reference=ReferenceTerm(K3ValueK2Gradient(), options.beta, refresh=options.steps) if options.beta else None,
            group_size=options.group,
            gradient_clip=options.clip,
            optimizer=optimizer,
            seed=seed,
        )
    data = ScoreData(
        run / "data",
        shapes.rubric(),
        batch_size=options.pairs,
        pairs=RandomPairs(1, AllPairs(ties=False)),
        pairs_per_batch=options.pairs,
        seed=seed,
    )
    trainer = L.Trainer(
        max_steps=options.steps,
        max_epochs=-1,
        limit_val_batches=0,
        gradient_clip_val=options.clip if cell == SFT else None,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    trainer.fit(stage, datamodule=data)
    print(cell, rate, {k: round(float(v), 4) for k, v in trainer.callback_metrics.items() if k.count("/") == 1}, flush=True)
    return model.eval()


def table(found: dict[str, Any]) -> Table:
    out = Table(title=f"seed {found['seed']}, {found['machine']}, {found['options']}")
    for name in (
        "method",
        "lr",
        "HPA",
        "margin HPA",
        "PLCC",
        "SRCC",
        *(f"{reference} - it" for reference in REFERENCES),
        "seconds",
    ):
        out.add_column(name)
    for name, measures in found["measures"].items():
        mean = measures["overall"]
        cells = ["{estimate:.3f} [{low:.2f}, {high:.2f}]".format(**mean[m]) for m in ("hpa", "margin_hpa", "plcc", "srcc")]
        gaps = [found["against"].get(f"{reference} - {name}") for reference in REFERENCES]
        shown = [
            "" if gap is None else "{estimate:+.3f} [{low:+.3f}, {high:+.3f}]".format(**gap["overall"]["hpa"]) for gap in gaps
        ]
        out.add_row(name, str(found["lr"].get(name, "")), *cells, *shown, str(found["seconds"].get(name, "")))
    return out


if __name__ == "__main__":
    main()
