"""Cells that draw: noise, hand-worked gains, what the report says, and a whole plan of tiny generators."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from affine import source
from chromium import FOUND, Chromium
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file

from zr.commands.compare import compare
from zr.commands.comparing import cell as process
from zr.commands.comparing.cell import DONE, DRAWN, HELD_OUT, MEASURED, PICTURES
from zr.commands.comparing.drawing import changes, draw, gather, leads, section, tables
from zr.commands.comparing.ending import Ending
from zr.commands.comparing.jobs import Job, Runner
from zr.commands.comparing.page import leads as all_leads
from zr.commands.comparing.page import markdown, page
from zr.commands.comparing.plan import Plan
from zr.data import Index, read_shards, shapes, write_shards
from zr.models import ScoreTokenHead, compose, tiny_qwen3_vl
from zr.models.generators import FlowGenerator, FlowSize, FullGuidance
from zr.report import write_page
from zr.stages import Alarm

NAMES = ["alignment", "realism"]
BEFORE = [[2.0, 3.0], [4.0, 3.0]]
AFTER = [[3.0, 3.25], [3.5, 3.0]]
HOSTILE = "</script><img src=http://example.com/x onerror=\"document.title='hacked'\"> \u202egnp"
HISTORY = {
    "start/student/alignment": [[10, 2.0], [20, 2.0]],
    "student/alignment": [[10, 2.5], [20, 3.0]],
    "start/held_out/alignment": [[10, 2.0], [20, 2.0]],
    "held_out/alignment": [[10, 2.1], [20, 2.2]],
    "gain/held_out": [[10, 0.1], [20, 0.25]],
    "gain/student": [[10, 0.9], [20, 1.5]],
    "gap": [[10, 0.8], [20, 1.25]],
    "diversity": [[10, 0.3], [20, 0.125]],
}
ALARMS = [
    {"monitor": "val/gap", "above": 0.5, "below": None, "stopped": True},
    {"monitor": "val/diversity", "above": None, "below": 0.25, "stopped": True},
    {"monitor": "train/student", "above": 9.0, "below": None, "stopped": False},
]
SIZE = FlowSize(image=48, patch=16, width=16, layers=1, heads=2)


class Folders:
    """A runner whose jobs are all done but those that are named."""

    def __init__(self, home: Path, missing: tuple[Job, ...] = ()) -> None:
        self.home, self.missing = home, missing

    def folder(self, job: Job) -> Path:
        return self.home / job.cell / str(job.seed)

    def done(self, job: Job) -> bool:
        return job not in self.missing


def stored(folder: Path, judge: list[list[float]], reward: list[list[float]], history=(), alarms=()) -> None:
    """What a cell that drew pictures leaves, by the scores of each."""
    folder.mkdir(parents=True)
    count = len(judge)
    images = torch.randint(
        0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(int(10 * judge[0][0]))
    )
    told = {"scores/judge": torch.tensor(judge).double(), "scores/reward": torch.tensor(reward).double(), "images": images}
    save_file(told, folder / PICTURES)
    prompts = {"keys": list("abcdefgh"[:count]), "prompts": ["a red ring", *[HOSTILE] * (count - 1)]}
    about = {**prompts, "dimensions": {"judge": NAMES, "reward": ["taste"]}}
    (folder / DRAWN).write_text(json.dumps({**about, "ms": 4.0, "history": dict(history)}))
    ending = {"steps": 20, "of": 90, "alarms": list(alarms)}
    (folder / DONE).write_text(json.dumps({"seconds": 9.0, "product": "run", "ending": ending}))


@pytest.fixture
def drawn(tmp_path: Path) -> tuple[Plan, Folders]:
    """A generator, an improved one, and one whose training an alarm stopped."""
    stored(tmp_path / "start" / "0", BEFORE, [[2.0], [2.0]])
    stored(tmp_path / "better" / "0", AFTER, [[3.0], [2.5]], HISTORY)
    stored(tmp_path / "hacked" / "0", BEFORE[::-1], [[4.0], [4.0]], HISTORY, ALARMS)
    plan = Plan.of(
        {
            "cells": {
                "start": {"model": "x", "draw": {}},
                "better": {"start": "start", "draw": {"against": "start"}},
                "hacked": {"start": "start", "draw": {"against": "start"}},
            }
        }
    )
    return plan, Folders(tmp_path)


def ends(interval: dict) -> list[float]:
    return [interval[end] for end in ("estimate", "low", "high")]


def test_gains_and_good_same_bad_of_two_pictures_by_hand(drawn) -> None:
    found, missing = gather(*drawn)
    assert missing == []
    judged, start = found["better"]["0"]["judge"], found["start"]["0"]["judge"]
    assert start == {"dimensions": {"alignment": {"new": 3.0}, "realism": {"new": 3.0}}, "overall": {"new": 3.0}}
    rows = {  # of two prompts a resample is one, the other, or both
        "alignment": (3.25, 3.0, [0.25, -0.5, 1.0], (1, 0, 1), [0.0, -1.0, 1.0]),
        "realism": (3.125, 3.0, [0.125, 0.0, 0.25], (0, 2, 0), [0.0, 0.0, 0.0]),
        "overall": (3.1875, 3.0, [0.1875, -0.25, 0.625], (1, 1, 0), [0.5, 0.0, 1.0]),
    }
    for name, (new, old, difference, counts, gsb) in rows.items():
        row = judged["overall"] if name == "overall" else judged["dimensions"][name]
        assert (row["new"], row["old"]) == (new, old)
        assert ends(row["difference"]) == pytest.approx(difference)
        assert (row["good"], row["same"], row["bad"]) == counts
        assert ends(row["gsb"]) == pytest.approx(gsb)
    assert found["better"]["0"]["scorers"]["reward"]["dimensions"]["taste"]["difference"]["estimate"] == 0.75
    assert found["better"]["0"]["shown"] == {"gains": [0], "losses": [1]}  # +.625 and -.25
    plan, folders = drawn
    found, missing = gather(plan, Folders(folders.home, (Job("start", 0),)))
    assert missing == [Job("start", 0)]
    assert found["better"]["0"]["judge"]["overall"] == {"new": 3.1875}  # there is nothing to compare it with


def test_three_of_the_largest_gains_and_losses_are_shown_the_largest_first(tmp_path: Path) -> None:
    gains = [0.5, -1.0, 2.0, 1.0, 0.0, -0.25, -2.0, 0.25]
    stored(tmp_path / "start" / "0", [[3.0, 3.0]] * 8, [[3.0]] * 8)
    stored(tmp_path / "other" / "0", [[3.0, 3.0 + 2 * gain] for gain in gains], [[3.0]] * 8)
    cells = {"start": {"model": "x", "draw": {}}, "other": {"start": "start", "draw": {"against": "start"}}}
    found, _ = gather(Plan.of({"cells": cells}), Folders(tmp_path))
    assert found["other"]["0"]["shown"] == {"gains": [2, 3, 0], "losses": [6, 1, 5]}


def test_what_disappoints_is_said_first(drawn, tmp_path: Path) -> None:
    found, _ = gather(*drawn)
    doubts, joys = leads(found)
    assert doubts == [
        "better does not gain on start in every dimension, by the judge: alignment seed 0 +0.250 [-0.500, +1.000]; realism "
        "seed 0 +0.125 [+0.000, +0.250].",
        "hacked, seed 0: stopped by its alarm, val/gap above 0.5 and val/diversity below 0.25, at step 20 of 90; rise in "
        "standard deviations: student +1.50, the held-out scorer +0.25; the judge's mean +0.000 [-1.000, +1.000].",
    ]
    assert joys == []
    stored(tmp_path / "best" / "0", [[3.0, 4.0], [5.0, 3.5]], [[3.0], [2.5]])
    cells = {"start": {"model": "x", "draw": {}}, "best": {"start": "start", "draw": {"against": "start"}}}
    found, _ = gather(Plan.of({"cells": cells}), Folders(tmp_path))
    doubts, joys = leads(found)
    assert doubts == []
    assert joys == [
        "best gains on start in every dimension, by the judge: seed 0 mean +0.875 [+0.750, +1.000], Good-Same-Bad +1.000 "
        "[+1.000, +1.000]."
    ]


def results(drawings: dict) -> dict:
    """Of a plan that measures nothing else."""
    empty = {"cells": {}, "differences": {}, "orderings": [], "pictures": None, "missing": []}
    return {"plan": "plan", "zr": "0", "split": "test", "seeds": [0], "drawings": drawings} | empty


def test_the_tables_and_the_figure_show_what_was_found(drawn) -> None:
    found, _ = gather(*drawn)
    scores, gains = (table.markdown().splitlines() for table in tables(found))
    assert scores[0] == "| cell | alignment | realism | mean | by reward | steps | s | ms |"
    assert scores[2:] == [
        "| start, seed 0 | 3.000 | 3.000 | 3.000 | 2.000 | 20 | 9 | 4.0 |",
        "| better, seed 0 | 3.250 | 3.125 | 3.188 | 2.750 | 20 | 9 | 4.0 |",
        "| hacked, seed 0 | 3.000 | 3.000 | 3.000 | 4.000 | 20, alarm | 9 | 4.0 |",
    ]
    assert [table.title for table in tables(found)] == ["Scores", "Gains on start"]
    assert gains[2] == (
        "| better, seed 0 | +0.250 [-0.500, +1.000] | +0.125 [+0.000, +0.250] | +0.188 [-0.250, +0.625] | +0.500 [+0.000, "
        "+1.000] | +0.750 [+0.500, +1.000] |"
    )
    shown = section(found, [])
    assert [figure.title.split(":")[0] for figure in shown.figures] == ["better, seed 0", "hacked, seed 0"]
    panels = ["expected scores by student", "expected scores by held out", "gain, in standard deviations", "gap"]
    assert [[panel.title for panel in figure.panels] for figure in shown.figures] == [panels, [*panels, "diversity"]]
    lines = [["an alarm's line, 0.5", "an alarm's line, 0.25"][i] in shown.figures[1].panels[3 + i].svg for i in range(2)]
    assert lines == [True, True]
    assert "an alarm's line" not in "".join(panel.svg for panel in shown.figures[0].panels)
    text = markdown(drawn[0], results(found))
    assert text.splitlines()[2] == f"- {leads(found)[0][0]}" == f"- {all_leads(results(found))[0]}"
    assert "## Text to image" in text
    assert gains[2] in text


def test_pictures_before_and_after_are_those_that_were_judged(drawn) -> None:
    plan, folders = drawn
    found, _ = gather(plan, folders)
    moved = changes(found, folders.folder)
    assert [change.title.split(":")[0] for change in moved] == [
        "better, seed 0, one of the largest gains",
        "better, seed 0, one of the largest losses",
        "hacked, seed 0, one of the largest gains",
        "hacked, seed 0, one of the largest losses",
    ]
    assert moved[0].rows == [("alignment", "2.00", "3.00", "+1.00"), ("realism", "3.00", "3.25", "+0.25")]
    assert [moved[1].before.prompt, moved[1].before.title, moved[1].after.title] == [HOSTILE, "start", "better"]
    for name, card in (("start", moved[1].before), ("better", moved[1].after)):
        assert torch.equal(card.image, load_file(folders.home / name / "0" / PICTURES)["images"][1])


@pytest.mark.skipif(FOUND is None, reason="no Chromium here")
def test_the_report_in_a_browser_asks_for_nothing_and_shows_prompts_as_text(drawn, tmp_path: Path) -> None:
    plan, folders = drawn
    found, _ = gather(plan, folders)
    report = write_page(tmp_path / "report.html", page(plan, results(found), {}, changes(found, folders.folder)))
    assert HOSTILE not in report.read_text()
    with Chromium(tmp_path) as browser:
        browser.call("Network.enable")
        browser.call("Runtime.enable")
        browser.open(report)
        assert browser.tell("document.title") == "Plan plan"
        assert "onerror=" in browser.tell("[...document.querySelectorAll('.change .prompt')].map(p => p.textContent).join()")
        widths = "[...document.querySelectorAll('.sides img')].map(image => [image.naturalWidth, image.clientWidth > 50])"
        assert browser.tell(widths) == [[8, True]] * 8
        assert browser.tell("document.documentElement.scrollWidth <= innerWidth")
        seen = [event for event in browser.events if event["method"] in ("Log.entryAdded", "Runtime.consoleAPICalled")]
        asked = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert seen == []
    assert [url for url in asked if not url.startswith(("data:", "file:"))] == []


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Two generators, a reward model and a held-out split of five prompts."""
    home = tmp_path_factory.mktemp("world")
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        generator = FlowGenerator(shapes.vocabulary(), SIZE, steps=2)
        with torch.no_grad():
            for p in generator.parameters():
                p.add_(0.3 * torch.randn_like(p))
        generator.save_pretrained(home / name)
    backbone = tiny_qwen3_vl(shapes.rubric(), shapes.vocabulary, hidden_size=32, layers=1)
    compose(backbone, ScoreTokenHead).save_pretrained(home / "reward")
    write_shards(shapes.records("test", 5, 1), home / "data" / HELD_OUT, shapes.rubric().scale, split="test")
    (home / "asked").mkdir()
    (home / "asked" / DONE).write_text(json.dumps({"product": str(home / "reward")}))
    return home


