import math

import pytest
import torch
from torch.autograd import gradcheck

from zr.losses import (
    AbsoluteExpectationLoss,
    ScoreTarget,
    SquaredExpectationLoss,
    absolute_expectation_loss,
    squared_expectation_loss,
)
from zr.scores import ScoreDistribution

BINS = (1.0, 1.25, 2.0, 3.5, 10.0)
LOGITS = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
SCORE = 1 + 9 * torch.rand(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
FORMS = [
    (absolute_expectation_loss, AbsoluteExpectationLoss, abs),
    (squared_expectation_loss, SquaredExpectationLoss, lambda x: x * x),
]


@pytest.mark.parametrize(("function", "module", "penalty"), FORMS)
def test_naive_loop(function, module, penalty):
    value = function(ScoreDistribution(LOGITS, BINS), SCORE)
    torch.testing.assert_close(value, module()(ScoreDistribution(LOGITS, BINS), ScoreTarget.from_scores(SCORE)))
    for i in range(4):
        for j in range(3):
            odds = [math.exp(x) for x in LOGITS[i, j].tolist()]
            mu = sum(o * s for o, s in zip(odds, BINS, strict=True)) / sum(odds)
            assert value[i, j].item() == pytest.approx(penalty((mu - SCORE[i, j].item()) / 9.0))


@pytest.mark.parametrize(("function", "module", "penalty"), FORMS)
def test_gradient_and_units(function, module, penalty):
    assert gradcheck(lambda x: function(ScoreDistribution(x, BINS), SCORE), LOGITS.clone().requires_grad_())
    # Another unit of score, the same loss.
    wider = ScoreDistribution(LOGITS, [10 * b - 3 for b in BINS])
    torch.testing.assert_close(function(wider, 10 * SCORE - 3), function(ScoreDistribution(LOGITS, BINS), SCORE))


@pytest.mark.parametrize(("function", "module", "penalty"), FORMS)
def test_nothing_is_broadcast(function, module, penalty):
    with pytest.raises(ValueError, match=r"score must have the shape \(4, 3\), got \(3,\)"):
        function(ScoreDistribution(LOGITS, BINS), SCORE[0])
