import inspect

import pytest
import torch
from torch import nn

import zr.losses
from zr.losses import AbsoluteExpectationLoss, BradleyTerryLoss, DistillationLoss, GapLoss, ItemLoss, PairLoss, ScoreTarget
from zr.scores import ScoreDistribution, kl_divergence

BINS = (1.0, 2.0, 5.0)
CLASSES = {name: part for name, part in vars(zr.losses).items() if inspect.isclass(part) and issubclass(part, nn.Module)}
ITEM = {name: part for name, part in CLASSES.items() if issubclass(part, ItemLoss) and part is not ItemLoss}
PAIR = {name: part for name, part in CLASSES.items() if issubclass(part, PairLoss) and part is not PairLoss}
nan = float("nan")


def draw(*shape, dtype=torch.float32, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, len(BINS), generator=generator, dtype=dtype)


def target(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    score = torch.tensor(BINS)[torch.randint(len(BINS), shape, generator=generator)]
    return ScoreTarget.from_scores(score, votes=torch.randint(1, 4, (*shape, len(BINS)), generator=generator))


def test_inventory():
    assert sorted(ITEM) == [
        "AbsoluteExpectationLoss",
        "BinCrossEntropy",
        "InterpolatedCrossEntropy",
        "RankedProbabilityLoss",
        "SoftLabelCrossEntropy",
        "SquaredExpectationLoss",
        "TiltedGaussianCrossEntropy",
        "VotesRankedProbabilityLoss",
    ]
    assert sorted(PAIR) == ["BradleyTerryLoss", "FidelityLoss", "GapLoss"]
    assert all(name in zr.losses.__all__ for name in CLASSES)


@pytest.mark.parametrize("loss", ITEM.values(), ids=ITEM)
@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (0,)])
def test_item_losses_give_one_value_per_item(loss, shape):
    logits, labels = draw(*shape), target(*shape)
    value = loss()(ScoreDistribution(logits, BINS), labels)
    assert value.shape == shape
    assert (value >= 0).all()
    if shape == (4,):  # the same item alone, and by keyword
        alone = loss()(prediction=ScoreDistribution(logits[2], BINS), target=labels[2])
        torch.testing.assert_close(value[2], alone)


@pytest.mark.parametrize("loss", PAIR.values(), ids=PAIR)
@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (0,)])
@pytest.mark.parametrize("group", [1, 3])
def test_pair_losses_give_one_value_per_pair(loss, shape, group):
    logits, labels = draw(*shape, 2, group), target(*shape, 2)
    value = loss()(ScoreDistribution(logits, BINS), labels)
    assert value.shape == shape
    assert (value >= 0).all()
    if shape == (4,):
        alone = loss()(prediction=ScoreDistribution(logits[2], BINS), target=labels[2])
        torch.testing.assert_close(value[2], alone)


@pytest.mark.parametrize("loss", (ITEM | PAIR).values(), ids=ITEM | PAIR)
@pytest.mark.parametrize(("scale", "dtype"), [(1.0, torch.bfloat16), (1e4, torch.float32)], ids=["bfloat16", "extreme"])
def test_values_and_gradients_are_finite(loss, scale, dtype):
    shape = (5, 2, 3) if issubclass(loss, PairLoss) else (5,)
    logits = draw(*shape, scale=scale).to(dtype).requires_grad_()
    value = loss()(ScoreDistribution(logits, BINS), target(*shape[:2]))
    assert value.dtype == torch.float32
    assert value.isfinite().all()
    value.sum().backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("loss", ITEM.values(), ids=ITEM)
def test_wrong_items_are_refused(loss):
    prediction = ScoreDistribution(draw(3), BINS)
    with pytest.raises(ValueError, match=r"target.score must have the shape \(3,\), got \(1,\)"):
        loss()(prediction, target(1))
    unknown = ScoreTarget.from_scores(torch.tensor([1.0, nan, nan]))
    with pytest.raises(ValueError, match=r"2 of 3 scores are unknown \(first at index \[1\]\): select the known ones"):
        loss()(prediction, unknown)


@pytest.mark.parametrize("loss", PAIR.values(), ids=PAIR)
def test_wrong_pairs_are_refused(loss):
    with pytest.raises(ValueError, match=r"batch shape \(..., 2, G\), .* got \(3, 2\)"):
        loss()(ScoreDistribution(draw(3, 2), BINS), target(3, 2))
    with pytest.raises(ValueError, match=r"batch shape \(..., 2, G\), .* got \(2, 0\)"):
        loss()(ScoreDistribution(draw(2, 0), BINS), target(2))
    with pytest.raises(ValueError, match=r"target.score must have the shape \(3, 2\), got \(3,\)"):
        loss()(ScoreDistribution(draw(3, 2, 1), BINS), target(3))
    with pytest.raises(ValueError, match=r"1 of 2 scores are unknown|1 of 1 pairs have neither"):
        loss()(ScoreDistribution(draw(1, 2, 1), BINS), ScoreTarget.from_scores(torch.tensor([[1.0, nan]])))


