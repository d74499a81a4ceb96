import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats
from torch.autograd import gradcheck
from torch.distributions import Categorical
from torch.nn.functional import cross_entropy

from zr.losses import (
    InterpolatedCrossEntropy,
    RankedProbabilityLoss,
    ScoreTarget,
    SoftLabelCrossEntropy,
    TiltedGaussianCrossEntropy,
    VotesRankedProbabilityLoss,
    bin_cross_entropy,
    interpolated_cross_entropy,
    linear_weights,
    ranked_probability_loss,
    soft_cross_entropy,
    soft_label,
    tilted_gaussian_label,
    votes_ranked_probability_loss,
    votes_variance,
)
from zr.scores import ScoreDistribution

BINS = (1.0, 1.25, 2.0, 3.5, 10.0)
nan = float("nan")
TENSOR = torch.tensor(BINS, dtype=torch.float64)
LOGITS = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Q = ScoreDistribution(LOGITS, BINS)
BETWEEN = torch.tensor([1.0, 1.1, 1.25, 3.0, 9.0, 10.0], dtype=torch.float64)
VOTES = torch.tensor([[1, 0, 0, 0, 0], [3, 1, 0, 0, 0], [0, 0, 2, 2, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 7], [2, 0, 0, 0, 2]])


def test_bin_cross_entropy_is_that_of_the_index():
    index = torch.tensor([0, 4, 2, 1, 3, 3])
    value = bin_cross_entropy(Q, TENSOR[index])
    torch.testing.assert_close(value, cross_entropy(LOGITS, index, reduction="none"))
    torch.testing.assert_close(value, -Categorical(logits=LOGITS).log_prob(index))
    with pytest.raises(ValueError, match=r"score 1.1 is no bin: its neighbours are 1 and 1.25"):
        bin_cross_entropy(Q, BETWEEN)
    with pytest.raises(ValueError, match=r"score must have the shape \(6,\), got \(\)"):
        bin_cross_entropy(Q, torch.tensor(1.0))


def test_linear_weights_against_a_loop():
    weights = linear_weights(BETWEEN, TENSOR)
    for score, row in zip(BETWEEN.tolist(), weights.tolist(), strict=True):
        expected = [0.0] * len(BINS)
        if score in BINS:
            expected[BINS.index(score)] = 1.0
        else:
            high = next(i for i, s in enumerate(BINS) if s > score)
            expected[high] = (score - BINS[high - 1]) / (BINS[high] - BINS[high - 1])
            expected[high - 1] = 1 - expected[high]
        assert row == pytest.approx(expected, abs=1e-12)


def test_linear_weights_need_the_scale():
    for bad in (0.9, 10.1, float("nan")):
        with pytest.raises(ValueError, match=f"score {bad:g} lies outside the bins, 1 to 10"):
            linear_weights(torch.tensor([2.0, bad]), TENSOR)
    assert linear_weights(torch.tensor(10.00001), TENSOR).tolist() == [0, 0, 0, 0, 1]  # rounding
    assert linear_weights(torch.zeros(0), TENSOR).shape == (0, 5)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.floats(0.05, 3), min_size=1, max_size=10), st.floats(0, 1))
def test_linear_weights_keep_the_mean(gaps, place):
    bins = torch.tensor([0.0, *gaps], dtype=torch.float64).cumsum(0)
    score = bins[-1] * place
    weights = linear_weights(score, bins)
    assert (weights * bins).sum().item() == pytest.approx(score.item(), abs=1e-9)
    assert weights.sum().item() == pytest.approx(1.0)
    assert (weights >= 0).all()
    assert (weights > 0).sum() <= 2


def test_soft_cross_entropy():
    label = torch.softmax(torch.randn(6, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64), -1)
    torch.testing.assert_close(soft_cross_entropy(Q, label), cross_entropy(LOGITS, label, reduction="none"))
    # Minus the label's entropy it is a Kullback-Leibler divergence.
    own, other = Categorical(probs=label), Categorical(logits=LOGITS)
    divergence = torch.distributions.kl_divergence(own, other)
    torch.testing.assert_close(soft_cross_entropy(Q, label) - own.entropy(), divergence)
    with pytest.raises(ValueError, match=r"label must have the shape \(6, 5\), got \(5,\)"):
        soft_cross_entropy(Q, label[0])


