"""The built-in world: its rubric by hand, its splits, its determinism, its annotators, its words."""

from collections import Counter

import numpy as np
import pytest
from scipy.stats import spearmanr

from zr.data import shapes
from zr.data.annotation import aggregate
from zr.data.shapes import Scene, Thing
from zr.data.shapes.lots import Annotator

PROMPT = "red ring, blue square; green triangle, yellow ring"
RIGHT = (Thing("red", "ring"), Thing("blue", "square"), Thing("green", "triangle"), Thing("yellow", "ring"))


@pytest.mark.parametrize(
    ("scene", "expected"),
    [
        (Scene(RIGHT), (5, 5, 5, 5)),
        (Scene((None, *RIGHT[1:])), (5 - 1.5 * 1.5, 5, 5, 5)),  # the subject is missing
        (Scene((*RIGHT[:3], Thing("red", "square"))), (5 - 1.0, 5, 5, 5)),  # wrong shape and colour: the worse one counts
        (Scene((*RIGHT[:3], Thing("red", "ring"))), (5 - 0.5, 5, 5, 5)),
        (Scene(RIGHT, realism=frozenset({"striped", "blocky"})), (5, 5 - 0.5 - 2.5, 5, 5)),
        (Scene(RIGHT, aesthetics=frozenset({"framed", "tilted", "cluttered", "clashing"})), (5, 5, 1, 5)),
        (Scene((Thing("red", "ring", "floating"), *RIGHT[1:])), (5, 5, 5, 5 - 1.5 * 1.0)),
        (Scene(tuple(Thing(t.colour, t.shape, "pierced") for t in RIGHT)), (5, 5, 5, 1)),  # clipped at the worst score
        (Scene((None, None, None, None)), (1, 5, 5, 5)),
    ],
)
def test_scores_follow_the_rubric_by_hand(scene: Scene, expected: tuple[float, ...]) -> None:
    assert tuple(shapes.true_scores(scene, PROMPT).values()) == pytest.approx(expected)


def test_prompts_round_trip_and_what_is_none_is_refused() -> None:
    assert shapes.write_prompt(shapes.read_prompt(PROMPT)) == PROMPT
    for text in ("", "a cat", "red ring, blue square", PROMPT.replace("red", "mauve"), PROMPT + ", red ring"):
        with pytest.raises(ValueError, match="not a prompt of the built-in world"):
            shapes.read_prompt(text)


def test_splits_are_disjoint_and_together_everything() -> None:
    every = [p for split in ("test", "validation", "train", "base", "unlabelled") for p in shapes.prompts(split)]
    assert len(every) == len(set(every)) == 12**4


def test_curated_pictures_have_three_tenths_of_the_flaws() -> None:
    drawn = [(prompt, scene) for prompt, scenes in shapes.scenes("curated", 300) for scene in scenes]
    assert {prompt for prompt, _ in drawn} <= set(shapes.prompts("unlabelled"))
    assert not any(record.scores or record.texts for record in shapes.records("curated", 2))

    def share(found, expected, count):  # within four standard deviations
        assert abs(found / count - expected) < 4 * (expected * (1 - expected) / count) ** 0.5

    for name, often in {"striped": 0.4, "speckled": 0.4, "blurred": 0.2, "blocky": 0.2}.items():
        share(sum(name in scene.realism for _, scene in drawn), 0.3 * often, len(drawn))
    for name in ("framed", "tilted", "cluttered", "clashing"):
        share(sum(name in scene.aesthetics for _, scene in drawn), 0.3 * 0.35, len(drawn))
    things = [thing for _, scene in drawn for thing in scene.things if thing is not None]
    share(sum(thing.state != "grounded" for thing in things), 0.3 * 0.35, len(things))
    wrong = sum(len(shapes.defects(scene, prompt)["alignment"]) for prompt, scene in drawn)
    share(wrong, 0.075, 4 * len(drawn))  # follows in .85 or all of the slots


