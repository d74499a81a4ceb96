import pytest
import torch

from zr.losses import flow_matching_loss, on_the_way


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_way_is_straight_from_noise_to_picture():
    noise, clean = draw(5, 3, 2, 2), draw(5, 3, 2, 2, seed=1)
    time = torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0], dtype=torch.float64)
    found = on_the_way(noise, clean, time)
    for i, t in enumerate(time.tolist()):
        torch.testing.assert_close(found[i], (1 - t) * noise[i] + t * clean[i], rtol=1e-12, atol=1e-12)
    later = on_the_way(noise, clean, time.clamp(max=0.5) + 0.25)
    velocity = (later - on_the_way(noise, clean, time.clamp(max=0.5))) / 0.25
    torch.testing.assert_close(velocity, clean - noise, rtol=1e-10, atol=1e-10)
    assert float(flow_matching_loss(velocity, noise, clean).max()) < 1e-20


def test_loss_against_a_loop():
    velocity, noise, clean = draw(3, 2, 4), draw(3, 2, 4, seed=1), draw(3, 2, 4, seed=2)
    found = flow_matching_loss(velocity, noise, clean)
    for i in range(3):
        errors = [float(velocity[i, j, k] - clean[i, j, k] + noise[i, j, k]) ** 2 for j in range(2) for k in range(4)]
        assert found[i].item() == pytest.approx(sum(errors) / 8, abs=1e-12)


def test_the_best_single_velocity_is_the_mean_of_those_of_the_noise():
    noise, clean = draw(400, 3), draw(1, 3, seed=1).expand(400, 3)
    velocity = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    flow_matching_loss(velocity.expand(400, 3), noise, clean).mean().backward()
    torch.testing.assert_close(velocity.grad, -2 / 3 * (clean - noise).mean(0), rtol=1e-10, atol=1e-12)


def test_gradcheck():
    velocity = draw(2, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: flow_matching_loss(v, draw(2, 3, seed=1), draw(2, 3, seed=2)), (velocity,))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: flow_matching_loss(draw(2, 3), draw(2, 1), draw(2, 3)), r"noise must have the shape \(2, 3\), got \(2, 1\)"),
        (lambda: flow_matching_loss(draw(3), draw(2, 3), draw(2, 3)), r"velocity must have the shape \(2, 3\), got \(3,\)"),
        (lambda: on_the_way(draw(2, 3), draw(2, 3), draw(1)), r"time must have the shape \(2,\), got \(1,\)"),
        (lambda: on_the_way(draw(2, 3), draw(1, 3), draw(2)), r"clean must have the shape \(2, 3\), got \(1, 3\)"),
    ],
)
def test_nothing_is_broadcast(call, message):
    with pytest.raises(ValueError, match=message):
        call()
