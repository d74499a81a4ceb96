"""What is made of stored answers: who moved where, what was learnt, how sure it was; by hand-worked numbers."""

from pathlib import Path

import pytest
import torch
from rich.console import Console
from stored import at, store

from zr.commands.comparing.jobs import Job, Runner
from zr.commands.comparing.plan import Plan
from zr.commands.comparing.results import Answers, gather

KEYS = ["p.a", "p.b", "q.a", "q.b"]
NAN = float("nan")
SCORES = [[4.0, NAN], [2.0, 3.0], [5.0, 1.0], [3.0, 3.0]]
BEFORE = [[2.0, 1.0], [2.0, 3.0], [4.0, 2.0], [1.0, 5.0]]  # off by 2 -, 0 0, 1 1, 2 2
AFTER = [[3.5, 5.0], [4.0, 3.0], [5.0, 1.5], [3.0, 2.5]]  # off by .5 -, 2 0, 0 .5, 0 .5
VOTES = torch.ones(4, 2, 5)


class Done(Runner):
    """What is there is done."""

    def done(self, job: Job) -> bool:
        return (self.folder(job) / "measured.json").is_file()


def plan(**entries) -> Plan:
    cell = {"fit": "zr:supervised", "model": "x", "measure": {}}
    return Plan.of({"cells": dict.fromkeys(("sft", "gdso", "parsed"), cell), "seeds": [3, 4]} | entries)


def stored(home: Path) -> Done:
    """The first seed of all cells, and the second of one."""
    for name, mu in (("sft", BEFORE), ("gdso", AFTER), ("parsed", BEFORE)):
        store(home / "cells" / name / "seed-3", KEYS, at(mu), SCORES, VOTES)
    store(home / "cells" / "sft" / "seed-4", KEYS, at(BEFORE), SCORES, VOTES)
    return Done(plan(), home, 0, Console(quiet=True))


def test_images_that_move_nearer_and_farther_are_named_with_their_distances(tmp_path: Path) -> None:
    stored(tmp_path)
    before, after = (Answers(tmp_path / "cells" / name / "seed-3") for name in ("sft", "gdso"))
    found = after.moved(before, 2)
    told = {name: [tuple(line.values()) for line in lines] for name, lines in found.items()}
    assert list(found["nearer"][0]) == ["key", "dimension", "before", "after"]
    assert [line[:2] for line in told["nearer"]] == [("q.b", "alignment"), ("p.a", "alignment")]
    assert [line[:2] for line in told["farther"][:1]] == [("p.b", "alignment")]
    assert [line[2:] for line in told["nearer"]] == [pytest.approx((2.0, 0.0), abs=1e-5), pytest.approx((2.0, 0.5), abs=1e-5)]
    assert told["farther"][0][2:] == pytest.approx((0.0, 2.0), abs=1e-5)
    assert [line["key"] for line in after.moved(before, 9)["nearer"]] == ["q.b", "p.a", "q.a"]
    assert [line["key"] for line in before.moved(after, 9)["farther"][:3]] == ["q.b", "p.a", "q.a"]
    assert before.moved(before, 9) == {"nearer": [], "farther": []}


def test_pictures_are_those_of_the_teacher_or_the_last_of_the_first_ordering(tmp_path: Path) -> None:
    runner = stored(tmp_path)
    for entries, cell in (
        ({"baseline": "sft", "teacher": "gdso"}, "gdso"),
        ({"baseline": "sft", "ordering": [["sft", "gdso"], ["sft", "parsed"]]}, "gdso"),
    ):
        found = gather(plan(**entries), runner)["pictures"]
        assert (found["cell"], found["baseline"], found["seed"], found["nearer"][0]["key"]) == (cell, "sft", 3, "q.b")
    for entries in ({}, {"baseline": "sft"}, {"teacher": "gdso"}, {"baseline": "sft", "teacher": "sft"}):
        assert gather(plan(**entries), runner)["pictures"] is None
    assert gather(plan(baseline="sft", teacher="gdso", seeds=[4]), runner)["pictures"] is None  # the teacher is not there


def test_a_figure_of_the_plan_compares_its_rows_with_the_first(tmp_path: Path) -> None:
    figures = {"expectation or text": {"GDSO": {"expectation": "gdso", "parsed text": "parsed"}}}
    found = gather(plan(figures=figures), stored(tmp_path))
    assert list(found["differences"]) == ["parsed - gdso"]
    # alignment: p.a over p.b is a tie before and wrong after, q.a over q.b right in both; realism: q.b over q.a right in both
    assert found["differences"]["parsed - gdso"]["3"]["overall"]["pooled_hpa"]["estimate"] == pytest.approx(0.0)
    assert found["missing"] == ["gdso, seed 4", "parsed, seed 4"]


def test_learning_curves_are_read_from_the_log_of_the_run_that_was_kept(tmp_path: Path) -> None:
    runner = stored(tmp_path)
    logs = tmp_path / "cells" / "sft" / "seed-3" / "run" / "logs" / "version_0"
    logs.mkdir(parents=True)
    (logs / "metrics.csv").write_text("step,train/loss,val/hpa\n4,1.5,\n9,,0.5\n19,,0.75\n")
    cells = gather(plan(), runner)["cells"]
    assert cells["sft"]["3"]["fit"]["curve"] == [[10, 0.5], [20, 0.75]]
    assert cells["gdso"]["3"]["fit"]["curve"] == []


def test_points_of_reliability_pool_all_dimensions(tmp_path: Path) -> None:
    sure, unsure = [1.0, 5.0], [2.25, 4.25]  # the top bin has probability 1 and .75
    votes = torch.zeros(2, 2, 5)
    votes[0, 0, :2] = torch.tensor([3, 1])  # .75 of them in the top bin
    votes[0, 1, 3:] = torch.tensor([3, 1])  # .25
    votes[1, 0, 1] = 2  # all
    store(
        tmp_path, ["p.a", "p.b"], at([sure, unsure], elsewhere=0), [[1.0, 4.0], [2.0, NAN]], votes
    )  # the fourth item has no votes
    found = Answers(tmp_path).reliability()
    assert found["confidence"] == pytest.approx([0.75, 1.0])
    assert found["share"] == pytest.approx([1.0, 0.5])
    assert found["weight"] == pytest.approx([1 / 3, 2 / 3])
