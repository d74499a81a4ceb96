"""Annotation against hand-worked numbers, published ones, naive loops and scipy."""

import math
from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from zr.data import Annotation, Candidate, Item, Record, aggregate, audit, collect, krippendorff_alpha, removal
from zr.data.annotation import check_refinement, interval, nominal, ordinal

BINS = (1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0)


@pytest.mark.parametrize(
    ("scores", "expected", "trimmed"),
    [
        ([4.0], 4.0, False),
        ([1.0, 4.0], 2.5, False),
        ([1.0, 4.5, 5.0], 4.5, True),
        ([5.0, 5.0, 5.0], 5.0, True),
        ([3.0, 1.0, 4.0, 4.5, 5.0], 11.5 / 3, True),  # 3, 4, 4.5 stay
    ],
)
def test_hand_worked(scores, expected, trimmed):
    together = aggregate(scores, BINS)
    assert together.score == pytest.approx(expected)
    assert together.trimmed is trimmed


def test_against_scipy_and_numpy():
    rng = np.random.default_rng(0)
    for count in (3, 5, 8):
        scores = rng.choice(BINS, count)
        together = aggregate(scores.tolist(), BINS)
        assert together.score == pytest.approx(stats.trim_mean(scores, 1.0 / count + 1e-9))
        assert together.variance == pytest.approx(scores.var())
        assert together.votes == tuple(np.array([(scores == b).sum() for b in BINS], dtype=float))


def test_order_does_not_matter_and_votes_keep_all():
    together = aggregate([1.0, 2.0, 5.0, 2.0], BINS)
    assert together == aggregate([5.0, 2.0, 2.0, 1.0], BINS)
    assert sum(together.votes) == 4.0


@pytest.mark.parametrize(
    ("scores", "words"), [([], "at least one"), ([4.2], "4 and 4.5"), ([6.0], "off the scale"), ([float("nan")], "NaN")]
)
def test_errors(scores, words):
    with pytest.raises(ValueError, match=words):
        aggregate(scores, BINS)


# Krippendorff 2011, section D: observers A to D on twelve units; a dot is no value.
PUBLISHED = """
1 2 3 3 2 1 4 1 2 . . .
1 2 3 3 2 2 4 1 2 5 . 3
. 3 3 3 2 3 4 2 2 5 1 .
1 2 3 3 2 4 4 1 2 5 1 .
"""
VALUES = (1.0, 2.0, 3.0, 4.0, 5.0)


def votes_of(columns, values=VALUES):
    return [[sum(score == value for score in column) for value in values] for column in columns]


@pytest.mark.parametrize(("distance", "published"), [(nominal, 0.743), (ordinal, 0.815), (interval, 0.849)])
def test_alpha_is_the_published_one(distance, published):
    rows = [[float(x) if x != "." else None for x in line.split()] for line in PUBLISHED.split("\n") if line]
    assert round(krippendorff_alpha(votes_of(zip(*rows, strict=True)), VALUES, distance), 3) == published


def pairwise_alpha(columns, distance):
    """By its meaning: mean distance of scores of one unit, over that of any two scores, both over ordered pairs."""
    columns = [column for column in columns if len(column) > 1]
    everything = [score for column in columns for score in column]
    within = sum(
        distance(a, b, everything) / (len(column) - 1)
        for column in columns
        for i, a in enumerate(column)
        for j, b in enumerate(column)
        if i != j
    )
    across = sum(distance(a, b, everything) for i, a in enumerate(everything) for j, b in enumerate(everything) if i != j)
    return 1 - (within / len(everything)) / (across / (len(everything) * (len(everything) - 1)))


def ordinal_by_loop(a, b, everything):
    low, high = min(a, b), max(a, b)
    between = sum(low <= score <= high for score in everything)
    return (between - (everything.count(low) + everything.count(high)) / 2) ** 2


LOOPS = {
    nominal: lambda a, b, everything: float(a != b),
    ordinal: ordinal_by_loop,
    interval: lambda a, b, everything: (a - b) ** 2,
}