def test_a_seed_decides_everything() -> None:
    first, again = (list(shapes.records("train", 3, candidates=2, seed=5)) for _ in range(2))
    other = list(shapes.records("train", 3, candidates=2, seed=6))
    assert first == again
    assert [r.prompt for r in first] != [r.prompt for r in other]


def test_records_carry_what_their_split_says() -> None:
    def one(split: str):
        return next(shapes.records(split, 1, candidates=2))

    assert {len(by) for by in one("validation").scores["realism"].values()} == {5}
    assert not one("unlabelled").scores
    assert not any(one(split).texts for split in ("unlabelled", "validation", "test"))
    base = one("base")
    assert set(base.texts) == set(shapes.DIMENSIONS)
    assert {name for by in base.scores["realism"].values() for name in by} == {"belief"}
    for split in ("base", "train", "unlabelled", "test"):
        one(split).validate(shapes.rubric().scale)


def test_more_prompts_than_a_split_has_is_an_error() -> None:
    with pytest.raises(ValueError, match="the split 'test' has 3000 prompts, 3001 were asked for"):
        next(shapes.records("test", 3001))


def test_every_bin_is_used_in_every_dimension() -> None:
    counts: dict[str, Counter[float]] = {name: Counter() for name in shapes.DIMENSIONS}
    for record in shapes.records("train", 80, seed=1):
        for name in shapes.DIMENSIONS:
            for by in record.scores[name].values():
                counts[name].update(a.score for a in by.values())
    for name, found in counts.items():
        shares = {b: found[b] / sum(found.values()) for b in shapes.rubric().bins}
        assert min(shares.values()) > 0.01, (name, shares)


def test_annotators_report_bias_noise_and_bins() -> None:
    rng = np.random.default_rng(0)
    reports = np.array([Annotator("a", bias=0.25).report(3.0, rng) for _ in range(4000)])
    assert set(reports * 2) <= set(range(2, 11))
    assert reports.mean() == pytest.approx(3.25, abs=0.03)
    assert reports.std() == pytest.approx((0.4**2 + 0.5**2 / 12) ** 0.5, abs=0.03)  # noise, and rounding to half points
    biases = np.array([a.bias for s in range(300) for a in shapes.annotators(seed=s)])
    assert biases.std() == pytest.approx(0.25, abs=0.02)


def test_the_aggregate_follows_the_truth() -> None:
    true, seen = [], []
    drawn = shapes.scenes("train", 40, seed=2)
    for (prompt, scenes), record in zip(drawn, shapes.records("train", 40, seed=2), strict=True):
        for scene, candidate in zip(scenes, record.candidates, strict=True):
            true.append(shapes.true_scores(scene, prompt)["plausibility"])
            given = [a.score for a in record.scores["plausibility"][candidate.id].values()]
            seen.append(aggregate(given, shapes.rubric().bins).score)
    assert spearmanr(true, seen).statistic > 0.95


def test_every_word_of_the_world_is_known_to_the_tiny_tokenizer() -> None:
    from zr.models import tiny_qwen3_vl

    builder = tiny_qwen3_vl(shapes.rubric(), shapes.vocabulary).prompts
    unknown = builder.tokenizer.unk_token_id
    for prompt, scenes in shapes.scenes("base", 60, seed=3):
        texts = [prompt, *(text for scene in scenes for text in shapes.describe(scene, prompt).values())]
        assert all(unknown not in builder.user_ids(text) for text in texts)


def test_defects_change_pixels_and_only_their_own() -> None:
    clean = shapes.draw(Scene(RIGHT, seed=1)).astype(int)
    assert clean.shape == (48, 48, 3)
    for kind, names in (("realism", shapes.SEVERITY["realism"]), ("aesthetics", shapes.SEVERITY["aesthetics"])):
        for name in names:
            drawn = shapes.draw(Scene(RIGHT, seed=1, **{kind: frozenset({name})})).astype(int)
            assert abs(drawn - clean).max() > 20, name
    floating = shapes.draw(Scene((Thing("red", "ring", "floating"), *RIGHT[1:]), seed=1)).astype(int)
    assert abs(floating - clean)[:18, :18].max() > 20
    assert not abs(floating - clean)[18:, :].any()
