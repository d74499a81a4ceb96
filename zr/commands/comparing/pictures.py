"""Pictures of what a plan's cell judges better than its baseline, and of what it judges worse."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from zr.commands.comparing.cell import HELD_OUT
from zr.commands.comparing.jobs import Job, Runner
from zr.commands.comparing.plan import DATA
from zr.commands.comparing.results import Answers
from zr.commands.inspecting import thumbnail
from zr.data import read_shards
from zr.data.record import decode
from zr.report import Card, Judgement

__all__ = ["SECTIONS", "pictures"]

SECTIONS = {"nearer": "Largest improvements", "farther": "Largest failures"}


def pictures(results: Mapping[str, Any], runner: Runner) -> dict[str, list[Card]]:
    """Cards of the images that ``results`` names under ``pictures``; both cells' distributions beside the votes.

    Args:
        results: by :func:`zr.commands.comparing.results.gather`.
        runner: whose folders hold the distributions, and the data cell's the images.

    Returns:
        By heading; nothing where there are none.
    """
    found = results["pictures"]
    if found is None:
        return {}
    both = {name: Answers(runner.folder(Job(found[name], found["seed"]))) for name in ("baseline", "cell")}
    home = runner.folder(Job(DATA, found["seed"])) / HELD_OUT
    shown = _images(home, results["split"], {line["key"] for name in SECTIONS for line in found[name]})
    return {
        title: [_card(line, found, both, *shown[line["key"]]) for line in found[name]]
        for name, title in SECTIONS.items()
        if found[name]
    }


def _images(home: Path, split: str, keys: Collection[str]) -> dict[str, tuple[str, Tensor]]:
    """By key the prompt and the image; reads no further than the last of them."""
    found: dict[str, tuple[str, Tensor]] = {}
    for record in read_shards(home, split) if keys else ():
        for candidate in record.candidates:
            if (key := f"{record.key}.{candidate.id}") in keys:
                found[key] = record.prompt, thumbnail(decode(candidate, record.key))
        if len(found) == len(keys):
            break
    return found


def _card(line: Mapping[str, Any], found: Mapping[str, Any], both: Mapping[str, Answers], prompt: str, image: Tensor) -> Card:
    judgements = []
    for name, answers in both.items():
        i = answers.about["keys"].index(line["key"])
        d = answers.about["dimensions"].index(line["dimension"])
        title = f"{line['dimension']}, {found[name]}"
        judgements.append(Judgement(title, answers.q[i, d], answers.votes[i, d], float(answers.scores[i, d])))
    note = f"{line['dimension']}: {line['before']:.2f} from the annotators' score before, {line['after']:.2f} after"
    return Card(prompt, judgements, image, line["key"], note)