def drawing(world: Path, folder: Path, generator: str | Path, seed: int = 0, fit: tuple = (), **asked) -> tuple[dict, dict]:
    """What a cell draws, and what it says of it."""
    folder.mkdir()
    (folder / DONE).write_text(json.dumps({"product": str(world / generator)}))
    needs = {"data": str(world / "data"), "asked": str(world / "asked")}
    about = draw(
        {"cell": {"name": "c", "fit": list(fit), "draw": asked}, "seed": seed, "split": "test", "needs": needs}, folder
    )
    return load_file(folder / PICTURES), about


def test_two_cells_draw_from_the_same_noise_that_seed_and_key_decide(world: Path, tmp_path: Path, monkeypatch) -> None:
    begun = []

    def noise(self, count, generator):
        begun.append(torch.randn(count, 3, 48, 48, generator=generator))
        return begun[-1]

    monkeypatch.setattr(FlowGenerator, "noise", noise)
    first, about = drawing(world, tmp_path / "first", "first", scorers=["asked"])
    second, _ = drawing(world, tmp_path / "second", "second", guidance=2)
    other, _ = drawing(world, tmp_path / "other", "first", seed=1)
    keys = [record.key for record in read_shards(world / "data" / HELD_OUT, "test")]
    assert about["keys"] == keys
    for seed, part in ((0, begun[:5]), (0, begun[5:10]), (1, begun[10:])):
        assert torch.equal(
            torch.cat(part), torch.cat([torch.randn(1, 3, 48, 48, generator=source(seed, key, 0)) for key in keys])
        )
    assert not torch.equal(first["images"], second["images"])
    assert not torch.equal(first["images"], other["images"])


