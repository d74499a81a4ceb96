import pytest
import torch

from zr.models.generators import DetachedGuidance, FullGuidance

KINDS = pytest.mark.parametrize("kind", [FullGuidance, DetachedGuidance])


class Counted:
    """A velocity ``a * condition ** 2`` that counts its passes with a gradient and without."""

    def __init__(self) -> None:
        self.a = torch.tensor([1.5, -0.5], dtype=torch.float64, requires_grad=True)
        self.passes = []

    def __call__(self, condition: float) -> torch.Tensor:
        self.passes.append(torch.is_grad_enabled())
        return self.a * condition**2


@KINDS
@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_value_and_gradient_by_hand(kind, scale):
    velocity = Counted()
    guided = kind(scale)(velocity, prompt=3.0, empty=2.0)
    expected = [a * (4 + scale * (9 - 4)) for a in (1.5, -0.5)]
    assert guided.tolist() == pytest.approx(expected)
    guided.sum().backward()
    through = 4 + scale * (9 - 4) if kind is FullGuidance else scale * 9
    assert velocity.a.grad.tolist() == pytest.approx([through, through])


def test_gradcheck():
    weight = torch.randn(2, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    latents = torch.tensor([0.5, -0.3, 0.8], dtype=torch.float64, requires_grad=True)

    def guided(weight, latents):
        return FullGuidance(2.5)(lambda condition: (weight[condition] @ latents).tanh(), prompt=0, empty=1)

    assert torch.autograd.gradcheck(guided, (weight, latents))


def test_cost():
    for kind, backward in ((FullGuidance, 2), (DetachedGuidance, 1)):
        velocity = Counted()
        kind(2.0)(velocity, prompt=3.0, empty=2.0)
        assert (len(velocity.passes), sum(velocity.passes)) == (2, backward)


@KINDS
def test_a_negative_scale_is_refused(kind):
    for scale in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="the scale of guidance must be at least 0"):
            kind(scale)
    assert repr(kind(2.0)) == f"{kind.__name__}(scale=2)"