def test_the_known_items_are_selected():
    logits = draw(4)
    labels = ScoreTarget.from_scores(torch.tensor([1.0, nan, 4.0, nan]))
    leaf = logits.clone().requires_grad_()
    value = AbsoluteExpectationLoss()(ScoreDistribution(leaf, BINS)[labels.known], labels[labels.known])
    value.sum().backward()
    assert value.shape == (2,)
    assert (leaf.grad[1] == 0).all()
    assert leaf.grad.isfinite().all()


def test_base_classes_are_abstract():
    for base in (ItemLoss, PairLoss, DistillationLoss):
        with pytest.raises(TypeError, match="abstract"):
            base()


def test_a_reduced_value_is_refused():
    class Reduced(ItemLoss):
        def forward(self, prediction, target):
            return prediction.mean.sum()

    class ReducedPair(PairLoss):
        def forward(self, prediction, target):
            return prediction.mean.mean(-1)

    with pytest.raises(ValueError, match=r"the value of Reduced must have the shape \(3,\), got \(\)"):
        Reduced()(ScoreDistribution(draw(3), BINS), target(3))
    with pytest.raises(ValueError, match=r"the value of ReducedPair must have the shape \(3,\), got \(3, 2\)"):
        ReducedPair()(ScoreDistribution(draw(3, 2, 1), BINS), target(3, 2))


def test_distillation_form():
    class Divergence(DistillationLoss):
        def forward(self, student, teacher):
            return kl_divergence(teacher, student)

    student, teacher = ScoreDistribution(draw(3), BINS), ScoreDistribution(draw(3, seed=1), BINS)
    torch.testing.assert_close(Divergence()(student=student, teacher=teacher), kl_divergence(teacher, student))
    with pytest.raises(ValueError, match=r"the teacher's logits must have the shape \(3, 3\), got \(2, 3\)"):
        Divergence()(student, teacher[:2])
    with pytest.raises(ValueError, match=r"need one scale: bins \[1.0, 2.0, 5.0\] and \[1.0, 3.0, 5.0\]"):
        Divergence()(student, ScoreDistribution(draw(3), (1.0, 3.0, 5.0)))


def test_hooks_and_keywords_reach_a_loss():
    seen = []
    loss = GapLoss()
    loss.register_forward_hook(lambda module, args, value: seen.append(value.shape))
    loss(ScoreDistribution(draw(3, 2, 1), BINS), target(3, 2))
    assert seen == [(3,)]


def test_target_shapes():
    score, known = torch.zeros(3, 2), torch.ones(3, 2, dtype=torch.bool)
    for wrong, text in (
        ({"known": known[:2]}, r"known must have the shape \(3, 2\), got \(2, 2\)"),
        ({"known": known.float()}, "known must be a bool tensor, got torch.float32"),
        ({"votes": torch.zeros(3, 9)}, r"votes without its last axis must have the shape \(3, 2\), got \(3,\)"),
        ({"variance": torch.zeros(3)}, r"variance must have the shape \(3, 2\), got \(3,\)"),
        ({"preference": torch.zeros(3, 2)}, r"preference must have the shape \(3,\), got \(3, 2\)"),
    ):
        with pytest.raises(ValueError, match=text):
            ScoreTarget(**{"score": score, "known": known, **wrong})
    with pytest.raises(ValueError, match=r"between two items: score must be \(..., 2\), got \(3,\)"):
        ScoreTarget(torch.zeros(3), torch.ones(3, dtype=torch.bool), preference=torch.tensor(0.5))


def test_target_selection():
    labels = ScoreTarget(
        score=torch.arange(6.0).reshape(3, 2),
        known=torch.tensor([[True, True], [False, True], [True, True]]),
        votes=torch.arange(18).reshape(3, 2, 3),
        variance=torch.arange(6.0).reshape(3, 2) / 10,
        preference=torch.tensor([0.0, 0.5, 1.0]),
    )
    for index in (labels.known.all(-1), torch.tensor([0, 2]), slice(None, None, 2)):
        part = labels[index]
        assert part.score.tolist() == [[0.0, 1.0], [4.0, 5.0]]
        assert part.votes[:, 0, 0].tolist() == [0, 12]
        torch.testing.assert_close(part.variance, torch.tensor([[0.0, 0.1], [0.4, 0.5]]))
        assert part.preference.tolist() == [0.0, 1.0]
    choice = ScoreTarget.from_preference(torch.tensor([0.25, 1.0]))
    assert choice.score.shape == (2, 2)
    assert not choice.known.any()
    assert BradleyTerryLoss()(ScoreDistribution(draw(2, 2, 1), BINS), choice).shape == (2,)
