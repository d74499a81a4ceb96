"""Classifier-free guidance: how the velocities with and without the prompt become one, and where the gradient goes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["DetachedGuidance", "FullGuidance", "Guidance"]


class Guidance(ABC):
    r"""Velocities :math:`v_\emptyset + w (v_p - v_\emptyset)`: two passes of the transformer for each step.

    Args:
        scale: w; 1 is the prompt's own velocity, 0 that without a prompt, more than 1 exaggerates the prompt.

    Raises:
        ValueError: a negative scale.

    Reference: Ho and Salimans, classifier-free guidance (arXiv 2207.12598).
    """

    def __init__(self, scale: float) -> None:
        if not scale >= 0:
            raise ValueError(f"the scale of guidance must be at least 0, got {scale}")
        self.scale = scale

    @abstractmethod
    def __call__(self, velocity: Callable[[Any], Tensor], prompt: Any, empty: Any) -> Tensor:
        """The guided velocity.

        Args:
            velocity: tells it under a condition.
            prompt: the condition of the prompts.
            empty: that of no prompt.
        """

    def __repr__(self) -> str:
        return f"{type(self).__name__}(scale={self.scale:g})"


class FullGuidance(Guidance):
    """The gradient goes through both velocities: that of what is sampled. A step costs two forward and two backward passes.

    Example:
        >>> FullGuidance(scale=3.0)(lambda condition: torch.tensor(condition), prompt=2.0, empty=1.5)
        tensor(3.)
    """

    def __call__(self, velocity: Callable[[Any], Tensor], prompt: Any, empty: Any) -> Tensor:
        """See :class:`Guidance`."""
        without = velocity(empty)
        return without + self.scale * (velocity(prompt) - without)


class DetachedGuidance(Guidance):
    """The gradient goes through the prompt's velocity alone, ``scale`` times: two forward passes, one backward.

    It lacks the part of the velocity without a prompt, which is ``1 - scale`` times that one's gradient.

    Example:
        >>> p = torch.tensor(2.0, requires_grad=True)
        >>> guided = DetachedGuidance(scale=3.0)(lambda condition: p * condition, prompt=1.0, empty=0.5)
        >>> guided.item(), torch.autograd.grad(guided, p)[0].item()                    # 1 + 3 * (2 - 1); 3 * 1
        (4.0, 3.0)
    """

    def __call__(self, velocity: Callable[[Any], Tensor], prompt: Any, empty: Any) -> Tensor:
        """See :class:`Guidance`."""
        with torch.no_grad():
            without = velocity(empty)
        return without + self.scale * (velocity(prompt) - without)
