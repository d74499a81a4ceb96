"""Cells that end with a generator: pictures of the held-out prompts, judged, compared and shown."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zr.commands.comparing.cell import DONE, DRAWN, HELD_OUT, PICTURES, product
from zr.commands.comparing.jobs import Job, Runner
from zr.commands.comparing.plan import DATA, Plan
from zr.commands.comparing.validations import validations

if TYPE_CHECKING:
    from torch import Tensor

    from zr.models import Scorer
    from zr.models.generators import BestOf, FlowGenerator
    from zr.report import Change, Figure, Section, Table

__all__ = ["TITLE", "changes", "draw", "gather", "leads", "section", "tables"]

JUDGE = "judge"
BATCH = 16
SHOWN = 3
"""Pictures of a cell's largest improvements, and as many of its largest losses."""

HELD = "held_out"
"""What the stage calls the scorer that is not optimised."""

FROM_ZERO = ("gap", "drift")
"""What the stage logs of a generator that is nothing at the start of its training."""

TITLE = "Text to image"


def draw(job: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Draw a picture for each prompt of the held-out split, and let the judge and others score it; both go to a file.

    The noise of a picture is drawn from the seed and the prompt's key, as in ``zr draw``: the pictures of two cells of a seed
    start alike.

    Args:
        job: of the cell.
        folder: its folder; the cell's product is there.

    Returns:
        Plain data: ``keys`` and ``prompts`` of the pictures, ``dimensions`` of those who score them, ``ms`` of a picture, and
        ``history``, what the training logged when it validated: by name, steps and values.
    """
    import torch
    from safetensors.torch import save_file

    from zr.data import read_prompts, shapes
    from zr.models import load
    from zr.models.generators.noise import source

    cell = job["cell"]
    prompts = read_prompts(Path(job["needs"][DATA]) / HELD_OUT / job["split"])
    maker = _maker(job, folder)
    begin, made = time.perf_counter(), []
    with torch.inference_mode():
        for part in _parts(len(prompts)):
            some = prompts.select(part)
            images = maker.sample(some.prompts, [source(job["seed"], key, 0) for key in some.keys])
            if not bool(images.isfinite().all()):
                raise ValueError(f"{cell['name']}: a picture of {some.keys[0]}, ... is not finite: look at the generator")
            made.append((images * 255).round().byte())
        seconds = time.perf_counter() - begin
        pictures = torch.cat(made)
        scorers: dict[str, Any] = {JUDGE: shapes.judge}
        scorers |= {name: load(product(Path(job["needs"][name]))).eval() for name in cell["draw"].get("scorers", ())}
        scores = {name: _scores(scorer, pictures, prompts.prompts) for name, scorer in scorers.items()}
    save_file({f"scores/{name}": table for name, table in scores.items()} | {"images": pictures}, folder / PICTURES)
    return {
        "keys": prompts.keys,
        "prompts": prompts.prompts,
        "dimensions": {name: list(scorer.rubric.dimensions) for name, scorer in scorers.items()},
        "ms": round(1e3 * seconds / len(prompts), 2),
        "history": validations(Path(product(folder))) if cell["fit"] else {},
    }


def _maker(job: Mapping[str, Any], folder: Path) -> FlowGenerator | BestOf:
    """What draws a cell's pictures."""
    from zr.commands.draw import MEAN
    from zr.commands.parts import built
    from zr.models import Aggregation, load
    from zr.models.generators import BestOf, FlowGenerator, FullGuidance

    asked = job["cell"]["draw"]
    guidance = FullGuidance(asked["guidance"]) if "guidance" in asked else None
    made = FlowGenerator.from_pretrained(product(folder), steps=asked.get("steps"), guidance=guidance).eval()
    if "best_of" not in asked:
        return made
    text = json.dumps(asked["aggregation"]) if "aggregation" in asked else MEAN
    aggregation = built(Aggregation, text, f"{job['cell']['name']}: draw: aggregation")
    return BestOf(made, load(product(Path(job["needs"][asked["reward"]]))).eval(), aggregation, asked["best_of"])


def _scores(scorer: Scorer, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
    """``(N, D)`` expected scores of pictures ``(N, 3, H, W)`` uint8."""
    import torch

    parts = _parts(len(prompts))
    return torch.cat([scorer(images=list(pictures[part]), prompts=prompts[part]).mean.double() for part in parts])


def _parts(count: int) -> Iterator[slice]:
    return (slice(start, start + BATCH) for start in range(0, count, BATCH))


def gather(plan: Plan, runner: Runner) -> tuple[dict[str, Any], list[Job]]:
    """The numbers of all drawn cells that are done.

    Returns:
        Plain data by cell and seed, and the jobs that are not there. ``judge`` and, by cell, ``scorers``: by ``dimensions`` and
        ``overall`` the mean score (``new``) and, where the cell is compared with another one (``against``), what
        :func:`zr.commands.gsb.compared` tells. ``ending`` and ``history`` of the training; ``shown``: positions of the
        pictures with the largest gain and with the largest loss in the judge's mean score.
    """
    jobs = [Job(name, seed) for name in plan.drawn for seed in plan.seeds]
    there = {job: runner.folder(job) for job in jobs if runner.done(job)}
    told: dict[str, Any] = {}
    for job, folder in there.items():
        against = (plan.cells[job.cell].draw or {}).get("against", "")
        about = json.loads((folder / DRAWN).read_text())
        made = json.loads((folder / DONE).read_text())
        other = there.get(Job(against, job.seed))
        entry = _compared(folder, other, about)
        entry |= {"against": against, "ending": made.get("ending", {}), "history": about["history"]}
        entry["time"] = {"seconds": made["seconds"], "ms_per_image": about["ms"]}
        told.setdefault(job.cell, {})[str(job.seed)] = entry
    return told, [job for job in jobs if job not in there]


def _compared(folder: Path, other: Path | None, about: Mapping[str, Any]) -> dict[str, Any]:
    """What each scorer says of a cell's pictures, and of those of another cell beside them."""
    import numpy as np
    from safetensors.numpy import load_file

    from zr.commands.gsb import compared
    from zr.data import shapes

    band = min(b - a for a, b in pairwise(shapes.rubric().bins)) / 2
    new, keys = load_file(folder / PICTURES), np.array(about["keys"])
    old = {} if other is None else load_file(other / PICTURES)

    def row(name: str, d: int | slice) -> dict[str, Any]:
        mine, *theirs = (
            side[f"scores/{name}"][:, d].reshape(len(keys), -1).mean(1) for side in (new, old) if f"scores/{name}" in side
        )
        return compared(mine, theirs[0], keys, band) if theirs else {"new": float(mine.mean())}

    def rows(name: str) -> dict[str, Any]:
        each = {dimension: row(name, d) for d, dimension in enumerate(about["dimensions"][name])}
        return {"dimensions": each, "overall": row(name, slice(None))}

    found = {name: rows(name) for name in about["dimensions"]}
    entry = {"pictures": len(keys), JUDGE: found.pop(JUDGE), "scorers": found}
    if other is not None:
        gain = (new[f"scores/{JUDGE}"] - old[f"scores/{JUDGE}"]).mean(1)
        order = np.argsort(-gain, kind="stable")
        entry["shown"] = {
            "gains": [int(i) for i in order[:SHOWN] if gain[i] > 0],
            "losses": [int(i) for i in order[::-1][:SHOWN] if gain[i] < 0],
        }
    return entry


def leads(drawings: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """What was found, one sentence each: what disappoints, and what does not.

    Args:
        drawings: by :func:`gather`.
    """
    from zr.report import Estimate

    doubts, joys = [], []
    for cell, by in drawings.items():
        compared = {seed: entry for seed, entry in by.items() if "shown" in entry and not _stopped(entry)}
        if not compared:
            continue
        against = next(iter(compared.values()))["against"]
        short: dict[str, list[str]] = {}
        for seed, entry in compared.items():
            for name, row in entry[JUDGE]["dimensions"].items():
                if not (row["difference"]["low"] or 0) > 0:
                    short.setdefault(name, []).append(f"seed {seed} {Estimate.of(row['difference'], signed=True)}")
        if short:
            where = "; ".join(f"{name} {', '.join(seeds)}" for name, seeds in short.items())
            doubts.append(f"{cell} does not gain on {against} in every dimension, by the judge: {where}.")
        else:
            told = []
            for seed, row in ((seed, entry[JUDGE]["overall"]) for seed, entry in compared.items()):
                gain, wins = (Estimate.of(row[key], signed=True) for key in ("difference", "gsb"))
                told.append(f"seed {seed} mean {gain}, Good-Same-Bad {wins}")
            joys.append(f"{cell} gains on {against} in every dimension, by the judge: {'; '.join(told)}.")
    return doubts + _stops(drawings), joys


def _stopped(entry: Mapping[str, Any]) -> list[str]:
    """The alarms that ended a training, as what they watch and their lines."""
    return [
        f"{alarm['monitor']} " + (f"above {alarm['above']:g}" if alarm["above"] is not None else f"below {alarm['below']:g}")
        for alarm in entry["ending"].get("alarms", ())
        if alarm["stopped"]
    ]


def _stops(drawings: Mapping[str, Any]) -> list[str]:
    """A sentence for each training that an alarm ended."""
    from zr.report import Estimate

    lines = []
    for cell, by in drawings.items():
        for seed, entry in by.items():
            alarms = _stopped(entry)
            if not alarms:
                continue
            ending, gains = entry["ending"], {name: entry["history"][f"gain/{name}"][-1][1] for name in _gains(entry)}
            what = f"stopped by its alarm, {' and '.join(alarms)}, at step {ending['steps']} of {ending['of']}"
            line = f"{cell}, seed {seed}: {what}"
            rises = [f"{'the held-out scorer' if name == HELD else name} {gain:+.2f}" for name, gain in gains.items()]
            line += f"; rise in standard deviations: {', '.join(rises)}" if rises else ""
            if "shown" in entry:
                line += f"; the judge's mean {Estimate.of(entry[JUDGE]['overall']['difference'], signed=True)}"
            lines.append(f"{line}.")
    return lines


def _gains(entry: Mapping[str, Any]) -> list[str]:
    """Names of the rewards, and of what is held out, whose gain the training logged."""
    return sorted((name.removeprefix("gain/") for name in entry["history"] if name.startswith("gain/")), key=HELD.__eq__)


def tables(drawings: Mapping[str, Any]) -> list[Table]:
    """The judge's scores of each cell and seed, and what the cells gain on those that they are compared with.

    Args:
        drawings: by :func:`gather`; at least one.
    """
    from zr.report import Estimate, Table
    from zr.report.tables import UNDEFINED

    entries = [(cell, seed, entry) for cell, by in drawings.items() for seed, entry in by.items()]
    names = list(entries[0][2][JUDGE]["dimensions"])
    others = list(dict.fromkeys(name for _, _, entry in entries for name in entry["scorers"]))

    def rows(entry: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        judged = entry[JUDGE]
        return [*(judged["dimensions"][name] for name in names), judged["overall"]]

    def beside(entry: Mapping[str, Any], tell: Callable[[Mapping[str, Any]], str | Estimate]) -> list[str | Estimate]:
        return [tell(entry["scorers"][name]["overall"]) if name in entry["scorers"] else UNDEFINED for name in others]

    def gain(row: Mapping[str, Any]) -> str | Estimate:
        return Estimate.of(row["difference"], signed=True) if "difference" in row else UNDEFINED

    def steps(entry: Mapping[str, Any]) -> str:
        return f"{entry['ending']['steps']}{', alarm' if _stopped(entry) else ''}" if entry["ending"] else UNDEFINED

    means = [
        (
            f"{cell}, seed {seed}",
            *(f"{row['new']:.3f}" for row in rows(entry)),
            *beside(entry, lambda row: f"{row['new']:.3f}"),
            steps(entry),
            f"{entry['time']['seconds']:.0f}",
            f"{entry['time']['ms_per_image']:.1f}",
        )
        for cell, seed, entry in entries
    ]
    gains: dict[str, list[Sequence[str | Estimate]]] = {}
    for cell, seed, entry in entries:
        if "shown" in entry:
            wins = Estimate.of(entry[JUDGE]["overall"]["gsb"], signed=True)
            row = (f"{cell}, seed {seed}", *map(gain, rows(entry)), wins, *beside(entry, gain))
            gains.setdefault(f"Gains on {entry['against']}", []).append(row)
    by = tuple(f"by {name}" for name in others)
    note = "Mean scores by the world's judge, which nobody optimises"
    note += f", and beside it by {' and '.join(others)}, mean over the dimensions" if others else ""
    note += "; steps and seconds of training; milliseconds of a picture."
    found = [Table("Scores", ("cell", *names, "mean", *by, "steps", "s", "ms"), means, note)]
    note = (
        "Each picture against the other cell's of the same prompt and noise; 95% intervals of the bootstrap over prompts. "
        "Good-Same-Bad of the judge's mean: the same is what differs by half a bin at most."
    )
    heads = ("cell", *names, "mean", "Good-Same-Bad", *by)
    return [*found, *(Table(title, heads, lines, note) for title, lines in gains.items())]


def section(drawings: Mapping[str, Any], changes: Sequence[Change]) -> Section:
    """The part of the report that is about generators.

    Args:
        drawings: by :func:`gather`; at least one.
        changes: by :func:`changes`.
    """
    from zr.report import Section

    return Section(TITLE, " ".join(_stops(drawings)), tables(drawings), _figures(drawings), changes=changes)


def _figures(drawings: Mapping[str, Any]) -> list[Figure]:
    """Of each training by rewards: expected scores over the run, gains, and what is watched beside its alarms' lines."""
    from zr.report import curves

    found = []
    for cell, by in drawings.items():
        for seed, entry in by.items():
            history, panels = entry["history"], {}
            for scorer, names in _scored(history, list(entry[JUDGE]["dimensions"])).items():
                panels[f"expected scores by {scorer.replace('_', ' ')}"] = {
                    name: [(0, history[f"start/{scorer}/{name}"][0][1]), *history[f"{scorer}/{name}"]] for name in names
                }
            if gains := _gains(entry):
                rises = {name.replace("_", " "): [(0, 0.0), *history[f"gain/{name}"]] for name in gains}
                panels["gain, in standard deviations"] = rises
            for name, bounds in _watched(entry).items():
                line = [*([(0, 0.0)] if name in FROM_ZERO else []), *history[name]]
                panels[name] = {name: line}
                panels[name] |= {f"an alarm's line, {bound:g}": [(line[0][0], bound), (line[-1][0], bound)] for bound in bounds}
            if panels:
                title = f"{cell}, seed {seed}: validation over the run (figure 5 of the paper)"
                found.append(curves(panels, title))
    return found


def _watched(entry: Mapping[str, Any]) -> dict[str, list[float]]:
    """By name of a measure of validation the lines of its alarms; the gap of all that have one."""
    found: dict[str, list[float]] = {"gap": []} if "gap" in entry["history"] else {}
    for alarm in entry["ending"].get("alarms", ()):
        name = alarm["monitor"].removeprefix("val/")
        if name in entry["history"]:
            found.setdefault(name, []).extend(alarm[end] for end in ("above", "below") if alarm[end] is not None)
    return found


def _scored(history: Mapping[str, Any], order: Sequence[str]) -> dict[str, list[str]]:
    """By name of a reward, its dimensions, the world's in their order; what is held out comes last."""
    found: dict[str, list[str]] = {}
    for name in history:
        match name.split("/"):
            case ["start", scorer, dimension]:
                found.setdefault(scorer, []).append(dimension)
    ranks = {name: rank for rank, name in enumerate(order)}
    ranked = {scorer: sorted(names, key=lambda name: ranks.get(name, len(ranks))) for scorer, names in found.items()}
    return dict(sorted(ranked.items(), key=lambda item: item[0] == HELD))


def changes(drawings: Mapping[str, Any], folder: Callable[[Job], Path]) -> list[Change]:
    """The pictures of the first seed that gained and lost most, beside those they are compared with.

    Args:
        drawings: by :func:`gather`.
        folder: of a job, where its pictures are.
    """
    from safetensors.torch import load_file

    from zr.report import Card, Change

    seeds = [seed for by in drawings.values() for seed, entry in by.items() if "shown" in entry]
    found = []
    for cell, entry in ((cell, by[seeds[0]]) for cell, by in drawings.items() if seeds and "shown" in by.get(seeds[0], {})):
        names = (entry["against"], cell)
        before, after = (folder(Job(name, int(seeds[0]))) for name in names)
        about = json.loads((after / DRAWN).read_text())
        stored = [load_file(place / PICTURES) for place in (before, after)]
        for kind, positions in entry["shown"].items():
            for i in positions:
                prompt = about["prompts"][i]
                old, new = (Card(prompt, (), side["images"][i], name) for side, name in zip(stored, names, strict=True))
                told = zip(*(side[f"scores/{JUDGE}"][i].tolist() for side in stored), strict=True)
                scores = dict(zip(about["dimensions"][JUDGE], told, strict=True))
                title = f"{cell}, seed {seeds[0]}, one of the largest {kind}: {about['keys'][i]}"
                found.append(Change(old, new, scores, title))
    return found
