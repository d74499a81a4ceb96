"""Plans: what they take over, what they refuse before anything runs, and when a cell counts as another one."""

from pathlib import Path

import pytest
import yaml

from zr.commands.comparing.paper import FIGURES
from zr.commands.comparing.plan import Plan

BASE = {"fit": "zr:look"}
SFT = {"fit": ["zr:supervised", "zr:sft"], "start": "base", "measure": {}}


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
        ({"cells": {"base": {**BASE, "steps": 3}}}, "cell base: there is no entry 'steps'; there are data, fit, label"),
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
        ({"split": "train"}, "split is what is measured on, test or validation, got 'train'"),
        ({"data": {"train": 5}}, "data: train is {prompts: NUMBER, candidates: NUMBER}, got 5"),
    ],
)
def test_a_plan_that_cannot_run_is_one_clear_error(entries: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("{", r"\{")):
        plan(**entries)


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
    order = list(found.cells)
    assert order[0] == "data"
    assert all(order.index(need) < order.index(name) for name, cell in found.cells.items() for need in cell.needs)
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
        "cells": {"mine": {"like": "sft", "options": {"model.terms.score.loss": "my.Loss"}, "paper": None}},
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


@pytest.mark.parametrize("name", ["main", "search", "ablations", "curves", "sizes"])
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
    assert {cell.rates for cell in trained} == {(0.0003, 0.001, 0.003)}
    assert not any(cell.rates for cell in Plan.load("zr:main").cells.values())
