"""The process of one cell and seed: makes its product, then measures or draws; ``python -m zr.commands.comparing.cell JOB``."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zr.commands.comparing.plan import RATE
from zr.commands.comparing.validations import validations
from zr.commands.results import write_json

if TYPE_CHECKING:
    from zr.data import Record
    from zr.models import RewardModel
    from zr.rubric import Rubric

__all__ = [
    "DISTRIBUTIONS",
    "DONE",
    "DRAWN",
    "HELD_OUT",
    "JOB",
    "LOG",
    "MEASURED",
    "PICTURES",
    "TRIED",
    "digest",
    "product",
    "run",
]

JOB, LOG, DONE, MEASURED, DISTRIBUTIONS = "job.json", "log.txt", "done.json", "measured.json", "distributions.safetensors"
DRAWN, PICTURES, TRIED = "drawn.json", "pictures.safetensors", "tried.json"
SHARDS, HELD_OUT = "shards", "held-out"
BATCH = 16
COUPLED = 4  # batches on which the coupling of score and trace is measured: it takes twice as long as scoring them


def product(folder: Path) -> str:
    """What a finished cell made: a run's folder, or one of shards; of a model from elsewhere its folder or name."""
    made: str = json.loads((folder / DONE).read_text())["product"]
    path = folder / made
    return str(path.resolve()) if path.exists() else made


def run(folder: Path) -> None:
    """Do what ``folder/job.json`` says and is not done yet."""
    job = json.loads((folder / JOB).read_text())
    if digest(folder / DONE) != job["digest"]:
        begin = time.perf_counter()
        about = _make(job, folder)
        seconds = round(time.perf_counter() - begin, 1)
        write_json(folder / DONE, {"digest": job["digest"], "seconds": seconds, **about})
    if job["measure"] is not None:
        write_json(folder / MEASURED, {"digest": job["measured"], **_measure(job, folder)})
    if job["cell"]["draw"] is not None:
        from zr.commands.comparing.drawing import draw

        write_json(folder / DRAWN, {"digest": job["drawn"], **draw(job, folder)})


def digest(file: Path) -> str:
    """Of the settings with which a file was made; nothing of one that is not there."""
    found: dict[str, str] = json.loads(file.read_text()) if file.is_file() else {}
    return found.get("digest", "")


