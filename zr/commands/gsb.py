"""``zr gsb``: two generators' pictures of the same prompts, compared blindly by a judge or by people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imported in the functions: the stack takes seconds, `zr gsb --help` must not
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from zr.commands.answers import Answer
    from zr.commands.pictures import Folder, Picture
    from zr.models import Scorer
    from zr.report import Table

__all__ = ["compared", "gsb"]

PAGE = "pairs.html"
MEAN = "mean"
ALL = "all answers"


def gsb(
    new: Path,
    old: Path,
    output: Path,
    judge: str | None = None,
    answers: list[Path] | None = None,
    dimensions: list[str] | None = None,
    numbers: Path | None = None,
    band: float | None = None,
    pairs: int | None = None,
    seed: int = 0,
    batch_size: int = 16,
    device: str = "auto",
) -> None:
    """Good-Same-Bad (Z-Reward, eq. 21) between two folders of `zr draw`, by a judge, by people, or by both.

    GSB is (Good - Bad) / (Good + Same + Bad); a picture of NEW is good where it is better than that of OLD for the same prompt
    and number. Intervals are over resampled prompts. The folders may be of two seeds: then pictures are compared that started
    from different noise.

    OUTPUT gets pairs.html, one file that shows the pairs in random order, left and right at random, and keeps and saves
    people's answers; it needs no network, and does not tell whose a picture is. OUTPUT/key.json does: keep it from those who
    judge. Pictures above 256 pixels are shown as WebP of quality 90, of at most 1024 pixels. With --answers the files that
    people saved are read back, and the page is left as it is.

    Args:
        new: folder of pictures.
        old: folder of pictures that they are compared with.
        output: folder for the page and its key; made if needed.
        judge: folder of a saved model, or of a run, a name on the hub, or shapes, the built-in world's judge. Let it be one
            that NEW was not optimised for.
        answers: files of answers that people saved.
        dimensions: what people are asked about each pair, and which of the judge's dimensions count; without it people are
            asked one question, and all of the judge's count.
        numbers: JSON file to write the numbers to.
        band: the judge's scores that differ by no more are the same, in score units; half a bin of its scale without it.
        pairs: in the page, drawn at random; all without it.
        seed: of the order and the sides of the pairs.
        batch_size: pictures that are judged together.
        device: of the judge, such as cpu or cuda:1; auto is cuda where there is one.

    Raises:
        FileNotFoundError: no pictures, judge, key or answers.
        FileExistsError: OUTPUT holds the key of another page.
        ValueError: folders that do not fit or are not finished, answers that are damaged, of another page, or given twice.
    """
    if numbers is not None and numbers.suffix != ".json":
        raise ValueError(f"--numbers {numbers} must end in .json")
    for name, count in (("pairs", pairs), ("batch_size", batch_size)):
        if count is not None and count < 1:
            raise ValueError(f"--{name} must be at least 1, got {count}")
    if band is not None and not band >= 0:
        raise ValueError(f"--band must not be negative, got {band}")

    from rich.console import Console
    from rich.text import Text

    from zr.commands.answers import KEY
    from zr.commands.parts import scorer
    from zr.commands.pictures import Folder
    from zr.report.text import plain
    from zr.version import __version__

    first, second = Folder.load(new), Folder.load(old)
    _check(first, second)
    console = Console()
    prompts = len({picture.key for picture in first.pictures})
    values: dict[str, Any] = {"new": str(new), "old": str(old), "pictures": len(first.pictures), "prompts": prompts}
    values["zr"] = __version__
    if answers:
        told = _answered(first, second, output / KEY, answers)
        values["people"] = _by_people(told)
        console.print(_table(f"people: {values['people']['people']}, answers: {len(told):,}", values["people"]).terminal())
    else:
        output.mkdir(parents=True, exist_ok=True)
        _write(first, second, output, dimensions, pairs, seed)
    if judge is not None:
        values["judge"] = {"name": judge} | _judged(scorer(judge, device), first, second, dimensions, band, batch_size)
        title = f"judge {judge}, {len(first.pictures):,} pairs of {prompts:,} prompts"
        console.print(_table(title, values["judge"], f"Same: no further apart than {values['judge']['band']:g}.").terminal())
    if numbers is not None:
        numbers.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        console.print(Text(plain(f"numbers: {numbers}")))
    if not answers:
        console.print(Text(plain(f"for people: {output / PAGE}; keep {output / KEY} from them")))


def _check(new: Folder, old: Folder) -> None:
    """Refuse folders that cannot be compared picture by picture."""
    first, second = ({(p.key, p.number): p.prompt for p in folder.pictures} for folder in (new, old))
    if apart := sorted(set(first) ^ set(second)):
        key, number = apart[0]
        has, lacks = (new, old) if (key, number) in first else (old, new)
        raise ValueError(
            f"{has.path} has picture {number} of the prompt {key!r}, {lacks.path} has not: draw both for the same prompts"
        )
    for (key, number), prompt in first.items():
        if second[key, number] != prompt:
            raise ValueError(
                f"the prompt {key!r} has another text in {new.path} than in {old.path}: draw both for the same prompts"
            )


def _write(new: Folder, old: Folder, output: Path, dimensions: Sequence[str] | None, pairs: int | None, seed: int) -> None:
    """The page and its key."""
    from zr.commands.answers import KEY, Key
    from zr.data.shards import atomic
    from zr.report import Pair, inline, render_pairs
    from zr.report.pairs import OVERALL

    key = Key.draw(new, old, dimensions or (OVERALL,), pairs, seed)
    shown = []
    for name, hidden in key.pairs.items():
        picture = new.pictures[hidden.index]
        sides = [inline(_pixels(folder, picture)) for folder in (new, old)]
        left, right = sides if hidden.new_left else reversed(sides)
        shown.append(Pair(name, picture.prompt, left, right))
    page = render_pairs(shown, key.dimensions)
    key.save(output / KEY)
    with atomic(output / PAGE) as file:
        file.write(page.encode())


def _answered(new: Folder, old: Folder, path: Path, answers: Sequence[Path]) -> list[Answer]:
    from zr.commands.answers import Key

    key = Key.load(path)
    key.check(new, old, path)
    return key.read(answers, new)


def _judged(
    judge: Scorer, new: Folder, old: Folder, dimensions: Sequence[str] | None, band: float | None, batch_size: int
) -> dict[str, Any]:
    """The measures of a judge, per dimension and of the mean over dimensions."""
    import numpy as np
    import torch
    from rich.progress import track

    bins = judge.rubric.bins
    band = min(b - a for a, b in pairwise(bins)) / 2 if band is None else band
    names = [judge.rubric.dimensions[i] for i in judge.rubric.index(dimensions)]
    pictures = new.pictures
    found: list[list[NDArray[np.float64]]] = [[], []]
    starts = range(0, len(pictures), batch_size)
    with torch.inference_mode():
        for start in track(starts, description="judge", transient=True):
            part = pictures[start : start + batch_size]
            for folder, means in zip((new, old), found, strict=True):
                images = [_pixels(folder, picture) for picture in part]
                q = judge(images=images, prompts=[picture.prompt for picture in part], dimensions=names)
                means.append(q.mean.double().cpu().numpy())
    first, second = (np.concatenate(means) for means in found)
    keys = np.array([picture.key for picture in pictures])
    rows = {name: compared(first[:, d], second[:, d], keys, band) for d, name in enumerate(names)}
    return {"band": band, "dimensions": rows, MEAN: compared(first.mean(1), second.mean(1), keys, band)}


def _by_people(answers: Sequence[Answer]) -> dict[str, Any]:
    """The measures of people's answers, per dimension and of all answers together."""
    import numpy as np

    names = list(dict.fromkeys(answer.dimension for answer in answers))
    rows = {}
    for name in [*names, ALL]:
        some = [answer for answer in answers if name in (answer.dimension, ALL)]
        outcomes = np.array([answer.outcome for answer in some], dtype=np.float64)
        rows[name] = _counts(outcomes, np.zeros(len(some)), np.array([answer.key for answer in some]), 0.0)
    counts = {"people": len({answer.person for answer in answers}), "answers": len(answers)}
    return {**counts, "dimensions": {name: rows[name] for name in names}, ALL: rows[ALL]}


