"""`zr demo` is a packaged plan; what it adds are the data and the models where the README's commands name them."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

import zr
from zr.commands import compare as comparing
from zr.commands.comparing.cell import DONE, HELD_OUT, SHARDS
from zr.commands.comparing.jobs import Job, Runner
from zr.commands.comparing.plan import Plan
from zr.commands.demo import MODELS, demo
from zr.commands.results import write_json
from zr.data import Index, read_shards, shapes, write_shards
from zr.models import ScoreTokenHead, compose, tiny_qwen3_vl


def finished(plan: Plan, home: Path, console: Console) -> Runner:
    """In place of the run: a folder as it leaves one, with few data and a model that was not trained."""
    runner = Runner(plan, home, 0, console)
    (seed,) = plan.seeds
    if (home / "cells").exists():
        return runner
    for name, places in (("data", {"train": SHARDS, "validation": SHARDS, "test": HELD_OUT}), ("curated", {"curated": SHARDS})):
        folder = runner.folder(Job(name, seed))
        for split, place in places.items():
            write_shards(shapes.records(split, 2, 2, seed=seed), folder / place, shapes.rubric().scale, split=split)
        write_json(folder / DONE, {"product": SHARDS})
    for name in MODELS:
        folder = runner.folder(Job(name, seed))
        compose(tiny_qwen3_vl(shapes.rubric(), shapes.vocabulary, seed=seed), ScoreTokenHead).save_pretrained(folder / "run")
        write_json(folder / DONE, {"product": "run"})
    return runner


@pytest.mark.parametrize("seed", [0, 3])
def test_data_and_models_are_where_the_readme_says(tmp_path, monkeypatch, seed):
    monkeypatch.setattr(comparing, "carry_out", finished)
    demo(tmp_path / "zr-demo", seed)
    (tmp_path / "zr-demo" / "teacher" / "mine").touch()
    demo(tmp_path / "zr-demo", seed)  # what the user did to his copies stays
    assert (tmp_path / "zr-demo" / "teacher" / "mine").is_file()
    with pytest.raises(ValueError, match="other settings"):
        demo(tmp_path / "zr-demo", seed + 1)
    with monkeypatch.context() as patch:  # a new version makes other models, and would leave the user's as they are
        patch.setattr("zr.commands.comparing.plan.__version__", "9")
        with pytest.raises(ValueError, match=r"base is of an earlier run, and you may have trained on it: move it away"):
            demo(tmp_path / "zr-demo", seed)
    home = shutil.move(tmp_path / "zr-demo", tmp_path / "moved")
    for name in MODELS:
        kept = zr.load(Path(home) / "cells" / name / f"seed-{seed}" / "run")
        for parameter, other in zip(zr.load(Path(home) / name).parameters(), kept.parameters(), strict=True):
            assert torch.equal(parameter, other)
    assert not (Path(home) / "cells" / "teacher" / f"seed-{seed}" / "run" / "mine").exists()
    assert set(Index.load(Path(home) / "data").splits) == {"train", "validation", "test", "curated"}
    for split in ("test", "curated"):
        found = [record.prompt for record in read_shards(Path(home) / "data", split=split)]
        assert found == [record.prompt for record in shapes.records(split, 2, 2, seed=seed)]


@pytest.mark.slow
def test_the_whole_way_with_few_steps(tmp_path, monkeypatch):
    """Every cell runs, in the processes and with the recipes of the real run."""

    def short(source):
        plan = whole(source)
        cells = {
            name: replace(cell, options=dict(cell.options) | steps) if cell.fit else cell for name, cell in plan.cells.items()
        }
        cells["pictures"] = replace(cells["pictures"], mix={"train": 3, "unlabelled": 3})
        cells["curated"] = replace(cells["curated"], write={"curated": {"prompts": 4, "candidates": 2}})
        return replace(plan, cells=cells, data={split: {"prompts": 4, "candidates": 2} for split in plan.data})

    whole, steps = Plan.load, {"trainer.max_steps": 2, "trainer.val_check_interval": 1}
    monkeypatch.setattr(Plan, "load", short)
    demo(tmp_path)
    assert {"results.json", "results.md", "report.html", "data", *MODELS} <= {path.name for path in tmp_path.iterdir()}
    assert "Text to image" in (tmp_path / "report.html").read_text()
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").rglob("*") if path.is_file()}
    demo(tmp_path)  # all is done
    assert made == {path: path.stat().st_mtime_ns for path in made}
