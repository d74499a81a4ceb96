"""Held-out batches: what the final table says of scores and of choices."""

import io

import pytest
import torch
from PIL import Image

from zr.commands.measuring import HeldOut, score_split
from zr.data import Annotation, Candidate, ChosenPairs, Record, collate
from zr.rubric import Rubric
from zr.scores import ScoreDistribution

SCALE = Rubric.load("zr:direct").scale
Image.new("RGB", (4, 4)).save(file := io.BytesIO(), "PNG")


def record(key, candidates, **annotations):
    return Record(key, "x", tuple(Candidate(name, file.getvalue()) for name in candidates), **annotations)


def held_out(*batches):
    found = [collate(records, SCALE, pairs=ChosenPairs(), seed=seed) for seed, records in enumerate(batches)]
    return HeldOut(found, SCALE.dimensions, SCALE.bins)


def test_choices_alone_give_an_hpa():
    """Five choices by hand, one of them a tie that does not count; and a pair that only its scores order."""
    scores = {"realism": {"a": {"ann": Annotation(4.0)}, "b": {"ann": Annotation(2.0)}}}
    data = held_out(
        [
            record("p0", "ab", preferences={"realism": (("a", "b", 1.0),)}),
            record("p1", "abc", preferences={"realism": (("b", "a", 0.9), ("a", "c", 0.5)), "aesthetics": (("c", "a", 0.2),)}),
        ],
        [record("p2", "ab", scores=scores), record("p3", "ab", preferences={"realism": (("a", "b", 0.3),)})],
    )
    mu = torch.full((9, 4), 3.0)
    realism, aesthetics = (SCALE.dimensions.index(name) for name in ("realism", "aesthetics"))
    mu[:, realism] = torch.tensor([4.0, 3.0, 4.0, 3.0, 1.0, 3.0, 2.0, 1.0, 2.0])  # right, wrong; right by scores; right
    mu[2, aesthetics] = 5.0  # a before c, as 0.8 of the judges say
    table = data.table(mu)["dimensions"]
    assert (table["realism"]["pairs"], table["realism"]["hpa"]["estimate"]) == (4, 0.75)
    assert (table["aesthetics"]["pairs"], table["aesthetics"]["hpa"]["estimate"]) == (1, 1.0)
    assert (table["realism"]["margin_pairs"], table["realism"]["margin_hpa"]["estimate"]) == (1, 1.0)
    assert data.records == ["p0", "p0", "p1", "p1", "p1", "p2", "p2", "p3", "p3"]


@pytest.mark.parametrize("pairs", [None, ChosenPairs()])
def test_scores_alone(pairs):
    scores = {"realism": {"a": {"ann": Annotation(4.0)}, "b": {"ann": Annotation(2.0)}}}
    data = HeldOut([collate([record("p0", "ab", scores=scores)], SCALE, pairs=pairs)], SCALE.dimensions, SCALE.bins)
    table = data.table(torch.tensor([[2.0] * 4, [1.0] * 4]))["dimensions"]
    assert (table["realism"]["pairs"], table["realism"]["hpa"]["estimate"]) == (1, 1.0)
    assert table["aesthetics"]["pairs"] == 0


def test_a_split_is_scored_as_it_comes():
    """Images are seen once and let go; a scorer that answers with the number of its call tells which batch was which."""
    records = [[record("p0", "ab"), record("p1", "a")], [record("p2", "abc")]]
    batches = [collate(some, SCALE, pairs=ChosenPairs()) for some in records]
    calls = []

    def scorer(images, prompts, dimensions=None):
        calls.append([tuple(image.shape) for image in images])
        return ScoreDistribution(
            torch.full((len(prompts), 4, 9), 0.0).index_fill(-1, torch.tensor(len(calls)), 5.0), SCALE.bins
        )

    scorer.rubric = Rubric.load("zr:direct")
    held, q = score_split(scorer, iter(batches))
    assert calls == [[(3, 4, 4)] * 3] * 2
    assert held.records == ["p0", "p0", "p1", "p2", "p2", "p2"]
    assert [batch.images for batch in held.batches] == [[], []]
    assert len(batches[0].images) == 3
    assert q.mode[:, 0].tolist() == [1.5] * 3 + [2.0] * 3
    assert held.votes.shape == (6, 4, 9)
