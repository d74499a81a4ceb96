"""The dispatch of losses against naive loops over items and pairs in plain Python."""

import math

import pytest
import torch

from zr.data import Batch
from zr.losses import BradleyTerryLoss, DistillationLoss, GapLoss, ItemLoss, SoftLabelCrossEntropy, SquaredExpectationLoss
from zr.scores import ScoreDistribution, kl_divergence
from zr.stages import Term, objective

BINS = (1.0, 2.0, 3.0, 5.0)
NAN = math.nan
SCORES = [[1.0, NAN], [2.5, 3.0], [NAN, NAN], [5.0, 2.0], [4.0, NAN]]
#        first, second, dimension, share that prefers the first; the third has no score at all, the fourth only one
PAIRS = [(0, 1, 0, 0.0), (3, 1, 1, 0.0), (2, 0, 0, 0.8), (4, 3, 1, 0.3), (1, 3, 0, 0.5)]


class ForwardKL(DistillationLoss):
    def forward(self, student, teacher):
        return kl_divergence(teacher, student)


class Never(ItemLoss):
    def forward(self, prediction, target):
        raise AssertionError("a term of weight 0 was computed")


def make(scores=SCORES, pairs=PAIRS, teacher=None):
    scores = torch.tensor(scores)
    generator = torch.Generator().manual_seed(0)
    votes = torch.randint(0, 3, (*scores.shape, len(BINS)), generator=generator).float()
    votes[..., 0] += 1
    votes[scores.isnan()] = 0
    return Batch(
        images=[torch.zeros(3, 2, 2, dtype=torch.uint8)] * len(scores),
        prompts=["p"] * len(scores),
        keys=[f"r.c{i}" for i in range(len(scores))],
        prompt_index=torch.zeros(len(scores), dtype=torch.int64),
        scores=scores,
        known=~scores.isnan(),
        votes=votes,
        teacher=teacher,
        texts=None,
        pairs=torch.tensor([p[:2] for p in pairs], dtype=torch.int64).reshape(-1, 2),
        pair_dimension=torch.tensor([p[2] for p in pairs], dtype=torch.int64),
        preference=torch.tensor([p[3] for p in pairs]),
    )


