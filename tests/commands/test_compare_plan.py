"""Plans: what they take over, what they refuse before anything runs, and when a cell counts as another one."""

import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml

from zr.commands.comparing.paper import FIGURES
from zr.commands.comparing.plan import RATE, Plan

BASE = {"fit": "zr:look"}
SFT = {"fit": ["zr:supervised", "zr:sft"], "start": "base", "measure": {}}
CURATED = {"write": {"curated": {"prompts": 2, "candidates": 2}}}
GENERATOR = {"fit": "zr:generator", "data": "curated", "splits": "curated", "draw": {"scorers": "sft"}}
DRAWN = {"base": BASE, "sft": SFT, "curated": CURATED, "generator": GENERATOR}


def plan(**entries) -> Plan:
    return Plan.of({"cells": {"base": BASE, "sft": SFT}} | entries)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"cells": {}}, "a plan needs cells"),
        ({"cells": {"sft": SFT}}, "cell sft names the cell 'base', which the plan does not have; it has sft"),
        (
            {"cells": {"a": {**SFT, "start": "b"}, "b": {**SFT, "start": "a"}}},
            "cells wait for each other: (a -> b -> a|b -> a -> b)",
        ),
        ({"cells": {"a": {"like": "b"}, "b": {"like": "a"}}}, "cells are like each other: a -> b -> a"),
        ({"cells": {"a": {"like": "b"}}}, "cell a names the cell 'b'"),
        ({"cells": {"sft": {"fit": "zr:supervised"}}}, "cell sft has nothing to start from: give it start"),
        ({"cells": {"none": {"measure": {}}}}, "cell none has nothing to start from"),
        ({"cells": {"base": {**BASE, "steps": 3}}}, "cell base: there is no entry 'steps'; there are data, draw, fit"),
        ({"cells": {"a/b": BASE}}, "a cell's name has letters"),
        ({"cells": {"base": BASE, "m": {"mix": {"train": 1}, "fit": "zr:look"}}}, "cell m has fit and mix"),
        ({"cells": {"base": BASE, "sft": {**SFT, "model": "x"}}}, "cell sft has start and model"),
        ({"cells": {"base": BASE, "sft": {**SFT, "data": "base"}}}, "reads the data of base, which makes none"),
        (
            {"cells": {"m": {"mix": {"train": 1}}, "sft": {**SFT, "start": "m"}}},
            "needs a model to start from, and m makes data",
        ),
        ({"cells": {"m": {"mix": {"train": 1}, "measure": {}}}}, "makes data, which cannot be measured"),
        ({"cells": {"base": BASE, "sft": {**SFT, "measure": {"trace": 1}}}}, "measure: there is no entry 'trace'"),
        ({"cells": {"base": BASE, "opd": {**SFT, "options": {"model.teacher.source": "{gdso}"}}}}, "names the cell 'gdso'"),
        ({"ordering": [["sft", "risd"]]}, "ordering names the cell 'risd'"),
        ({"baseline": "base"}, "baseline names the cell 'base', which is not measured"),
        ({"figures": {"f": {"GDSO": {"expectation": "gdso"}}}}, "figures names the cell 'gdso', which the plan does not have"),
        ({"figures": {"f": {"GDSO": {"expectation": "base"}}}}, "figures names the cell 'base', which is not measured"),
        ({"figures": {"f": {"GDSO": "sft"}}}, "figures: f is {PANEL: {ROW: CELL}}, got {'GDSO': 'sft'}"),
        ({"figures": {"f": "sft"}}, "figures: f is {PANEL: {ROW: CELL}}, got 'sft'"),
        ({"split": "train"}, "split is what is measured on, test or validation, got 'train'"),
        ({"data": {"train": 5}}, "data: train is {prompts: NUMBER, candidates: NUMBER}, got 5"),
        ({"cells": DRAWN | {"sft": {**SFT, "draw": {}}}}, "cell sft makes no generator to draw with"),
        ({"cells": DRAWN | {"curated": {**CURATED, "draw": {}}}}, "cell curated makes no generator to draw with"),
        (
            {"cells": DRAWN | {"a": {"start": "generator", "measure": {}}}},
            "cell a makes a generator, which no score is asked of",
        ),
        (
            {"cells": DRAWN | {"a": {"start": "generator", "draw": {"against": "sft"}}}},
            "cell a is drawn against 'sft', which is not",
        ),
        (
            {"cells": DRAWN | {"a": {"start": "generator", "draw": {"against": "b"}}}},
            "cell a names the cell 'b'",
        ),
        (
            {"cells": DRAWN | {"a": {"start": "generator", "draw": {"best_of": 4}}}},
            "cell a: draw: best_of and reward go together",
        ),
        (
            {"cells": DRAWN | {"a": {"start": "generator", "draw": {"reward": "sft"}}}},
            "cell a: draw: best_of and reward go together",
        ),
        (
            {"cells": DRAWN | {"a": {"start": "generator", "draw": {"aggregation": "zr.models.Minimum"}}}},
            "cell a: draw: best_of and reward go together",
        ),
        ({"cells": DRAWN | {"a": {"start": "generator", "draw": {"scorers": ["sfd"]}}}}, "cell a names the cell 'sfd'"),
        (
            {"cells": DRAWN | {"a": {"start": "generator", "draw": {"scorers": ["generator"]}}}},
            "cell a lets generator score its pictures, which makes no reward model",
        ),
        ({"cells": DRAWN | {"a": {"start": "generator", "draw": {"best": 4}}}}, "cell a: draw: there is no entry 'best'"),
        (
            {"cells": DRAWN | {"a": {"start": "generator", "draw": {"steps": 0}}}},
            "draw: steps must be a number of at least 1, got 0",
        ),
        (
            {"cells": DRAWN | {"a": {"start": "generator", "draw": {"steps": 1.5}}}},
            "steps must be a number of at least 1, got 1.5",
        ),
        (
            {"cells": DRAWN | {"a": {"start": "generator", "draw": {"guidance": "2"}}}},
            "guidance must be a number of at least 0",
        ),
        ({"cells": DRAWN, "data": {"folder": "mine"}}, "cell generator draws, and only the built-in world has a judge"),
        ({"cells": {"a": {"write": {"test": {"prompts": 2, "candidates": 2}}}}}, "cell a: write: there is no entry 'test'"),
        ({"cells": {"a": {"write": {"curated": 5}}}}, "write: curated is {prompts: NUMBER, candidates: NUMBER}, got 5"),
        ({"cells": {"a": {**CURATED, "fit": "zr:look"}}}, "cell a has fit and write"),
        ({"cells": ["sft"]}, r"plan: cells must be a mapping of names to cells, got \['sft'\]"),
        ({"seeds": 3}, r"plan: seeds must be a list of whole numbers such as \[0, 1, 2\], got 3"),
        ({"ordering": ["base", "sft"]}, r"ordering must be a list of chains such as \[\[sft, gdso\]\], got \['base', 'sft'\]"),
        ({"cells": {"base": {**BASE, "rates": 0.001}}}, "cell base: rates must be a list, got 0.001"),
        (
            {"cells": {"base": {**BASE, "rates": "0.001"}}},
            r"rates must be a list of numbers such as \[0\.0003, 0\.001\], got \('0\.001',\)",
        ),
        (
            {"cells": {"base": {**BASE, "paper": ["27B", "Sft"]}}},
            r"paper is a row of the paper's tables, got \('27B', 'Sft'\); there",
        ),
        ({"cells": DRAWN | {"b": {**SFT, "start": "curated"}}}, "needs a model to start from, and curated makes data"),
    ],
)
def test_a_plan_that_cannot_run_is_one_clear_error(entries: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("{", r"\{")):
        plan(**entries)


