"""Best-of-N: what the same reward gains without any training, the baseline that a user tries first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

import torch
from torch import Tensor

from zr.models.aggregation import Aggregation
from zr.models.generators.base import Generator
from zr.models.generators.noise import source
from zr.models.scorer import Scorer

__all__ = ["Best", "BestOf"]

Sources = torch.Generator | Sequence[torch.Generator]
"""Of the noise: one for all prompts, or one for each."""


class Best(NamedTuple):
    """The images that were kept, and why.

    Attributes:
        images: ``(B, 3, H, W)`` in [0, 1].
        number: ``(B,)``, which of the N images each of them was; 0 is the one that the generator alone makes.
        rewards: ``(B, N)`` of all images, in the unit of the aggregation.
    """

    images: Tensor
    number: Tensor
    rewards: Tensor


@dataclass(frozen=True)
class BestOf:
    """Draws N images for each prompt and keeps the one with the largest reward; N times the cost, and no gradient.

    Image 0 is the one that the generator makes from the same randomness, so a comparison with it is paired. The noise of each
    other one depends on where that randomness stood and on its number: with a ``torch.Generator`` for each prompt, no image
    depends on the batch.

    Args:
        generator: what draws; call ``eval()`` on it.
        scorer: what scores; likewise.
        aggregation: makes one number of the dimensions (eq. 20).
        count: N.
        dimensions: which ones are scored; all for None.

    Raises:
        ValueError: fewer than one image, an unknown dimension.

    Reference: Z-Reward (arXiv 2606.09076), eq. (20), for the reward; the selection is rejection sampling with N draws, as in
    Stiennon et al. (arXiv 2009.01325).

    Example:
        >>> from zr.data import shapes
        >>> from zr.models import Minimum
        >>> from zr.models.generators import tiny_flow
        >>> generator = tiny_flow(shapes.vocabulary, steps=1)
        >>> prompts = shapes.prompts("test")[:2]
        >>> best = BestOf(generator, shapes.judge, Minimum(), count=3).search(prompts, torch.Generator().manual_seed(0))
        >>> best.images.shape, best.rewards.shape
        (torch.Size([2, 3, 48, 48]), torch.Size([2, 3]))
        >>> torch.equal(best.number, best.rewards.argmax(1))
        True
    """

    generator: Generator
    scorer: Scorer
    aggregation: Aggregation
    count: int
    dimensions: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"best-of-N needs at least one image for each prompt, got count={self.count}")
        self.scorer.rubric.index(self.dimensions)

    def sample(self, prompts: Sequence[str], generator: Sources | None = None) -> Tensor:
        """The best images of prompts, as :meth:`~zr.models.generators.Generator.sample` gives one; see :meth:`search`."""
        return self.search(prompts, generator).images

    @torch.no_grad()
    def search(self, prompts: Sequence[str], generator: Sources | None = None) -> Best:
        """The best image of each prompt; of equal ones the first.

        Args:
            prompts: B of them.
            generator: of the noise of image 0, on the CPU, from which that of the others follows; one for each prompt, or one
                for all; None for torch's global one.

        Returns:
            B images, their numbers, and the rewards of all.

        Raises:
            ValueError: no prompt, not one generator for each, a scorer that refuses an image, a reward that is NaN.
        """
        first, *others = _draws(torch.default_generator if generator is None else generator, self.count)
        images, reward = self._scored(prompts, first, 0)
        rewards = [reward]
        for number, sources in enumerate(others, start=1):
            found, reward = self._scored(prompts, sources, number)
            better = reward > torch.stack(rewards).amax(0)
            images = torch.where(better.to(images.device)[:, None, None, None], found, images)
            rewards.append(reward)
        table = torch.stack(rewards, 1)
        return Best(images, table.argmax(1), table)

    def _scored(self, prompts: Sequence[str], sources: Sources, number: int) -> tuple[Tensor, Tensor]:
        """Images ``(B, 3, H, W)`` and their rewards ``(B,)``."""
        images = self.generator.sample(prompts=prompts, generator=sources)
        wide = images.to(torch.promote_types(images.dtype, torch.float32))
        reward = self.aggregation(self.scorer(images=wide, prompts=prompts, dimensions=self.dimensions))
        if bool(reward.isnan().any()):
            at = int(reward.isnan().nonzero()[0])
            raise ValueError(f"prompt {at}: the reward of image {number} is NaN: look at what the scorer says of it")
        return images, reward


def _draws(given: Sources, count: int) -> list[Sources]:
    """The sources of each of ``count`` images: the given ones, then those that follow from how they stand now."""
    if isinstance(given, torch.Generator):
        return list(_following(given, count))
    following = [_following(one, count) for one in given]
    return [[row[number] for row in following] for number in range(count)]


def _following(given: torch.Generator, count: int) -> list[torch.Generator]:
    state = blake2b(given.get_state().numpy().tobytes(), digest_size=16).hexdigest()
    return [given, *(source(state, number) for number in range(1, count))]
