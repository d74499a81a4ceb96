"""What a student learns of its teacher on the built-in world: RISD beside SFT and OPD, smaller than the teacher and as large.

    python benchmarks/student.py RUN [RUN ...]          folders of `zr demo`, one for each seed: data, base
    python benchmarks/student.py RUN --split validation --rates 3e-4 1e-3 3e-3
    python benchmarks/student.py RUN --cells small-sft small-risd-10 --steps 100

The teacher is RUN/teacher, as `zr fit --config zr:teacher_small --run RUN/teacher` leaves it; where there is none, GDSO with
centred advantages trains it. It labels the annotated images of the run and up to ten (`--most 40`: forty) times as many without
annotation (`zr label`), with one trace and with four. A smaller base model, for smaller students, gets the lessons of the
demo's. All cells have the same annotated prompts, all or a part of them (`--annotated 37`). The checkpoint of each, the teacher
too, is the best on the validation split, the learning rate what was best there on seed 0, or the best of `--rates`:

    SIZE-sft          the annotations alone, one token
    SIZE-risd-N       the teacher's labels of the annotated images and of N times as many others, one token
    SIZE-risd-10-k1   labels of one trace instead of four
    SIZE-both-10      labels, and annotations where there are any, one token
    SIZE-opd          on-policy distillation on all these images, with reasoning
    clip-risd-10      a CLIP from random weights

SIZE is small or same. Measured on the split's prompts: against annotators (intervals and differences from risd-10 by paired
bootstraps over prompts), and against the teacher with four traces: mean KL, and the share of pairs ordered alike. Printed as a
table, written to RUN/student.json. What is done is kept in RUN/student: an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import random
import shutil
import time
import warnings
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.console import Console
from rich.table import Table

import zr
from zr.commands.label import label
from zr.commands.measuring import HeldOut, predict
from zr.commands.training import run as fit
from zr.data import Index, RandomPairs, Record, ScoreData, read_shards, shapes, write_shards
from zr.data.batch import AllPairs
from zr.losses import CentredAdvantage, ForwardKL, GapLoss, InterpolatedCrossEntropy, ReverseKL
from zr.metrics import compare, hpa
from zr.models import LinearHead, ReasoningReward, SamplingRule, compose, reasoning, tiny_clip
from zr.scores import ScoreDistribution, kl_divergence
from zr.stages import OnPolicy, PolicyTerm, ScoringStage, Student, Supervised, Teacher, Term

SHARES = (1, 3, 10, 40)
"""Images without annotation, in multiples of the annotated ones."""

METHODS = ("sft", "risd-0", *(f"risd-{n}" for n in SHARES), "risd-10-k1", "both-10", "opd")
CELLS = [*(f"{size}-{method}" for size in ("small", "same") for method in METHODS), "clip-risd-10"]
RATES = {"sft": 3e-4, "risd": 3e-3, "both": 3e-3, "opd": 1e-3}
"""Of learning: of 3e-4, 1e-3 and 3e-3 what validation of seed 0 preferred, small students, 37 annotated prompts."""

TRACE, CANDIDATES, DONE = 24, 4, "done"
"""Most tokens of a trace, images of a prompt, and the file that says that a training came to its end."""

SMALL = {"hidden_size": 64, "layers": 2, "vision_size": 32}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--cells", nargs="+", choices=CELLS, help="all that --most allows")
    parser.add_argument("--split", default="test", choices=["validation", "test"])
    parser.add_argument("--rates", type=float, nargs="+", help="of learning, of which the best on validation counts")
    parser.add_argument("--steps", type=int, default=400, help="of the cells that answer with one token")
    parser.add_argument("--opd-steps", type=int, default=150)
    parser.add_argument("--looks", type=int, default=8, help="validations of a cell")
    parser.add_argument("--prompts", type=int, default=8, help="in a batch")
    parser.add_argument("--opd-prompts", type=int, default=4)
    parser.add_argument("--traces", type=int, default=4)
    parser.add_argument("--most", type=int, default=10, choices=SHARES, help="multiples that are labelled at all")
    parser.add_argument("--lessons", type=int, default=0, help="steps of each half of the small base; 0: as the demo's")
    parser.add_argument("--annotated", type=int, help="prompts whose annotations are used; all, if not given")
    parser.add_argument("--teacher-steps", type=int, default=100)
    parser.add_argument("--teacher-rates", type=float, nargs="+", default=[1e-3], help="as --rates, of the teacher")
    options = parser.parse_args()
    beyond = [
        cell
        for cell in options.cells or CELLS
        for share in SHARES
        if share > options.most and cell.split("-")[2:3] == [str(share)]
    ]
    options.cells = options.cells or [cell for cell in CELLS if cell not in beyond]
    if set(beyond) & set(options.cells):
        parser.error(f"--most {options.most} leaves no labels for {', '.join(beyond)}: leave them out of --cells")
    warnings.filterwarnings("ignore")
    console = Console(width=190)
    for whole in options.runs:
        run = part(whole, options.annotated) if options.annotated else whole
        found = measure(run, options)
        (run / "student.json").write_text(json.dumps(found, indent=2) + "\n")
        console.print(table(found))


def part(run: Path, count: int) -> Path:
    """A run with the first ``count`` annotated prompts alone, and the same base, validation and test."""
    home, scale = run / f"annotated-{count}", shapes.rubric().scale
    if not (home / DONE).exists():
        shutil.rmtree(home, ignore_errors=True)
        shutil.copytree(run / "base", home / "base")
        shutil.copy(run / "settings.json", home / "settings.json")
        for split in Index.load(run / "data").splits:
            records = islice(read_shards(run / "data", split=split), count if split == "train" else None)
            write_shards(records, home / "data", scale, split=split, per_shard=8)
        (home / DONE).touch()
    return home


def measure(run: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All cells of a run."""
    seconds = prepare(run, options)
    held_out = held(run, options.split)
    known, scores = ~held_out.scores.isnan().numpy(), held_out.scores.double().numpy()
    teacher = once(
        run / "student" / f"teacher-{options.traces}-{options.split}.pt",
        lambda: answers(teacher_of(run, options.traces), run, options),
    )
    q = ScoreDistribution(teacher["logits"], held_out.bins)
    outcomes = {f"teacher, {options.traces} traces": teacher}
    for size, folder in (("same", "base"), ("small", "student/small")):
        base = zr.load(run / folder)
        path = run / "student" / f"{size}-base-{options.split}.pt"
        outcomes[f"{size}, zero-shot"] = once(path, lambda model=base: answers(model, run, options))
    for cell in options.cells:
        outcomes[cell] = best(run, cell, options)
    mu = {name: ScoreDistribution(found["logits"], held_out.bins).mean for name, found in outcomes.items()}
    against = {}
    for name in options.cells:
        reference = f"{name.split('-')[0]}-risd-10"
        if reference in mu and name != reference:
            pair = (mu[reference].double().numpy(), mu[name].double().numpy())
            against[name] = compare(*pair, scores, known, held_out.records, held_out.dimensions)
    return {
        "seed": seed_of(run),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "options": {name: value for name, value in vars(options).items() if name not in ("runs", "cells")},
        "prepared": seconds,
        "settings": {name: {k: v for k, v in o.items() if k != "logits"} for name, o in outcomes.items()},
        "measures": {name: held_out.table(value) for name, value in mu.items()},
        "teacher": {name: distance(q, ScoreDistribution(o["logits"], held_out.bins), held_out) for name, o in outcomes.items()},
        "risd-10 - it": against,
    }


