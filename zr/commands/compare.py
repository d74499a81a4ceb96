"""``zr compare``: a plan of experiments, run cell by cell and told in one report; interrupted, it goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from zr.commands.comparing.jobs import Runner
    from zr.commands.comparing.plan import Plan

__all__ = ["carry_out", "compare"]


def compare(
    plan: str,
    out: Path | None = None,
    quick: bool = False,
    parallel: int = 2,
    only: list[str] | None = None,
    again: list[str] | None = None,
) -> None:
    """Run a plan of experiments and compare its cells on one held-out split, with paired intervals and every seed singly.

    PLAN is zr:main, zr:generators, zr:search, zr:ablations, zr:curves, zr:sizes, or a YAML file of your own. A loss of yours
    beside all the methods of the paper is a file of a few lines, next to the module that has the loss:

      like: zr:main
      cells:
        mine: {like: sft, options: {model.terms.score.loss: my_losses.Mine}}

    OUT gets results.json, results.md, report.html and a folder for each cell and seed, with its log, model and distributions.
    Plans may share a folder and the cells that both have; the report of the second one lies in a folder with the plan's name.
    Run the same command again after an interruption of any kind: what is done stays. A cell whose settings have changed is
    run again, with all that follows from it. Each cell is a process with one thread, so that neither --parallel nor what else
    runs changes a number. The split that is measured on lies apart from the others and is read once for each cell and seed; the
    report shows some of its images.

    A plan is code, as recipes are: it names classes to import.

    Args:
        plan: of the cells.
        out: its folder; zr-compare/PLAN without it.
        quick: run the plan's short form.
        parallel: processes at a time.
        only: run these cells, and what they need; all of the plan without it.
        again: run these cells again, and all that follows from them.

    Raises:
        FileNotFoundError: no such plan or recipe.
        ValueError: a plan that cannot run, a cell that failed, another run in OUT.
    """
    from rich.console import Console

    from zr.commands.comparing.plan import Plan

    if parallel < 1:
        raise ValueError(f"parallel must be at least 1, got {parallel}")
    found = Plan.load(plan, quick)
    wanted = list(only or found.cells)
    found.needed([*wanted, *(again or ())])
    home = Path("zr-compare") / found.name if out is None else out
    carry_out(found, home, Console(), wanted, again or (), parallel)


def carry_out(
    plan: Plan, home: Path, console: Console, wanted: Sequence[str] | None = None, again: Sequence[str] = (), parallel: int = 2
) -> Runner:
    """Run what is not done of a plan, write its report, and show the first findings.

    Args:
        plan: of the cells.
        home: its folder.
        console: where it is told.
        wanted: cells to run, and what they need; all of the plan for None.
        again: cells to run again, and all that follows from them.
        parallel: processes at a time.

    Raises:
        ValueError: a cell that failed, another run in the folder.
    """
    from zr.commands.comparing.drawing import changes
    from zr.commands.comparing.jobs import Runner, held
    from zr.commands.comparing.page import leads, markdown, page, tables
    from zr.commands.comparing.pictures import pictures
    from zr.commands.comparing.results import gather
    from zr.commands.results import write_json
    from zr.report import write_page
    from zr.report.text import plain

    with held(home) as lock:
        runner = Runner(plan, home, lock, console)
        runner.forget(again)
        failed = None
        try:
            runner.run(wanted or list(plan.cells), parallel)
        except ValueError as error:  # what is done is told all the same
            failed = error
        results = gather(plan, runner)
        if results["cells"] or results["drawings"]:
            place = _place(home, plan)
            write_json(place / "results.json", results)
            (place / "results.md").write_text(markdown(plan, results), encoding="utf-8")
            moved = changes(results["drawings"], runner.folder)
            write_page(place / "report.html", page(plan, results, pictures(results, runner), moved))
    if failed is not None:
        raise failed
    for line in leads(results):
        console.print(plain(line), markup=False, highlight=False)
    if results["cells"] or results["drawings"]:
        for table in [table for group in tables(plan, results).values() for table in group][:2]:
            console.print(table.terminal())
        files = ", ".join(str(place / name) for name in ("report.html", "results.md", "results.json"))
        console.print(plain(f"all tables: {files}"), markup=False)
    return runner


def _place(home: Path, plan: Plan) -> Path:
    """Where a plan's report goes: its folder, or one in it where another plan's report stands there."""
    told = home / "results.json"
    if not told.is_file() or json.loads(told.read_text(encoding="utf-8"))["plan"] == plan.name:
        return home
    (home / plan.name).mkdir(exist_ok=True)
    return home / plan.name