def test_figures_of_a_plan_name_measured_cells_and_a_null_takes_one_away() -> None:
    figures = {"by data": {"SFT": {"all": "sft", 150: "sft"}}, "gone": None}
    assert plan(figures=figures).figures == {"by data": {"SFT": {"all": "sft", "150": "sft"}}}
    assert plan().figures == {}
    found = Plan.load("zr:ablations")
    shown = {cell: found.cells[cell] for panels in found.figures.values() for rows in panels.values() for cell in rows.values()}
    assert {name: "zr:parsed" in cell.fit for name, cell in shown.items()} == {
        "reward-dance": False,
        "rationale": False,
        "rationale-grpo": False,
        "rationale-gdso": False,
        "grpo": False,
        "grpo-parsed": True,
        "gdso": False,
        "gdso-parsed": True,
        "grpo-coarse": True,
        "grpo-coarser": True,
        "grpo-unblamed": True,
        "grpo-heavy": True,
    }


def test_an_unknown_recipe_or_plan_is_named() -> None:
    with pytest.raises(FileNotFoundError, match="no packaged recipe zr:sfd"):
        plan(cells={"base": {"fit": "zr:sfd"}})
    with pytest.raises(FileNotFoundError, match=r"there is no recipe .*mine\.yaml"):
        plan(cells={"base": {"fit": "mine.yaml"}})
    with pytest.raises(FileNotFoundError, match="no packaged plan zr:mian; there are zr:ablations"):
        Plan.load("zr:mian")
    with pytest.raises(FileNotFoundError, match=r"there is no plan nowhere\.yaml"):
        Plan.load("nowhere.yaml")


