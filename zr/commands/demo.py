"""``zr demo``: the main job on the built-in world, from shards to a report; interrupted, it goes on where it stopped."""

from __future__ import annotations

import csv
import json
import logging
import platform
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from zr.commands.results import write_json
from zr.version import __version__

if TYPE_CHECKING:
    from torch import Tensor

    from zr.commands.measuring import HeldOut
    from zr.report import Table

__all__ = ["demo"]

PROMPTS = {"base": 5000, "train": 150, "validation": 100, "test": 250}
"""Prompts of each split."""

CANDIDATES = {"base": 2, "train": 4, "validation": 4, "test": 4}
"""Images of each prompt. The base model's lessons have many prompts, the annotated splits many pairs."""

TRACE = 24
"""Most tokens of a trace in this world; the longest that it teaches has 16."""

DONE = "done"
"""File in a run's folder that says that its training came to an end: its best model is there long before."""


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
            (what, folder / name / DONE, lambda name=name, start=start: _fit(folder, name, start, seed))
            for name, start, what in (
                ("look", "", "base model, first half: learn to look (zr fit --config zr:look)"),
                ("base", "look", "base model, second half: all dimensions (zr fit --config zr:base)"),
                ("supervised", "base", "supervised score distributions (zr fit --config zr:supervised)"),
            )
        ),
        ("measure on held-out prompts", folder / "results.json", lambda: _measure(folder, seed)),
        ("report", folder / "report.html", lambda: _report(folder)),
    ]
    settings = {"zr": __version__, "seed": seed, "prompts": PROMPTS, "candidates": CANDIDATES}
    _same_settings(folder, settings)
    with warnings.catch_warnings():
        _quiet()
        took = _run(console, parts, seconds)
    _show(console, folder, took)


def _run(console: Console, parts: list[tuple[str, Path, Callable[[], None]]], seconds: Path) -> dict[str, float]:
    """Run the parts that are not done; the seconds that each took, those of earlier runs included."""
    took: dict[str, float] = json.loads(seconds.read_text()) if seconds.is_file() else {}
    for number, (what, product, action) in enumerate(parts, start=1):
        if product.exists():
            console.print(f"[dim]{number}/{len(parts)} {what}: done[/dim]")
            continue
        console.print(f"[bold]{number}/{len(parts)} {what}[/bold]")
        begin = time.perf_counter()
        action()
        took[what.split(":")[0].split(" (")[0]] = round(time.perf_counter() - begin, 1)
        write_json(seconds, took)
    return took