def compared(new: NDArray[np.float64], old: NDArray[np.float64], keys: NDArray[Any], band: float) -> dict[str, Any]:
    """Two sets of pictures by a judge.

    Args:
        new: ``(N,)`` expected scores of the pictures that shall be better.
        old: ``(N,)`` those of the pictures they are compared with.
        keys: ``(N,)`` of the prompts, over which the intervals resample.
        band: scores that differ by no more are the same.

    Returns:
        Plain data: means of both, ``difference`` (new - old) and ``gsb`` with their intervals, the counts.
    """
    from zr.metrics import bootstrap_interval

    def gain(mu: NDArray[np.float64], score: NDArray[np.float64], prompt: NDArray[Any], weight: NDArray[np.float64]) -> Any:
        return weight @ (mu - score) / weight.sum(-1)

    means = {"new": float(new.mean()), "old": float(old.mean())}
    difference = bootstrap_interval(gain, new, old, keys).to_dict()
    return {**means, "difference": difference, **_counts(new, old, keys, band)}


def _counts(new: NDArray[np.float64], old: NDArray[np.float64], keys: NDArray[Any], band: float) -> dict[str, Any]:
    """Good, same and bad, and GSB with its interval."""
    import torch

    from zr.metrics import GSB, bootstrap_interval
    from zr.metrics import gsb as statistic

    metric = GSB(band=band)
    metric.update(torch.from_numpy(new), torch.from_numpy(old))
    counts = {name: int(count) for name, count in metric.counts()._asdict().items()}
    return {**counts, "gsb": bootstrap_interval(partial(statistic, band=band), new, old, keys).to_dict()}


def _table(title: str, values: Mapping[str, Any], note: str = "") -> Table:
    """The measures for the terminal; the last row only where there is more than one dimension, or it would repeat the row."""
    from zr.report import Estimate, Table

    rows = dict(values["dimensions"])
    if len(rows) > 1:
        rows |= {name: values[name] for name in (MEAN, ALL) if name in values}
    scored = MEAN in values
    lines: list[tuple[str | Estimate, ...]] = []
    for name, row in rows.items():
        means = (f"{row['new']:.3f}", f"{row['old']:.3f}", Estimate.of(row["difference"], signed=True)) if scored else ()
        counts = (f"{row[count]:,}" for count in ("good", "same", "bad"))
        lines.append((name, *means, *counts, Estimate.of(row["gsb"], signed=True)))
    heads = ("dimension", *(("new", "old", "new - old") if scored else ()), "good", "same", "bad", "GSB")
    return Table(title, heads, lines, f"In brackets: 95% intervals over resampled prompts. {note}".rstrip())


def _pixels(folder: Folder, picture: Picture) -> Tensor:
    """``(3, H, W)`` uint8."""
    from zr.data.record import read_image

    return read_image(folder.read(picture), str(folder.path / picture.file))