def test_cells_come_after_what_they_follow_from_and_options_are_references() -> None:
    cells = {
        "opd": {"fit": "zr:on_policy_small", "start": "base", "options": {"model.teacher.source": "{gdso}", "a": "{seed}"}},
        "labels": {"label": "gdso", "data": "mixed"},
        "mixed": {"mix": {"train": 2}},
        "gdso": {"fit": "zr:teacher_small", "start": "base"},
        "base": BASE,
    }
    found = plan(cells=cells)
    assert list(found.cells) == ["data", "base", "gdso", "opd", "mixed", "labels"]  # else as they are written
    assert found.cells["opd"].needs == ("data", "base", "gdso")
    assert set(found.cells["labels"].needs) == {"data", "mixed", "gdso"}
    assert found.needed(["opd"]) == {"data", "base", "gdso", "opd"}
    assert found.following(["gdso"]) == {"gdso", "opd", "labels"}
    with pytest.raises(ValueError, match="names the cell 'gdxo'"):
        found.following(["gdxo"])


def test_a_cell_and_a_plan_may_be_like_another_one(tmp_path: Path) -> None:
    parent = {
        "seeds": [0, 1],
        "options": {"trainer.devices": 1},
        "cells": {"base": BASE, "sft": {**SFT, "options": {"trainer.max_steps": 9}, "paper": ["9B", "SFT"]}},
        "quick": {"seeds": [0], "cells": {"sft": {"options": {"trainer.max_steps": 2}}}},
    }
    child = {
        "like": "parent.yaml",
        "cells": {"mine": {"like": "sft", "options": {"model.terms.score.loss": "my.Loss"}}},
    }
    (tmp_path / "parent.yaml").write_text(yaml.safe_dump(parent))
    (tmp_path / "child.yaml").write_text(yaml.safe_dump(child))
    found, quick = (Plan.load(str(tmp_path / "child.yaml"), short) for short in (False, True))
    assert found.cells["mine"].options == {"trainer.devices": 1, "trainer.max_steps": 9, "model.terms.score.loss": "my.Loss"}
    assert (found.cells["mine"].paper, found.cells["sft"].paper) == ((), ("9B", "SFT"))
    assert (found.seeds, quick.seeds, quick.name) == ((0, 1), (0,), "child-quick")
    assert quick.cells["mine"].options["trainer.max_steps"] == 2
    alone = Plan.load(str(tmp_path / "parent.yaml"))
    assert alone.digest("sft", 1) == found.digest("sft", 1)  # so that a child goes on in its parent's folder


def test_a_digest_changes_with_the_settings_of_a_cell_and_of_all_before_it(tmp_path: Path) -> None:
    def written(look: int = 1, sft: int = 1, seeds: tuple[int, ...] = (0, 1), **entries) -> Plan:
        base = {**BASE, "options": {"trainer.max_steps": look}}
        both = {**SFT, "options": {"trainer.max_steps": sft}, **entries}
        return Plan.of({"cells": {"base": base, "sft": both}, "seeds": list(seeds)}, "plan", tmp_path / "plan.yaml")

    before = written()
    assert before.digest("sft", 0) == written().digest("sft", 0) != before.digest("sft", 1)
    assert written(seeds=(0,)).digest("sft", 0) == before.digest("sft", 0)
    changed = written(sft=2)
    assert changed.digest("base", 0) == before.digest("base", 0)
    assert changed.digest("sft", 0) != before.digest("sft", 0)
    assert written(look=2).digest("sft", 0) != before.digest("sft", 0)
    traces = written(measure={"traces": 2})
    assert traces.digest("sft", 0) == before.digest("sft", 0)  # measured anew, not trained anew
    assert traces.measured_digest("sft", 0) != before.measured_digest("sft", 0)
    data = Plan.of({"cells": {"base": BASE}, "data": {"train": {"prompts": 2, "candidates": 2}}})
    assert data.digest("base", 0) != Plan.of({"cells": {"base": BASE}}).digest("base", 0)