def test_what_is_stored_are_the_generators_pictures_and_the_judges_scores(world: Path, tmp_path: Path) -> None:
    found, about = drawing(world, tmp_path / "cell", "second", guidance=2, steps=3, scorers=["asked"])
    alone = FlowGenerator.from_pretrained(world / "second", steps=3, guidance=FullGuidance(2.0))
    for i, (key, prompt) in enumerate(zip(about["keys"], about["prompts"], strict=True)):
        image = 255 * alone.sample([prompt], source(0, key, 0))[0].detach()
        assert (found["images"][i] - image).abs().max() <= 0.51
        pixels = Image.fromarray(found["images"][i].permute(1, 2, 0).numpy())
        assert found["scores/judge"][i].tolist() == pytest.approx(shapes.judge([pixels], [prompt]).mean[0].tolist(), abs=1e-6)
    assert about["dimensions"] == {"judge": list(shapes.DIMENSIONS), "asked": list(shapes.DIMENSIONS)}
    assert found["scores/asked"].shape == (5, 4)
    assert about["history"] == {}


def test_the_best_of_some_is_what_the_reward_prefers(world: Path, tmp_path: Path) -> None:
    plain, _ = drawing(world, tmp_path / "plain", "first", scorers=["asked"])
    minimum = {"class_path": "zr.models.Minimum"}
    best, _ = drawing(world, tmp_path / "best", "first", scorers=["asked"], best_of=3, reward="asked", aggregation=minimum)
    gain = best["scores/asked"].amin(1) - plain["scores/asked"].amin(1)
    assert gain.min() > -1e-3  # of 8 bits
    assert gain.max() > 1e-3
    kept = [torch.equal(a, b) for a, b in zip(best["images"], plain["images"], strict=True)]
    assert kept == (gain.abs() < 1e-6).tolist()


