"""Aggregation against hand-worked numbers and scipy."""

import numpy as np
import pytest
from scipy import stats

from zr.data import aggregate

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
