"""Best-of-N against a loop that draws, scores and compares one image at a time."""

import pytest
import torch
from affine import Affine, Linear

from zr.models import Aggregation, Minimum, RiskAverse
from zr.models.generators import BestOf

PROMPTS = ["red ring", "blue", "a green triangle", "a dog"]
MEAN = RiskAverse(deviations=0.0)


class Recorded:
    """A generator that remembers what it drew, and from which randomness."""

    def __init__(self):
        self.inner, self.images = Affine(), []

    def sample(self, prompts, generator=None):
        self.images.append(self.inner.sample(prompts, generator))
        return self.images[-1]


class Undefined(Aggregation):
    """No number for the third image."""

    def forward(self, scores):
        return scores.mean.sum(-1).index_fill(0, torch.tensor([2]), torch.nan)


def sources(seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize("aggregation", [MEAN, Minimum()])
def test_what_is_kept_is_the_largest_of_a_naive_loop(aggregation):
    generator, scorer = Recorded(), Linear()
    best = BestOf(generator, scorer, aggregation, count=4).search(PROMPTS, sources(range(4)))
    assert len(generator.images) == 4
    assert not best.images.requires_grad
    for i, prompt in enumerate(PROMPTS):
        values = []
        for images in generator.images:
            scores = scorer(images[i][None], [prompt]).mean[0].tolist()
            values.append(min(scores) if isinstance(aggregation, Minimum) else sum(scores) / 4)
        kept = max(range(4), key=values.__getitem__)
        assert best.number[i] == kept
        torch.testing.assert_close(best.images[i], generator.images[kept][i], atol=0, rtol=0)
        assert best.rewards[i].tolist() == pytest.approx(values, abs=1e-12)
    assert set(best.number.tolist()) != {0}  # else the loop would prove little
    assert len({tuple(image.flatten().tolist()) for images in generator.images for image in images}) == 16


@pytest.mark.parametrize("seeds", [None, 7, [3, 4, 5, 6]])
def test_image_0_is_the_generators_own(seeds):
    generator, results = Affine(), []
    for draw in (generator.sample, BestOf(generator, Linear(), MEAN, count=1).sample):
        given = sources(seeds) if isinstance(seeds, list) else sources([seeds])[0] if seeds else None
        torch.manual_seed(1)
        results.append(draw(prompts=PROMPTS, generator=given).detach())
    torch.testing.assert_close(*results, atol=0, rtol=0)


def test_an_image_does_not_depend_on_the_batch():
    best = BestOf(Affine(), Linear(), MEAN, count=5)
    together = best.search(PROMPTS, sources(range(4)))
    for i, prompt in enumerate(PROMPTS):
        alone = best.search([prompt], sources([i]))
        torch.testing.assert_close(together.images[i], alone.images[0], atol=1e-12, rtol=0)
        torch.testing.assert_close(together.rewards[i], alone.rewards[0], atol=1e-12, rtol=0)


def test_more_images_keep_those_that_were_there():
    few, many = (BestOf(Affine(), Linear(), MEAN, count=n).search(PROMPTS, sources(range(4))) for n in (2, 6))
    torch.testing.assert_close(many.rewards[:, :2], few.rewards, atol=0, rtol=0)
    assert (many.rewards.amax(1) >= few.rewards.amax(1)).all()


def test_one_source_for_all_gives_new_images_at_each_call():
    best, drawn = BestOf(Affine(), Linear(), MEAN, count=3), torch.Generator().manual_seed(0)
    first, second = (best.search(PROMPTS, drawn) for _ in range(2))
    assert not set(first.rewards.flatten().tolist()) & set(second.rewards.flatten().tolist())


def test_only_the_chosen_dimensions_count():
    rewards = BestOf(Affine(), Linear(), MEAN, count=2, dimensions=["realism"]).search(PROMPTS, sources(range(4))).rewards
    wanted = Linear()(Affine().sample(PROMPTS, sources(range(4))).detach(), PROMPTS, ["realism"]).mean[:, 0]
    torch.testing.assert_close(rewards[:, 0], wanted)


def test_equal_rewards_keep_the_first():
    generator = Recorded()
    best = BestOf(generator, Linear(scale=0.0), MEAN, count=3).search(PROMPTS, sources(range(4)))
    assert best.number.tolist() == [0] * 4
    torch.testing.assert_close(best.images, generator.images[0].detach(), atol=0, rtol=0)


def test_what_is_refused():
    with pytest.raises(ValueError, match="at least one image for each prompt, got count=0"):
        BestOf(Affine(), Linear(), MEAN, count=0)
    with pytest.raises(ValueError, match="charm"):
        BestOf(Affine(), Linear(), MEAN, count=2, dimensions=["charm"])
    with pytest.raises(ValueError, match="2 generators for 4 prompts"):
        BestOf(Affine(), Linear(), MEAN, count=2).sample(PROMPTS, sources(range(2)))
    with pytest.raises(ValueError, match="at least one prompt"):
        BestOf(Affine(), Linear(), MEAN, count=2).sample([], [])
    with pytest.raises(ValueError, match="prompt 2: the reward of image 0 is NaN"):
        BestOf(Affine(), Linear(), Undefined(), count=2).sample(PROMPTS, sources(range(4)))