def prepare(run: Path, options: argparse.Namespace) -> dict[str, float]:
    """Teacher, smaller base, labels and mixed splits; the seconds of what was not there yet."""
    home, seed, took = run / "student", seed_of(run), {}
    home.mkdir(exist_ok=True)
    if not (run / "teacher" / "model").exists():
        begin = time.perf_counter()
        train_teacher(run, options).save_pretrained(run / "teacher" / "model")
        took["teacher"] = time.perf_counter() - begin
    for name, start in (("small-look", ""), ("small", "student/small-look")):
        if not (home / name / DONE).exists():
            begin = time.perf_counter()
            lessons(run, name, start, options)
            took[name] = time.perf_counter() - begin
    begin = time.perf_counter()
    annotated = sum(shard.records for shard in Index.load(run / "data").splits["train"])
    raw = home / "raw"
    if not (raw / "index.json").exists():
        write_shards(read_shards(run / "data", split="train"), raw, shapes.rubric().scale, split="train", per_shard=25)
    if "unlabelled" not in Index.load(raw).splits:
        others = shapes.records("unlabelled", options.most * annotated, CANDIDATES, seed=seed)
        write_shards(others, raw, shapes.rubric().scale, split="unlabelled", per_shard=25)
    source = raw
    for count in dict.fromkeys((options.traces, 1)):
        target = home / f"labels-{count}"
        if not (target / DONE).exists():
            label(str(run / "teacher"), str(source), target, labeller=f"k{count}", traces=count, seed=seed, batch_size=32)
            (target / DONE).touch()
        source = target
    for share in (0, *(share for share in SHARES if share <= options.most)):
        mixed = home / "data"
        if not (mixed / "index.json").exists() or f"mix{share}" not in Index.load(mixed).splits:
            records = mixture(source, share * annotated, seed)
            write_shards(records, mixed, shapes.rubric().scale, split=f"mix{share}", per_shard=64)
    took["labels"] = time.perf_counter() - begin
    file = home / "seconds.json"
    before = json.loads(file.read_text()) if file.exists() else {}
    before |= {name: round(value, 1) for name, value in took.items() if name not in before}
    file.write_text(json.dumps(before, indent=2) + "\n")
    return before