def test_what_is_drawn_does_not_decide_on_what_is_made() -> None:
    best = {"start": "generator", "draw": {"best_of": 2, "reward": "sft", "against": "generator"}}

    def written(sft: int = 1, **entries) -> Plan:
        cells = DRAWN | {"sft": {**SFT, "options": {"trainer.max_steps": sft}}, "best": {**best, **entries}}
        return plan(cells=cells)

    before = written()
    assert set(before.cells["best"].needs) == {"generator", "data", "sft"}
    other = plan(cells=DRAWN | {"same": {"start": "generator", "draw": {}}, "best": {**best, "draw": {"against": "same"}}})
    assert "same" in other.needed(["best"])
    assert before.cells["generator"].needs == ("data", "curated", "sft")
    assert before.drawn == ("generator", "best")
    assert before.following(["curated"]) == {"curated", "generator", "best"}
    assert before.following(["sft"]) == {"sft"}  # their pictures are drawn again, they are not made again
    elsewhere = {"start": "model", "draw": {}}
    assert plan(cells={"model": {"model": "x"}, "best": elsewhere}).drawn == ("best",)
    for other, made, drawn in (
        (written(), True, True),
        (written(draw={**best["draw"], "against": None}), True, True),  # compared when the report is made
        (written(draw={**best["draw"], "best_of": 3}), True, False),
        (written(sft=2), True, False),  # another model chooses
        (written(start="", model="x"), False, False),
    ):
        assert (other.digest("best", 0) == before.digest("best", 0)) == made
        assert (other.drawn_digest("best", 0) == before.drawn_digest("best", 0)) == drawn
    assert before.digest("generator", 0) == written(sft=2).digest("generator", 0)
    size = {"prompts": 3, "candidates": 2}
    more = plan(cells=DRAWN | {"curated": {"write": {"curated": size}}})
    assert more.digest("generator", 0) != before.digest("generator", 0)
    assert more.digest("data", 0) == before.digest("data", 0)  # the plan's splits stay


def test_a_short_form_leaves_out_what_the_plan_has_taken_away(tmp_path: Path) -> None:
    parent = {"cells": {"base": BASE, "sft": SFT}, "quick": {"cells": {"sft": {"options": {"trainer.max_steps": 2}}}}}
    (tmp_path / "parent.yaml").write_text(yaml.safe_dump(parent))
    (tmp_path / "child.yaml").write_text(yaml.safe_dump({"like": "parent.yaml", "cells": {"sft": None}}))
    assert list(Plan.load(str(tmp_path / "child.yaml"), quick=True).cells) == ["data", "base"]


