"""`zr compare` as users run it: real processes, a killed run, a loss of one's own, a test split that is read once."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import zr
from zr.cli import main
from zr.commands.compare import compare
from zr.commands.comparing.jobs import held
from zr.data import shapes
from zr.models import ScoreTokenHead, compose, tiny_qwen3_vl

LOSS = """
import torch
from zr.losses import ItemLoss, SquaredExpectationLoss

class Mine(ItemLoss):
    def forward(self, prediction, target):
        return 0.5 * SquaredExpectationLoss()(prediction, target)
"""
RECORD = """
import os, sys

def opened(event, args):
    if event == "open" and "held-out" in str(args[0]) and str(args[0]).endswith(".tar"):
        with os.fdopen(os.open(os.environ["OPENED"], os.O_APPEND | os.O_CREAT | os.O_WRONLY), "a") as file:
            file.write(f"{sys.argv[-1]} {args[1]}\\n")

sys.addaudithook(opened)
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder with a model to start from, and a loss of a user's own."""
    compose(tiny_qwen3_vl(shapes.rubric(), shapes.vocabulary, hidden_size=32, layers=1), ScoreTokenHead).save_pretrained(
        tmp_path / "start"
    )
    (tmp_path / "my_losses.py").write_text(LOSS)
    return tmp_path


def written(home: Path, name: str = "plan", **entries) -> str:
    """A tiny plan."""
    size = {"prompts": 3, "candidates": 2}
    plan = {
        "seeds": [0],
        "data": dict.fromkeys(("train", "validation", "test"), size) | {"test": {"prompts": 6, "candidates": 2}},
        "options": {"trainer.max_epochs": 1, "trainer.accelerator": "cpu", "trainer.enable_checkpointing": False}
        | {"trainer.log_every_n_steps": 1},
        "cells": {
            "sft": {"fit": ["zr:supervised", "zr:sft"], "model": str(home / "start"), "measure": {}},
            "mine": {"like": "sft", "options": {"model.terms.score.loss": "my_losses.Mine"}},
        },
    }
    (home / f"{name}.yaml").write_text(yaml.safe_dump(plan | entries, sort_keys=False))
    return str(home / f"{name}.yaml")


def numbers(out: Path):
    """The results without what depends on the machine's speed."""
    found = json.loads((out / "results.json").read_text())
    for by in found["cells"].values():
        for entry in by.values():
            del entry["time"]
    return found


def command(plan: str, out: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "zr.cli", "compare", plan, "--out", str(out), *options]


def test_a_loss_of_ones_own_is_one_more_line_and_the_test_split_is_read_once(home: Path, monkeypatch, capfd) -> None:
    (home / "sitecustomize.py").write_text(RECORD)
    monkeypatch.setenv("OPENED", str(home / "opened"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(home), str(Path(zr.__file__).parents[1])]))
    plan, out = written(home, ordering=[["sft", "sft"], ["mine", "sft"]]), home / "out"
    compare(plan, out, parallel=2)
    opened = [line.split() for line in (home / "opened").read_text().splitlines()]
    reads = sorted(Path(place).parent.name for place, mode in opened if "r" in mode)
    assert [name for name in reads if name != "data"] == ["mine", "sft"]  # which data writes
    found = json.loads((out / "results.json").read_text())
    assert (list(found["cells"]), found["missing"]) == (["sft", "mine"], [])
    logs = [next((out / "cells" / name / "seed-0").rglob("metrics.csv")).read_text() for name in ("sft", "mine")]
    assert "train/score" in logs[0]
    assert logs[0] != logs[1]
    model = zr.load(out / "cells" / "mine" / "seed-0" / "run")
    assert model.rubric.dimensions == shapes.DIMENSIONS
    assert not found["orderings"][0]["appears"]  # nothing is better than itself
    for text in ((out / "results.md").read_text().splitlines()[2], capfd.readouterr().out):
        assert "sft < sft does not appear: seed 0 +0.000 [+0.000, +0.000], not told apart." in " ".join(text.split())
    lead = (out / "report.html").read_text().split('class="lead"')[1]
    assert "sft &lt; sft does not appear" in lead[: lead.index("</li>")]
    kept = {file: file.stat().st_mtime_ns for file in (out / "cells").rglob("*") if file.is_file()}
    compare(plan, out)  # all is done
    compare(written(home, "another"), out)  # so it is for a plan with the same cells, whose report lies beside
    assert kept == {file: file.stat().st_mtime_ns for file in (out / "cells").rglob("*") if file.is_file()}
    assert [json.loads((place / "results.json").read_text())["plan"] for place in (out, out / "another")] == ["plan", "another"]
    assert (out / "another" / "report.html").is_file()