def test_impossible_bins_cost_only_what_is_on_them():
    logits = torch.tensor([0.0, 0.0, -torch.inf], requires_grad=True)
    q = ScoreDistribution(logits, (1.0, 2.0, 3.0))
    value = soft_cross_entropy(q, torch.tensor([0.5, 0.5, 0.0]))
    assert value.item() == pytest.approx(math.log(2))
    value.backward()
    assert logits.grad.isfinite().all()
    assert soft_cross_entropy(q, torch.tensor([0.5, 0.25, 0.25])).item() == math.inf


def test_interpolated_cross_entropy():
    value = interpolated_cross_entropy(Q, BETWEEN)
    torch.testing.assert_close(value, -(linear_weights(BETWEEN, TENSOR) * Q.logits).sum(-1))
    torch.testing.assert_close(value, InterpolatedCrossEntropy()(Q, ScoreTarget.from_scores(BETWEEN)))
    on = torch.tensor([0, 2, 5])
    torch.testing.assert_close(value[on], bin_cross_entropy(Q[on], BETWEEN[on]))


def test_soft_label():
    votes = VOTES.clone()
    votes[1] = 0
    label = soft_label(ScoreTarget.from_scores(BETWEEN, votes=votes), TENSOR)
    for row in range(6):
        expected = linear_weights(BETWEEN[row], TENSOR) if row == 1 else votes[row] / votes[row].sum()
        torch.testing.assert_close(label[row], expected.double(), check_dtype=False, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(soft_label(ScoreTarget.from_scores(BETWEEN), TENSOR), linear_weights(BETWEEN, TENSOR))
    # The score is not looked at where there are votes.
    assert soft_label(ScoreTarget.from_scores(torch.tensor([99.0]), votes=VOTES[:1]), TENSOR)[0].tolist() == [1, 0, 0, 0, 0]
    with pytest.raises(ValueError, match=r"votes must be \(..., 5\) for 5 bins, got \(6, 4\)"):
        soft_label(ScoreTarget.from_scores(BETWEEN, votes=VOTES[:, :4]), TENSOR)


def test_soft_label_loss_is_the_mean_over_annotators():
    value = SoftLabelCrossEntropy()(Q, ScoreTarget.from_scores(BETWEEN, votes=VOTES))
    for row in range(6):
        each = [-Q.logits[row, k].item() for k in range(5) for _ in range(int(VOTES[row, k]))]
        assert value[row].item() == pytest.approx(sum(each) / len(each))


def test_ranked_probability_loss_is_the_integral():
    value = ranked_probability_loss(Q, BETWEEN)
    torch.testing.assert_close(value, RankedProbabilityLoss()(Q, ScoreTarget.from_scores(BETWEEN)))
    for row in range(6):
        score, cdf = BETWEEN[row].item(), np.append(0, Q.probs[row].numpy().cumsum())
        edges = np.unique([*BINS, score])
        middle = (edges[1:] + edges[:-1]) / 2
        step = (cdf[np.searchsorted(BINS, middle, side="right")] - (middle >= score)) ** 2
        assert value[row].item() == pytest.approx((step * np.diff(edges)).sum())


def test_ranked_probability_loss_is_a_difference_of_expected_distances():
    value = ranked_probability_loss(Q, BETWEEN)
    for row in range(6):
        p, score = Q.probs[row].tolist(), BETWEEN[row].item()
        to_score = sum(a * abs(s - score) for a, s in zip(p, BINS, strict=True))
        inside = sum(a * b * abs(s - t) for a, s in zip(p, BINS, strict=True) for b, t in zip(p, BINS, strict=True))
        assert value[row].item() == pytest.approx(to_score - inside / 2)


def test_votes_ranked_probability_loss_is_an_energy_distance():
    value = votes_ranked_probability_loss(Q, VOTES)
    torch.testing.assert_close(value, VotesRankedProbabilityLoss()(Q, ScoreTarget.from_scores(BETWEEN, votes=VOTES)))
    for row in range(6):
        energy = stats.energy_distance(BINS, BINS, Q.probs[row].numpy(), VOTES[row].numpy())
        assert value[row].item() == pytest.approx(energy**2 / 2)
    one = torch.nn.functional.one_hot(torch.tensor([0, 4, 2, 1, 3, 3]), 5)
    torch.testing.assert_close(votes_ranked_probability_loss(Q, 3 * one), ranked_probability_loss(Q, TENSOR[one.argmax(-1)]))
    agreeing = ScoreDistribution(VOTES.double().log(), BINS)
    assert votes_ranked_probability_loss(agreeing, VOTES).abs().max() < 1e-12


def test_votes_are_needed():
    with pytest.raises(ValueError, match=r"needs target.votes, got None: use RankedProbabilityLoss"):
        VotesRankedProbabilityLoss()(Q, ScoreTarget.from_scores(BETWEEN))
    votes = VOTES.clone()
    votes[4] = 0
    with pytest.raises(ValueError, match=r"an item has no votes \(index \[4\]\)"):
        votes_ranked_probability_loss(Q, votes)
    with pytest.raises(ValueError, match=r"votes must have the shape \(6, 5\), got \(6, 4\)"):
        votes_ranked_probability_loss(Q, VOTES[:, :4])


FUNCTIONS = {
    "bin": lambda q: bin_cross_entropy(q, TENSOR[torch.tensor([0, 4, 2, 1, 3, 3])]),
    "interpolated": lambda q: interpolated_cross_entropy(q, BETWEEN),
    "soft": lambda q: soft_cross_entropy(q, VOTES / VOTES.sum(-1, keepdim=True)),
    "tilted": lambda q: TiltedGaussianCrossEntropy()(q, ScoreTarget.from_scores(BETWEEN, votes=VOTES)),
    "ranked": lambda q: ranked_probability_loss(q, BETWEEN),
    "votes": lambda q: votes_ranked_probability_loss(q, VOTES),
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_gradients(function):
    assert gradcheck(lambda x: function(ScoreDistribution(x, BINS)), LOGITS.clone().requires_grad_())


@pytest.mark.parametrize("function", [FUNCTIONS[name] for name in ("soft", "votes")])
def test_the_votes_are_the_optimum(function):
    elsewhere = VOTES + 0.05 + 0.1 * torch.rand(VOTES.shape, generator=torch.Generator().manual_seed(3))
    assert (function(ScoreDistribution(elsewhere.log(), BINS)) > function(ScoreDistribution(VOTES.log(), BINS))).all()


HALVES = torch.arange(1.0, 5.5, 0.5, dtype=torch.float64)


def tilted_by_scipy(score, variance, bins):
    """Cells by differences of the normal CDF, the tilt by root finding."""
    edges = [-math.inf, *((a + b) / 2 for a, b in zip(bins[1:], bins[:-1], strict=True)), math.inf]
    cells = np.diff(stats.norm.cdf(edges, score, math.sqrt(variance)))
    bins = np.array(bins)

    def tilted(tilt):
        weights = cells * np.exp(tilt * (bins - score))
        return weights / weights.sum()

    return tilted(optimize.brentq(lambda tilt: tilted(tilt) @ bins - score, -60, 60, xtol=1e-14))


@pytest.mark.parametrize("bins", [HALVES, TENSOR], ids=["halves", "uneven"])
def test_tilted_gaussian_label_against_scipy(bins):
    place = torch.tensor([0.01, 0.1, 0.25, 0.5, 0.61, 0.9, 0.99], dtype=torch.float64)
    score = (bins[0] + (bins[-1] - bins[0]) * place).repeat_interleave(3)
    variance = torch.tensor([0.3, 1.0, 4.0], dtype=torch.float64).repeat(7)
    label = tilted_gaussian_label(score, variance, bins)
    assert (label > 0).all()
    for s, v, row in zip(score.tolist(), variance.tolist(), label.tolist(), strict=True):
        assert row == pytest.approx(tilted_by_scipy(s, v, bins.tolist()), abs=1e-9)


def test_tilted_gaussian_label_by_hand():
    # On the middle of an even scale nothing is tilted: Phi(-.75) below 2, what lies between, Phi(-.75) above 4.
    label = tilted_gaussian_label(torch.tensor(3.0), torch.tensor(4 / 9), torch.tensor([1.0, 3.0, 5.0]))
    assert label.tolist() == pytest.approx([0.066807, 0.866386, 0.066807], abs=1e-6)  # 1 / (2 / 3) = 1.5
    # Two bins have one label of a mean, whatever the variance.
    two = tilted_gaussian_label(torch.tensor([2.0, 2.0]), torch.tensor([0.5, 50.0]), torch.tensor([1.0, 5.0]))
    torch.testing.assert_close(two, torch.tensor([[0.75, 0.25], [0.75, 0.25]]))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.floats(0.05, 3), min_size=1, max_size=10), st.floats(0, 1), st.floats(-12, 6))
