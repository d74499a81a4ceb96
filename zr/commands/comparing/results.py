"""The numbers of a plan's finished cells: measures, distance to the teacher, paired differences, orderings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from zr.commands.comparing import drawing
from zr.commands.comparing.cell import DISTRIBUTIONS, DONE, MEASURED, product
from zr.commands.comparing.jobs import Job, Runner
from zr.commands.comparing.plan import Plan
from zr.commands.comparing.validations import validations
from zr.metrics import Choices, ExpectedCalibrationError, bootstrap_interval, compare, coupling_distances, evaluate
from zr.scores import ScoreDistribution
from zr.version import __version__

__all__ = ["Answers", "gather"]

MEASURES = ("ece", "nll", "rps", "off_scale", "coupling", "tokens", "parameters")
PICTURES = 4
"""Pictures of the largest improvements, and as many of the largest failures."""


@dataclass(frozen=True)
class Answers:
    """What one cell and seed answered, as it was stored.

    Args:
        folder: of the job.
    """

    folder: Path

    @cached_property
    def about(self) -> dict[str, Any]:
        """Measures, and names of the images."""
        found: dict[str, Any] = json.loads((self.folder / MEASURED).read_text())
        return found

    @cached_property
    def q(self) -> ScoreDistribution:
        """``(N, D)`` distributions."""
        return ScoreDistribution(self._stored["probs"].log(), self.about["bins"])

    @cached_property
    def mu(self) -> NDArray[np.float64]:
        """``(N, D)`` expected scores."""
        found: NDArray[np.float64] = self.q.mean.double().numpy()
        return found

    @property
    def scores(self) -> NDArray[np.float64]:
        """``(N, D)`` annotated scores; NaN where unknown."""
        found: NDArray[np.float64] = self._stored["scores"].double().numpy()
        return found

    @property
    def votes(self) -> Tensor:
        """``(N, D, K)`` annotators per bin."""
        found: Tensor = self._stored["votes"]
        return found

    @property
    def records(self) -> list[str]:
        """N names of the records that the images belong to."""
        return [key.rsplit(".", 1)[0] for key in self.about["keys"]]

    @cached_property
    def _stored(self) -> Any:
        return load_file(self.folder / DISTRIBUTIONS)

    def reliability(self) -> dict[str, list[float]]:
        """Points of the reliability plot of all dimensions together: ``confidence``, ``share``, ``weight``."""
        metric = ExpectedCalibrationError()
        metric.update(ScoreDistribution(self.q.logits.flatten(0, 1), self.about["bins"]), self.votes.flatten(0, 1))
        return {name: part.tolist() for name, part in metric.curve()._asdict().items()}

    def minus(self, other: Answers) -> dict[str, Any]:
        """The paired difference of two cells' measures, per dimension and overall."""
        choices = {
            name: Choices(np.array(first, int), np.array(second, int), np.array(share))
            for name, (first, second, share) in self.about["choices"].items()
        }
        known = ~np.isnan(self.scores)
        names = self.about["dimensions"]
        return compare(self.mu, other.mu, self.scores, known, self.records, names, choices=choices)

    def moved(self, other: Answers, count: int) -> dict[str, list[dict[str, Any]]]:
        """Images whose expected score is nearer to the annotators' than the other's, and those where it is farther away.

        Args:
            other: cell on the same images.
            count: most images of each kind, each in the dimension in which its score moves most.

        Returns:
            ``nearer`` and ``farther``, the largest move first: ``key``, ``dimension``, ``before`` and ``after`` (the distances
            to the annotators' score of the other and of this one), in score units.
        """
        before, after = (np.abs(mu - self.scores) for mu in (other.mu, self.mu))
        found = {}
        for name, gain in (("nearer", before - after), ("farther", after - before)):
            largest = np.where(np.isnan(gain), 0.0, gain)
            order = np.argsort(-largest.max(1), kind="stable")[:count]
            places = [(i, int(largest[i].argmax())) for i in order.tolist()]
            found[name] = [
                {
                    "key": self.about["keys"][i],
                    "dimension": self.about["dimensions"][d],
                    "before": float(before[i, d]),
                    "after": float(after[i, d]),
                }
                for i, d in places
                if largest[i, d] > 0
            ]
        return found

    def distance(self, teacher: Answers) -> dict[str, Any]:
        """Mean KL(teacher || it) in nats, and the share of the pairs that the teacher tells apart which both order alike."""
        records, names = self.records, self.about["dimensions"]
        alike = evaluate(self.mu, teacher.mu, np.ones_like(self.mu), records, names)["overall"]["hpa"]
        kl = coupling_distances(teacher.q, self.q)[0].mean(-1).double().numpy()
        return {"kl": bootstrap_interval(_mean, kl, kl, records).to_dict(), "alike": alike}


