import math

import pytest
import torch
from torch.autograd import gradcheck
from torch.distributions import Categorical
from torch.distributions import kl_divergence as torch_kl

from zr.losses import DistillationLoss, ForwardKL, JensenShannon, ReverseKL, forward_kl, jensen_shannon, reverse_kl
from zr.scores import ScoreDistribution

BINS = (1.0, 1.25, 2.0, 3.5, 10.0)
STUDENT = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TEACHER = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
FUNCTIONS = {ForwardKL: forward_kl, ReverseKL: reverse_kl, JensenShannon: jensen_shannon}
every = pytest.mark.parametrize("loss", FUNCTIONS, ids=lambda loss: loss.__name__)


def naive(loss, student, teacher, temperature):
    """The definition, one bin after the other."""
    p, q = ([math.exp(x / temperature) for x in row] for row in (teacher, student))
    p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
    mixture = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    pairs = {ForwardKL: [(p, q)], ReverseKL: [(q, p)], JensenShannon: [(p, mixture), (q, mixture)]}[loss]
    each = [sum(a * math.log(a / b) for a, b in zip(*pair, strict=True)) for pair in pairs]
    return temperature**2 * sum(each) / len(each)


@every
@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
def test_naive_loop(loss, temperature):
    value = loss(temperature)(ScoreDistribution(STUDENT, BINS), ScoreDistribution(TEACHER, BINS))
    assert value.shape == (4, 3)
    for i in range(4):
        for j in range(3):
            expected = naive(loss, STUDENT[i, j].tolist(), TEACHER[i, j].tolist(), temperature)
            assert value[i, j].item() == pytest.approx(expected)


def test_torch_agrees():
    student, teacher = ScoreDistribution(STUDENT, BINS), ScoreDistribution(TEACHER, BINS)
    p, q = Categorical(logits=TEACHER), Categorical(logits=STUDENT)
    torch.testing.assert_close(forward_kl(student, teacher), torch_kl(p, q))
    torch.testing.assert_close(reverse_kl(student, teacher), torch_kl(q, p))
    mixture = Categorical(probs=(p.probs + q.probs) / 2)
    torch.testing.assert_close(jensen_shannon(student, teacher), (torch_kl(p, mixture) + torch_kl(q, mixture)) / 2)


def test_numbers_by_hand():
    half, quarter = (ScoreDistribution(torch.tensor([p, 1 - p]).log(), (1.0, 5.0)) for p in (0.5, 0.25))
    assert forward_kl(half, quarter).item() == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    assert reverse_kl(half, quarter).item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))


@every
def test_least_where_both_agree(loss):
    logits = STUDENT.clone().requires_grad_()
    value = loss(2.0)(ScoreDistribution(logits + 5.0, BINS), ScoreDistribution(STUDENT, BINS))  # logits are up to a constant
    assert value.abs().max() < 1e-12
    value.sum().backward()
    assert logits.grad.abs().max() < 1e-12
    assert (loss()(ScoreDistribution(STUDENT, BINS), ScoreDistribution(TEACHER, BINS)) > 0).all()


@every
def test_gradients_go_to_the_student_alone(loss):
    teacher = TEACHER.clone().requires_grad_()
    student = STUDENT.clone().requires_grad_()
    function = FUNCTIONS[loss]
    assert gradcheck(lambda x: function(ScoreDistribution(x, BINS), ScoreDistribution(TEACHER, BINS), 1.7), student)
    loss()(ScoreDistribution(student, BINS), ScoreDistribution(teacher, BINS)).sum().backward()
    assert teacher.grad is None


def test_the_gradient_keeps_its_size_at_any_temperature():
    sizes = []
    for temperature in (50.0, 100.0):
        student = STUDENT.clone().requires_grad_()
        forward_kl(ScoreDistribution(student, BINS), ScoreDistribution(TEACHER, BINS), temperature).sum().backward()
        sizes.append(student.grad)
    torch.testing.assert_close(sizes[0], sizes[1], rtol=0.05, atol=1e-2)
    centred = (STUDENT - STUDENT.mean(-1, keepdim=True)) - (TEACHER - TEACHER.mean(-1, keepdim=True))
    torch.testing.assert_close(sizes[1], centred / 5, rtol=0.1, atol=1e-2)  # Hinton et al., eq. (4)


def test_jensen_shannon_is_symmetric_and_bounded():
    student, teacher = ScoreDistribution(STUDENT, BINS), ScoreDistribution(TEACHER, BINS)
    torch.testing.assert_close(jensen_shannon(student, teacher), jensen_shannon(teacher, student))
    logits = torch.tensor([0.0, -torch.inf, -torch.inf], requires_grad=True)
    apart = jensen_shannon(ScoreDistribution(logits, BINS[:3]), ScoreDistribution(logits.detach().roll(1), BINS[:3]))
    assert apart.item() == pytest.approx(math.log(2))
    apart.backward()
    assert logits.grad.isfinite().all()


@every
@pytest.mark.parametrize(("scale", "dtype"), [(1.0, torch.bfloat16), (1e4, torch.float32)], ids=["bfloat16", "extreme"])
def test_values_and_gradients_are_finite(loss, scale, dtype):
    student, teacher = (scale * STUDENT).to(dtype).requires_grad_(), (scale * TEACHER).to(dtype)
    value = loss()(ScoreDistribution(student, BINS), ScoreDistribution(teacher, BINS))
    assert value.dtype == torch.float32
    assert value.isfinite().all()
    value.sum().backward()
    assert student.grad.isfinite().all()


def test_a_teacher_without_a_bin():
    student = torch.zeros(2, 3, requires_grad=True)
    teacher = ScoreDistribution(torch.tensor([[0.2, 0.3, 0.5], [0.5, 0.5, 0.0]]).log(), BINS[:3])
    for loss in (ForwardKL(), JensenShannon()):
        student.grad = None
        loss(ScoreDistribution(student, BINS[:3]), teacher).sum().backward()
        assert student.grad.isfinite().all()
    with pytest.raises(ValueError, match=r"1 of 2 teacher distributions .* \(first at index \[1\]\).* use ForwardKL"):
        ReverseKL()(ScoreDistribution(student, BINS[:3]), teacher)


@every
def test_errors(loss):
    student, teacher = ScoreDistribution(STUDENT, BINS), ScoreDistribution(TEACHER, BINS)
    assert issubclass(loss, DistillationLoss)
    with pytest.raises(ValueError, match=r"the teacher's logits must have the shape \(4, 3, 5\), got \(3, 5\)"):
        loss()(student, teacher[0])
    for temperature in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="temperature must be positive and finite"):
            loss(temperature)
        with pytest.raises(ValueError, match="temperature must be positive and finite"):
            FUNCTIONS[loss](student, teacher, temperature)
    with pytest.raises(ValueError, match="one scale"):
        FUNCTIONS[loss](student, ScoreDistribution(TEACHER, [2 * s for s in BINS]))
    assert repr(loss(2.0)) == f"{loss.__name__}(temperature=2)"
