"""A generator as it was: against a copy of it."""

import copy

import pytest
import torch
from affine import PIXELS, SIZE, Affine

from zr.stages.starting_generator import StartingGenerator


def changed(generator):
    with torch.no_grad():
        for p in generator.parameters():
            p.mul_(1.1)
    return generator


def test_it_stands_in_for_a_while_and_leaves_no_trace():
    generator = Affine()
    start, plain = StartingGenerator(generator), copy.deepcopy(generator)
    parameters = list(changed(generator).parameters())
    latents, conditions = torch.randn(2, 3, SIZE, SIZE, dtype=torch.float64), generator.condition(["a", "bcd"])
    now, was = (g.velocity(latents, 1, conditions) for g in (generator, plain))
    with torch.inference_mode(), start.standing_in():
        torch.testing.assert_close(generator.velocity(latents, 1, conditions), was.detach(), atol=0, rtol=0)
    with pytest.raises(KeyError), start.standing_in():
        raise KeyError
    assert all(a is b for a, b in zip(generator.parameters(), parameters, strict=True))
    torch.testing.assert_close(generator.velocity(latents, 1, conditions), now, atol=0, rtol=0)
    assert not torch.allclose(now, was)


def test_only_what_is_trained_is_kept_and_shared_weights_once():
    generator = Affine()
    generator.word.requires_grad_(False)
    generator.again = torch.nn.Linear(PIXELS, PIXELS, dtype=torch.float64)
    generator.again.weight = generator.mix.weight
    generator.again.bias = None
    start = StartingGenerator(generator)
    assert start.names == ["mix.weight", "mix.bias"]
    was = generator.mix.weight.detach().clone()
    changed(generator)
    with start.standing_in():
        assert generator.again.weight is generator.mix.weight
        torch.testing.assert_close(generator.again.weight.data, was, atol=0, rtol=0)


def test_the_distance_and_its_gradient_are_those_of_a_copy():
    """Through two steps, so that the latents of the second depend on the weights; and twice, in either order."""
    generator = Affine()
    start, plain = StartingGenerator(generator), copy.deepcopy(generator).requires_grad_(False)
    changed(generator)
    conditions, noise = generator.condition(["a", "bcd"]), torch.randn(2, 3, SIZE, SIZE, dtype=torch.float64)

    def distances(of_start):
        latents, found = noise, []
        for step in range(2):
            velocity = generator.velocity(latents, step, conditions)
            found.append(of_start(latents, velocity, step))
            latents = generator.advance(latents, velocity, step)
        return torch.stack(found)

    def by_copy(latents, velocity, step):
        far = velocity - plain.velocity(latents, step, conditions)
        return torch.stack([(row**2).sum() / PIXELS for row in far])

    found, wanted = distances(lambda x, v, step: start.distance(x, v, step, conditions)), distances(by_copy)
    assert found.shape == (2, 2)
    assert wanted.min() > 1e-5
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)
    for weights in (torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0.0, 0.0], [1.0, 1.0]])):
        slopes = [torch.autograd.grad((f * weights).sum(), generator.parameters(), retain_graph=True) for f in (found, wanted)]
        for one, other in zip(*slopes, strict=True):
            torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-9)


def test_at_the_start_it_is_zero():
    generator = Affine()
    start, conditions = StartingGenerator(generator), generator.condition(["a"])
    latents = torch.randn(1, 3, SIZE, SIZE, dtype=torch.float64)
    assert start.distance(latents, generator.velocity(latents, 0, conditions), 0, conditions).tolist() == [0.0]
