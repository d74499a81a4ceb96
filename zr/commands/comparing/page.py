"""The report of a plan: what appeared and what did not, then tables; as HTML and as Markdown."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from zr.commands.comparing import drawing
from zr.commands.comparing.paper import FIGURES
from zr.commands.comparing.pictures import SECTIONS
from zr.commands.comparing.plan import Plan
from zr.metrics import ReliabilityCurve
from zr.report import (
    Card,
    Change,
    Estimate,
    Figure,
    Page,
    Runs,
    Section,
    Table,
    curves,
    reliability_panels,
    run_dots,
    scorer_table,
)
from zr.report.tables import MEASURES, UNDEFINED

__all__ = ["leads", "markdown", "page", "tables"]

SIZES = 1.25
"""Models with fewer than so many times the parameters of the smallest are of one size."""

KIND = {"axis": "mean HPA", "published": "paper"}
DOTS = "A dot is a seed; the stroke and the number are their mean."
PAPERS = " The hollow mark is the paper's, for its own models and test set: to be seen beside ours, not to be reached."


def page(plan: Plan, results: Mapping[str, Any], cards: Mapping[str, Sequence[Card]], changes: Sequence[Change] = ()) -> Page:
    """The report.

    Args:
        plan: that was run.
        results: by :func:`zr.commands.comparing.results.gather`.
        cards: by :func:`zr.commands.comparing.pictures.pictures`.
        changes: by :func:`zr.commands.comparing.drawing.changes`.
    """
    cells = results["cells"]
    sections = [Section("Quality by method and size", figures=_quality(plan, cells))] if cells else []
    sections += [Section(title, tables=group) for title, group in tables(plan, results).items() if title != drawing.TITLE]
    if results["drawings"]:
        sections.append(drawing.section(results["drawings"], changes))
    if reliable := _reliability(plan, results):
        text = f"All dimensions together, seed {results['seeds'][0]}."
        sections.append(Section("Calibration", text, figures=[reliability_panels(reliable)]))
    if learnt := _learnt(cells):
        text = "Mean HPA on the validation split while training; what was measured is the checkpoint that it prefers."
        sections.append(Section("Learning curves", text, figures=[curves(learnt, alike=True)]))
    sections += [Section(title, _moves(results["pictures"], title), cards=cards[title]) for title in cards]
    by_seed = {seed: {name: by[seed] for name, by in cells.items() if seed in by} for seed in map(str, results["seeds"])}
    of_seeds = [scorer_table(measured, title=f"HPA, seed {seed}") for seed, measured in by_seed.items() if measured]
    if cells:
        sections.append(Section("Dimensions", tables=of_seeds, figures=_dimensions(cells)))
    return Page(f"Plan {plan.name}", leads(results), sections, _facts(plan, results))


def _quality(plan: Plan, cells: Mapping[str, Mapping[str, Any]]) -> list[Figure]:
    """All cells by size, as the paper's figure 1 has them, and the figures that the plan asks for."""
    values = _values({name: [entry["overall"] for entry in by.values()] for name, by in cells.items()})
    paper = {name: FIGURES[cell.paper[0], cell.paper[1]]["hpa"] for name, cell in plan.cells.items() if cell.paper}
    sizes = {
        size: {name: Runs(values[name], paper.get(name)) for name in names if name in values}
        for size, names in _sizes(cells).items()
    }
    asked = {
        title: {panel: {row: Runs(values[name]) for row, name in rows.items() if name in values} for panel, rows in of.items()}
        for title, of in plan.figures.items()
    }
    caption = DOTS + (PAPERS if paper.keys() & values.keys() else "")
    found = [("", sizes, caption), *((title, panels, DOTS) for title, panels in asked.items())]
    return [
        run_dots({name: rows for name, rows in panels.items() if rows}, title, caption, **KIND)
        for title, panels, caption in found
        if any(panels.values())
    ]