def mixture(source: Path, count: int, seed: int) -> Iterator[Record]:
    """The annotated records and the first ``count`` of the others, in random order."""
    records = list(read_shards(source, split="train"))
    for _, record in zip(range(count), read_shards(source, split="unlabelled"), strict=False):
        records.append(record)
    random.Random(seed).shuffle(records)
    yield from records


def lessons(run: Path, name: str, start: str, options: argparse.Namespace) -> None:
    """One half of the smaller base model's training."""
    recipe = "zr:look" if not start else "zr:base"
    words = ["fit", "--config", recipe, "--folder", str(run / "data"), "--run", str(run / "student" / name)]
    words += ["--seed_everything", str(seed_of(run)), "--trainer.devices=1", "--trainer.enable_model_summary=false"]
    words += ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
    words += ["--start", str(run / start)] if start else [f"--model.model.backbone.{k}={v}" for k, v in SMALL.items()]
    words += [f"--trainer.max_steps={options.lessons}"] if options.lessons else []
    if not (run / "student" / name / "model").exists():
        fit(words)
    (run / "student" / name / DONE).touch()


def train_teacher(run: Path, options: argparse.Namespace) -> ReasoningReward:
    """GDSO, as the teacher's own benchmark has it, but learning rate and checkpoint are those that validation prefers."""
    found = []
    for rate in options.teacher_rates:
        keep, stage = KeepBest(), teacher_stage(run, rate)
        pairs = {"pairs": RandomPairs(1, AllPairs(ties=False)), "pairs_per_batch": 16}
        data = ScoreData(run / "data", shapes.rubric(), batch_size=16, seed=seed_of(run), **pairs)
        looks = {"val_check_interval": max(1, options.teacher_steps // options.looks), "check_val_every_n_epoch": None}
        trainer(options.teacher_steps, callbacks=[keep], num_sanity_val_steps=0, **looks).fit(stage, datamodule=data)
        stage.model.load_state_dict(keep.weights)
        print("teacher", {"lr": rate, "validation": keep.value, "step": keep.step}, flush=True)
        found.append((keep.value, stage.model))
    return max(found, key=lambda pair: pair[0])[1].eval()


def teacher_stage(run: Path, rate: float) -> Teacher:
    """From the run's base model."""
    seed = seed_of(run)
    L.seed_everything(seed, verbose=False)
    return Teacher(
        reasoner(zr.load(run / "base"), seed),
        terms={"pointwise": Term(InterpolatedCrossEntropy(), 0.5), "pairwise": Term(GapLoss(), 0.5)},
        policy=PolicyTerm(advantage=CentredAdvantage()),
        group_size=4,
        optimizer=partial(torch.optim.AdamW, lr=rate, weight_decay=0.01),
        seed=seed,
    )


def best(run: Path, cell: str, options: argparse.Namespace) -> dict[str, Any]:
    """The outcome of a cell with the learning rate that validation prefers."""
    names = ("steps", "opd_steps", "looks", "prompts", "opd_prompts", "traces", "most", "lessons")
    tried = []
    for rate in options.rates or [RATES[cell.split("-")[1]]]:
        settings = {name: getattr(options, name) for name in names} | {"lr": rate, "split": options.split}
        mark = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
        path = run / "student" / "cells" / f"{cell}-{mark}.pt"
        tried.append(once(path, lambda lr=rate: train(run, cell, lr, options)))
    return max(tried, key=lambda found: found["validation"])


def train(run: Path, cell: str, rate: float, options: argparse.Namespace) -> dict[str, Any]:
    """Train a cell, and what its best checkpoint answers."""
    begin, seed = time.perf_counter(), seed_of(run)
    L.seed_everything(seed, verbose=False)
    size, method = cell.split("-", 1)
    stage = stage_of(run, size, method, partial(torch.optim.AdamW, lr=rate, weight_decay=0.01))
    opd = isinstance(stage, OnPolicy)
    share = method.split("-")[1] if "-" in method else str(options.most) if opd else "0"
    labeller = None if opd or method == "sft" else "k1" if method.endswith("k1") else f"k{options.traces}"
    data = ScoreData(
        run / "data",
        shapes.rubric(),
        batch_size=options.opd_prompts if opd else options.prompts,
        train=str((run / "student" / "data" / f"mix{share}").resolve()),
        labeller=labeller,
        seed=seed,
    )
    steps = options.opd_steps if opd else options.steps
    keep = KeepBest()
    clip = {} if opd else {"gradient_clip_val": 1.0}
    every = {"val_check_interval": max(1, steps // options.looks), "check_val_every_n_epoch": None}
    trainer(steps, callbacks=[keep], num_sanity_val_steps=0, **every, **clip).fit(stage, datamodule=data)
    stage.model.load_state_dict(keep.weights)
    took = time.perf_counter() - begin
    found = {"lr": rate, "validation": keep.value, "step": keep.step, "seconds": round(took, 1)}
    print(cell, found, flush=True)
    return found | answers(stage.model.eval(), run, options)


def stage_of(run: Path, size: str, method: str, optimizer: Any) -> ScoringStage:
    """The stage of a cell."""
    if size == "clip":
        model = compose(tiny_clip(shapes.rubric(), shapes.vocabulary), LinearHead)
    else:
        model = zr.load(run / ("base" if size == "same" else "student/small"))
    kl, near = {"kl": Term(ForwardKL())}, {"near": Term(InterpolatedCrossEntropy())}
    if method == "sft":
        return Supervised(model, terms=near, optimizer=optimizer)
    if method == "opd":
        student = reasoner(model, seed_of(run))
        return OnPolicy(student, zr.load(run / "teacher"), {"score": Term(ReverseKL())}, optimizer=optimizer, seed=seed_of(run))
    return Student(model, terms=kl | near if method.startswith("both") else kl, optimizer=optimizer)


class KeepBest(L.Callback):
    """Keeps the weights of the best validation in memory."""

    def __init__(self) -> None:
        self.value, self.step, self.weights = float("-inf"), 0, {}

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look whether it is better."""
        value = float(trainer.callback_metrics["val/hpa"])
        if value > self.value:
            self.value, self.step = value, trainer.global_step
            self.weights = {name: tensor.clone() for name, tensor in pl_module.model.state_dict().items()}


def answers(model: Any, run: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What a model says of the split's images, the tokens of a score, and the milliseconds of an image."""
    batches = held(run, options.split).batches
    begin = time.perf_counter()
    logits = predict(model, batches).logits
    spent = (time.perf_counter() - begin) / len(logits)
    return {"logits": logits, "tokens": tokens(model, batches[0]), "ms": round(1e3 * spent, 2)}


@torch.inference_mode()
def tokens(model: Any, batch: Any) -> float:
    """Mean number of output tokens of a score: the label's, and the trace's before it, over a batch."""
    if not isinstance(model, ReasoningReward):
        return 1.0
    names = model.rubric.dimensions
    row = torch.arange(len(batch.images)).repeat_interleave(len(names))
    prefix = model.policy.backbone.encode(batch.images, batch.prompts).fork(row)
    rollouts = model.policy.sample(prefix, list(names) * len(batch.images), model.traces, model.rule)
    return 1.0 + model.traces * float(rollouts.mask.sum(-1).float().mean())


def distance(teacher: ScoreDistribution, student: ScoreDistribution, held_out: HeldOut) -> dict[str, float]:
    """Mean KL from the teacher, and the share of pairs that both order alike, over dimensions."""
    index = {name: number for number, name in enumerate(dict.fromkeys(held_out.records))}
    prompt = torch.tensor([index[name] for name in held_out.records]).numpy()
    mu, wanted = student.mean.double().numpy(), teacher.mean.double().numpy()
    alike = [float(hpa(mu[:, d], wanted[:, d], prompt)) for d in range(mu.shape[1])]
    return {"kl": float(kl_divergence(teacher, student).mean()), "alike": sum(alike) / len(alike)}


def held(run: Path, split: str) -> HeldOut:
    rubric = shapes.rubric()
    batches = list(ScoreData(run / "data", rubric, batch_size=16, test=split).test_dataloader())
    return HeldOut(batches, rubric.dimensions, rubric.bins)


def seed_of(run: Path) -> int:
    return int(json.loads((run / "settings.json").read_text())["seed"])


def reasoner(model: Any, seed: int) -> ReasoningReward:
    return reasoning(model, shapes.rubric(reasoning=True), rule=SamplingRule(length=TRACE), seed=seed)


def teacher_of(run: Path, traces: int) -> ReasoningReward:
    teacher = zr.load(run / "teacher")
    assert isinstance(teacher, ReasoningReward)
    return ReasoningReward(teacher.policy, traces, teacher.seed, teacher.rule).eval()


def once(path: Path, make: Any) -> dict[str, Any]:
    """What a file keeps, made if it is not there."""
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        torch.save(make(), path)
    found: dict[str, Any] = torch.load(path, weights_only=True)
    return found


def trainer(steps: int, **options: Any) -> L.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, "logger": False}
    return L.Trainer(max_steps=steps, max_epochs=-1, accelerator="cpu", **quiet, **options)


def table(found: dict[str, Any]) -> Table:
    out = Table(title=f"seed {found['seed']}, {found['machine']}")
    for name in ("cell", "lr", "step", "HPA", "margin HPA", "PLCC", "SRCC", "risd-10 - it", "KL", "alike", "tokens", "ms", "s"):
        out.add_column(name)
    for name, measures in found["measures"].items():
        about, far = found["settings"][name], found["teacher"][name]
        cells = ["{estimate:.3f} [{low:.2f}, {high:.2f}]".format(**measures["overall"][m]) for m in ("hpa",)]
        cells += [f"{measures['overall'][m]['estimate']:.3f}" for m in ("margin_hpa", "plcc", "srcc")]
        diff = found["risd-10 - it"].get(name)
        gap = "" if diff is None else "{estimate:+.3f} [{low:+.3f}, {high:+.3f}]".format(**diff["overall"]["hpa"])
        rest = [f"{far['kl']:.3f}", f"{far['alike']:.3f}", f"{about['tokens']:.1f}", f"{about['ms']:.1f}"]
        settings = [str(about.get(key, "")) for key in ("lr", "step")]
        out.add_row(name, *settings, *cells, gap, *rest, str(about.get("seconds", "")))
    return out


if __name__ == "__main__":
    main()