def _same_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Refuse to mix two runs in one folder."""
    file = folder / "settings.json"
    folder.mkdir(parents=True, exist_ok=True)
    if file.is_file() and (found := json.loads(file.read_text())) != settings:
        raise ValueError(f"{folder} holds a demo with other settings ({found}): choose another folder, or remove it")
    file.write_text(json.dumps(settings) + "\n")


def _quiet() -> None:
    """Silence what is not about the job: the demo tells its own story."""
    import lightning.pytorch  # noqa: F401 (its import sets the levels that are changed here)
    import transformers

    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")


def _write(folder: Path, seed: int) -> None:
    from rich.progress import track

    from zr.data import shapes, write_shards

    staging = folder.with_name(f".{folder.name}-partial")  # the folder appears when all its splits are there
    shutil.rmtree(staging, ignore_errors=True)
    for split, count in PROMPTS.items():
        records = shapes.records(split, count, CANDIDATES[split], seed=seed)  # type: ignore[arg-type]
        write_shards(track(records, split, total=count), staging, shapes.rubric().scale, split=split)
    staging.rename(folder)


def _fit(folder: Path, name: str, start: str, seed: int) -> None:
    from zr.commands.training import run

    shutil.rmtree(folder / name, ignore_errors=True)  # of a training that was interrupted
    options = [
        "--trainer.enable_model_summary=false",
        "--trainer.devices=1",  # the small world has fewer shards than a large machine has devices
        "--seed_everything",
        str(seed),
        "--folder",
        str(folder / "data"),
        "--run",
        str(folder / name),
    ]
    run(["fit", "--config", f"zr:{name}", *options, *(["--start", str(folder / start)] if start else [])])
    (folder / name / DONE).touch()


def _held_out(folder: Path) -> HeldOut:
    from zr.commands.measuring import HeldOut
    from zr.data import ScoreData, shapes

    rubric = shapes.rubric()
    return HeldOut(list(ScoreData(folder / "data", rubric, batch_size=16).test_dataloader()), rubric.dimensions, rubric.bins)


def _measure(folder: Path, seed: int) -> None:
    """Score the test images by three scorers, and write their measures and distributions."""
    from rich.progress import track
    from safetensors.torch import save_file

    from zr.commands.measuring import predict
    from zr.data import shapes
    from zr.metrics import compare
    from zr.models import SamplingRule, Scorer, load, reasoning

    held_out = _held_out(folder)
    base, tuned = load(folder / "base"), load(folder / "supervised")
    reasoner = reasoning(base, shapes.rubric(reasoning=True), rule=SamplingRule(length=TRACE), seed=seed)
    scorers: dict[str, Scorer] = {"zero-shot": base, "zero-shot, reasoning": reasoner, "supervised": tuned}
    found = {name: predict(scorer, track(held_out.batches, name)) for name, scorer in scorers.items()}
    scores = held_out.scores.double().numpy()
    known = ~held_out.scores.isnan().numpy()
    pair = (found["supervised"].mean.double().numpy(), found["zero-shot"].mean.double().numpy())
    results = {
        "methods": {name: held_out.table(q.mean) for name, q in found.items()},
        "noise-free rubric": held_out.table(_true_scores(seed)),
        "supervised - zero-shot": compare(*pair, scores, known, held_out.records, shapes.DIMENSIONS),
    }
    save_file({name: q.probs.contiguous() for name, q in found.items()}, folder / "distributions.safetensors")
    write_json(folder / "results.json", results)


def _true_scores(seed: int) -> Tensor:
    """``(N, D)`` scores of the test images by the world's rubric: the ceiling.

    Images that the rubric scores alike are told apart at random: HPA counts a tie as wrong, and nobody can do better than
    chance on a pair that only the annotators' noise orders.
    """
    import torch

    from zr.data import shapes

    drawn = shapes.scenes("test", PROMPTS["test"], CANDIDATES["test"], seed=seed)
    true = torch.tensor([list(shapes.true_scores(s, p).values()) for p, several in drawn for s in several], dtype=torch.float64)
    return true + 1e-3 * torch.rand(true.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _report(folder: Path) -> None:
    """One HTML file: what was found, tables, figures, and images with their distributions."""
    import torch
    from safetensors.torch import load_file

    from zr.metrics import ExpectedCalibrationError
    from zr.report import Page, Section, cards, curves, dimension_table, hpa_bars, reliability_panels, scatter, write_page
    from zr.scores import ScoreDistribution

    results = json.loads((folder / "results.json").read_text())
    held_out = _held_out(folder)
    names, bins = held_out.dimensions, held_out.bins
    q = ScoreDistribution(load_file(folder / "distributions.safetensors")["supervised"].log(), bins)
    reliability = {}
    for index, name in enumerate(names):
        metric = ExpectedCalibrationError()
        metric.update(q[:, index], held_out.votes[:, index])
        reliability[name] = metric.curve()
    ceiling = {name: row["hpa"]["estimate"] for name, row in results["noise-free rubric"]["dimensions"].items()}
    error = (q.mean - held_out.scores).abs().mean(-1)
    order = error.argsort().tolist()
    shown = [*order[:2], *order[len(order) // 2 : len(order) // 2 + 2], *order[-2:]]  # nearest, typical, farthest
    images = [image for batch in held_out.batches for image in batch.images]
    prompts = [prompt for batch in held_out.batches for prompt in batch.prompts]
    keys = [key for batch in held_out.batches for key in batch.keys]
    pictures = cards(
        q[torch.tensor(shown)],
        [prompts[i] for i in shown],
        names,
        images=[images[i] for i in shown],
        votes=held_out.votes[shown],
        scores=held_out.scores[shown],
        titles=[keys[i] for i in shown],
    )
    gain = results["supervised - zero-shot"]
    page = Page(
        title="Score distributions on the built-in world",
        lead=_findings(results),
        sections=[
            Section("Order of image pairs", figures=[hpa_bars(results["methods"], ceiling)], tables=_tables(results)),
            Section("Against zero-shot", tables=[dimension_table(gain, "Supervised minus zero-shot", difference=True)]),
            Section(
                "Distributions",
                "Two test images each whose expected scores are nearest to the annotators', typical, and farthest.",
                cards=pictures,
            ),
            Section(
                "Agreement with the annotators",
                figures=[
                    scatter(q.mean, held_out.scores, ~held_out.scores.isnan(), names, bins),
                    reliability_panels(reliability),
                ],
            ),
            Section("Training of the supervised model", figures=[curves(_history(folder / "supervised"))]),
        ],
        facts=_facts(folder),
    )
    write_page(folder / "report.html", page)


def _tables(results: dict[str, Any]) -> list[Table]:
    """The scorers' HPA, and all measures of the supervised model."""
    from zr.report import dimension_table, scorer_table

    scorers = {**results["methods"], "noise-free rubric": results["noise-free rubric"]}
    return [
        scorer_table(scorers, "hpa", "HPA of each scorer"),
        dimension_table(results["methods"]["supervised"], "All measures of the supervised model"),
    ]