def test_a_digest_changes_with_recipes_and_modules_beside_the_plan(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("model: {init_args: {}}\n")
    (tmp_path / "my_losses.py").write_text("class Mine: ...\n")
    entries = {"cells": {"base": {"fit": ["zr:look", "mine.yaml"], "options": {"model.terms.score.loss": "my_losses.Mine"}}}}

    def digest() -> str:
        return Plan.of(entries, "plan", tmp_path / "plan.yaml").digest("base", 0)

    found = {digest()}
    (tmp_path / "my_losses.py").write_text("class Mine: weight = 2\n")
    found.add(digest())
    (tmp_path / "mine.yaml").write_text("model: {init_args: {decay: 0.5}}\n")
    found.add(digest())
    assert len(found) == 3
    (tmp_path / "mine.yaml").write_text("# Mine.\nmodel:\n  init_args: {decay: 0.5}  # as theirs\n")
    assert digest() in found  # what it says is the same
    (tmp_path / "mine.yaml").write_text("model: {init_args: {b: 1, a: 2}}\n")
    before = digest()
    (tmp_path / "mine.yaml").write_text("model: {init_args: {a: 2, b: 1}}\n")
    assert digest() != before  # terms are added up in their order


def test_a_recipe_that_is_no_yaml_is_named_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("model: {init_args: [\n")
    with pytest.raises(ValueError, match=r"cell base: mine\.yaml is no YAML: while parsing"):
        Plan.of({"cells": {"base": {"fit": ["zr:look", "mine.yaml"]}}}, "plan", tmp_path / "plan.yaml")


def test_a_tried_rate_has_the_digest_of_a_cell_with_this_rate_alone(tmp_path: Path) -> None:
    def written(rates: tuple[float, ...] = (), **options) -> Plan:
        cells = {"base": BASE, "sft": {**SFT, "rates": list(rates), "options": options}}
        return Plan.of({"cells": cells, "seeds": [0, 1]}, "plan", tmp_path / "plan.yaml")

    few, more = written((0.001, 1e-05)), written((0.003, 0.001, 1e-05))
    assert few.digest("sft", 1) != more.digest("sft", 1)  # another one may be the best
    assert few.trials("sft", 1).items() < more.trials("sft", 1).items()
    assert more.trials("sft", 0)[0.001] == written(**{RATE: 0.001}).digest("sft", 0) != more.trials("sft", 1)[0.001]
    assert written((0.001,), **{RATE: 0.5}).digest("sft", 0) == written((0.001,)).digest("sft", 0)  # it is not trained with
    assert written((0.001,), **{"trainer.max_steps": 2}).trials("sft", 0) != written((0.001,)).trials("sft", 0)
    assert not written().trials("sft", 0)


@pytest.mark.parametrize("name", ["main", "generators", "search", "ablations", "curves", "sizes"])
def test_packaged_plans_hold_together_and_say_how_they_are_run(name: str) -> None:
    found = Plan.load(f"zr:{name}")
    assert found.file.read_text().splitlines()[0].endswith(f"  zr compare zr:{name}")
    assert found.baseline in found.measured
    assert all(cell.paper in {(), *FIGURES} for cell in found.cells.values())
    assert found.split == ("validation" if name == "search" else "test")
    if name != "curves":
        quick = Plan.load(f"zr:{name}", quick=True)
        assert quick.seeds == (0,)
        assert set(quick.cells) <= set(found.cells)


def test_the_search_tries_the_same_rates_for_every_method() -> None:
    found = Plan.load("zr:search")
    trained = [cell for cell in found.cells.values() if cell.fit and cell.measure is not None]
    assert len(trained) > 8
    assert {cell.rates for cell in trained} == {(0.0001, 0.0003, 0.001, 0.003, 0.01)}
    assert not any(cell.rates for cell in Plan.load("zr:main").cells.values())


def test_the_plans_have_the_rates_that_the_search_found() -> None:
    """By the committed result: of each row the rate whose validation is the highest, as printed."""
    told = (Path(__file__).parents[2] / "docs/results/search.md").read_text(encoding="utf-8").split("## Learning rates")[1]
    rows = re.findall(r"^\| ([\w-]+), seed 0 \| (.+?) \| ([\d.]+) \|$", told, flags=re.MULTILINE)
    search = {name: cell for name, cell in Plan.load("zr:search").cells.items() if cell.rates and cell.measure is not None}
    assert {name for name, _, _ in rows} == search.keys()
    plans = [Plan.load(f"zr:{name}").cells for name in ("main", "ablations", "sizes", "curves", "generators")]
    for name, tried, chosen in rows:
        found = {float(rate): float(hpa) for rate, hpa in (part.split(": ") for part in tried.split(", "))}
        assert found[float(chosen)] == max(found.values())
        users = [cells[name] for cells in plans if name in cells]
        assert users
        for cell in users:  # it is what was searched, with this rate
            assert cell.options[RATE] == float(chosen)
            assert asdict(replace(cell, options={}, paper=())) == asdict(replace(search[name], options={}, rates=(), paper=()))
            assert cell.options.items() ^ {RATE: float(chosen)}.items() == {
                (key, value) for key, value in search[name].options.items() if key != RATE
            }
