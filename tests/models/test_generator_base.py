"""The one loop of all generators, by a network small enough to write down."""

import pytest
import torch
from affine import SIZE, Affine, naive

PROMPTS = ["red ring", "blue", "a green triangle"]


def sources(seeds=(1, 2, 3)):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def noise(seed):
    return torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("stop", [None, 5, 3, 1])
def test_pictures_and_gradients_of_a_plain_loop(stop):
    generator = Affine()
    for count in range((stop or 5) + 1):
        found = generator.sample(PROMPTS, sources(), gradient_steps=count, stop=stop)
        wanted = [naive(generator, p, noise(seed), count, stop or 5)[0] for seed, p in enumerate(PROMPTS, start=1)]
        torch.testing.assert_close(found, torch.cat(wanted), atol=1e-12, rtol=0)
        assert found.requires_grad == (count > 0)
        if count:
            parameters = list(generator.parameters())
            slopes = [torch.autograd.grad(images.square().sum(), parameters) for images in (found, torch.cat(wanted))]
            for one, other in zip(*slopes, strict=True):
                torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-9)


def test_a_picture_with_its_own_noise_is_the_same_alone():
    generator = Affine()
    together = generator.sample(PROMPTS, sources())
    alone = [generator.sample([prompt], [source])[0] for prompt, source in zip(PROMPTS, sources(), strict=True)]
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-12, rtol=0)


def test_what_is_watched():
    generator, seen = Affine(), []
    generator.sample(PROMPTS, sources(), gradient_steps=2, stop=4, watch=lambda x, v, step, c: seen.append((step, x, v, c)))
    assert [step for step, *_ in seen] == [2, 3]
    for step, latents, velocity, conditions in seen:
        torch.testing.assert_close(generator.velocity(latents, step, conditions), velocity)


def test_what_is_refused():
    generator = Affine()
    for said, options in {
        "at least one prompt": {"prompts": []},
        "2 generators for 3 prompts: give one for each, or one for all": {"generator": sources((1, 2))},
        "stop=6: the generator has 5 steps": {"stop": 6},
        "stop=0": {"stop": 0},
        "gradient_steps=4: 3 steps are run, give 0 to 3": {"gradient_steps": 4, "stop": 3},
    }.items():
        with pytest.raises(ValueError, match=said):
            generator.sample(**({"prompts": PROMPTS} | options))
    with pytest.raises(ValueError, match="at least one step, got 0"):
        Affine(steps=0)
