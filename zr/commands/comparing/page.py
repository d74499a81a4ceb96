"""The report of a plan: what appeared and what did not, then tables; as HTML and as Markdown."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from typing import Any

from zr.commands.comparing.paper import FIGURES
from zr.commands.comparing.plan import Plan
from zr.report import Estimate, Page, Section, Table, hpa_bars, scorer_table
from zr.report.tables import MEASURES, UNDEFINED

__all__ = ["leads", "markdown", "page", "tables"]


def page(plan: Plan, results: Mapping[str, Any]) -> Page:
    """The report.

    Args:
        plan: that was run.
        results: by :func:`zr.commands.comparing.results.gather`.
    """
    found = tables(plan, results)
    sections = [Section(title, tables=group) for title, group in found.items()]
    for seed in map(str, results["seeds"]):
        measured = {name: by[seed] for name, by in results["cells"].items() if seed in by}
        if measured:
            sections.append(Section(f"Dimensions, seed {seed}", tables=[scorer_table(measured)], figures=[hpa_bars(measured)]))
    return Page(f"Plan {plan.name}", leads(results), sections, _facts(plan, results))


def markdown(plan: Plan, results: Mapping[str, Any]) -> str:
    """Findings and tables."""
    lines = [f"# Plan {plan.name}", "", *(f"- {line}" for line in leads(results))]
    for title, group in tables(plan, results).items():
        lines += ["", f"## {title}"]
        for table in group:
            lines += ["", *([f"**{table.title}**", ""] if table.title else []), table.markdown()]
            lines += ["", table.note] if table.note else []
    return "\n".join(lines) + "\n"


def leads(results: Mapping[str, Any]) -> list[str]:
    """What was found, one sentence each: orderings that do not appear, then what is missing, then those that appear."""
    lines = []
    for pair in results["orderings"]:
        if not pair["appears"]:
            seeds = "; ".join(f"seed {seed} {_said(interval)}" for seed, interval in pair["seeds"].items()) or "not run"
            lines.append(f"{pair['lower']} < {pair['higher']} does not appear: {seeds}.")
    if results["missing"]:
        lines.append(f"Not run or failed: {', '.join(results['missing'])}.")
    if results["split"] == "validation":
        lines.append("Measured on the validation split, which also chose the checkpoints: for choosing, not for claims.")
    for pair in results["orderings"]:
        if pair["appears"]:
            seeds = ", ".join(str(Estimate.of(interval, signed=True)) for interval in pair["seeds"].values())
            lines.append(f"{pair['lower']} < {pair['higher']} appears for every seed; HPA higher by {seeds}.")
    return lines or ["No ordering was stated: the tables show each cell and seed."]


def _said(interval: Mapping[str, Any]) -> str:
    """A difference, and what it says."""
    low, high = interval["low"], interval["high"]
    above, below = low is not None and low > 0, high is not None and high < 0
    told = "above" if above else "the other way round" if below else "not told apart"
    return f"{Estimate.of(interval, signed=True)}, {told}"


def tables(plan: Plan, results: Mapping[str, Any]) -> dict[str, list[Table]]:
    """By heading."""
    seeds = [str(seed) for seed in results["seeds"]]
    cells: Mapping[str, Mapping[str, Any]] = results["cells"]
    found = {"Every cell, every seed": [_measures(plan, cells)]}
    if results["differences"]:
        rows = [
            (name, *(_cell(by.get(seed), ("overall", "hpa"), signed=True) for seed in seeds))
            for name, by in results["differences"].items()
        ]
        note = "Mean HPA of the first minus that of the second; 95% intervals of the paired bootstrap over prompts."
        found["Differences"] = [Table("", ("difference", *(f"seed {seed}" for seed in seeds)), rows, note)]
    found["Distributions and cost"] = [_rest(cells)]
    tried = [
        (f"{name}, seed {seed}", ", ".join(f"{rate}: {hpa:.3f}" for rate, hpa in fit["tried"].items()), f"{fit['rate']:g}")
        for name, by in cells.items()
        for seed, fit in ((seed, entry["fit"]) for seed, entry in by.items())
        if fit.get("tried")
    ]
    if tried:
        note = "HPA on the validation split of the best checkpoint of each rate; the best one is what was measured."
        found["Learning rates"] = [Table("", ("cell", "rate: validation", "chosen"), tried, note)]
    return found


def _measures(plan: Plan, cells: Mapping[str, Mapping[str, Any]]) -> Table:
    """HPA, margin HPA, PLCC and SRCC of each cell and seed, and the paper's, where the plan names its row."""
    shown = any(plan.cells[name].paper for name in cells)
    rows: list[Sequence[str | Estimate]] = []
    for name, by in cells.items():
        for seed, entry in by.items():
            row: list[str | Estimate] = [f"{name}, seed {seed}", *(Estimate.of(entry["overall"][key]) for key in MEASURES)]
            rows.append([*row, *([UNDEFINED] * len(MEASURES) if shown else [])])
        if shown and (paper := plan.cells[name].paper):
            published = FIGURES[paper[0], paper[1]]
            rows.append(
                [f"{name}: the paper's {' '.join(paper)}", *[UNDEFINED] * len(MEASURES)]
                + [UNDEFINED if published[key] is None else f"{published[key]:.4f}" for key in MEASURES]
            )
    heads = [*MEASURES.values(), *(f"{head}, the paper's" for head in (MEASURES.values() if shown else ()))]
    note = "Mean over the dimensions; in brackets 95% intervals over resampled prompts."
    if shown:
        note += " The paper's figures are of its own models, sizes and test set, as published: beside ours, not to be reached."
    return Table("", ("cell", *heads), rows, note)


