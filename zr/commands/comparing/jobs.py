"""Running the cells of a plan: one process for each cell and seed, some at a time; what is done is known by its digest."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from zr.commands.comparing.cell import DONE, DRAWN, JOB, LOG, MEASURED, TRIED, digest
from zr.commands.comparing.plan import Plan
from zr.commands.results import write_json
from zr.report.text import plain

__all__ = ["Job", "Runner", "held"]

PATIENCE = 10.0
"""Seconds to wait for the processes of a run that was killed, which end with it."""

TAIL = 15
"""Last lines of a log that an error shows."""

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


@dataclass(frozen=True, order=True)
class Job:
    """A cell with a seed."""

    cell: str
    seed: int

    def __str__(self) -> str:
        return f"{self.cell}, seed {self.seed}"


@contextmanager
def held(out: Path) -> Iterator[int]:
    """Hold a plan's folder, whose lock its processes share: a run that was killed holds it until the last of them has ended.

    Raises:
        ValueError: another run has it.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as file:
        end = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise ValueError(f"another zr compare is writing to {out}: wait for it, or choose another folder") from None
                time.sleep(0.05)
        yield file.fileno()


class Runner:
    """Runs what is not done.

    Args:
        plan: of the cells.
        out: its folder.
        lock: that its processes shall hold too.
        console: where it is told.
    """

    def __init__(self, plan: Plan, out: Path, lock: int, console: Console) -> None:
        self.plan = plan
        self.out = out
        self.lock = lock
        self.console = console

    def folder(self, job: Job) -> Path:
        """Where a job keeps what it makes."""
        return self.out / "cells" / job.cell / f"seed-{job.seed}"

    def done(self, job: Job) -> bool:
        """Whether its files are there, of these settings and of these settings of all that it follows from."""
        cell, place = self.plan.cells[job.cell], (job.cell, job.seed)
        wanted = {DONE: self.plan.digest(*place)}
        wanted |= {} if cell.measure is None else {MEASURED: self.plan.measured_digest(*place)}
        wanted |= {} if cell.draw is None else {DRAWN: self.plan.drawn_digest(*place)}
        return all(digest(self.folder(job) / file) == made for file, made in wanted.items())

    def forget(self, cells: Sequence[str]) -> None:
        """Let cells, and what follows from them, be run again; of a cell whose pictures they score only the drawing."""
        again = self.plan.following(cells)
        for name, cell in self.plan.cells.items():
            files = (DONE, MEASURED, DRAWN) if name in again else (DRAWN,) if again & set(cell.needs) else ()
            for job in (Job(name, seed) for seed in self.plan.seeds):
                for tried in self.folder(job).glob(f"run-*/{TRIED}") if name in again else ():
                    tried.unlink()
                for file in files:
                    (self.folder(job) / file).unlink(missing_ok=True)

    def run(self, cells: Sequence[str], parallel: int) -> None:
        """Run cells and what they need, with every seed.

        Args:
            cells: names.
            parallel: processes at a time, each with one thread.

        Raises:
            ValueError: a cell failed; the others that do not need it have been run.
        """
        needed = self.plan.needed(cells)
        jobs = [Job(name, seed) for seed in self.plan.seeds for name in self.plan.cells if name in needed]
        finished = {job for job in jobs if self.done(job)}
        waiting = [job for job in jobs if job not in finished]
        failed: list[Job] = []
        running: dict[Job, tuple[subprocess.Popen[bytes], float]] = {}
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self.console) as bar:
            task = bar.add_task("cells", total=len(jobs), completed=len(finished))
            try:
                while waiting or running:
                    ready = [j for j in waiting if all(Job(n, j.seed) in finished for n in self.plan.cells[j.cell].needs)]
                    for job in ready[: parallel - len(running)]:
                        waiting.remove(job)
                        running[job] = (self._start(job), time.monotonic())
                    if not running:
                        break
                    bar.update(task, description=plain(" | ".join(str(job) for job in running)))
                    for job, (process, begin) in list(running.items()):
                        code = process.poll()
                        if code is None:
                            continue
                        running.pop(job)[0].communicate()  # closes its pipe
                        if code == 0 and self.done(job):
                            finished.add(job)
                            bar.advance(task)
                            bar.console.print(plain(f"{job}: {time.monotonic() - begin:.0f} s"), markup=False, highlight=False)
                        else:
                            failed.append(job)
                            bar.console.print(plain(f"{job}: failed"), style="red", markup=False)
                    time.sleep(0.02)
            finally:
                for process, _ in running.values():
                    process.kill()
                    process.communicate()
        if failed:
            raise ValueError(self._failure(failed, waiting))

    def _start(self, job: Job) -> subprocess.Popen[bytes]:
        folder = self.folder(job)
        folder.mkdir(parents=True, exist_ok=True)
        cell = self.plan.cells[job.cell]
        write_json(
            folder / JOB,
            {
                "digest": self.plan.digest(job.cell, job.seed),
                "measured": self.plan.measured_digest(job.cell, job.seed),
                "drawn": self.plan.drawn_digest(job.cell, job.seed),
                "trials": self.plan.trials(job.cell, job.seed),
                "seed": job.seed,
                "cell": asdict(cell),
                "recipes": [str(path) for path in self.plan.recipes(cell)],
                "needs": {need: str(self.folder(Job(need, job.seed)).resolve()) for need in cell.needs},
                "data": self.plan.data,
                "split": self.plan.split,
                "measure": cell.measure,
                "modules": str(self.plan.file.parent.resolve()),
            },
        )
        with (folder / LOG).open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "zr.commands.comparing.cell", str(folder.resolve())],
                stdin=subprocess.PIPE,  # held open: the process ends when this one does
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **dict.fromkeys(THREADS, "1")},
                pass_fds=(self.lock,),
            )

    def _failure(self, failed: Sequence[Job], waiting: Sequence[Job]) -> str:
        """One error: the first failure's last lines, and what else did not come to run."""
        first = failed[0]
        log = self.folder(first) / LOG
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:]
        others = f"; also failed: {'; '.join(map(str, failed[1:]))}" if failed[1:] else ""
        left = f"; not run, since they need it: {'; '.join(map(str, waiting))}" if waiting else ""
        return f"cell {first} failed{others}{left}. The last lines of {log}:\n" + "\n".join(lines)