def test_the_tilted_label_has_the_mean(gaps, place, exponent):
    bins = torch.tensor([0.0, *gaps], dtype=torch.float64).cumsum(0)
    score, variance = bins[-1] * place, torch.tensor(10.0**exponent, dtype=torch.float64)
    label = tilted_gaussian_label(score, variance, bins)
    assert (label * bins).sum().item() == pytest.approx(score.item(), abs=1e-7)
    assert label.sum().item() == pytest.approx(1.0)
    assert (label >= 0).all()
    mirrored = tilted_gaussian_label(bins[-1] - score, variance, bins[-1] - bins.flip(0))
    torch.testing.assert_close(mirrored.flip(0), label, rtol=1e-5, atol=1e-7)


def test_the_tilted_label_meets_linear_weights():
    score = torch.tensor([1.0, 3.2, 3.25, 4.5, 5.0, 2.7, 2.7], dtype=torch.float64)
    for variance in (0.0, 1e-14, 1e-4, nan):
        label = tilted_gaussian_label(score, torch.full_like(score, variance), HALVES)
        torch.testing.assert_close(label, linear_weights(score, HALVES))
    # No jump where the Gaussian takes over, and none next to the ends.
    narrow = torch.full_like(score, (0.0301 * 0.5) ** 2)
    torch.testing.assert_close(tilted_gaussian_label(score, narrow, HALVES), linear_weights(score, HALVES), atol=1e-9, rtol=0)
    near = torch.tensor([1 + 1e-4, 5 - 1e-4], dtype=torch.float64)
    ends = tilted_gaussian_label(near, torch.ones_like(near), HALVES)
    torch.testing.assert_close(ends, linear_weights(near, HALVES), atol=3e-4, rtol=0)
    assert (ends > 0).all()
    # Wider annotators, wider label.
    wide = tilted_gaussian_label(score[1].expand(3), torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64), HALVES)
    spread = (wide * (HALVES - score[1]).square()).sum(-1)
    assert spread.diff().min() > 0.1