@pytest.mark.parametrize("distance", LOOPS)
def test_alpha_against_a_loop(distance):
    rng = np.random.default_rng(0)
    columns = [rng.choice(BINS, rng.integers(0, 5)).tolist() for _ in range(15)]
    columns += [[2.0, 2.5, 2.0], [4.5, 4.5], [1.0]]
    alpha = krippendorff_alpha(votes_of(columns, BINS), BINS, distance)
    assert alpha == pytest.approx(pairwise_alpha(columns, LOOPS[distance]))
    shuffled = [columns[i] for i in rng.permutation(len(columns))]
    assert alpha == pytest.approx(krippendorff_alpha(votes_of(shuffled, BINS), BINS, distance))


@pytest.mark.parametrize("distance", LOOPS)
def test_alpha_at_its_ends(distance):
    assert krippendorff_alpha([[3, 0], [0, 2]], (1, 5), distance) == 1.0
    assert krippendorff_alpha([[1, 1], [1, 1]], (1, 5), distance) < 0  # less agreement than chance gives
    for empty in ([[1, 0], [0, 1]], [[2, 0], [3, 0]], np.zeros((0, 2))):  # no two scores; no variation; nothing
        assert math.isnan(krippendorff_alpha(empty, (1, 5), distance))
    rng = np.random.default_rng(0)
    assert abs(krippendorff_alpha(votes_of(rng.choice(BINS, (4000, 3)), BINS), BINS, distance)) < 0.03


def test_alpha_arguments():
    for votes in ([[1, 2, 3]], [1, 2], [[-1, 2]]):
        with pytest.raises(ValueError, match=r"votes must be \(N, 2\) counts for 2 values"):
            krippendorff_alpha(votes, (1, 2), nominal)


def test_half_point_rule():
    for score in (3.5, 4, 4.5):
        check_refinement(score, 4)
    for score in (3.0, 5.0, math.nan):
        with pytest.raises(ValueError, match=r"from its coarse score 4: the second round moves a score by 0\.5 at most"):
            check_refinement(score, 4)
    with pytest.raises(ValueError, match=r"coarse score 3\.5 is no integer"):
        check_refinement(4, 3.5)


def ratings_by(table):
    """From {(record, candidate): {annotator: score}} of one dimension."""
    return {Item("realism", *place): by for place, by in table.items()}


def draw(seed=0, records=12):
    rng = np.random.default_rng(seed)
    table = {}
    for r in range(records):
        for c in "abcd":
            people = rng.permutation(["ann", "bob", "cy", "dan"])[: rng.integers(1, 5)]
            table[f"p{r}", c] = {str(who): float(rng.choice(BINS)) for who in people}
    return ratings_by(table)


def test_collect_keeps_every_score():
    def record(key):
        scores = {"realism": {"a": {"ann": Annotation(4.5, True, 4.0), "bob": Annotation(3.0)}, "b": {}}}
        return Record(key, "night", (Candidate("a", b""), Candidate("b", b"")), scores=scores)

    assert collect([record("p1"), record("p2")]) == {
        Item("realism", key, "a"): {"ann": 4.5, "bob": 3.0} for key in ("p1", "p2")
    }
    with pytest.raises(ValueError, match="record 'p1' comes twice"):
        collect([record("p1"), record("p1")])


def test_audit_against_a_reference():
    table = {("p", c): {"ann": s, "bob": s - 1.5} for c, s in zip("abcd", (2.0, 3.0, 4.0, 5.0), strict=True)}
    table["p", "e"] = {"cy": 1.0}
    told = {Item("realism", "p", c): s for c, s in zip("abc", (2.5, 3.0, 3.0), strict=True)}
    ann, bob, cy = audit(ratings_by(table), told, tolerance=0.5, threshold=2 / 3)
    assert (ann.annotator, ann.scores, ann.audited) == ("ann", 4, 3)
    assert (ann.accuracy, ann.bias) == (pytest.approx(2 / 3), pytest.approx(0.5 / 3))  # -0.5, 0, 1
    assert ann.spread == pytest.approx(np.std([-0.5, 0, 1]))
    assert ann.admitted is True  # the threshold itself admits
    assert (bob.accuracy, bob.bias, bob.admitted) == (pytest.approx(1 / 3), pytest.approx(-4 / 3), False)
    assert (cy.scores, cy.audited, cy.admitted) == (1, 0, None)
    assert math.isnan(cy.accuracy)
    assert math.isnan(cy.bias)


