"""Which denoising steps a reward's gradient passes through: one drawn step, the last K, a drawn number of the last ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

__all__ = ["GradientPath", "LastSteps", "RandomTruncation", "ReFL"]


class GradientPath(ABC):
    """Says for each update how many steps are run, and how many of the last ones of these carry gradient."""

    @abstractmethod
    def check(self, steps: int) -> None:
        """Raise a ValueError unless the path can be had from a generator of so many ``steps``."""

    @abstractmethod
    def draw(self, steps: int, generator: torch.Generator) -> tuple[int, int]:
        """``gradient_steps`` and ``stop`` of :meth:`zr.models.generators.base.Generator.sample`."""


@dataclass(frozen=True)
class ReFL(GradientPath):
    """One step, drawn from a range; the reward sees the clean image that it predicts. The steps after it are saved.

    An early step decides on the layout, and the paper extends the range to these; its clean image is blurred, and a reward
    model that never saw such images may misjudge it.

    Args:
        earliest: the first step that may be drawn, counted from 1.
        latest: the last one; the generator's number of steps for the finished image.

    Raises:
        ValueError: a range that is empty or begins before 1.

    Reference: ImageReward (arXiv 2304.05977), Algorithm 1.

    Example:
        >>> ReFL(earliest=3, latest=3).draw(10, torch.Generator())
        (1, 3)
    """

    earliest: int
    latest: int

    def __post_init__(self) -> None:
        if not 1 <= self.earliest <= self.latest:
            raise ValueError(f"{self} draws no step: give 1 <= earliest <= latest")

    def check(self, steps: int) -> None:
        """See :class:`GradientPath`."""
        _check(self, self.latest, steps)

    def draw(self, steps: int, generator: torch.Generator) -> tuple[int, int]:
        """One step with gradient, and its number."""
        return 1, int(torch.randint(self.earliest, self.latest + 1, (), generator=generator))


@dataclass(frozen=True)
class LastSteps(GradientPath):
    """The last K steps of all; memory and time of the backward pass grow with K.

    Args:
        count: K.

    Raises:
        ValueError: K below 1.

    Reference: DRaFT-K (arXiv 2309.17400), section 3.2.

    Example:
        >>> LastSteps(2).draw(10, torch.Generator())
        (2, 10)
    """

    count: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"{self} has no step with gradient: give a count of at least 1")

    def check(self, steps: int) -> None:
        """See :class:`GradientPath`."""
        _check(self, self.count, steps)

    def draw(self, steps: int, generator: torch.Generator) -> tuple[int, int]:
        """K, and all steps."""
        return self.count, steps


@dataclass(frozen=True)
class RandomTruncation(GradientPath):
    """The last K steps of all, K drawn anew for each update from 1 to ``most``, each as likely.

    Args:
        most: the largest K.

    Raises:
        ValueError: a largest K below 1.

    Reference: AlignProp (arXiv 2310.03739), section 4.

    Example:
        >>> RandomTruncation(1).draw(10, torch.Generator())
        (1, 10)
    """

    most: int

    def __post_init__(self) -> None:
        if self.most < 1:
            raise ValueError(f"{self} has no step with gradient: give a largest K of at least 1")

    def check(self, steps: int) -> None:
        """See :class:`GradientPath`."""
        _check(self, self.most, steps)

    def draw(self, steps: int, generator: torch.Generator) -> tuple[int, int]:
        """The drawn K, and all steps."""
        return int(torch.randint(1, self.most + 1, (), generator=generator)), steps


def _check(path: GradientPath, wanted: int, steps: int) -> None:
    if wanted > steps:
        raise ValueError(f"{path} wants {wanted} steps, the generator has {steps}: give at most {steps}, or more steps to it")