def _findings(results: dict[str, Any]) -> list[str]:
    """What the numbers say, the disappointing first."""
    gain = results["supervised - zero-shot"]["dimensions"]
    clear = [name for name, row in gain.items() if (row["hpa"]["low"] or 0) > 0]
    unclear = [name for name in gain if name not in clear]
    overall = {name: table["overall"]["hpa"]["estimate"] for name, table in results["methods"].items()}
    best = results["noise-free rubric"]["overall"]["hpa"]["estimate"]
    lines = []
    if unclear:
        lines.append(f"Supervision does not gain more than its interval in: {', '.join(unclear)}.")
    if clear:
        lines.append(f"Supervision orders image pairs better than zero-shot, beyond the interval, in: {', '.join(clear)}.")
    lines.append(
        f"Mean HPA on held-out prompts: supervised {overall['supervised']:.3f}, zero-shot {overall['zero-shot']:.3f}, "
        f"zero-shot with reasoning {overall['zero-shot, reasoning']:.3f}. The noise-free rubric itself reaches {best:.3f} "
        "against these annotators."
    )
    return lines


def _history(run: Path) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Curves from the newest log of a run."""
    path = max(run.glob("logs/version_*/metrics.csv"), key=lambda file: file.stat().st_mtime)
    wanted = {
        "loss": {"training": "train/loss"},
        "mean HPA": {"validation": "val/hpa"},
        "mean PLCC": {"validation": "val/plcc"},
    }
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return {
        title: {name: [(float(r["step"]), float(r[key])) for r in rows if r.get(key)] for name, key in series.items()}
        for title, series in wanted.items()
    }


def _facts(folder: Path) -> list[tuple[str, str]]:
    import torch

    settings = json.loads((folder / "settings.json").read_text())
    return [
        ("command", f"zr demo --seed {settings['seed']}"),
        ("prompts per split", ", ".join(f"{name} {count}" for name, count in settings["prompts"].items())),
        ("images per prompt", "4, each scored by five simulated annotators; highest and lowest dropped, then the mean"),
        ("zr", __version__),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads on {platform.machine()}"),
    ]


def _show(console: Console, folder: Path, took: dict[str, float]) -> None:
    """The tables that a reader wants first."""
    results = json.loads((folder / "results.json").read_text())
    for table in _tables(results):
        console.print(table.terminal())
    console.print(f"{sum(took.values()):.0f} s in all: " + ", ".join(f"{name} {value:.0f}" for name, value in took.items()))
    console.print(f"model {folder / 'supervised'} (for zr.load), numbers {folder / 'results.json'}, {folder / 'report.html'}")