def test_tilted_label_shapes_and_errors():
    score = torch.tensor([[2.0, 3.1]])
    assert tilted_gaussian_label(score, torch.ones(1, 2), HALVES.float()).dtype == torch.float32
    assert tilted_gaussian_label(score[:0], torch.ones(0, 2), HALVES).shape == (0, 2, 9)
    with pytest.raises(ValueError, match=r"variance must have the shape \(1, 2\), got \(2,\)"):
        tilted_gaussian_label(score, torch.ones(2), HALVES)
    for bad in (-0.5, math.inf):
        with pytest.raises(ValueError, match=rf"a variance must be at least 0 and finite \(NaN: unknown\), got {bad:g}"):
            tilted_gaussian_label(score, torch.tensor([[1.0, bad]]), HALVES)
    with pytest.raises(ValueError, match=r"score 5.2 lies outside the bins, 1 to 5"):
        tilted_gaussian_label(score + 2.1, torch.ones(1, 2), HALVES)


def test_tilted_gaussian_loss():
    variance = torch.tensor([nan, 0.5, 0.0, 2.0, 9.0, 1.0], dtype=torch.float64)
    target = ScoreTarget.from_scores(BETWEEN, votes=VOTES, variance=variance)
    label = tilted_gaussian_label(BETWEEN, variance, TENSOR)
    torch.testing.assert_close(TiltedGaussianCrossEntropy()(Q, target), soft_cross_entropy(Q, label))
    # Without a variance, that of the votes; without either, linear weights.
    voted = TiltedGaussianCrossEntropy()(Q, ScoreTarget.from_scores(BETWEEN, votes=VOTES))
    spread = torch.full((6,), nan, dtype=torch.float64)
    for row in range(1, 6):
        each = [BINS[k] for k in range(5) for _ in range(int(VOTES[row, k]))]
        spread[row] = float(np.var(each, ddof=1))
    torch.testing.assert_close(votes_variance(VOTES, TENSOR), spread, equal_nan=True)
    torch.testing.assert_close(voted, soft_cross_entropy(Q, tilted_gaussian_label(BETWEEN, spread, TENSOR)))
    alone = TiltedGaussianCrossEntropy()(Q, ScoreTarget.from_scores(BETWEEN))
    torch.testing.assert_close(alone, interpolated_cross_entropy(Q, BETWEEN))
    # Least, the entropy of the label, where the prediction is the label.
    best = TiltedGaussianCrossEntropy()(ScoreDistribution(label.log(), BINS), target)
    torch.testing.assert_close(best, Categorical(probs=label).entropy())
    with pytest.raises(ValueError, match=r"votes must be \(..., 5\) for 5 bins, got \(6, 4\)"):
        votes_variance(VOTES[:, :4], TENSOR)