def test_what_a_training_logged_when_it_validated_is_kept(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "first", tmp_path / "run" / "generator")
    (tmp_path / "run" / "logs" / "version_0").mkdir(parents=True)
    table = "epoch,step,train/loss,val/gap,val/student\n0,4,0.5,,\n0,19,,0.25,4.5\n1,24,0.4,,\n1,39,,0.5,4.75\n"
    (tmp_path / "run" / "logs" / "version_0" / "metrics.csv").write_text(table)
    _, about = drawing(world, tmp_path / "trained", tmp_path / "run", fit=("zr:text_to_image_small",))
    assert about["history"] == {"gap": [[20, 0.25], [40, 0.5]], "student": [[20, 4.5], [40, 4.75]]}  # the first step is 0
    _, about = drawing(world, tmp_path / "as-it-is", tmp_path / "run")
    assert about["history"] == {}  # it is that of another cell


def test_a_picture_that_is_not_finite_is_refused(world: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(FlowGenerator, "decode", lambda self, latents: latents * math.nan)
    with pytest.raises(ValueError, match=r"c: a picture of test-00000, \.\.\. is not finite: look at the generator"):
        drawing(world, tmp_path / "cell", "first")


def test_a_cell_writes_a_split_of_its_own(tmp_path: Path) -> None:
    cell = {
        "name": "curated",
        "write": {"curated": {"prompts": 3, "candidates": 2}},
        "mix": {},
        "label": "",
        "fit": [],
        "draw": None,
    }
    (tmp_path / "job.json").write_text(json.dumps({"digest": "d", "trials": {}, "seed": 4, "cell": cell, "measure": None}))
    process.run(tmp_path)
    assert json.loads((tmp_path / DONE).read_text())["product"] == "shards"
    assert set(Index.load(tmp_path / "shards").splits) == {"curated"}
    found, wanted = read_shards(tmp_path / "shards", "curated"), shapes.records("curated", 3, 2, seed=4)
    for record, other in zip(found, wanted, strict=True):
        assert (record.prompt, record.scores, [c.image for c in record.candidates]) == (
            other.prompt,
            {},
            [c.image for c in other.candidates],
        )


def test_whoever_scores_pictures_again_leaves_the_generator(tmp_path: Path) -> None:
    generator = {"model": "x", "draw": {"scorers": "sft"}}
    cells = {"sft": {"model": "y", "measure": {}}, "start": generator, "other": {"start": "start", "draw": {}}}
    runner = Runner(Plan.of({"cells": cells}), tmp_path, 0, Console())
    files = (DONE, MEASURED, DRAWN)

    def left(*again: str) -> dict[str, list[str]]:
        folders = {name: runner.folder(Job(name, 0)) for name in cells}
        for folder in folders.values():
            folder.mkdir(parents=True, exist_ok=True)
            for file in files:
                (folder / file).touch()
        runner.forget(again)
        return {name: [file for file in files if (folder / file).exists()] for name, folder in folders.items()}

    assert left("sft") == {"sft": [], "start": [DONE, MEASURED], "other": list(files)}
    assert left("start") == {"sft": list(files), "start": [], "other": []}
    assert left("data") == {"sft": [], "start": [DONE, MEASURED], "other": [DONE, MEASURED]}  # its prompts are drawn


def test_how_a_training_ended() -> None:
    alarms = [
        Alarm("val/gap", above=0.5, patience=2, stop=True),
        Alarm("train/x", below=0.1),
        Alarm("val/y", above=1, stop=True),
    ]
    for alarm, beyond in zip(alarms, (2, 3, 0), strict=True):
        alarm.beyond = beyond
    ending = Ending()
    ending.on_train_end(SimpleNamespace(callbacks=[ending, *alarms], max_steps=-1, global_step=50), None)
    assert (ending.about["steps"], ending.about["of"]) == (50, None)
    assert ending.about["alarms"] == [
        {"monitor": "val/gap", "above": 0.5, "below": None, "stopped": True},
        {"monitor": "train/x", "above": None, "below": 0.1, "stopped": False},  # it only warned
        {"monitor": "val/y", "above": 1, "below": None, "stopped": False},
    ]


@pytest.mark.slow
def test_a_plan_of_tiny_generators(world: Path, tmp_path: Path) -> None:
    options = {
        "trainer.accelerator": "cpu",
        "trainer.devices": 1,
        "trainer.enable_checkpointing": False,
        "trainer.num_sanity_val_steps": 0,
        "trainer.log_every_n_steps": 1,
    }
    small = {"width": 16, "layers": 1, "heads": 2}
    backbone = tiny_qwen3_vl(shapes.rubric(), shapes.vocabulary, hidden_size=32, layers=1, seed=1)
    compose(backbone, ScoreTokenHead).save_pretrained(tmp_path / "other")
    cells = {
        "reward": {"model": str(world / "reward")},
        "other": {"model": str(tmp_path / "other")},
        "curated": {"write": {"curated": {"prompts": 4, "candidates": 2}}},
        "start": {
            "fit": "zr:generator",
            "data": "curated",
            "splits": "curated",
            "options": {
                "trainer.max_steps": 3,
                "model.generator.steps": 4,
                "model.generator.size": "zr.models.generators.FlowSize",
            }
            | {f"model.generator.size.{name}": value for name, value in small.items()},
            "draw": {"scorers": "reward"},
        },
        "improved": {
            "fit": "zr:text_to_image_small",
            "start": "start",
            "splits": "train",
            "options": {
                "trainer.max_steps": 6,
                "trainer.val_check_interval": 1,
                "model.path.count": 1,
                "model.rewards.student.scorer.source": "{reward}",
                "model.held_out.scorer.source": "{other}",
                "model.velocity_distance": 0,
                "model.gradient_clip": None,
                "model.optimizer.init_args.lr": 0.01,
            },
            "draw": {"against": "start", "scorers": "reward"},
        },
        "best": {"start": "start", "draw": {"best_of": 2, "reward": "reward", "against": "start"}},
    }
    data = {name: {"prompts": 4, "candidates": 1} for name in ("train", "validation", "test")}
    plan, out = tmp_path / "plan.yaml", tmp_path / "out"
    plan.write_text(yaml.safe_dump({"data": data, "options": options, "cells": cells}, sort_keys=False))
    compare(str(plan), out, parallel=1)
    found = json.loads((out / "results.json").read_text())
    assert (found["cells"], found["missing"]) == ({}, [])
    improved = found["drawings"]["improved"]["0"]
    stored = {name: load_file(out / "cells" / name / "seed-0" / PICTURES) for name in ("start", "improved", "best")}
    for name in ("improved", "best"):
        gain = (stored[name]["scores/judge"] - stored["start"]["scores/judge"]).mean()
        assert found["drawings"][name]["0"]["judge"]["overall"]["difference"]["estimate"] == pytest.approx(gain.item())
    assert improved["scorers"]["reward"]["overall"]["difference"]["estimate"] > 0.1  # it is what was optimised
    steps, history = improved["ending"]["steps"], improved["history"]
    alarms = {alarm["monitor"]: (alarm["above"], alarm["stopped"]) for alarm in improved["ending"]["alarms"]}
    assert {name: line for name, (line, _) in alarms.items()} == {"val/gap": 0.5, "val/drift": 0.1}
    assert [step for step, _ in history["gap"]] == list(range(1, steps + 1))
    assert steps < 6  # the first two in a row that are above a line end it
    for name, (line, stopped) in alarms.items():
        above = [value > line for _, value in history[name.removeprefix("val/")]]
        assert [all(above[i : i + 2]) for i in range(steps - 1)] == [False] * (steps - 2) + [stopped]
    which = " and ".join(f"{name} above {line:g}" for name, (line, stopped) in alarms.items() if stopped)
    assert f"improved, seed 0: stopped by its alarm, {which}, at step {steps} of 6" in (out / "results.md").read_text()
    text = (out / "report.html").read_text()
    assert all(part in text for part in ("Text to image", "Before and after", "figure 5 of the paper", "Gains on start"))
    kept = {file: file.stat().st_mtime_ns for file in (out / "cells").rglob("*") if file.is_file()}
    compare(str(plan), out)
    assert kept == {file: file.stat().st_mtime_ns for file in (out / "cells").rglob("*") if file.is_file()}
    (out / "cells" / "best" / "seed-0" / DRAWN).unlink()  # as if it had been killed before
    compare(str(plan), out)
    again = load_file(out / "cells" / "best" / "seed-0" / PICTURES)
    assert all(torch.equal(again[name], tensor) for name, tensor in stored["best"].items())
    assert (
        json.loads((out / "results.json").read_text())["drawings"]["best"]["0"]["judge"]
        == found["drawings"]["best"]["0"]["judge"]
    )
