"""Rewards of rollouts and what of them the log-probs learn, against numbers worked by hand."""

import math

import pytest
import torch

from zr.losses import K2, CentredAdvantage, ClippedPolicyGradient, GroupAdvantage, PolicyGradient, ScoreReward
from zr.models import Rollouts
from zr.scores import ScoreDistribution
from zr.stages import Credit, ExpectedScore, ParsedScore, PolicyTerm, ReferenceTerm

BINS = (1.0, 3.0, 5.0)
MEANS = [[5.0, 3.0], [3.0, 1.0]]  # of the rollouts of both sides
CERTAIN = [[[0, 0, 1], [0, 1, 0]], [[0, 1, 0], [0.5, 0.5, 0]]]


def scores(probs=CERTAIN):
    return ScoreDistribution(torch.tensor([probs]).float().log(), BINS)


def rollouts(lengths=(2, 4, 1, 4), forced=(False, True, False, False)):
    mask = torch.arange(4) < torch.tensor(lengths)[:, None]
    nothing = torch.zeros(4, dtype=torch.long)
    return Rollouts(
        row=nothing,
        dimension=nothing,
        tokens=torch.zeros(4, 4, dtype=torch.long),
        mask=mask,
        forced=torch.tensor(forced),
        logits=torch.zeros(4, 3),
        log_probs=torch.zeros(4, 4),
    )


def credit(term, **options):
    given = {"scores": scores(), "annotated": torch.tensor([[5.0, 2.0]]), "rollouts": rollouts(), "length": 4}
    return term.credit(**(given | options), seeds=[0, 1, 2, 3])


def test_rewards_by_hand():
    """Scores 5 and 2; means 5, 3 and 3, 2: errors 0, 2 and 1, 0 of 4; gaps 2, 3, 0, 1 against 3."""
    pointwise = [1.0, 0.5, 0.75, 1.0]
    pairwise = [1 - (1 + 0) / 2 / 4, 1 - (3 + 2) / 2 / 4, 1 - (1 + 3) / 2 / 4, 1 - (0 + 2) / 2 / 4]
    wanted = [2 * a + b for a, b in zip(pointwise, pairwise, strict=True)]
    found = credit(PolicyTerm(ScoreReward(2.0, 1.0), CentredAdvantage()))
    assert found.reward.tolist() == pytest.approx(wanted)
    means = [sum(wanted[:2]) / 2] * 2 + [sum(wanted[2:]) / 2] * 2
    assert found.advantage.tolist() == pytest.approx([r - m for r, m in zip(wanted, means, strict=True)])
    assert found.label is None


def test_penalties_by_hand():
    """Half the length costs half; the second trace was closed by force."""
    plain = credit(PolicyTerm()).reward
    found = credit(PolicyTerm(length_penalty=0.4, forced_penalty=0.3)).reward
    assert (plain - found).tolist() == pytest.approx([0.4 * 2 / 4, 0.4 + 0.3, 0.4 * 1 / 4, 0.4])


def test_the_usual_parts():
    term = PolicyTerm()
    kinds = [type(part) for part in (term.reward, term.advantage, term.loss, term.decoding)]
    assert kinds == [ScoreReward, GroupAdvantage, PolicyGradient, ExpectedScore]
    assert term.weight == 1.0


def test_parsed_labels_are_rewarded_and_blamed():
    """Sure distributions draw their own label; the mean of the unsure one is 2, but a draw is 1 or 3."""
    term, seen = PolicyTerm(ScoreReward(1.0, 0.0), decoding=ParsedScore()), set()
    for seed in range(30):
        given = {"annotated": torch.tensor([[5.0, 1.0]]), "rollouts": rollouts(), "length": 4}
        found = term.credit(scores(), **given, seeds=[seed, 50 + seed, 100 + seed, 150 + seed])
        assert found.label.tolist()[:3] == [2, 1, 1]
        last = found.label.tolist()[3]
        seen.add(last)
        assert found.reward.tolist() == pytest.approx([1.0, 0.5, 0.5, {0: 1.0, 1: 0.5}[last]])
    assert seen == {0, 1}
    probs = torch.tensor([[0.2, 0.3, 0.5]])
    drawn = torch.tensor([int(ParsedScore()(ScoreDistribution(probs.log(), BINS), [seed])[1]) for seed in range(2000)])
    share = torch.bincount(drawn, minlength=3) / 2000
    assert (share - probs[0]).abs().max() < 4 * math.sqrt(0.25 / 2000)


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (None, [1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5]),
        (0.5, [1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5]),
        (1.0, [1, 1, 2, 3, 3, 3, 4, 5, 5]),
        (2.0, [1, 1, 1, 3, 3, 3, 5, 5, 5]),
        (4.0, [1, 1, 1, 1, 1, 5, 5, 5, 5]),
    ],
)
def test_a_coarse_text_says_the_nearest_of_its_scores(step, said):
    """Each bin is drawn for sure; its own label is blamed."""
    bins = [1 + i / 2 for i in range(9)]
    sure = ScoreDistribution(torch.eye(9).log(), bins)
    read, label = ParsedScore(step)(sure, range(9))
    assert read.mean.tolist() == said
    assert label.tolist() == list(range(9))


