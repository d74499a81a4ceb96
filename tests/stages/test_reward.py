"""A reward's loss by hand, and what it does to its scorer."""

import pytest
import torch
from affine import RUBRIC, Linear

from zr.models import Minimum
from zr.stages import Reward


def test_the_loss_by_hand():
    values = torch.tensor([1.0, 3.0, 4.5], dtype=torch.float64, requires_grad=True)
    plain = Reward(Linear(), Minimum(), weight=2.0).loss(values)
    bounded = Reward(Linear(), Minimum(), weight=2.0, ceiling=4.0).loss(values)
    assert plain.tolist() == [-2.0, -6.0, -9.0]
    assert bounded.tolist() == [6.0, 2.0, 0.0]
    assert torch.autograd.grad(plain.sum(), values)[0].tolist() == [-2.0, -2.0, -2.0]
    assert torch.autograd.grad(bounded.sum(), values)[0].tolist() == [-2.0, -2.0, 0.0]


def test_the_scorer_is_frozen():
    scorer = Linear().train()
    Reward(scorer, Minimum())
    assert not scorer.training
    assert not any(p.requires_grad for p in scorer.parameters())


def test_dimensions_are_named_in_the_order_asked_for():
    assert Reward(Linear(), Minimum()).dimensions == list(RUBRIC.dimensions)
    assert Reward(Linear(), Minimum(), dimensions=["realism", "alignment"]).dimensions == ["realism", "alignment"]


@pytest.mark.parametrize("weight", [0.0, -1.0, float("inf"), float("nan")])
def test_a_weight_that_means_nothing(weight):
    with pytest.raises(ValueError, match="the weight of a reward must be above zero, got"):
        Reward(Linear(), Minimum(), weight=weight)


def test_an_unknown_dimension():
    with pytest.raises(ValueError, match="beauty"):
        Reward(Linear(), Minimum(), dimensions=["beauty"])