def gather(plan: Plan, runner: Runner) -> dict[str, Any]:
    """The results of all measured cells that are done.

    Returns:
        Plain data. ``cells``: by cell and seed, the table by :func:`zr.metrics.evaluate`, calibration (``ece``, ``nll``,
        ``rps``, points of ``reliability``), ``off_scale`` (None where the model does not tell), ``coupling`` (None where it
        writes no trace), output ``tokens`` of a score, ``parameters``, ``teacher`` (distance to it), ``fit`` (rate, validation
        and its ``curve`` of steps and HPA); what depends on the machine's speed stands under ``time``.
        ``differences``: ``A - B`` by seed, with paired intervals. ``orderings``: of each neighbouring pair the difference of
        HPA by seed, and whether it appears. ``pictures``: of the first seed, what of the teacher, or of the last cell of the
        first ordering, moved most against the baseline (:meth:`Answers.moved`), or None. ``drawings``: of cells that were drawn
        from (:func:`zr.commands.comparing.drawing.gather`). ``missing``: cells and seeds that are not there.
    """
    jobs = [Job(name, seed) for name in plan.measured for seed in plan.seeds]
    answers = {job: Answers(runner.folder(job)) for job in jobs if runner.done(job)}
    cells: dict[str, dict[str, Any]] = {}
    for job, found in answers.items():
        entry = {**found.about["table"], **{name: found.about[name] for name in MEASURES}, "reliability": found.reliability()}
        teacher = answers.get(Job(plan.teacher, job.seed))
        if teacher is not None and job.cell != plan.teacher:
            entry["teacher"] = found.distance(teacher)
        made = json.loads((runner.folder(job) / DONE).read_text())
        entry["fit"] = {name: made[name] for name in ("rate", "validation", "tried") if name in made}
        if plan.cells[job.cell].fit:
            entry["fit"]["curve"] = validations(Path(product(runner.folder(job)))).get("hpa", [])
        entry["time"] = {"seconds": made["seconds"], "ms_per_image": found.about["ms"]}
        cells.setdefault(job.cell, {})[str(job.seed)] = entry
    pairs = [(a, b) for chain in plan.ordering for b, a in pairwise(chain)]
    others = [name for name in plan.measured if plan.baseline and name != plan.baseline]
    pairs += [(name, plan.baseline) for name in others if (plan.baseline, name) not in pairs]
    groups = [list(rows.values()) for panels in plan.figures.values() for rows in panels.values()]
    pairs += [(name, first) for first, *rest in groups for name in rest if (first, name) not in pairs]
    differences: dict[str, dict[str, Any]] = {}
    for first, second in dict.fromkeys(pairs):
        for seed in plan.seeds:
            if {Job(first, seed), Job(second, seed)} <= answers.keys():
                minus = answers[Job(first, seed)].minus(answers[Job(second, seed)])
                differences.setdefault(f"{first} - {second}", {})[str(seed)] = minus
    drawings, undrawn = drawing.gather(plan, runner)
    return {
        "plan": plan.name,
        "zr": __version__,
        "split": plan.split,
        "seeds": list(plan.seeds),
        "cells": cells,
        "differences": differences,
        "orderings": [_ordering(*pair, differences) for chain in plan.ordering for pair in pairwise(chain)],
        "pictures": _pictures(plan, answers),
        "drawings": drawings,
        "missing": [str(job) for job in [*(job for job in jobs if job not in answers), *undrawn]],
    }


def _ordering(lower: str, higher: str, differences: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """By seed the higher cell's mean HPA less the lower one's; the pair appears if each interval is above 0."""
    found = {seed: table["overall"]["hpa"] for seed, table in differences.get(f"{higher} - {lower}", {}).items()}
    appears = bool(found) and all((interval["low"] or 0) > 0 for interval in found.values())
    return {"lower": lower, "higher": higher, "seeds": found, "appears": appears}


def _pictures(plan: Plan, answers: Mapping[Job, Answers]) -> dict[str, Any] | None:
    """What the teacher, or the last cell of the first ordering, moves of what the baseline said, for the first seed."""
    cell = plan.teacher or next((chain[-1] for chain in plan.ordering if chain), "")
    first, second = (Job(name, plan.seeds[0]) for name in (cell, plan.baseline))
    if first == second or not {first, second} <= answers.keys():
        return None
    moved = answers[first].moved(answers[second], PICTURES)
    return {"cell": first.cell, "baseline": second.cell, "seed": first.seed, **moved}


def _mean(values: Any, same: Any, prompt: Any, weight: Any) -> Any:
    return (weight @ values) / weight.sum(-1)
