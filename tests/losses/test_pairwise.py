import math

import pytest
import torch
from scipy.stats import norm
from torch.autograd import gradcheck

from zr.losses import (
    BradleyTerryLoss,
    FidelityLoss,
    GapLoss,
    ScoreTarget,
    bradley_terry_loss,
    fidelity_loss,
    gap_loss,
    preference_probability,
    preference_share,
)
from zr.scores import ScoreDistribution

BINS = (1.0, 1.25, 2.0, 3.5, 10.0)
G = 3
LOGITS = torch.randn(4, 2, G, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Q = ScoreDistribution(LOGITS, BINS)
SCORE = torch.tensor([[2.0, 3.5], [10.0, 1.0], [3.5, 3.5], [1.25, 7.0]], dtype=torch.float64)
SHARE = torch.tensor([0.0, 1.0, 0.5, 0.3], dtype=torch.float64)
nan = float("nan")


def test_gap_loss_is_equation_11():
    value = gap_loss(Q, SCORE)
    torch.testing.assert_close(value, GapLoss()(Q, ScoreTarget.from_scores(SCORE)))
    for pair in range(4):
        total = 0.0
        for j in range(2):
            other = 1 - j
            for i in range(G):
                for k in range(G):
                    predicted = Q.mean[pair, j, i] - Q.mean[pair, other, k]
                    total += abs((predicted - (SCORE[pair, j] - SCORE[pair, other])).item())
        assert value[pair].item() == pytest.approx(total / (2 * G**2 * 9.0))


def test_bradley_terry_is_equation_12():
    value = bradley_terry_loss(Q, SHARE)
    for pair in range(4):
        total = 0.0
        for i in range(G):
            for k in range(G):
                first = 1 / (1 + math.exp(-(Q.mean[pair, 0, i] - Q.mean[pair, 1, k]).item()))
                total -= SHARE[pair].item() * math.log(first) + (1 - SHARE[pair].item()) * math.log(1 - first)
        assert value[pair].item() == pytest.approx(total / G**2)


def test_bradley_terry_takes_winners_from_scores():
    value = BradleyTerryLoss()(Q, ScoreTarget.from_scores(SCORE))
    torch.testing.assert_close(value, bradley_terry_loss(Q, torch.tensor([0.0, 1.0, 0.5, 0.0])))
    one = Q[:, :, :1]
    loser_to_winner = torch.stack([one.mean[1, 0, 0] - one.mean[1, 1, 0]])
    expected = -torch.nn.functional.logsigmoid(loser_to_winner)
    torch.testing.assert_close(BradleyTerryLoss()(one[1:2], ScoreTarget.from_scores(SCORE[1:2])), expected)


def test_preference_share():
    score = torch.tensor([[11 / 3, 11 / 3], [4.0, 3.5], [nan, 3.0], [1.0, 5.0]])
    known = ~score.isnan()
    preference = torch.tensor([nan, 0.25, 0.75, nan])
    share = preference_share(ScoreTarget(score, known, preference=preference))
    assert share.tolist() == [0.5, 0.25, 0.75, 0.0]  # a comparison, where there is one, counts before the scores
    rounded = torch.tensor([[1.0, 1.0 + 2e-7]])
    assert preference_share(ScoreTarget.from_scores(rounded)).tolist() == [0.5]
    with pytest.raises(ValueError, match=r"1 of 4 pairs have neither .* \(first at index \[2\]\)"):
        preference_share(ScoreTarget(score, known))
    # What stands in the place of an unknown score has no influence.
    filled = torch.where(known, score, 99.0)
    assert preference_share(ScoreTarget(filled, known, preference=preference)).tolist() == share.tolist()


def test_a_preference_must_be_a_share_and_has_no_distance():
    with pytest.raises(ValueError, match=r"preference must be a share in \[0, 1\], got \[0.0, 2.0"):
        bradley_terry_loss(Q, torch.tensor([0.0, 2.0, 1.0, 1.0]))
    with pytest.raises(ValueError, match=r"preference must have the shape \(4,\), got \(4, 2\)"):
        bradley_terry_loss(Q, SCORE)
    with pytest.raises(ValueError, match="8 of 8 scores are unknown"):
        GapLoss()(Q, ScoreTarget.from_preference(SHARE))


def test_order_does_not_matter():
    order = torch.tensor([2, 0, 1])
    shuffled = ScoreDistribution(torch.stack([LOGITS[:, 0, order], LOGITS[:, 1]], 1), BINS)
    swapped = ScoreDistribution(LOGITS.flip(1), BINS)
    torch.testing.assert_close(gap_loss(shuffled, SCORE), gap_loss(Q, SCORE))
    torch.testing.assert_close(gap_loss(swapped, SCORE.flip(1)), gap_loss(Q, SCORE))
    torch.testing.assert_close(bradley_terry_loss(shuffled, SHARE), bradley_terry_loss(Q, SHARE))
    torch.testing.assert_close(bradley_terry_loss(swapped, 1 - SHARE), bradley_terry_loss(Q, SHARE))
    torch.testing.assert_close(fidelity_loss(shuffled, SHARE), fidelity_loss(Q, SHARE))
    torch.testing.assert_close(fidelity_loss(swapped, 1 - SHARE), fidelity_loss(Q, SHARE))


def test_a_common_shift_of_scores_has_no_influence():
    torch.testing.assert_close(gap_loss(Q, SCORE + 1.7), gap_loss(Q, SCORE))
    wider = ScoreDistribution(LOGITS, [10 * b - 3 for b in BINS])
    torch.testing.assert_close(gap_loss(wider, 10 * SCORE), gap_loss(Q, SCORE))
    torch.testing.assert_close(fidelity_loss(wider, SHARE), fidelity_loss(Q, SHARE))


def test_the_gap_loss_stops_where_bradley_terry_goes_on():
    logits = torch.tensor([[[0.5, 0.5]], [[0.75, 0.25]]], dtype=torch.float64).log()
    gap_zero = ScoreDistribution(logits.requires_grad_(), (1.0, 5.0))  # means 3 and 2
    assert gap_loss(gap_zero, torch.tensor([4.0, 3.0])).item() == pytest.approx(0.0, abs=1e-12)
    bradley_terry_loss(gap_zero, torch.tensor(1.0)).backward()
    assert logits.grad[0, 0, 1] < 0 < logits.grad[1, 0, 1]


def test_fidelity_against_a_loop():
    value = fidelity_loss(Q, SHARE)
    for pair in range(4):
        total, share = 0.0, SHARE[pair].item()
        for i in range(G):
            for k in range(G):
                spread = math.sqrt((Q.variance[pair, 0, i] + Q.variance[pair, 1, k]).item())
                p = norm.cdf((Q.mean[pair, 0, i] - Q.mean[pair, 1, k]).item() / spread)
                total += 1 - math.sqrt(p * share) - math.sqrt((1 - p) * (1 - share))
        assert value[pair].item() == pytest.approx(total / G**2)


def test_fidelity_by_hand():
    # Means 4 and 2, variances 3 and 3: P = Phi(2 / sqrt 6) = Phi(.8165) = .7929.
    q = ScoreDistribution(torch.tensor([[[0.25, 0.75]], [[0.75, 0.25]]]).log(), (1.0, 5.0))
    assert fidelity_loss(q, torch.tensor(1.0)).item() == pytest.approx(1 - math.sqrt(0.79289), abs=1e-5)
    assert fidelity_loss(q, torch.tensor(0.0)).item() == pytest.approx(1 - math.sqrt(1 - 0.79289), abs=1e-5)
    assert fidelity_loss(q, torch.tensor(norm.cdf(2 / math.sqrt(6)))).item() == pytest.approx(0.0, abs=1e-12)


def test_fidelity_has_its_minimum_at_the_preference():
    one = Q[:, :, :1].detach()
    z = (one.mean[:, 0, 0] - one.mean[:, 1, 0]) / one.variance.sum(1).squeeze(-1).sqrt()
    leaf = LOGITS[:, :, :1].clone().requires_grad_()
    value = fidelity_loss(ScoreDistribution(leaf, BINS), torch.from_numpy(norm.cdf(z.numpy())))
    assert value.abs().max() < 1e-12
    value.sum().backward()
    assert leaf.grad.abs().max() < 1e-9
    assert (fidelity_loss(Q, SHARE) > 0).all()
    assert (fidelity_loss(Q, SHARE) < 1).all()


def test_fidelity_is_finite_where_the_prediction_is_certain():
    for low in (-50.0, -1e4, -torch.inf):  # variance zero, ever more so
        sure = torch.tensor([0.0, low, low])
        for first, second in ((sure, sure.roll(2)), (sure.roll(2), sure), (sure, sure)):
            logits = torch.stack([first, second])[:, None].requires_grad_()
            for share in (0.0, 0.5, 1.0):
                logits.grad = None
                value = FidelityLoss(1e-4)(
                    ScoreDistribution(logits, (1.0, 2.0, 5.0)), ScoreTarget.from_preference(torch.tensor(share))
                )
                value.backward()
                assert 0 <= value.item() <= 1
                assert logits.grad.isfinite().all()
            # Certain and right costs nothing, certain and wrong the most.
            if first is not second:
                right = float(first is not sure)
                q = ScoreDistribution(logits.detach(), (1.0, 2.0, 5.0))
                assert fidelity_loss(q, torch.tensor(right)).item() == pytest.approx(0.0, abs=1e-6)
                assert fidelity_loss(q, torch.tensor(1 - right)).item() == pytest.approx(1.0)


def test_preference_probability():
    variance = torch.tensor([[0.5, 0.5], [0.0, 0.0], [nan, 1.0], [2.0, 7.0]], dtype=torch.float64)
    value = preference_probability(ScoreTarget.from_scores(SCORE, variance=variance))
    expected = [norm.cdf(-1.5), 1.0, 0.5, norm.cdf(-5.75 / 3)]
    assert value.tolist() == pytest.approx(expected)
    # A direct comparison counts first; without variances, the order of the scores.
    target = ScoreTarget.from_scores(SCORE, variance=variance)
    compared = ScoreTarget(SCORE, target.known, variance=variance, preference=torch.tensor([0.25, nan, nan, nan]))
    assert preference_probability(compared).tolist() == pytest.approx([0.25, *expected[1:]])
    plain = ScoreTarget.from_scores(SCORE)
    assert preference_probability(plain).tolist() == preference_share(plain).tolist()
    torch.testing.assert_close(FidelityLoss()(Q, target), fidelity_loss(Q, value))
    with pytest.raises(ValueError, match="a variance must be at least 0"):
        preference_probability(ScoreTarget.from_scores(SCORE, variance=variance - 1))


def test_fidelity_errors():
    with pytest.raises(ValueError, match=r"preference must be a share in \[0, 1\], got \[0.0, 2.0"):
        fidelity_loss(Q, torch.tensor([0.0, 2.0, 1.0, 1.0]))
    with pytest.raises(ValueError, match=r"preference must have the shape \(4,\), got \(4, 2\)"):
        fidelity_loss(Q, SCORE)
    for floor in (0.0, 1e-5, nan):
        with pytest.raises(ValueError, match=r"floor is a share of the score range of at least 1e-4, got"):
            FidelityLoss(floor)
        with pytest.raises(ValueError, match="floor is a share"):
            fidelity_loss(Q, SHARE, floor)
    for function in (fidelity_loss, bradley_terry_loss):
        with pytest.raises(ValueError, match=r"batch shape \(..., 2, G\).* got \(\)"):
            function(Q[0, 0, 0], torch.tensor(1.0))
    assert repr(FidelityLoss()) == "FidelityLoss(floor=0.01)"


@pytest.mark.parametrize(
    "function",
    [lambda q: gap_loss(q, SCORE), lambda q: bradley_terry_loss(q, SHARE), lambda q: fidelity_loss(q, SHARE)],
    ids=["gap", "bradley_terry", "fidelity"],
)
def test_gradients(function):
    assert gradcheck(lambda x: function(ScoreDistribution(x, BINS)), LOGITS.clone().requires_grad_())
