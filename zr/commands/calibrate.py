"""``zr calibrate``: a saved model's distributions fitted to annotators' votes, and what that changes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # imported in the function: the stack takes seconds, `zr calibrate --help` must not
    from zr.commands.measuring import HeldOut
    from zr.metrics import Interval
    from zr.models import RewardModel
    from zr.report import Table
    from zr.scores import ScoreDistribution

__all__ = ["calibrate"]

MEASURES = {
    "nll": "NLL",
    "rps": "RPS",
    "ece": "ECE",
    "coverage_50": "50 %",
    "coverage_80": "80 %",
    "coverage_90": "90 %",
    "plcc": "PLCC",
    "hpa": "HPA",
}
"""Measures of the table, and how they are written."""


def calibrate(
    model: Path,
    shards: str,
    split: str = "validation",
    test: str | None = None,
    method: Literal["temperature", "isotonic"] = "temperature",
    dimensions: list[str] | None = None,
    save: bool = False,
    output: Path | None = None,
    batch_size: int = 4,
    budget: int | None = None,
    device: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
) -> None:
    """Fit a saved model's distributions to annotators' votes on held-out images, and show what changes.

    Shown before and after, per dimension: negative log-likelihood of a vote (NLL, nats), ranked probability score (RPS, score
    units), expected calibration error of the top score (ECE), the share of votes inside the model's central 50, 80 and 90 %
    intervals, which should be 50, 80 and 90 %, PLCC, and HPA.

    A temperature makes distributions flatter or sharper; an isotonic map moves expected scores that lie too high or too low,
    and never changes the order of two images. With --save true the calibration is kept in the model's folder, for
    zr.load(..., calibrated=True) and zr score --calibrated true; no weight is changed, and without these two the model answers
    as before.

    Args:
        model: folder of a saved model, or of a run, or a name on the hub.
        shards: folder of shards with annotators' scores that the model was not trained on.
        split: which split to fit on; that of another folder is OTHER_FOLDER/SPLIT.
        test: a second split, to measure on; without it the numbers are those of the images that were fitted, and flatter.
        method: temperature or isotonic.
        dimensions: which to fit; all without it. The others stay as they are.
        save: keep the calibration with the model; one that was there is replaced.
        output: JSON file to write the numbers to.
        batch_size: prompts that are scored together.
        budget: most tokens in one pass of the model; without it a batch is one pass.
        device: such as cpu or cuda:1; auto is cuda where there is one.
        dtype: of the backbone's weights; auto is the one they were saved in.

    Raises:
        FileNotFoundError: no model, folder or split.
        ValueError: shards of another scale, a dimension without votes, a bad option.
    """
    from rich.console import Console
    from rich.text import Text

    from zr.commands.measuring import loaded
    from zr.models import Isotonic, Temperature
    from zr.models.loading import model_folder
    from zr.models.reward import keep_calibration
    from zr.report.text import plain

    _check(model, split, test, save, output)
    scorer = loaded(model, device, dtype, budget=budget)
    console = Console()
    held_out, q = _scored(scorer, shards, split, batch_size)
    kinds: dict[str, type[Isotonic | Temperature]] = {"temperature": Temperature, "isotonic": Isotonic}
    fitted = kinds[method].fit(q, held_out.votes, scorer.rubric, dimensions)
    if test is not None:
        held_out, q = _scored(scorer, shards, test, batch_size)
    before, after = (_measures(scorer, held_out, one) for one in (q, fitted(q)))
    change = _change(held_out, q, fitted(q))
    where = f"split {split}, that it was fitted on: give --test a second one, these numbers flatter" if test is None else test
    console.print(_table(held_out.dimensions, before, after, f"Measured on {where}").terminal())
    lines = [f"{name}: {numbers}" for name, numbers in fitted.numbers().items()]
    lines.append(
        f"NLL changes by {change.estimate:+.4f} [{change.low:+.4f}, {change.high:+.4f}], "
        f"{change.level:.0%} interval over {len(set(held_out.records))} resampled prompts"
    )
    if output is not None:
        about = {"model": str(model), "shards": shards, "split": split, "test": test, "method": method}
        numbers = {"calibration": asdict(fitted), "before": before, "after": after, "nll_change": change.to_dict()}
        output.write_text(json.dumps(about | numbers, indent=2) + "\n", encoding="utf-8")
        lines.append(f"numbers: {output}")
    if save:
        keep_calibration(fitted, model_folder(model))
        lines.append(f"kept in {model_folder(model)}: zr.load({str(model)!r}, calibrated=True)")
    for line in lines:
        console.print(Text(plain(line)))


def _check(model: Path, split: str, test: str | None, save: bool, output: Path | None) -> None:
    if test == split:
        raise ValueError(f"--test {test} is the split to fit on: name another one, or leave --test out")
    if output is not None and output.suffix != ".json":
        raise ValueError(f"--output {output} must end in .json: it is written as JSON")
    if save and not model.is_dir():
        raise ValueError(
            f"--save true keeps the calibration in the model's folder, and {model} is none here: save the model first"
        )


def _scored(scorer: RewardModel, shards: str, split: str, batch_size: int) -> tuple[HeldOut, ScoreDistribution]:
    from rich.progress import track

    from zr.commands.measuring import score_split
    from zr.data import ScoreData

    loader = ScoreData(shards, scorer.rubric, batch_size=batch_size, test=split).test_dataloader()
    return score_split(scorer, track(loader, description=split, transient=True))


def _measures(scorer: RewardModel, held_out: HeldOut, q: ScoreDistribution) -> dict[str, float | None]:
    """The measures of a stage, as numbers."""
    from zr.stages import ScoreMetrics

    metrics, start = ScoreMetrics(scorer.rubric), 0
    for batch in held_out.batches:
        metrics.update(q[start : start + len(batch.keys)], batch)
        start += len(batch.keys)
    return {name: None if value.isnan() else value.item() for name, value in metrics.compute().items()}


def _change(held_out: HeldOut, before: ScoreDistribution, after: ScoreDistribution) -> Interval:
    """Of the negative log-likelihood of a vote, over all dimensions."""
    from zr.metrics import bootstrap_difference

    votes = held_out.votes.double()
    new, old = (-(votes * q.logits.double().masked_fill(votes == 0, 0.0)).sum(-1).flatten().numpy() for q in (after, before))
    records = [record for record in held_out.records for _ in held_out.dimensions]
    return bootstrap_difference(_of_a_vote, new, old, votes.sum(-1).flatten().numpy(), records)


def _of_a_vote(loss: Any, votes: Any, prompt: Any, weight: Any) -> Any:
    return (weight @ loss) / (weight @ votes)


def _table(
    dimensions: tuple[str, ...], before: Mapping[str, float | None], after: Mapping[str, float | None], title: str
) -> Table:
    from zr.report import Table
    from zr.report.tables import UNDEFINED

    def line(name: str, numbers: Mapping[str, float | None], suffix: str) -> tuple[str, ...]:
        found = [numbers.get(measure + suffix) for measure in MEASURES]
        return (name, *(UNDEFINED if number is None else f"{number:.3f}" for number in found))

    rows = []
    for name, suffix in [*((name, f"/{name}") for name in dimensions), ("mean", "")]:
        rows += [line(name, before, suffix), line("  calibrated", after, suffix)]
    return Table(title, ("dimension", *MEASURES.values()), rows)