def _make(job: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The cell's product, from nothing: what an interrupted process left is removed, but for rates that were tried."""
    (folder / DONE).unlink(missing_ok=True)  # first: a folder that is half removed is none that is done
    trials = {_run_name(float(rate)): made for rate, made in job["trials"].items()}
    for left in (folder / SHARDS, folder / HELD_OUT, *folder.glob("run*")):
        if left.exists() and (left.name not in trials or digest(left / TRIED) != trials[left.name]):
            (left / TRIED).unlink(missing_ok=True)
            shutil.rmtree(left)
    cell = job["cell"]
    if cell["name"] == "data":
        return _write(job, folder)
    if cell["mix"]:
        return _mix(job, folder)
    if cell["write"]:
        for name, size in cell["write"].items():
            _write_world(folder / SHARDS, name, size, job["seed"])
        return {"product": SHARDS}
    if cell["label"]:
        return _label(job, folder)
    if cell["fit"]:
        return _fit(job, folder)
    return {"product": _started(job)}


def _started(job: Mapping[str, Any]) -> str:
    """The model that a cell starts from: a folder, or a name on the hub."""
    cell = job["cell"]
    found: str = product(Path(job["needs"][cell["start"]])) if cell["start"] else cell["model"]
    return found


def _write(job: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The world's splits, or links to the user's own; the one that is measured on lies apart, where no training looks."""
    from zr.data import Index

    data, split = dict(job["data"]), job["split"]
    if "folder" not in data:
        for name, size in data.items():
            for place in _places(name, split):
                _write_world(folder / place, name, size, job["seed"])
        return {"product": SHARDS}
    index = Index.load(Path(data["folder"]).resolve())
    for place in (SHARDS, HELD_OUT):
        (folder / place).mkdir()
        splits = {name: shards for name, shards in index.splits.items() if place in _places(name, split)}
        for shard in (shard for shards in splits.values() for shard in shards):
            (folder / place / shard.path.name).symlink_to(str(shard.path))
        Index(folder / place, index.scale, splits).save()
    return {"product": SHARDS}


def _write_world(place: Path, split: Any, size: Mapping[str, int], seed: int) -> None:
    """A split of the built-in world."""
    from zr.data import shapes, write_shards

    records = shapes.records(split, size["prompts"], size["candidates"], seed=seed)
    write_shards(records, place, shapes.rubric().scale, split=split)


def _places(name: str, split: str) -> list[str]:
    """Where a split goes: test is never among what is trained on; a search measures on validation, which training sees too."""
    places = [] if name == "test" else [SHARDS]
    return [*places, HELD_OUT] if name == split else places


def _mix(job: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    from zr.data import Index, write_shards

    source = Path(product(Path(job["needs"][job["cell"]["data"]])))
    records = list(_some(source, job["cell"]["mix"]))
    random.Random(job["seed"]).shuffle(records)
    write_shards(records, folder / SHARDS, Index.load(source).scale, split="train", per_shard=64)
    return {"product": SHARDS, "prompts": len(records)}


def _some(source: Path, counts: Mapping[str, int]) -> Iterator[Record]:
    """The first records of each split."""
    from zr.data import read_shards

    for split, count in counts.items():
        found = list(islice(read_shards(source, split=split), count))
        if len(found) < count:
            raise ValueError(f"mix takes {count} prompts of {split}, {source} has {len(found)}: take fewer, or write more")
        yield from found


def _label(job: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    from zr.commands.label import label

    cell = job["cell"]
    model, shards = product(Path(job["needs"][cell["label"]])), product(Path(job["needs"][cell["data"]]))
    for split in cell["splits"]:
        label(model, shards, folder / SHARDS, split=split, seed=job["seed"], **cell["options"])
    return {"product": SHARDS}


def _fit(job: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Train with each learning rate; validation chooses among them."""
    cell, tried = job["cell"], {}
    for rate in cell["rates"] or [None]:
        name = "run" if rate is None else _run_name(rate)
        file, begin = folder / name / TRIED, time.perf_counter()
        if not file.is_file():  # one of other settings has been removed
            reached = _train(job, folder / name, rate)
            seconds = round(time.perf_counter() - begin, 1)
            write_json(file, {"digest": job["trials"].get(str(rate), ""), "seconds": seconds, **reached})
        tried[name] = json.loads(file.read_text())
        del tried[name]["digest"]
    if len(tried) > 1 and any(t["validation"] is None for t in tried.values()):
        raise ValueError(f"cell {cell['name']} chooses its rate on validation, and nothing was validated: leave rates out")
    best = max(tried, key=lambda name: tried[name]["validation"] or 0.0)
    return {
        "product": best,
        **tried[best],
        "seconds": round(sum(t["seconds"] for t in tried.values()), 1),  # of all rates, whenever they were tried
        "tried": {f"{t['rate']:g}": t["validation"] for t in tried.values() if t["rate"]},
    }


def _run_name(rate: float) -> str:
    return f"run-{rate!r}"


def _train(job: Mapping[str, Any], run: Path, rate: float | None) -> dict[str, Any]:
    """Train once: the best validation, and how it ended."""
    from zr.commands.comparing.ending import Ending
    from zr.commands.training import run as train

    cell, ending = job["cell"], Ending()
    words = [word for path in job["recipes"] for word in ("--config", path)]
    words += ["--folder", product(Path(job["needs"]["data"])), "--run", str(run)]
    words += ["--seed_everything", str(job["seed"])]
    words += ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    words += ["--start", _started(job)] if cell["start"] or cell["model"] else []
    words += [f"--{key}={_option(job, value)}" for key, value in cell["options"].items()]
    words += _training_split(job)
    words += [] if rate is None else [f"--{RATE}={rate}"]
    train(["fit", *words], callbacks=[ending])
    reached = [value for _, value in validations(run).get("hpa", [])]
    return {"rate": rate, "validation": max(reached, default=None), "ending": ending.about}


def _training_split(job: Mapping[str, Any]) -> list[str]:
    cell = job["cell"]
    if cell["data"] == "data" and cell["splits"] == ["train"]:
        return []  # what the recipe says
    source = product(Path(job["needs"][cell["data"]]))
    places = [f"{source}/{split}" for split in cell["splits"]]
    return [f"--data.train={json.dumps(places) if places[1:] else places[0]}"]


def _option(job: Mapping[str, Any], given: Any) -> str:
    """An option as the shell would have it, with the seed and the folders of cells in their places."""
    if not isinstance(given, str):
        return json.dumps(given)
    value: str = given.replace("{seed}", str(job["seed"]))
    for name, folder in job["needs"].items():
        if f"{{{name}}}" in value:
            value = value.replace(f"{{{name}}}", product(Path(folder)))
    return value


def _measure(job: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Read the held-out split once; distributions to a file, and what they cost and are worth."""
    import torch
    from safetensors.torch import save_file

    from zr.commands.agreeing import Contestant
    from zr.commands.comparing.coupling import coupled
    from zr.commands.measuring import HeldOut
    from zr.data import ScoreData
    from zr.metrics import ExpectedCalibrationError, RankedProbabilityScore, VotesNegativeLogLikelihood
    from zr.models import ReasoningReward, ScoreTokenHead, load
    from zr.scores import ScoreDistribution

    model = _asked(load(product(folder)), job)
    if isinstance(model.head, ScoreTokenHead):
        model.head.with_off_scale = True  # it reads the whole vocabulary then
    rubric = model.rubric
    data = ScoreData(Path(job["needs"]["data"]) / HELD_OUT, rubric, batch_size=BATCH, test=job["split"])
    held_out = HeldOut(list(data.test_dataloader()), rubric.dimensions, rubric.bins)
    who = Contestant(job["cell"]["name"], rubric, model)
    with torch.inference_mode():
        who.answer(held_out.batches[0], rubric.dimensions, timed=False)
        answers = [who.answer(batch, rubric.dimensions) for batch in held_out.batches]
    q = ScoreDistribution(torch.cat([a.logits for a in answers]), rubric.bins)
    told = isinstance(model.head, ScoreTokenHead) and not isinstance(model, ReasoningReward)
    outside = torch.cat([a.off_scale for a in answers]) if told else None
    kept = {"probs": q.probs, "scores": held_out.scores, "votes": held_out.votes}
    kept |= {} if outside is None else {"off_scale": outside}
    save_file({name: tensor.contiguous() for name, tensor in kept.items()}, folder / DISTRIBUTIONS)
    pooled, votes = ScoreDistribution(q.logits.flatten(0, 1), rubric.bins), held_out.votes.flatten(0, 1)
    measures = {"ece": ExpectedCalibrationError(), "nll": VotesNegativeLogLikelihood(), "rps": RankedProbabilityScore()}
    for measure in measures.values():
        measure.update(pooled, votes)
    choices = held_out.choices
    tokens = who.tokens / (len(held_out.records) * len(rubric.dimensions))
    moved = coupled(model, held_out.batches[:COUPLED]) if isinstance(model, ReasoningReward) else None
    return {
        "dimensions": list(rubric.dimensions),
        "bins": list(rubric.bins),
        "keys": [key for batch in held_out.batches for key in batch.keys],
        "choices": {name: [part.tolist() for part in chosen] for name, chosen in choices.items()},
        "table": held_out.table(q.mean),
        **{name: _defined(float(measure.compute())) for name, measure in measures.items()},
        "off_scale": None if outside is None else float(outside.mean()),
        "tokens": tokens,
        "coupling": moved and {name: _defined(value) for name, value in moved.items()},
        "parameters": sum(p.numel() for p in model.parameters()),
        "ms": round(1e3 * sum(who.seconds) / sum(who.images), 2),
    }


def _defined(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _asked(model: RewardModel, job: Mapping[str, Any]) -> RewardModel:
    """A model as it shall be measured: as it was saved, or with so many traces."""
    from zr.models import ReasoningReward, SamplingRule, reasoning

    traces = job["measure"].get("traces")
    if traces is None:
        return model
    if isinstance(model, ReasoningReward):
        rule = model.rule if "length" not in job["measure"] else SamplingRule(length=job["measure"]["length"])
        return ReasoningReward(model.policy, traces, job["seed"], rule).eval()
    rule = SamplingRule(length=job["measure"].get("length", 48))
    return reasoning(model, _reasoning_rubric(model.rubric), traces=traces, seed=job["seed"], rule=rule).eval()


def _reasoning_rubric(rubric: Rubric) -> Rubric:
    from zr import Rubric
    from zr.data import shapes

    for asked in (shapes.rubric(reasoning=True), Rubric.load("zr:reasoning")):
        if asked.scale_id == rubric.scale_id:
            return asked
    raise ValueError("measure.traces: no packaged rubric for reasoning has the model's scale; leave traces out")


def _watch() -> None:
    """End with the process that started this one, however it ended: then nobody reads its pipe any more."""
    sys.stdin.buffer.read()
    os._exit(1)


def main() -> int:
    """Run the job of the folder that is the only argument."""
    import torch

    threading.Thread(target=_watch, daemon=True).start()
    torch.set_num_threads(1)
    warnings.simplefilter("once")
    folder = Path(sys.argv[1])
    sys.path.insert(0, json.loads((folder / JOB).read_text())["modules"])
    run(folder)
    return 0


if __name__ == "__main__":
    code: int | str | None = 1
    try:
        code = main()
    except SystemExit as end:  # of the command line, which has said why
        code = end.code
    except Exception:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)  # the watching thread still waits for its pipe
