"""Pictures of a plan: the right images with the right numbers, read from the shards that were measured on."""

import io
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from stored import at, store

import zr
from zr.commands.comparing.jobs import Runner
from zr.commands.comparing.pictures import pictures
from zr.commands.comparing.plan import Plan
from zr.data import Candidate, Record, write_shards

COLOURS = {"p.a": (255, 0, 0), "p.b": (0, 255, 0), "q.a": (0, 0, 255)}
PROMPTS = {"p": "<script>alert(1)</script> \u202egnir", "q": "a blue cube"}


def png(colour: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 8), colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    records = [
        Record(name, prompt, tuple(Candidate(key[2:], png(colour)) for key, colour in COLOURS.items() if key[0] == name))
        for name, prompt in PROMPTS.items()
    ]
    write_shards(
        records,
        tmp_path / "cells" / "data" / "seed-0" / "held-out",
        zr.Rubric.load("zr:direct").scale,
        split="test",
        per_shard=1,
    )
    votes = torch.arange(30.0).reshape(3, 2, 5)
    scores = [[1.0, 2.0], [3.0, 4.0], [5.0, 1.0]]
    for name, mu in (("sft", [[2.0, 2.0], [3.0, 4.0], [5.0, 3.5]]), ("gdso", [[1.5, 2.0], [3.0, 1.0], [5.0, 1.0]])):
        store(tmp_path / "cells" / name / "seed-0", list(COLOURS), at(mu), scores, votes)
    plan = Plan.of({"cells": {"sft": {"fit": "zr:supervised", "model": "x", "measure": {}}}})
    return Runner(plan, tmp_path, 0, Console(quiet=True))


def named(key: str, dimension: str, before: float, after: float) -> dict:
    return {"key": key, "dimension": dimension, "before": before, "after": after}


def test_each_card_has_its_image_both_answers_and_the_votes(runner: Runner) -> None:
    nearer = [named("q.a", "realism", 2.5, 0.0), named("p.a", "alignment", 1.0, 0.5)]
    moved = {"cell": "gdso", "baseline": "sft", "seed": 0, "nearer": nearer, "farther": [named("p.b", "realism", 0.0, 3.0)]}
    found = pictures({"pictures": moved, "split": "test"}, runner)
    assert list(found) == ["Largest improvements", "Largest failures"]
    first, second = found["Largest improvements"]
    (third,) = found["Largest failures"]
    for card, key in ((first, "q.a"), (second, "p.a"), (third, "p.b")):
        assert card.image[:, 3, 5].tolist() == list(COLOURS[key])
        assert (card.title, card.prompt) == (key, PROMPTS[key[0]])
    assert [(j.dimension, j.mean, j.annotated) for j in first.judgements] == [
        ("realism, sft", "3.50", "1.00"),
        ("realism, gdso", "1.00", "1.00"),
    ]
    assert [j.votes.tolist() for j in first.judgements] == [[25, 26, 27, 28, 29]] * 2
    assert second.note == "alignment: 1.00 from the annotators' score before, 0.50 after"
    assert [j.mean for j in third.judgements] == ["4.00", "1.00"]


def test_without_moves_there_are_no_pictures(runner: Runner) -> None:
    assert pictures({"pictures": None, "split": "test"}, runner) == {}
    moved = {"cell": "gdso", "baseline": "sft", "seed": 0, "nearer": [], "farther": []}
    assert pictures({"pictures": moved, "split": "test"}, runner) == {}