def test_a_text_that_cannot_be_is_an_error():
    with pytest.raises(ValueError, match=r"above 0, got 0"):
        ParsedScore(step=0.0)
    with pytest.raises(ValueError, match=r"label_weight must be at least 0, got -1"):
        ParsedScore(label_weight=-1.0)
    with pytest.raises(ValueError, match=r"a step of 0\.75 leads to scores that are no bins, such as 1\.75"):
        ParsedScore(step=0.75)(ScoreDistribution(torch.eye(5).log(), [1, 1.5, 2, 2.5, 3]), range(5))


@pytest.mark.parametrize("weight", [1.0, 0.0, 4.0])
@pytest.mark.parametrize("loss", [PolicyGradient(length=2.0), ClippedPolicyGradient(length=2.0)])
def test_loss_of_a_drawn_label_by_hand(loss, weight):
    """A label's log-prob stands behind the trace's; its ratio is that of the labels' softmax; its gradient has a weight."""
    term = PolicyTerm(loss=loss, decoding=ParsedScore(label_weight=weight))
    log_probs = torch.tensor([[-1.0, -2.0, 7.0, 7.0]]).requires_grad_()
    raw = torch.tensor([[1.0, 2.0, 0.5]]).requires_grad_()
    q = ScoreDistribution(raw, BINS)
    mine = Credit(torch.tensor([0.7]), torch.tensor([-1.5]), torch.tensor([1]))
    one = rollouts(lengths=(2, 1, 1, 1)).select(slice(0, 1))
    label = math.log(math.exp(2) / (math.exp(1) + math.exp(2) + math.exp(0.5)))
    both, mask = term.with_label(log_probs, one, mine, q)
    assert both[mask].tolist() == pytest.approx([-1.0, -2.0, label])
    value = term(log_probs, both.detach(), one, mine, q)
    wanted = 1.5 * (-3.0 + label) / 2 if isinstance(loss, PolicyGradient) else 1.5 * 3 / 2
    assert value.tolist() == pytest.approx([wanted])
    value.sum().backward()
    assert log_probs.grad.tolist()[0] == pytest.approx([0.75, 0.75, 0, 0])
    softmax = [math.exp(x) / sum(map(math.exp, (1, 2, 0.5))) for x in (1, 2, 0.5)]
    assert raw.grad.tolist()[0] == pytest.approx([0.75 * weight * (float(i == 1) - p) for i, p in enumerate(softmax)], abs=1e-6)


def test_without_a_label_the_score_is_not_blamed():
    raw = torch.randn(4, 3, requires_grad=True)
    log_probs = torch.randn(4, 4, requires_grad=True)
    term = PolicyTerm()
    found = term(log_probs, log_probs.detach(), rollouts(), credit(term), ScoreDistribution(raw, BINS))
    found.sum().backward()
    assert raw.grad is None
    assert log_probs.grad[rollouts().mask].ne(0).any()


def test_select():
    whole = Credit(torch.arange(4.0), torch.arange(4.0) * 2, torch.arange(4))
    part = whole.select(slice(1, 3))
    assert (part.reward.tolist(), part.advantage.tolist(), part.label.tolist()) == ([1, 2], [2, 4], [1, 2])
    assert Credit(whole.reward, whole.advantage, None).select(slice(1, 3)).label is None


def test_no_gradient_through_the_credit():
    raw = torch.randn(1, 2, 2, 3, requires_grad=True)
    found = credit(PolicyTerm(), scores=ScoreDistribution(raw, BINS))
    assert not found.reward.requires_grad
    assert not found.advantage.requires_grad


@pytest.mark.parametrize("name", ["weight", "length_penalty", "forced_penalty"])
@pytest.mark.parametrize("value", [-0.1, math.nan])
def test_weights_that_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be at least 0"):
        PolicyTerm(**{name: value})


@pytest.mark.parametrize("wrong", [{"weight": 0.0}, {"weight": math.nan}, {"weight": 1.0, "refresh": 0}])
def test_references_that_are_refused(wrong):
    with pytest.raises(ValueError, match="a reference needs a weight above 0 and refresh of at least 1"):
        ReferenceTerm(K2(), **wrong)
