import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch.autograd import gradcheck
from torch.distributions import Categorical
from torch.nn.functional import cross_entropy

from zr.losses import (
    InterpolatedCrossEntropy,
    RankedProbabilityLoss,
    ScoreTarget,
    SoftLabelCrossEntropy,
    VotesRankedProbabilityLoss,
    bin_cross_entropy,
    interpolated_cross_entropy,
    linear_weights,
    ranked_probability_loss,
    soft_cross_entropy,
    soft_label,
    votes_ranked_probability_loss,
)
from zr.scores import ScoreDistribution

BINS = (1.0, 1.25, 2.0, 3.5, 10.0)
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