def test_a_failed_cell_is_told_with_its_log_and_the_others_go_on(home: Path, capsys) -> None:
    cells = {
        "bad": {"mix": {"train": 9}},
        "after": {"fit": "zr:student_small", "model": str(home / "start"), "data": "bad"},
        "good": {"mix": {"train": 2}},
    }
    out = home / "out"
    assert main(["compare", written(home, cells=cells), "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert "cell bad, seed 0 failed; not run, since they need it: after, seed 0. The last lines of" in error
    assert "ValueError: mix takes 9 prompts of train" in error
    assert (out / "cells" / "good" / "seed-0" / "done.json").is_file()
    assert not (out / "cells" / "after").exists()
    assert not (out / "results.json").exists()


def test_one_run_at_a_time(home: Path, monkeypatch) -> None:
    monkeypatch.setattr("zr.commands.comparing.jobs.PATIENCE", 0.1)
    with held(home), pytest.raises(ValueError, match="another zr compare is writing to"), held(home):
        pass
    with pytest.raises(ValueError, match="parallel must be at least 1, got 0"):
        compare(written(home), home / "out", parallel=0)


def test_a_rate_that_was_tried_is_not_tried_again(home: Path) -> None:
    def ran(*rates: float, again: list[str] | None = None) -> dict[float, int]:
        """When each rate was tried."""
        sft = {"fit": ["zr:supervised", "zr:sft"], "model": str(home / "start"), "rates": list(rates), "measure": {}}
        alone = {"like": "sft", "rates": [], "options": {"model.optimizer.init_args.lr": 0.003}}
        compare(written(home, cells={"sft": sft, "alone": alone}), home / "out", again=again)
        runs = home.glob("out/cells/sft/seed-0/run-*/logs")
        return {float(run.parent.name.removeprefix("run-")): run.stat().st_mtime_ns for run in runs}

    first = ran(0.001, 0.003)
    wider = ran(0.003, 0.01)
    assert wider.keys() == {0.003, 0.01}
    assert wider[0.003] == first[0.003]
    found = numbers(home / "out")["cells"]
    tried = found["sft"]["0"]["fit"]["tried"]
    assert list(tried) == ["0.003", "0.01"]
    assert tried["0.003"] == found["alone"]["0"]["fit"]["validation"]  # what it is with this rate alone
    assert ran(0.003, 0.01, again=["sft"])[0.003] > wider[0.003]


@pytest.mark.slow
def test_killed_and_resumed_twice_and_in_parallel_gives_the_same_numbers(home: Path) -> None:
    plan = written(home)
    killed, alone, again = (home / name for name in ("killed", "alone", "again"))
    process = subprocess.Popen(command(plan, killed, "--parallel", "2"), stdout=subprocess.DEVNULL)
    while not (killed / "cells" / "sft" / "seed-0" / "run" / "logs").exists():  # in the middle of a training
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (killed / "cells" / "data" / "seed-0" / "done.json").is_file()
    assert not (killed / "results.json").exists()
    subprocess.run(command(plan, killed, "--parallel", "2"), check=True, stdout=subprocess.DEVNULL)
    subprocess.run(command(plan, alone, "--parallel", "1"), check=True, stdout=subprocess.DEVNULL)
    assert numbers(killed) == numbers(alone)
    before = (alone / "cells" / "sft" / "seed-0" / "done.json").stat().st_mtime_ns
    compare(plan, alone, again=["mine"])
    assert numbers(killed) == numbers(alone)
    assert (alone / "cells" / "sft" / "seed-0" / "done.json").stat().st_mtime_ns == before
    compare(plan, again, only=["mine"])
    found = numbers(again)
    assert (list(found["cells"]), found["missing"]) == (["mine"], ["sft, seed 0"])
    assert found["cells"]["mine"] == numbers(alone)["cells"]["mine"]


@pytest.mark.slow
def test_rates_labels_reasoning_and_references(home: Path) -> None:
    cells = {
        "zero-shot": {"model": str(home / "start"), "measure": {"traces": 2, "length": 4}},
        "teacher": {
            "fit": "zr:teacher_small",
            "start": "zero-shot",
            "rates": [0.0003, 0.003],
            "options": {"model.model.rule.length": 4, "model.group_size": 2, "data.pairs_per_batch": 2, "trainer.max_steps": 1},
            "measure": {},
        },
        "pictures": {"mix": {"train": 2, "unlabelled": 2}},
        "labels": {"label": "teacher", "data": "pictures", "options": {"traces": 2}},
        "risd": {"fit": "zr:student_small", "model": str(home / "start"), "data": "labels", "measure": {}},
        "opd": {
            "fit": "zr:on_policy_small",
            "model": str(home / "start"),
            "data": "pictures",
            "options": {"model.teacher.source": "{teacher}", "model.model.rule.length": 4, "trainer.max_steps": 1},
            "measure": {},
        },
    }
    size = {"prompts": 3, "candidates": 2}
    data = dict.fromkeys(("train", "unlabelled", "validation", "test"), size)
    out = home / "out"
    compare(written(home, cells=cells, teacher="teacher", data=data), out, parallel=1)
    found = numbers(out)["cells"]
    tried = found["teacher"]["0"]["fit"]["tried"]
    assert set(tried) == {"0.0003", "0.003"}
    assert tried[f"{found['teacher']['0']['fit']['rate']:g}"] == max(tried.values())
    assert "teacher" not in found["teacher"]["0"]
    assert all(found[name]["0"]["teacher"]["kl"]["estimate"] > 0 for name in ("zero-shot", "risd", "opd"))
    assert {name: found[name]["0"]["coupling"] is not None for name in found} == {
        "zero-shot": True,  # measured with traces
        "teacher": True,
        "risd": False,
        "opd": True,
    }
    assert found["teacher"]["0"]["coupling"]["images"] == 6
    assert (found["risd"]["0"]["tokens"], found["risd"]["0"]["off_scale"] is None) == (1.0, False)
    assert 2 < found["zero-shot"]["0"]["tokens"] <= 10  # two traces of up to four, and an answer after each
    assert (
        json.loads((out / "cells" / "labels" / "seed-0" / "shards" / "index.json").read_text())["splits"]["train"][0]["records"]
        == 4
    )