def _rest(cells: Mapping[str, Mapping[str, Any]]) -> Table:
    rows = [
        (
            f"{name}, seed {seed}",
            _cell(entry, ("teacher", "kl")),
            _cell(entry, ("teacher", "alike")),
            *(_number(entry[key]) for key in ("ece", "nll", "rps", "off_scale")),
            f"{entry['tokens']:.1f}",
            f"{entry['time']['ms_per_image']:.1f}",
            f"{entry['parameters'] / 1e6:.2f} M",
            f"{entry['time']['seconds']:.0f}",
        )
        for name, by in cells.items()
        for seed, entry in by.items()
    ]
    heads = ("KL", "alike", "ECE", "NLL", "RPS", "off scale", "tokens", "ms", "parameters", "s")
    note = (
        "KL(teacher || it) in nats and the share of pairs ordered alike, of those that the teacher tells apart; ECE, NLL, RPS "
        "against annotators' votes; probability outside the labels, where a direct model tells it; output tokens of a score; "
        "milliseconds of an image in all dimensions; seconds of training."
    )
    return Table("", ("cell", *heads), rows, note)


def _cell(entry: Mapping[str, Any] | None, path: Sequence[str], signed: bool = False) -> str | Estimate:
    """The interval at a path, or a dash."""
    found: Any = entry
    for key in path:
        if found is None or key not in found:
            return UNDEFINED
        found = found[key]
    return Estimate.of(found, signed)


def _number(value: float | None) -> str:
    return UNDEFINED if value is None else f"{value:.3f}"


def _facts(plan: Plan, results: Mapping[str, Any]) -> list[tuple[str, str]]:
    import torch

    sizes = (f"{split} {size['prompts']} x {size['candidates']}" for split, size in plan.data.items())
    data = plan.data["folder"] if "folder" in plan.data else ", ".join(sizes)
    return [
        ("plan", plan.file.name),
        ("data, prompts x images", data),
        ("measured on", results["split"]),
        ("seeds", ", ".join(map(str, results["seeds"]))),
        ("zr", results["zr"]),
        ("torch", f"{torch.__version__}, one thread for each cell, on {platform.machine()}"),
    ]
