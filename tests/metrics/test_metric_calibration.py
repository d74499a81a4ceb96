import math

import numpy as np
import pytest
import torch
from scipy import stats

from zr.metrics import (
    Coverage,
    ExpectedCalibrationError,
    OffScaleMass,
    RankedProbabilityScore,
    VotesNegativeLogLikelihood,
    reliability,
)
from zr.scores import ScoreDistribution

BINS = (1.0, 1.25, 2.0, 3.5, 10.0)
METRICS = [VotesNegativeLogLikelihood, RankedProbabilityScore, ExpectedCalibrationError, Coverage]


def draw(count=50, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(count, 5, generator=generator)
    votes = torch.randint(0, 3, (count, 5), generator=generator)
    votes[::7] = 0
    return ScoreDistribution(logits, BINS), votes


def test_negative_log_likelihood_vote_by_vote():
    q, votes = draw()
    metric = VotesNegativeLogLikelihood()
    metric.update(q[:20], votes[:20])
    metric.update(q[20:], votes[20:])
    each = [
        -torch.distributions.Categorical(logits=q.logits[n]).log_prob(torch.tensor(k)).item()
        for n in range(50)
        for k in range(5)
        for _ in range(int(votes[n, k]))
    ]
    assert metric.compute().item() == pytest.approx(sum(each) / len(each), rel=1e-5)


def test_a_vote_on_an_impossible_bin_is_infinite_and_nothing_else():
    q = ScoreDistribution(torch.tensor([[0.0, 0.0, -torch.inf]]), (1.0, 2.0, 3.0))
    possible, impossible = VotesNegativeLogLikelihood(), VotesNegativeLogLikelihood()
    possible.update(q, torch.tensor([[2, 3, 0]]))
    impossible.update(q, torch.tensor([[2, 3, 1]]))
    assert possible.compute().item() == pytest.approx(math.log(2))
    assert impossible.compute().item() == math.inf


def test_ranked_probability_score_against_scipy():
    q, votes = draw()
    metric = RankedProbabilityScore()
    metric.update(q[:20], votes[:20])
    metric.update(q[20:], votes[20:])
    each = [
        stats.energy_distance(BINS, BINS, q.probs[n].numpy(), votes[n].numpy()) ** 2 / 2
        for n in range(50)
        if votes[n].sum() > 0
    ]
    assert metric.compute().item() == pytest.approx(np.mean(each), rel=1e-5)


def test_expected_calibration_error_against_a_loop():
    q, votes = draw(103)
    metric = ExpectedCalibrationError()
    metric.update(q[:20], votes[:20])
    metric.update(q[20:], votes[20:])
    points = []
    for n in range(103):
        if votes[n].sum() > 0:
            top = max(range(5), key=lambda k, n=n: q.probs[n, k].item())
            points.append((q.probs[n, top].item(), votes[n, top].item() / votes[n].sum().item()))
    points.sort()
    groups = [[] for _ in range(10)]
    for place, point in enumerate(points):
        groups[math.floor(10 * (place + 0.5) / len(points))].append(point)
    assert max(map(len, groups)) - min(map(len, groups)) <= 1  # equal mass
    means = [np.mean(group, axis=0) for group in groups]
    weights = [len(group) / len(points) for group in groups]
    error = sum(w * abs(c - s) for w, (c, s) in zip(weights, means, strict=True))
    assert metric.compute().item() == pytest.approx(error, rel=1e-5)
    curve = metric.curve()
    assert curve.confidence.tolist() == pytest.approx([c for c, _ in means], rel=1e-5)
    assert curve.share.tolist() == pytest.approx([s for _, s in means], rel=1e-5)
    assert curve.weight.tolist() == pytest.approx(weights)
    assert curve.error.item() == pytest.approx(error, rel=1e-5)


def test_a_calibrated_scorer_has_a_small_error():
    q, _ = draw(4000)
    torch.manual_seed(0)
    votes = torch.distributions.Multinomial(20, probs=q.probs).sample()
    calibrated, overconfident = ExpectedCalibrationError(), ExpectedCalibrationError()
    calibrated.update(q, votes)
    overconfident.update(ScoreDistribution(3 * q.logits, BINS), votes)
    assert calibrated.compute() < 0.02
    assert overconfident.compute() > 0.1


def test_equal_confidences_stay_together_in_any_order():
    confidence = torch.tensor([0.5] * 8 + [0.9] * 2)
    share = torch.tensor([0.0, 1.0] * 4 + [0.9, 0.9])
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    for curve in (reliability(confidence, share), reliability(confidence[order], share[order])):
        assert curve.confidence.tolist() == pytest.approx([0.5, 0.9])
        assert curve.share.tolist() == pytest.approx([0.5, 0.9])
        assert curve.weight.tolist() == pytest.approx([0.8, 0.2])
        assert curve.error.item() == pytest.approx(0.0, abs=1e-6)


def test_reliability_arguments():
    with pytest.raises(ValueError, match=r"one length, got \(2,\), \(3,\)"):
        reliability(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match="groups must be at least 1, got 0"):
        reliability(torch.zeros(2), torch.zeros(2), groups=0)
    with pytest.raises(ValueError, match="groups must be at least 1, got 0"):
        ExpectedCalibrationError(groups=0)
    assert len(reliability(torch.zeros(0), torch.zeros(0)).weight) == 0


@pytest.mark.parametrize("level", [0.5, 0.8, 0.9])
def test_coverage_is_that_of_randomised_votes(level):
    """Oracle: each vote becomes many uniform points inside its step of the CDF; the share of points that are inside."""
    q, votes = draw(20)
    metric = Coverage(level)
    metric.update(q[:8], votes[:8])
    metric.update(q[8:], votes[8:])
    grid = (np.arange(20_000) + 0.5) / 20_000
    inside = []
    for n in range(20):
        steps = np.concatenate([[0], np.cumsum(q.probs[n].double().numpy())])
        for k in range(5):
            points = steps[k] + grid * (steps[k + 1] - steps[k])
            inside += [np.mean(np.abs(points - 0.5) < level / 2)] * int(votes[n, k])
    assert metric.compute().item() == pytest.approx(np.mean(inside), abs=1e-4)


@pytest.mark.parametrize("level", [0.5, 0.8, 0.9])
def test_coverage_of_a_calibrated_scorer_is_the_level(level):
    q, _ = draw(4000)
    torch.manual_seed(0)
    votes = torch.distributions.Multinomial(5, probs=q.probs).sample()
    values = []
    for sharper in (0.5, 1, 2):
        metric = Coverage(level)
        metric.update(ScoreDistribution(sharper * q.logits, BINS), votes)
        values.append(metric.compute().item())
    assert values[1] == pytest.approx(level, abs=0.01)
    assert values[0] > level + 0.01 > level - 0.02 > values[2]  # not sure enough, too sure
    exact = Coverage(level)  # expected votes: the level itself
    exact.update(q, q.probs)
    assert exact.compute().item() == pytest.approx(level, abs=1e-5)


def test_coverage_of_bins_without_probability():
    q = ScoreDistribution(torch.tensor([[0.5, 0.0, 0.5], [0.0, 1.0, 0.0]]).log(), (1.0, 2.0, 3.0))
    for votes, value in (([[0, 1, 0], [0, 0, 0]], 1.0), ([[0, 0, 0], [1, 0, 1]], 0.0), ([[0, 0, 0], [0, 1, 0]], 0.8)):
        metric = Coverage(0.8)
        metric.update(q, torch.tensor(votes))
        assert metric.compute().item() == pytest.approx(value)
    for level in (0, 1, 80):
        with pytest.raises(ValueError, match=f"level must be between 0 and 1, got {level}"):
            Coverage(level)


def test_off_scale_mass():
    mass = torch.rand(4, 3, generator=torch.Generator().manual_seed(0))
    metric = OffScaleMass()
    for part in (mass[:1], mass[1:]):
        metric.update(ScoreDistribution(torch.zeros(*part.shape, 5), BINS, off_scale=part))
    assert metric.compute().item() == pytest.approx(sum(mass.flatten().tolist()) / 12)
    metric.reset()
    metric.update(ScoreDistribution(torch.zeros(0, 5), BINS, off_scale=torch.zeros(0)))
    assert metric.compute().isnan()
    with pytest.raises(ValueError, match=r"off_scale was not computed.*off_scale=True"):
        metric.update(draw()[0])


@pytest.mark.parametrize("metric", METRICS)
def test_common(metric):
    q, votes = draw()
    shuffled, batched, half = metric(), metric(), metric()
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    shuffled.update(q[order], votes[order])
    batched.update(q, votes)
    torch.testing.assert_close(shuffled.compute(), batched.compute())
    half.update(ScoreDistribution(q.logits.bfloat16(), BINS), votes)
    assert half.compute().isfinite()
    empty = metric()
    empty.update(q[:3], torch.zeros(3, 5))
    empty.update(q[:0], torch.zeros(0, 5))
    assert empty.compute().isnan()
    with pytest.raises(ValueError, match=r"got batch shape \(50,\), 5 bins and votes \(50, 4\)"):
        metric().update(q, votes[:, :4])
    with pytest.raises(ValueError, match=r"needed are N distributions and votes \(N, K\): got batch shape \(5, 10\)"):
        metric().update(ScoreDistribution(q.logits.reshape(5, 10, 5), BINS), votes.reshape(5, 10, 5))