def test_audit_against_the_others():
    ratings = draw()
    for row in audit(ratings):
        gaps = []
        for by in ratings.values():
            others = [score for who, score in by.items() if who != row.annotator]
            if row.annotator in by and others:
                gaps.append(by[row.annotator] - np.mean(others))
        assert row.audited == len(gaps) < row.scores
        assert row.accuracy == pytest.approx(np.mean([abs(gap) <= 0.5 + 1e-9 for gap in gaps]))
        assert (row.bias, row.spread) == (pytest.approx(np.mean(gaps)), pytest.approx(np.std(gaps)))


def test_a_careless_annotator_is_found():
    rng = np.random.default_rng(0)
    table = {}
    for i in range(100):
        true = rng.choice(BINS)
        near = {who: float(np.clip(true + rng.choice([-0.5, 0, 0, 0.5]), 1, 5)) for who in ("ann", "bob", "cy")}
        table[f"p{i}", "a"] = {**near, "dan": float(rng.choice(BINS))}
    told = {item: by["ann"] for item, by in ratings_by(table).items()}
    assert {row.annotator for row in audit(ratings_by(table), told) if not row.admitted} == {"dan"}


@pytest.mark.parametrize("refused", [set(), {"ann"}, {"bob", "cy"}, {"ann", "bob", "cy", "dan"}])
def test_removal_against_a_loop(refused):
    ratings = draw()
    after = removal(ratings, refused, BINS)
    old = {item: aggregate(list(by.values()), BINS).score for item, by in ratings.items()}
    left = {item: [s for who, s in by.items() if who not in refused] for item, by in ratings.items()}
    new = {item: aggregate(scores, BINS).score for item, scores in left.items() if scores}
    change = {item: abs(new[item] - old[item]) for item in new}
    pairs = [(a, b) for a, b in combinations(new, 2) if a[:2] == b[:2]]
    signs = [(np.sign(round(old[a] - old[b], 6)), np.sign(round(new[a] - new[b], 6))) for a, b in pairs]
    assert (after.scores, after.lost, after.pairs) == (len(ratings), len(old) - len(new), len(pairs))
    assert after.changed == sum(c > 1e-9 for c in change.values())
    assert after.largest == pytest.approx(max(change.values(), default=0.0))
    assert after.largest_at is None if not after.changed else change[after.largest_at] == after.largest
    assert after.flipped == sum({a, b} == {-1, 1} for a, b in signs)
    assert after.tied == sum((a == 0) != (b == 0) for a, b in signs)


def test_pairs_stay_within_record_and_dimension():
    ratings = {
        Item("realism", "p1", "a"): {"ann": 1.0, "bob": 5.0},
        Item("realism", "p2", "b"): {"ann": 2.0, "bob": 1.0},
        Item("alignment", "p1", "b"): {"ann": 2.0, "bob": 1.0},
    }
    assert removal(ratings, ["bob"], BINS).pairs == 0


def test_arguments_of_audit_and_removal():
    with pytest.raises(ValueError, match=r"threshold in \[0, 1\] and a tolerance of at least 0, got 80 and 0\.5"):
        audit({}, threshold=80)
    with pytest.raises(ValueError, match=r"got 0\.8 and nan"):
        audit({}, tolerance=math.nan)
    with pytest.raises(ValueError, match="there is no annotator 'zoe': the scores are by 'ann'"):
        removal(ratings_by({("p", "a"): {"ann": 1.0}}), ["zoe"], BINS)
    assert audit({}) == []