@pytest.fixture
def prediction():
    logits = torch.randn(5, 2, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    distribution = ScoreDistribution(logits, BINS)
    distribution.source = logits
    return distribution


def mean(prediction, n, d):
    return sum(p * b for p, b in zip(prediction.probs[n, d].tolist(), BINS, strict=True))


def test_items(prediction):
    batch = make()
    squares, entropies = [], []
    for n in range(5):
        for d in range(2):
            if not math.isnan(SCORES[n][d]):
                squares.append(((mean(prediction, n, d) - SCORES[n][d]) / 4) ** 2)
                votes = batch.votes[n, d].tolist()
                logs = [math.log(p) for p in prediction.probs[n, d].tolist()]
                entropies.append(-sum(v / sum(votes) * q for v, q in zip(votes, logs, strict=True)))
    assert len(squares) == 6
    assert math.isclose(Term(SquaredExpectationLoss())(prediction, batch).item(), sum(squares) / 6, rel_tol=1e-6)
    assert math.isclose(Term(SoftLabelCrossEntropy())(prediction, batch).item(), sum(entropies) / 6, rel_tol=1e-6)


def test_pairs_of_known_scores(prediction):
    gaps = []
    for i, j, d, _ in PAIRS:
        if not (math.isnan(SCORES[i][d]) or math.isnan(SCORES[j][d])):
            gaps.append(abs(mean(prediction, i, d) - mean(prediction, j, d) - SCORES[i][d] + SCORES[j][d]) / 4)
    assert len(gaps) == 3
    assert math.isclose(Term(GapLoss())(prediction, make()).item(), sum(gaps) / 3, rel_tol=1e-6)


def test_pairs_with_choices_alone(prediction):
    """A choice needs no scores, and where there are both the batch's share counts."""
    values = []
    for i, j, d, share in PAIRS:
        p = 1 / (1 + math.exp(mean(prediction, j, d) - mean(prediction, i, d)))
        values.append(-share * math.log(p) - (1 - share) * math.log(1 - p))
    assert math.isclose(Term(BradleyTerryLoss())(prediction, make()).item(), sum(values) / 5, rel_tol=1e-6)
    nothing_scored = make(scores=[[NAN, NAN]] * 5)
    assert math.isclose(Term(BradleyTerryLoss())(prediction, nothing_scored).item(), sum(values) / 5, rel_tol=1e-6)
    assert Term(GapLoss())(prediction, nothing_scored) is None


def test_no_pairs(prediction):
    assert Term(GapLoss())(prediction, make(pairs=[])) is None
    assert Term(BradleyTerryLoss())(prediction, make(pairs=[])) is None
    without_policy = make()
    without_policy.preference = None
    with pytest.raises(ValueError, match=r"GapLoss compares images in pairs: give the data module a pair policy"):
        Term(GapLoss())(prediction, without_policy)


def test_teacher_rows_missing(prediction):
    teacher = torch.randn(5, 2, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64).softmax(-1)
    teacher[0, 0], teacher[2] = 0, 0
    teacher[1, 1] = torch.tensor([0.5, 0, 0.5, 0])
    values = []
    for n, d in [(0, 1), (1, 0), (1, 1), (3, 0), (3, 1), (4, 0), (4, 1)]:
        pairs = zip(teacher[n, d].tolist(), prediction.probs[n, d].tolist(), strict=True)
        values.append(sum(t * math.log(t / q) for t, q in pairs if t))
    found = Term(ForwardKL())(prediction, make(teacher=teacher))
    assert math.isclose(found.item(), sum(values) / 7, rel_tol=1e-6)
    found.backward()
    assert prediction.source.grad.isfinite().all()
    assert not prediction.source.grad[0, 0].any()
    assert not prediction.source.grad[2].any()
    assert Term(ForwardKL())(prediction, make(teacher=torch.zeros(5, 2, 4))) is None
    with pytest.raises(ValueError, match=r"ForwardKL needs a teacher's distributions: name the data module's labeller"):
        Term(ForwardKL())(prediction, make())


def test_unknown_items_get_no_gradient(prediction):
    Term(SquaredExpectationLoss())(prediction, make()).backward()
    moved = prediction.source.grad.abs().sum(-1) > 0
    assert moved.tolist() == (~torch.tensor(SCORES).isnan()).tolist()


def test_weighted_sum(prediction):
    batch = make()
    terms = {
        "mean": Term(SquaredExpectationLoss(), weight=2.0),
        "gap": Term(GapLoss(), weight=0.5),
        "off": Term(Never(), weight=0.0),
    }
    total, values = objective(terms, prediction, batch)
    assert set(values) == {"mean", "gap"}
    assert not any(value.requires_grad for value in values.values())
    assert math.isclose(total.item(), 2 * values["mean"].item() + 0.5 * values["gap"].item(), rel_tol=1e-9)
    grads = [
        torch.autograd.grad(t, prediction.source, retain_graph=True)[0]
        for t in (total, *(terms[n](prediction, batch) for n in values))
    ]
    torch.testing.assert_close(grads[0], 2 * grads[1] + 0.5 * grads[2])


def test_a_term_with_nothing_to_do_is_left_out(prediction):
    total, values = objective({"mean": Term(SquaredExpectationLoss()), "gap": Term(GapLoss())}, prediction, make(pairs=[]))
    assert set(values) == {"mean"}
    assert total.item() == values["mean"].item()


def test_nothing_known_keeps_the_graph(prediction):
    batch = make(scores=[[NAN, NAN]] * 5, pairs=[])
    total, values = objective({"mean": Term(SquaredExpectationLoss()), "gap": Term(GapLoss())}, prediction, batch)
    assert (total.item(), values) == (0.0, {})
    total.backward()
    assert prediction.source.grad is not None
    assert not prediction.source.grad.any()


@pytest.mark.parametrize("weight", [-0.1, NAN])
def test_weights_that_are_refused(weight):
    with pytest.raises(ValueError, match="the weight of a term must be at least 0"):
        Term(GapLoss(), weight=weight)


def test_a_loss_of_no_known_form_is_refused(prediction):
    with pytest.raises((TypeError, ValueError), match="ItemLoss, PairLoss or DistillationLoss"):
        Term(torch.nn.MSELoss())