def _dimensions(cells: Mapping[str, Mapping[str, Any]]) -> list[Figure]:
    """All cells in each dimension."""
    names = {name: None for by in cells.values() for entry in by.values() for name in entry["dimensions"]}
    panels = {
        dimension: _values({name: [entry["dimensions"][dimension] for entry in by.values()] for name, by in cells.items()})
        for dimension in names
    }
    drawn = {dimension: {name: Runs(found) for name, found in rows.items()} for dimension, rows in panels.items() if rows}
    return [run_dots(drawn, "", DOTS, **KIND | {"axis": "HPA"})] if drawn else []


def _values(lines: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, list[float]]:
    """HPA by cell, of those for which it is defined in every line."""
    found = {name: [line["hpa"]["estimate"] for line in of] for name, of in lines.items()}
    return {name: values for name, values in found.items() if None not in values}


def _sizes(cells: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """Names by size of the models, the largest first."""
    parameters = {name: next(iter(by.values()))["parameters"] for name, by in cells.items()}
    groups: list[list[str]] = []
    for name in sorted(cells, key=lambda name: parameters[name]):
        if not groups or parameters[name] >= SIZES * parameters[groups[-1][0]]:
            groups.append([])
        groups[-1].append(name)
    return {f"{_millions(parameters[of[-1]])} parameters": [name for name in cells if name in of] for of in groups[::-1]}


def _reliability(plan: Plan, results: Mapping[str, Any]) -> dict[str, ReliabilityCurve]:
    """Of the baseline, the teacher and the last cell of each ordering, for the first seed."""
    seed = str(results["seeds"][0])
    found = {name: by[seed] for name, by in results["cells"].items() if seed in by}
    names = dict.fromkeys([plan.baseline, plan.teacher, *(chain[-1] for chain in plan.ordering if chain)])
    return {
        name: ReliabilityCurve(**{key: torch.tensor(part) for key, part in found[name]["reliability"].items()})
        for name in names
        if name in found
    }


def _learnt(cells: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """By cell and seed the steps and HPA of its validations, where it had any."""
    found = {
        name: {f"seed {seed}": entry["fit"]["curve"] for seed, entry in by.items() if entry["fit"].get("curve")}
        for name, by in cells.items()
    }
    return {name: by for name, by in found.items() if by}


def _moves(found: Mapping[str, Any], title: str) -> str:
    """What the images of a section are."""
    gain = "nearer to" if title == SECTIONS["nearer"] else "farther from"
    return (
        f"Where the expected score of {found['cell']} lies {gain} the annotators' than that of {found['baseline']}, by the "
        f"largest steps; each image in the dimension with its largest step. Seed {found['seed']}."
    )


def _moved(found: Mapping[str, Any], name: str) -> Table:
    """The images of a section of pictures, without their pictures."""
    rows = [[line["key"], line["dimension"], f"{line['before']:.2f}", f"{line['after']:.2f}"] for line in found[name]]
    note = f"{_moves(found, SECTIONS[name])} Distances to the annotators' score."
    return Table("", ("image", "dimension", found["baseline"], found["cell"]), rows, note)


def markdown(plan: Plan, results: Mapping[str, Any]) -> str:
    """Findings and tables."""
    lines = [f"# Plan {plan.name}", "", *(f"- {line}" for line in leads(results))]
    moved = results["pictures"] or {}
    pictured = {title: [_moved(moved, name)] for name, title in SECTIONS.items() if moved.get(name)}
    for title, group in (tables(plan, results) | pictured).items():
        lines += ["", f"## {title}"]
        for table in group:
            lines += ["", *([f"**{table.title}**", ""] if table.title else []), table.markdown()]
            lines += ["", table.note] if table.note else []
    return "\n".join(lines) + "\n"


def leads(results: Mapping[str, Any]) -> list[str]:
    """What was found, one sentence each: what does not appear, then what is missing, then what appears."""
    lines, gains = drawing.leads(results["drawings"])
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
    lines += gains
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
    found = {"Every cell, every seed": [_measures(plan, cells)]} if cells else {}
    if results["differences"]:
        rows = [
            (name, *(_cell(by.get(seed), ("overall", "hpa"), signed=True) for seed in seeds))
            for name, by in results["differences"].items()
        ]
        note = "Mean HPA of the first minus that of the second; 95% intervals of the paired bootstrap over prompts."
        found["Differences"] = [Table("", ("difference", *(f"seed {seed}" for seed in seeds)), rows, note)]
    if cells:
        found["Distributions and cost"] = [_rest(cells)]
    if coupled := _coupling(cells):
        found["Coupling of score and reasoning"] = [coupled]
    tried = [
        (f"{name}, seed {seed}", ", ".join(f"{rate}: {hpa:.3f}" for rate, hpa in fit["tried"].items()), f"{fit['rate']:g}")
        for name, by in cells.items()
        for seed, fit in ((seed, entry["fit"]) for seed, entry in by.items())
        if fit.get("tried")
    ]
    if tried:
        note = "HPA on the validation split of the best checkpoint of each rate; the best one is what was measured."
        found["Learning rates"] = [Table("", ("cell", "rate: validation", "chosen"), tried, note)]
    if results["drawings"]:
        found[drawing.TITLE] = drawing.tables(results["drawings"])
    return found


def _measures(plan: Plan, cells: Mapping[str, Mapping[str, Any]]) -> Table:
    """HPA, margin HPA, PLCC and SRCC of each cell and seed, then what the paper reports, where the plan names its row."""
    rows: list[Sequence[str | Estimate]] = []
    for name, by in cells.items():
        for seed, entry in by.items():
            rows.append([f"{name}, seed {seed}", *(Estimate.of(entry["overall"][key]) for key in MEASURES)])
        if paper := plan.cells[name].paper:
            published = FIGURES[paper[0], paper[1]]
            told = (UNDEFINED if published[key] is None else f"{published[key]:.4f}" for key in MEASURES)
            rows.append([f"the paper's {' '.join(paper)}", *told])
    note = "Mean over the dimensions; in brackets 95% intervals over resampled prompts."
    if any(plan.cells[name].paper for name in cells):
        note += (
            " Rows named as the paper's hold what it published, of its own models, sizes and test set: to be seen beside ours, "
            "not to be reached."
        )
    return Table("", ("cell", *MEASURES.values()), rows, note)


def _rest(cells: Mapping[str, Mapping[str, Any]]) -> Table:
    rows = [
        (
            f"{name}, seed {seed}",
            _cell(entry, ("teacher", "kl")),
            _cell(entry, ("teacher", "alike")),
            *(_number(entry[key]) for key in ("ece", "nll", "rps", "off_scale")),
            f"{entry['tokens']:.1f}",
            f"{entry['time']['ms_per_image']:.1f}",
            _millions(entry["parameters"]),
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


def _coupling(cells: Mapping[str, Mapping[str, Any]]) -> Table | None:
    """How far scores move without their trace and with another image's; None where no cell writes one."""
    told = [(f"{name}, seed {seed}", entry["coupling"]) for name, by in cells.items() for seed, entry in by.items()]
    told = [(name, coupling) for name, coupling in told if coupling is not None]
    if not told:
        return None
    keys = [f"{change}_{kind}" for kind in ("kl", "gap") for change in ("removed", "other", "floor")]
    rows = [(name, *(_number(coupling[key]) for key in keys), f"{coupling['images']:,}") for name, coupling in told]
    heads = ("KL, no trace", "KL, another's", "KL, own again", "score, no trace", "score, another's", "score, own again")
    note = (
        "From the score after a trace to that of the same image without a trace, after a trace of another image of the same "
        "prompt, and after a second trace of its own, which is the noise floor: mean KL(q || q') in nats, and how far the "
        "expected score moves. Where the first two are near the third, the reasoning has no say in the score. Measured on the "
        "first images of the split."
    )
    return Table("", ("cell", *heads, "images"), rows, note)


def _cell(entry: Mapping[str, Any] | None, path: Sequence[str], signed: bool = False) -> str | Estimate:
    """The interval at a path, or a dash."""
    found: Any = entry
    for key in path:
        if found is None or key not in found:
            return UNDEFINED
        found = found[key]
    return Estimate.of(found, signed)


def _millions(count: int) -> str:
    return f"{count / 1e6:,.2f} M"


def _number(value: float | None) -> str:
    return UNDEFINED if value is None else f"{value:.3f}"


def _facts(plan: Plan, results: Mapping[str, Any]) -> list[tuple[str, str]]:
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
